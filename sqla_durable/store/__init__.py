"""Every SQL statement of this package, as functions of a `Session`; nothing here commits or opens a session.

`schema` checks that the tables fit · `workflows` starts, finishes, releases, parks and wakes · `queues` claims ·
`steps` records checkpoints · `workers` holds leases · `crashes` takes back what dead workers had · `management`
resumes, retries and rewinds · `trees` cancels and deletes · `forks` copies · `selection` tells which workflows are
meant. The values that go in and out are below.
"""

from sqla_durable.store._rows import (
    Checkpoint,
    Claimed,
    Completion,
    Connectable,
    Fence,
    NewWorkflow,
    Park,
    Recorded,
    Standing,
    Verdict,
    refresh_known,
)

__all__ = [
    "Checkpoint",
    "Claimed",
    "Completion",
    "Connectable",
    "Fence",
    "NewWorkflow",
    "Park",
    "Recorded",
    "Standing",
    "Verdict",
    "refresh_known",
]
