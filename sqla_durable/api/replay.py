"""What is the same on every replay: time, chance, the way that a patched workflow takes, the keys of its operations."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from sqla_durable.api.calls import Call, operation, require_workflow, visit
from sqla_durable.definitions.checks import escape_key, fault_in, require_duration, require_moment
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.inspection import require_name
from sqla_durable.errors import ArgumentError, UsageError
from sqla_durable.operations import waiting
from sqla_durable.operations.runtime import Operation
from sqla_durable.operations.workflow import patched as record_patch
from sqla_durable.runtime.context import Context, active

T = TypeVar("T")

_TIME, _UUID, _NUMBER = (
    Codec.of(datetime, what="current_time"),
    Codec.of(uuid.UUID, what="new_uuid"),
    Codec.of(float, what="random_number"),
)


def sleep(duration: timedelta, *, step_key: str | None = None) -> None:
    """Wait in a workflow's code, for seconds or for years.

    ```python
    sleep(timedelta(days=14))
    ```

    The wait begins when the workflow first comes here and ends on the database's clock, whatever happens to workers.
    Longer than a moment, the workflow is suspended and needs a row and nothing else. A duration of zero or less is over
    at once.

    Args:
        duration: how long.
        step_key: an explicit identity in the history, instead of `sleep` and its occurrence.

    Raises:
        ArgumentError: the duration is no timedelta, or longer than a hundred years.
        UsageError: this is not a workflow's own code.
        UsageError: the workflow is `async def`.
    """
    sleep_call(duration, step_key).outcome()


def sleep_until(moment: datetime, *, step_key: str | None = None) -> None:
    """Wait in a workflow's code until a time; one in the past is over at once. See `sleep`.

    Raises:
        ArgumentError: the time has no time zone, or is not before the year 9999.
        UsageError: this is not a workflow's own code.
        UsageError: the workflow is `async def`.
    """
    sleep_until_call(moment, step_key).outcome()


def current_time(*, step_key: str | None = None) -> datetime:
    """Return the time on the database's clock, recorded: the same on every replay.

    In a step and outside a workflow, return this machine's time.

    Args:
        step_key: an explicit identity in the history, instead of `current_time` and its occurrence.

    Raises:
        UsageError: the workflow is `async def`.
    """
    return current_time_call(step_key).outcome()


def new_uuid(*, step_key: str | None = None) -> uuid.UUID:
    """Return a random UUID, recorded: the same on every replay. In a step and outside a workflow, always a new one.

    Args:
        step_key: an explicit identity in the history, instead of `new_uuid` and its occurrence.

    Raises:
        UsageError: the workflow is `async def`.
    """
    return new_uuid_call(step_key).outcome()


def random_number(*, step_key: str | None = None) -> float:
    """Return a random number from 0 up to 1, recorded: the same on every replay.

    In a step and outside a workflow, always a new one.

    Args:
        step_key: an explicit identity in the history, instead of `random_number` and its occurrence.

    Raises:
        UsageError: the workflow is `async def`.
    """
    return random_number_call(step_key).outcome()


def patched(patch_id: str) -> bool:
    """Return whether to execute the new code of a change: false if the workflow passed this point before the change.

    ```python
    @durable.workflow
    def checkout(order_id: int) -> str:
        reserve(order_id)
        if patched("check fraud"):
            check_fraud(order_id)
        return charge(order_id)
    ```

    The answer is the same on every replay, and wherever the workflow asks again for the same id. True is recorded: it
    is durable before the next step of the workflow is executed, and costs a checkpoint without a commit of its own.

    False where an earlier attempt has recorded a step that this one has not visited yet. So it is False, and the old
    way is taken, also where that step is one that today's code does not visit any more, and in parallel branches
    where it is one of another branch. A step that was being executed for the first time when its worker died has
    recorded nothing: what came before it decides.

    Args:
        patch_id: what the change is called in this workflow. In a loop, with the round in it where each is to decide
            for itself: `patched(f"check fraud {round}")`.

    Returns:
        True where no workflow is being executed: a plain call takes the new way.

    Raises:
        ArgumentError: the id is not a text, is blank, or cannot be stored.
        UsageError: it was called in a step, which is not replayed, or in another task or thread than the workflow.
    """
    fault = fault_in(patch_id)
    if fault is not None:
        raise ArgumentError(f"patched({patch_id!r}): the id {fault}. Give a text that is not blank.")
    context = active()
    if context is None:
        return True
    if context.step is not None:
        raise UsageError(
            f"patched({patch_id!r}) was called in step {context.step.position.shown!r}, which is not replayed: call it "
            "in the workflow, and pass the answer to the step."
        )
    context.attempt.branches.require_here(f"patched({patch_id!r})", workflow=context.attempt.name)
    is_new, marker = record_patch(context.attempt, patch_id)
    if marker is not None:
        context.runtime.recorder.note(marker)
    return is_new


def deprecate_patch(patch_id: str) -> None:
    """Mark where a `patched` was whose old code is gone, because no workflow is left that executes it.

    New workflows still record the patch, so that workers with the older code, which call `patched`, can execute them,
    also after a deploy is rolled back. Delete this call when no such worker is left.

    Args:
        patch_id: the id of the patch.

    Raises:
        ArgumentError, UsageError: as `patched`.
    """
    patched(patch_id)


@contextmanager
def step_scope(name: str) -> Generator[None]:
    """Number the operations in a block apart from the others, under the name of the scope.

    ```python
    with step_scope("agent"):
        answer = run_step("ask", client.ask, prompt)  # its key is agent/ask
    ```

    For libraries that call steps in a user's workflow: their keys do not depend on how often the user calls a step of
    the same name. Scopes of one name are counted, `agent#2/ask`. A step key that is given in the block is unique within
    the scope.

    In a task that is made in the block, keys have the task's name, `agent/call_tool/ask`. A scope in that task has the
    name of the outer scope only, `agent/tool 7/ask`, whatever the task is called; so it must be of another name than
    those of the tasks beside it. Outside a workflow, and in a step, nothing happens.

    Args:
        name: the name of the scope.

    Raises:
        DefinitionError: the name cannot be one.
        UsageError: another task of the outer scope has used the name; or this is a task or thread that is no branch of
            the workflow.
    """
    require_name(name, what="name of a step_scope")
    context = active()
    if context is None or context.step is not None:
        yield
        return
    branch = context.attempt.branches.require_here(f"step_scope({name!r})", workflow=context.attempt.name)
    with branch.scope(escape_key(name)):
        yield


def sleep_call(duration: timedelta, step_key: str | None) -> Call[None]:
    """Return the call of `sleep`."""
    require_duration(duration, "duration")
    return operation("sleep", "sleep", partial(waiting.sleep, delay=duration, until=None), step_key=step_key)


def sleep_until_call(moment: datetime, step_key: str | None) -> Call[None]:
    """Return the call of `sleep_until`."""
    require_moment(moment, "moment")
    return operation("sleep_until", "sleep", partial(waiting.sleep, delay=None, until=moment), step_key=step_key)


def current_time_call(step_key: str | None) -> Call[datetime]:
    """Return the call of `current_time`."""
    recording = partial(waiting.record_database_time, codec=_TIME)
    return _recorded("current_time", lambda: datetime.now(UTC), recording, step_key)


def new_uuid_call(step_key: str | None) -> Call[uuid.UUID]:
    """Return the call of `new_uuid`."""
    recording = partial(waiting.record_value, produce=uuid.uuid4, codec=_UUID)
    return _recorded("new_uuid", uuid.uuid4, recording, step_key)


def random_number_call(step_key: str | None) -> Call[float]:
    """Return the call of `random_number`."""
    recording = partial(waiting.record_value, produce=random.random, codec=_NUMBER)
    return _recorded("random_number", random.random, recording, step_key)


def _recorded(function: str, ask: Callable[[], T], recording: Operation, step_key: str | None) -> Call[T]:
    """Return the call of a function that asks once in a workflow's code and records the answer, and elsewhere asks."""

    def carry_out(context: Context | None) -> Any:
        if context is None or context.step is not None:
            return ask()
        return visit(require_workflow(function, context), function, recording, step_key)

    return Call(function, carry_out)
