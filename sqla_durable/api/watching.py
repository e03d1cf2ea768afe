"""`wait_event`: a workflow waits for what another one shows."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast, overload
from uuid import UUID

from sqla_durable.api.callers import id_of
from sqla_durable.api.operate import operate
from sqla_durable.definitions.checks import require_duration, require_text
from sqla_durable.definitions.codec import Codec
from sqla_durable.errors import EventNotSetError, NotFoundError
from sqla_durable.models import Workflow
from sqla_durable.operations import waiting
from sqla_durable.store import Checkpoint, Connectable, events

T = TypeVar("T")


class _WaitEvent:
    """`wait_event`, with its other face for type checkers."""

    @overload
    def __call__(self, workflow: Workflow | UUID, key: str, *, timeout: timedelta | None = None) -> Any: ...

    @overload
    def __call__(
        self, workflow: Workflow | UUID, key: str, kind: type[T], *, timeout: timedelta | None = None
    ) -> T: ...

    def __call__(
        self, workflow: Workflow | UUID, key: str, kind: Any = Any, *, timeout: timedelta | None = None
    ) -> Any:
        """Wait in a workflow's code until another workflow has set an event; give its latest value.

        ```python
        address = await wait_event.aio(customer_workflow, "address", Address)
        ```

        The value is recorded: a replay finds the same. It is looked for again and again, at most every 30 seconds;
        meanwhile the workflow is a row and nothing else.

        Args:
            workflow: the other workflow, its record or its id.
            key: the event's key.
            kind: the type of its value.
            timeout: how long to wait at most.

        Raises:
            WaitTimeoutError: it was not set in time.
            EventNotSetError: the other workflow is finished and has never set it.
            NotFoundError: there is no such workflow.
            DecodingError: the value does not fit `kind`.
            UsageError: this is not a workflow's own code, or nobody could set it (a joined executor).
            ArgumentError: the key cannot be one, the timeout is no timedelta, or what is given is no workflow.
        """
        require_text(key, what="key of an event")
        if timeout is not None:
            require_duration(timeout, "timeout")
        take = partial(_take, workflow_id=id_of(workflow), key=key)
        source = waiting.WaitSource(
            None, waiting.in_one_statement(take), f"event {key!r} was not set within {timeout}."
        )
        codec = Codec.of(kind, what=f"value of event {key!r}")
        return operate(f"wait_event({key})", partial(waiting.receive, source=source, result=codec, within=timeout))

    @overload
    def aio(
        self, workflow: Workflow | UUID, key: str, *, timeout: timedelta | None = None
    ) -> Coroutine[Any, Any, Any]: ...

    @overload
    def aio(
        self, workflow: Workflow | UUID, key: str, kind: type[T], *, timeout: timedelta | None = None
    ) -> Coroutine[Any, Any, T]: ...

    def aio(
        self, workflow: Workflow | UUID, key: str, kind: Any = Any, *, timeout: timedelta | None = None
    ) -> Coroutine[Any, Any, Any]:
        """The same in an `async def` workflow, for type checkers."""
        return cast("Coroutine[Any, Any, Any]", self(workflow, key, kind, timeout=timeout))


def _take(connectable: Connectable, checkpoint: Checkpoint, *, workflow_id: UUID, key: str) -> str | None:
    found = events.take(connectable, checkpoint, workflow_id=workflow_id, key=key)
    if found is None:
        raise NotFoundError(f"no workflow {workflow_id} is there to wait for.", workflow_id=workflow_id)
    if found.value is None and found.status.finished:
        raise EventNotSetError(
            f"workflow {workflow_id} is finished and has never set the event {key!r}.", workflow_id=workflow_id, key=key
        )
    return found.value


wait_event = _WaitEvent()
"""Wait in a workflow's code for an event of another."""
