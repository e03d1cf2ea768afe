"""What is called in the code of an `async def` workflow: the functions of `sqla_durable` of the same names, awaited.

A call has its place in the history when it is made, not when it is awaited: `asyncio.gather` may take them together.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Concatenate, ParamSpec, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import TypeVar

import sqla_durable.api.blobs as blobs
import sqla_durable.api.callbacks as callbacks
import sqla_durable.api.children as children
import sqla_durable.api.events as events
import sqla_durable.api.replay as replay
import sqla_durable.api.signals as signals
import sqla_durable.api.steps as steps
import sqla_durable.api.streams as streams
import sqla_durable.api.tags as new_tags
import sqla_durable.api.update_requests as update_requests
from sqla_durable.api.blobs import AsyncBlobWriter
from sqla_durable.api.callbacks import AsyncCallback
from sqla_durable.api.calls import ANY, in_async_code
from sqla_durable.api.children import AsyncChild, H
from sqla_durable.api.durable import Durable
from sqla_durable.api.steps import SyncStep
from sqla_durable.api.update_requests import AsyncUpdateRequest
from sqla_durable.api.workflows import AnyWorkflowFunction, bind_without_headers
from sqla_durable.errors import ArgumentError
from sqla_durable.models import Workflow

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", default=Any)


def sleep(duration: timedelta, *, step_key: str | None = None) -> Coroutine[Any, Any, None]:
    """Wait in a workflow's code, for seconds or for years. See `sqla_durable.sleep`."""
    return replay.sleep_call(duration, step_key).coroutine()


def sleep_until(moment: datetime, *, step_key: str | None = None) -> Coroutine[Any, Any, None]:
    """Wait in a workflow's code until a time. See `sqla_durable.sleep_until`."""
    return replay.sleep_until_call(moment, step_key).coroutine()


def current_time(*, step_key: str | None = None) -> Coroutine[Any, Any, datetime]:
    """Return the time on the database's clock, recorded. See `sqla_durable.current_time`."""
    return replay.current_time_call(step_key).coroutine()


def new_uuid(*, step_key: str | None = None) -> Coroutine[Any, Any, uuid.UUID]:
    """Return a random UUID, recorded. See `sqla_durable.new_uuid`."""
    return replay.new_uuid_call(step_key).coroutine()


def random_number(*, step_key: str | None = None) -> Coroutine[Any, Any, float]:
    """Return a random number from 0 up to 1, recorded. See `sqla_durable.random_number`."""
    return replay.random_number_call(step_key).coroutine()


def wait_signal(
    name: str, kind: type[T] = ANY, *, timeout: timedelta | None = None, step_key: str | None = None
) -> Coroutine[Any, Any, T]:
    """Wait for a signal and return its payload. See `sqla_durable.wait_signal`."""
    return signals.wait_signal_call(name, kind, timeout, step_key).coroutine()


def wait_event(
    workflow: Workflow | UUID,
    key: str,
    kind: type[T] = ANY,
    *,
    timeout: timedelta | None = None,
    step_key: str | None = None,
) -> Coroutine[Any, Any, T]:
    """Wait until another workflow has set an event, and return its value. See `sqla_durable.wait_event`."""
    return events.wait_event_call(workflow, key, kind, timeout, step_key).coroutine()


def wait_update(
    name: str,
    kind: type[T] = ANY,
    *,
    validate: Callable[[T], object] | None = None,
    timeout: timedelta | None = None,
    step_key: str | None = None,
) -> Coroutine[Any, Any, AsyncUpdateRequest[T]]:
    """Wait for an acceptable update, and return it to be answered. See `sqla_durable.wait_update`.

    The validator may be a coroutine function; a `def` one blocks the event loop while it is called.
    """
    return update_requests.wait_update_call(AsyncUpdateRequest[T], name, kind, validate, timeout, step_key).coroutine()


def create_blob(
    *, session: AsyncSession | None = None, durable: Durable | None = None, media_type: str | None = None
) -> AsyncBlobWriter:
    """Write a document of any size, from a step or in a caller's transaction. See `sqla_durable.create_blob`.

    ```python
    async with create_blob() as writer:
        async for part in response.aiter_bytes():
            await writer.write(part)
    return writer.blob
    ```
    """
    return blobs.create_blob_async(session, durable, media_type)


def create_callback(
    kind: type[T] = ANY,
    *,
    timeout: timedelta | None = None,
    heartbeat: timedelta | None = None,
    step_key: str | None = None,
) -> Coroutine[Any, Any, AsyncCallback[T]]:
    """Create a callback, to be answered by its token. See `sqla_durable.create_callback`."""
    return callbacks.create_callback_call(AsyncCallback[T], kind, timeout, heartbeat, step_key).coroutine()


