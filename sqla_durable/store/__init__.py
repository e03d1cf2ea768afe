"""Every SQL statement of this package, as functions of a `Session`; nothing here commits or opens a session.

`schema` checks that the tables fit · `workflows` starts, finishes, releases, parks and wakes · `queues` claims ·
`steps` records checkpoints, `progress` how far one is · `events` and `streams` publish and read · `workers` holds
leases · `crashes` takes back what dead workers had · `deadlines` fails what is overdue · `waits` begins to wait ·
`signals` sends, takes and delivers · `updates` answers too · `callbacks` answers by token · `children` starts them and
looks at them · `management` resumes, retries and rewinds · `trees` cancels and deletes · `forks` copies · `selection`
tells which workflows are meant · `keys` is what inserts under a key share · `exports` reads whole records. The values
that go in and out are below.
"""

from sqla_durable.store._rows import (
    Awaited,
    Checkpoint,
    Claimed,
    Completion,
    Connectable,
    Fence,
    NewWorkflow,
    Origin,
    Park,
    Recorded,
    Standing,
    Verdict,
    bind_arguments,
    connection_of,
    current_record,
    refresh_known,
)

__all__ = [
    "Awaited",
    "Checkpoint",
    "Claimed",
    "Completion",
    "Connectable",
    "Fence",
    "NewWorkflow",
    "Origin",
    "Park",
    "Recorded",
    "Standing",
    "Verdict",
    "bind_arguments",
    "connection_of",
    "current_record",
    "refresh_known",
]
