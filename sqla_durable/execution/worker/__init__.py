"""The worker: the process that claims workflows and executes them.

`worker` is what its callers see, `settings` what it may be given, `serving` what it does for a database · `claims`
fills its slots · `attempts` executes what was claimed · `recorder` records what an attempt decides, by the `writer`
· `heartbeat` extends the lease · `maintenance` polls · `hints` wakes these loops · `database` executes its statements.
"""

from sqla_durable.execution.worker.worker import Worker

__all__ = ["Worker"]