def start_child(
    workflow: AnyWorkflowFunction[P, R], *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, AsyncChild[R]]:
    """Start a child in the code of a workflow. See `sqla_durable.start_child`.

    ```python
    child = await start_child(ship, order_id)
    label = await child
    ```
    """
    bound = bind_without_headers(workflow, args, kwargs)
    return children.start_child_call(AsyncChild[R], workflow.definition, bound).coroutine()


@overload
def map_children(
    workflow: AnyWorkflowFunction[..., R], items: Iterable[Any], *, max_concurrency: int | None = None
) -> Coroutine[Any, Any, list[R]]: ...


@overload
def map_children(
    workflow: AnyWorkflowFunction[..., R], items: Iterable[Any], *, max_concurrency: int | None = None, tolerate: int
) -> Coroutine[Any, Any, list[R | Exception]]: ...


def map_children(
    workflow: AnyWorkflowFunction[..., Any],
    items: Iterable[Any],
    *,
    max_concurrency: int | None = None,
    tolerate: int = 0,
) -> Coroutine[Any, Any, Any]:
    """Start a child for each item, wait for all, and return their results. See `sqla_durable.map_children`."""
    return children.map_children_call(workflow, items, max_concurrency, tolerate).coroutine()


def wait_first(
    workflows: Iterable[H], *, timeout: timedelta | None = None, step_key: str | None = None
) -> Coroutine[Any, Any, H]:
    """Wait until the first of some workflows has an outcome, and return that one. See `sqla_durable.wait_first`."""
    return children.wait_first_call(workflows, timeout, step_key).coroutine()


async def as_completed(workflows: Iterable[H]) -> AsyncIterator[H]:
    """Yield workflows as each of them has its outcome. See `sqla_durable.as_completed`.

    ```python
    async for child in as_completed(children):
        label = await child
    ```
    """
    left = list(workflows)
    while left:
        first = await wait_first(left)
        left.remove(first)
        yield first


def set_event(key: str, value: object, *, session: AsyncSession | None = None) -> Coroutine[Any, Any, None]:
    """Publish a value under a key, in a workflow's code or in a step. See `sqla_durable.set_event`."""
    return events.set_event_call(key, value, session).coroutine()


def set_tags(tags: Mapping[str, str | None], *, session: AsyncSession | None = None) -> Coroutine[Any, Any, None]:
    """Merge tags into those of the workflow, in its code or in a step. See `sqla_durable.set_tags`."""
    return new_tags.set_tags_call(tags, session).coroutine()


def write_stream(name: str, *values: object, session: AsyncSession | None = None) -> Coroutine[Any, Any, None]:
    """Append a value, or several, to a stream of the workflow. See `sqla_durable.write_stream`."""
    return streams.write_stream_call(name, values, session).coroutine()


def close_stream(name: str, *, session: AsyncSession | None = None) -> Coroutine[Any, Any, None]:
    """Close a stream: its readers end after the last item. See `sqla_durable.close_stream`."""
    return streams.close_stream_call(name, session).coroutine()


def heartbeat(details: object = None) -> Coroutine[Any, Any, None]:
    """Report from a plain step that it is alive, and how far it has come. See `sqla_durable.heartbeat`."""
    return steps.heartbeat_call(details).coroutine()


@overload
def run_step(
    name: str, fn: Callable[Concatenate[AsyncSession, P], Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, R]: ...


@overload
def run_step(
    name: str, fn: Callable[Concatenate[Session, P], R], /, *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, R]: ...


@overload
def run_step(
    name: str, fn: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, R]: ...


@overload
def run_step(name: str, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]: ...


def run_step(name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
    """Call any function as a step of the workflow, under this name. See `sqla_durable.run_step`.

    A `def` function is executed in a thread.
    """
    return steps.run_step_async(name, fn, args, kwargs)


def to_thread(step: SyncStep[P, R], *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
    """Call a `def` step in an `async def` workflow: it is executed in a thread.

    ```python
    receipt = await to_thread(charge, order_id)
    ```

    Outside a workflow and in a step it is a plain call of the function, in a thread. Named after `asyncio.to_thread`.

    Raises:
        ArgumentError: this is no `def` step.
        UsageError: this is a `def` workflow, which calls the step.
        Exception: the step's own error.
    """
    if not isinstance(step, SyncStep):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(
            f"to_thread() takes a step made of a def, got {step!r}: await an async def step itself, and call another "
            'function by run_step("name", fn, ...).'
        )
    in_async_code("to_thread")
    return steps.call_step_async(step.definition, step.step_key, args, kwargs)
