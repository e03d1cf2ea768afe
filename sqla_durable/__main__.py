"""`python -m sqla_durable`: the same as the console script `sqla-durable`."""

from sqla_durable.tools.cli import main

if __name__ == "__main__":
    main()
