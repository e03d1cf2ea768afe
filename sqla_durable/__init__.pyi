"""What type checkers read of `sqla_durable`; `__init__.py` imports the same names when they are first used."""

from sqla_durable import errors, manage, migrations, models, unwinding
from sqla_durable.api.blobs import BlobReader, BlobWriter, create_blob, open_blob
from sqla_durable.api.callbacks import Callback, complete_callback, create_callback, fail_callback, heartbeat_callback
from sqla_durable.api.children import Child, as_completed, map_children, start_child, wait_first
from sqla_durable.api.durable import Durable
from sqla_durable.api.events import get_event, set_event, wait_event
from sqla_durable.api.options import StartOptions as StartOptions
from sqla_durable.api.parallel import parallel
from sqla_durable.api.polling import Handle
from sqla_durable.api.replay import (
    current_time,
    deprecate_patch,
    new_uuid,
    patched,
    random_number,
    sleep,
    sleep_until,
    step_scope,
)
from sqla_durable.api.saga import Saga
from sqla_durable.api.signals import send_signal, start_with_signal, wait_signal
from sqla_durable.api.steps import RunningStep, StepFunction, TransactionalStep, heartbeat, run_step, running_steps
from sqla_durable.api.streams import StreamEntry, close_stream, read_stream, write_stream
from sqla_durable.api.tags import set_tags
from sqla_durable.api.update_requests import UpdateRequest, wait_update
from sqla_durable.api.updates import UpdateHandle, send_update, start_with_update, update_handle
from sqla_durable.api.workflows import BoundWorkflow, WorkflowFunction, start_many
from sqla_durable.definitions.blobs import Blob
from sqla_durable.definitions.failure import is_recorded_error
from sqla_durable.definitions.interceptors import Execution, Interceptor, Start, StepExecution
from sqla_durable.definitions.payloads import Encryption, PayloadCodec, Zstandard
from sqla_durable.definitions.schedules import Tick
from sqla_durable.execution.executor import Executor
from sqla_durable.execution.worker.worker import Worker
from sqla_durable.models import Event, Queue, Schedule, Signal, Step, StreamItem, Workflow, metadata, storage
from sqla_durable.models.base import StepStatus, WorkflowStatus
from sqla_durable.runtime.context import WorkflowLogFilter, current, current_step

__version__: str

__all__ = [
    "Blob",
    "BlobReader",
    "BlobWriter",
    "BoundWorkflow",
    "Callback",
    "Child",
    "Durable",
    "Encryption",
    "Event",
    "Execution",
    "Executor",
    "Handle",
    "Interceptor",
    "PayloadCodec",
    "Queue",
    "RunningStep",
    "Saga",
    "Schedule",
    "Signal",
    "Start",
    "StartOptions",
    "Step",
    "StepExecution",
    "StepFunction",
    "StepStatus",
    "StreamEntry",
    "StreamItem",
    "Tick",
    "TransactionalStep",
    "UpdateHandle",
    "UpdateRequest",
    "Worker",
    "Workflow",
    "WorkflowFunction",
    "WorkflowLogFilter",
    "WorkflowStatus",
    "Zstandard",
    "as_completed",
    "close_stream",
    "complete_callback",
    "create_blob",
    "create_callback",
    "current",
    "current_step",
    "current_time",
    "deprecate_patch",
    "errors",
    "fail_callback",
    "get_event",
    "heartbeat",
    "heartbeat_callback",
    "is_recorded_error",
    "manage",
    "map_children",
    "metadata",
    "migrations",
    "models",
    "new_uuid",
    "open_blob",
    "parallel",
    "patched",
    "random_number",
    "read_stream",
    "run_step",
    "running_steps",
    "send_signal",
    "send_update",
    "set_event",
    "set_tags",
    "sleep",
    "sleep_until",
    "start_child",
    "start_many",
    "start_with_signal",
    "start_with_update",
    "step_scope",
    "storage",
    "unwinding",
    "update_handle",
    "wait_event",
    "wait_first",
    "wait_signal",
    "wait_update",
    "write_stream",
]
