"""The functions of `sqla_durable` for `async def` code, in the manner of `sqlalchemy.ext.asyncio`.

What the code of an `async def` workflow calls, what is called with an `AsyncSession`, and the classes of async code.
Everything else, such as `Durable` and `Worker`, is imported from `sqla_durable`.
"""

from sqla_durable.api.blobs import AsyncBlobReader, AsyncBlobWriter
from sqla_durable.api.callbacks import AsyncCallback
from sqla_durable.api.children import AsyncChild
from sqla_durable.api.polling import AsyncHandle
from sqla_durable.api.replay import deprecate_patch, patched, step_scope
from sqla_durable.api.saga import AsyncSaga as Saga
from sqla_durable.api.steps import AsyncStepFunction, AsyncTransactionalStep
from sqla_durable.api.update_requests import AsyncUpdateRequest
from sqla_durable.api.updates import AsyncUpdateHandle
from sqla_durable.api.workflows import AsyncWorkflowFunction
from sqla_durable.asyncio import manage
from sqla_durable.asyncio.transactions import (
    complete_callback,
    fail_callback,
    get_event,
    heartbeat_callback,
    open_blob,
    read_stream,
    running_steps,
    send_signal,
    send_update,
    start_many,
    start_with_signal,
    start_with_update,
    update_handle,
)
from sqla_durable.asyncio.workflows import (
    as_completed,
    close_stream,
    create_blob,
    create_callback,
    current_time,
    heartbeat,
    map_children,
    new_uuid,
    random_number,
    run_step,
    set_event,
    set_tags,
    sleep,
    sleep_until,
    start_child,
    to_thread,
    wait_event,
    wait_first,
    wait_signal,
    wait_update,
    write_stream,
)
from sqla_durable.definitions.failure import is_recorded_error
from sqla_durable.execution.executor import AsyncExecutor
from sqla_durable.runtime.context import current, current_step

__all__ = [
    "AsyncBlobReader",
    "AsyncBlobWriter",
    "AsyncCallback",
    "AsyncChild",
    "AsyncExecutor",
    "AsyncHandle",
    "AsyncStepFunction",
    "AsyncTransactionalStep",
    "AsyncUpdateHandle",
    "AsyncUpdateRequest",
    "AsyncWorkflowFunction",
    "Saga",
    "as_completed",
    "close_stream",
    "complete_callback",
    "create_blob",
    "create_callback",
    "current",
    "current_step",
    "current_time",
    "deprecate_patch",
    "fail_callback",
    "get_event",
    "heartbeat",
    "heartbeat_callback",
    "is_recorded_error",
    "manage",
    "map_children",
    "new_uuid",
    "open_blob",
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
    "to_thread",
    "update_handle",
    "wait_event",
    "wait_first",
    "wait_signal",
    "wait_update",
    "write_stream",
]
