"""Every SQL statement of this package, as functions of a `Session` or connection; nothing here commits.

Basics: `statements` builds and executes them, of `records`, and `driver` those that need to be fastest; `schema` finds
the tables; `keys` inserts under a key.
What workers do: `starts`, `claims`, `work`, `attempts` (ends), `steps`, `workers` (leases, reclaim), `failures`.
What workflows do: `timers`, `inbox` (shared by `signals`, `updates`, `callbacks`), `events`, `tags`, `streams`,
`children`, `deferred` (children of a map), `continuations` (continue as new).
What operators do: `manage`, `forks`, and its log, `audit`; `workflows` and `histories` read records; `hints` are NOTIFY
and LISTEN.
"""

from sqla_durable.store.records import (
    Awaited,
    Checkpoint,
    Claimed,
    Completion,
    Fence,
    KeyRule,
    NewWorkflow,
    Origin,
    Recorded,
    Suspend,
    Verdict,
    WorkflowState,
)
from sqla_durable.store.statements import (
    Connectable,
    bind_arguments,
    connection_of,
    current_record,
    refresh_loaded,
)

__all__ = [
    "Awaited",
    "Checkpoint",
    "Claimed",
    "Completion",
    "Connectable",
    "Fence",
    "KeyRule",
    "NewWorkflow",
    "Origin",
    "Recorded",
    "Suspend",
    "Verdict",
    "WorkflowState",
    "bind_arguments",
    "connection_of",
    "current_record",
    "refresh_loaded",
]
