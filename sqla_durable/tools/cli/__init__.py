"""The command line: `sqla-durable`, or `python -m sqla_durable`; of the extra `cli`.

`application` registers the commands. Those that read: `listing`, `showing`, `watching`, with their queries in
`reading`, `details` and `recent`; `doctor`, `metrics`. Those that change: `verbs`, `sending`, `queueing`, `scheduling`,
`migrating`, `prune`, `roles`; `exporting` writes a file. They share `choosing` (the loop over workflows), `acting`
(who, why, and the row of the audit log), `filters`, `groups`, `database`, `output` and `errors`. For workers:
`worker`, `target`, `supervisor`, `supervised`, `health`. `bench` and `torture` are commands of tools beside.
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
