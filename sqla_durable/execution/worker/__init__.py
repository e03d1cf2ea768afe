"""The worker: the process that claims workflows and executes them.

`worker` is the whole of it, `settings` what it may be given · `claims` keeps its slots filled · `attempts` executes
what was claimed · `writer` commits what all of them record · `heartbeat` holds the lease · `runtimes` says how an
attempt records · `database` where the worker's own statements run.
"""

from sqla_durable.execution.worker.worker import Worker

__all__ = ["Worker"]
