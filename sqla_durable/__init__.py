"""Durable workflows and queues as a SQLAlchemy extension: PostgreSQL is the orchestrator.

The records `Workflow`, `Step` and `Queue` are ORM models in your own database (with `models.Worker`, the record of a
worker's lease); `Durable` makes functions durable; `Worker`, `Executor` and `AsyncExecutor` execute them.
"""

import typing as _typing

from sqla_durable import errors, migrations, models, unwinding
from sqla_durable.api.callbacks import (
    AsyncCallback,
    Callback,
    complete_callback,
    create_callback,
    fail_callback,
    heartbeat_callback,
)
from sqla_durable.api.children import AsyncChild, Child, as_completed, wait_first
from sqla_durable.api.durable import Durable
from sqla_durable.api.events import get_event, set_event
from sqla_durable.api.functions import AsyncWorkflowFunction, WorkflowFunction
from sqla_durable.api.handle import AsyncHandle, Handle
from sqla_durable.api.parallel import parallel
from sqla_durable.api.patches import deprecate_patch, patched
from sqla_durable.api.progress import RunningStep, heartbeat, running_steps
from sqla_durable.api.saga import Saga
from sqla_durable.api.signals import signal, start_with_signal, wait_signal
from sqla_durable.api.start import BoundWorkflow, StartOptions, start_many
from sqla_durable.api.steps import (
    AsyncStepFunction,
    AsyncTransactionalStep,
    StepFunction,
    TransactionalStep,
    run_step,
)
from sqla_durable.api.streams import StreamEntry, close_stream, read_stream, write_stream
from sqla_durable.api.timers import now, random, sleep, sleep_until, uuid4
from sqla_durable.api.update_handles import AsyncUpdate, Update, update_handle
from sqla_durable.api.update_requests import UpdateRequest, wait_update
from sqla_durable.api.updates import start_with_update, update
from sqla_durable.api.watching import wait_event
from sqla_durable.definitions.interceptors import Execution, Interceptor, StepExecution
from sqla_durable.execution import AsyncExecutor, Executor
from sqla_durable.execution.worker import Worker
from sqla_durable.management import cancel, delete, fork, id_at, resume, retry, rewind
from sqla_durable.models import Event, Queue, Signal, Step, StreamItem, Workflow, metadata, storage
from sqla_durable.models.status import StepStatus, WorkflowStatus
from sqla_durable.runtime.context import current, current_step

__version__: str


if not _typing.TYPE_CHECKING:  # or every misspelled name would be a str

    def __getattr__(name: str) -> str:
        """Return the version of the package that is installed, when it is asked for."""
        if name == "__version__":
            from importlib.metadata import version

            return version("sqla-durable")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AsyncCallback",
    "AsyncChild",
    "AsyncExecutor",
    "AsyncHandle",
    "AsyncStepFunction",
    "AsyncTransactionalStep",
    "AsyncUpdate",
    "AsyncWorkflowFunction",
    "BoundWorkflow",
    "Callback",
    "Child",
    "Durable",
    "Event",
    "Execution",
    "Executor",
    "Handle",
    "Interceptor",
    "Queue",
    "RunningStep",
    "Saga",
    "Signal",
    "StartOptions",
    "Step",
    "StepExecution",
    "StepFunction",
    "StepStatus",
    "StreamEntry",
    "StreamItem",
    "TransactionalStep",
    "Update",
    "UpdateRequest",
    "Worker",
    "Workflow",
    "WorkflowFunction",
    "WorkflowStatus",
    "as_completed",
    "cancel",
    "close_stream",
    "complete_callback",
    "create_callback",
    "current",
    "current_step",
    "delete",
    "deprecate_patch",
    "errors",
    "fail_callback",
    "fork",
    "get_event",
    "heartbeat",
    "heartbeat_callback",
    "id_at",
    "metadata",
    "migrations",
    "models",
    "now",
    "parallel",
    "patched",
    "random",
    "read_stream",
    "resume",
    "retry",
    "rewind",
    "run_step",
    "running_steps",
    "set_event",
    "signal",
    "sleep",
    "sleep_until",
    "start_many",
    "start_with_signal",
    "start_with_update",
    "storage",
    "unwinding",
    "update",
    "update_handle",
    "uuid4",
    "wait_event",
    "wait_first",
    "wait_signal",
    "wait_update",
    "write_stream",
]
