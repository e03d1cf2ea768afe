"""The command line: `sqla-durable`, or `python -m sqla_durable`; of the extra `cli`.

`application` has all of it · `worker`, `bench` and `torture` are its commands, and those in `listing`, `showing` and
`watching`, which read; their queries are in `reading`, `details` and `recent` · `errors` turns errors into messages ·
`target` imports the `Durable` object that a command line names, and connects to its database · `supervisor` starts
`application` has all of it · `worker`, `bench` and `torture` are its commands · `errors` turns errors into messages ·
`verbs`, `sending`, `queueing`, `scheduling`, `exporting` and `migrating` are those that change something · `choosing`
has the loop over workflows, `acting` who does it and why, `groups`, `filters`, `database` and `output` what they share
· `target` imports the `Durable` object that a command line names, and connects to its database · `supervisor` starts
worker processes and replaces them, `supervised` connects each of them to it.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process and exit.

    Raises:
        SystemExit: always, with the exit code; 2 where typer is not installed.
    """
    if find_spec("typer") is None:
        print("sqla-durable: the command line is an extra: pip install 'sqla-durable[cli]'.", file=sys.stderr)
        raise SystemExit(2)
    from sqla_durable.tools.cli.application import main as run

    run()
