"""The command line: `sqla-durable`, or `python -m sqla_durable`.

`application` is the whole of it and turns errors into messages · one module for each verb, such as `worker` ·
`target` imports what `module:attribute` names · `database` makes sessionmakers of a URL · `errors` its own errors.
"""

from sqla_durable.cli.application import app, main

__all__ = ["app", "main"]
