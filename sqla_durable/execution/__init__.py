"""Executing a workflow inline, durable on the caller's own session.

`executor` has the two classes · `story` says what happens, once for sessions of either kind · `runtimes` says how an
attempt records on that session.
"""

from sqla_durable.execution.executor import AsyncExecutor, Executor

__all__ = ["AsyncExecutor", "Executor"]
