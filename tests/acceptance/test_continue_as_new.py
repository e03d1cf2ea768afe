"""Continue-as-new, which keeps the history of a long workflow short, and the limit of a history."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from sqlalchemy import func, select

from sqla_durable import Durable, errors, manage
from sqla_durable.models import Event, Signal, StreamItem
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell

pytestmark = pytest.mark.few_shells

COMMITTING = pytest.mark.shells(("executor", "async-executor", "worker", "async-worker", "asyncpg-worker"))


async def awaited(outcome: Any) -> Any:
    """Return the outcome of an operation, in either form."""
    return await outcome if inspect.isawaitable(outcome) else outcome


def counting(app: Application) -> Any:
    calls: list[int] = []

    def count(number: int) -> int:
        calls.append(number)
        return number + 1

    step = app.plain(count)
    found: list[Any] = []

    async def loop(until: int, number: int = 0) -> int:
        for _ in range(3):
            number = await step(number)
            if number == until:
                return len(calls)
        await awaited(found[0].continue_as_new(until, number))
        raise AssertionError("it went on")

    found.append(app.workflow(loop))
    return found[0]


@COMMITTING
def test_workflow_continues_as_new_with_a_short_history(shell: Shell, app: Application) -> None:
    workflow = counting(app)
    workflow_id = shell.begin(workflow, 10)
    assert shell.finish(workflow, workflow_id) == 10
    record = shell.one(workflow_id)
    assert [each.key for each in record.steps] == ["count"]
    assert (record.input, record.attempt) == ({"until": 10, "number": 9}, 4)


@COMMITTING
def test_signals_pass_from_one_round_to_the_next(shell: Shell, app: Application) -> None:
    found: list[Any] = []

    async def collect(seen: list[int]) -> list[int]:
        seen.append(await awaited(either.wait_signal("item", int)))
        if len(seen) == 4:
            return seen
        await awaited(found[0].continue_as_new(seen))
        raise AssertionError("it went on")

    found.append(app.workflow(collect))
    workflow_id = shell.begin(found[0], [])
    with shell.client() as client:
        for number in range(4):
            client.signal(workflow_id, "item", number)
        client.commit()
    assert shell.finish(found[0], workflow_id) == [0, 1, 2, 3]


@COMMITTING
def test_rows_of_a_workflow_do_not_grow_with_its_rounds_and_a_rewind_leaves_earlier_ones_alone(
    shell: Shell, app: Application
) -> None:
    found: list[Any] = []

    async def collect(until: int, seen: list[int]) -> list[int]:
        seen.append(await awaited(either.wait_signal("item", int)))
        await awaited(either.set_event("seen", seen))
        await awaited(either.write_stream("items", seen[-1]))
        if len(seen) == until:
            return seen
        await awaited(found[0].continue_as_new(until, seen))
        raise AssertionError("it went on")

    found.append(app.workflow(collect))
    workflow_id = shell.begin(found[0], 5, [])
    with shell.client() as client:
        for number in range(5):
            client.signal(workflow_id, "item", number, key="first" if number == 0 else None)
        client.signal(workflow_id, "item", 9, key="first")
        client.commit()
    assert shell.finish(found[0], workflow_id) == [0, 1, 2, 3, 4]

    def rows() -> tuple[list[str | None], list[Any], int]:
        with shell.sessionmaker() as session:
            signals = session.scalars(select(Signal.consumed_by).order_by(Signal.id))
            events = session.scalars(select(Event.value).order_by(Event.id))
            items = session.scalar(select(func.count()).select_from(StreamItem))
            return list(signals), list(events), items or 0

    # The newest event may be there beside the one of the round before.
    assert rows() == (["#earlier", "signal:item"], [[0, 1, 2, 3], [0, 1, 2, 3, 4]], 5)
    with shell.sessionmaker.begin() as session:
        manage.rewind(session, workflow_id, to_step="signal:item")
    assert rows() == (["#earlier", None], [[0, 1, 2, 3]], 4)
    assert shell.finish(found[0], workflow_id) == [0, 1, 2, 3, 4]


def test_another_workflow_is_refused(shell: Shell, app: Application) -> None:
    other = counting(app)

    async def wrong() -> None:
        await awaited(other.continue_as_new(1))

    with pytest.raises(errors.UsageError, match="which continues as itself"):
        shell.run(app.workflow(wrong))


def test_too_many_operations_are_refused(shell: Shell) -> None:
    app = Application(shell.form, Durable(history_limit=5))
    shell.app = app
    step = app.plain(lambda: None, name="nothing")

    async def endless() -> None:
        while True:
            await step()

    with pytest.raises(errors.HistoryLimitError, match="has called 5 operations, its limit"):
        shell.run(app.workflow(endless))
    assert len(shell.one(shell.only).steps) == 5


def test_limit_that_is_none_is_refused() -> None:
    with pytest.raises(errors.DefinitionError, match="history_limit must be at least 1, got 0"):
        Durable(history_limit=0)
