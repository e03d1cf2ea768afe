"""Durable workflows and queues as a SQLAlchemy extension: PostgreSQL is the orchestrator.

The records `Workflow`, `Step` and `Queue` are ORM models in your own database (with `models.Worker`, the record of a
worker's lease); `Durable` makes functions durable; `Worker`, `Executor` and `AsyncExecutor` execute them.
"""

from sqla_durable import errors, migrations, models, storage
from sqla_durable.context import Execution, current
from sqla_durable.durable import Durable, run_step
from sqla_durable.executor import AsyncExecutor, Executor
from sqla_durable.functions import (
    AsyncStepFunction,
    AsyncTransactionalStep,
    AsyncWorkflowFunction,
    StepFunction,
    TransactionalStep,
    WorkflowFunction,
)
from sqla_durable.handle import AsyncHandle, Handle
from sqla_durable.management import cancel, delete, fork, resume, retry, rewind
from sqla_durable.models import Event, Queue, Signal, Step, StreamItem, Workflow, metadata
from sqla_durable.start import BoundWorkflow, StartOptions, start_many
from sqla_durable.status import StepStatus, WorkflowStatus
from sqla_durable.worker import Worker

__all__ = [
    "AsyncExecutor",
    "AsyncHandle",
    "AsyncStepFunction",
    "AsyncTransactionalStep",
    "AsyncWorkflowFunction",
    "BoundWorkflow",
    "Durable",
    "Event",
    "Execution",
    "Executor",
    "Handle",
    "Queue",
    "Signal",
    "StartOptions",
    "Step",
    "StepFunction",
    "StepStatus",
    "StreamItem",
    "TransactionalStep",
    "Worker",
    "Workflow",
    "WorkflowFunction",
    "WorkflowStatus",
    "cancel",
    "current",
    "delete",
    "errors",
    "fork",
    "metadata",
    "migrations",
    "models",
    "resume",
    "retry",
    "rewind",
    "run_step",
    "start_many",
    "storage",
]
