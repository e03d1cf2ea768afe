"""The worker: the process that claims workflows and executes them.

`worker` is the whole of it · `claims` keeps its slots filled · `attempts` executes what was claimed · `writer` commits
what all of them record · `heartbeat` holds the lease · `database` and `threads` say where statements and sync code run.
"""

from sqla_durable.worker.worker import Worker

__all__ = ["Worker"]
