"""The database on one page: fourteen declarative models in a schema of their own, `durable`.

An application refers to them by class, `ForeignKey(Workflow.id)` and `relationship(Workflow)`: the string form does
not find a class of another metadata. `storage` has what a SQLAlchemy `Table` has no place for. The statements are in
`store`; how the tables come into a database is in `migrations`.
"""

from sqla_durable.models import storage
from sqla_durable.models.audit import Audit
from sqla_durable.models.base import REVISION, SCHEMA, Base, metadata
from sqla_durable.models.blobs import BlobChunk, StoredBlob
from sqla_durable.models.queues import Queue, QueueKey, QueueUse
from sqla_durable.models.retention import Retention
from sqla_durable.models.schedules import Schedule
from sqla_durable.models.tables import Event, Signal, Step, StreamItem, Worker, Workflow

__all__ = [
    "REVISION",
    "SCHEMA",
    "Audit",
    "Base",
    "BlobChunk",
    "Event",
    "Queue",
    "QueueKey",
    "QueueUse",
    "Retention",
    "Schedule",
    "Signal",
    "Step",
    "StoredBlob",
    "StreamItem",
    "Worker",
    "Workflow",
    "metadata",
    "storage",
]
