"""Changed code on exported histories: the differences are reported before it is deployed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import (
    Durable,
    Executor,
    Step,
    StepFunction,
    Workflow,
    WorkflowStatus,
    deprecate_patch,
    patched,
)
from sqla_durable.asyncio import AsyncWorkflowFunction, to_thread
from sqla_durable.errors import ArgumentError, UsageError
from sqla_durable.testing import History, ReplayReport, export, replay

Sessions = sessionmaker[Session]


@dataclass(frozen=True)
class Receipt:
    cents: int


class Code:
    """One state of an application's code. Its steps must not be executed in a replay."""

    def __init__(self, body: Callable[[Code, int], Any], *, receipt: Any = Receipt, fail: str | None = None) -> None:
        self.durable = Durable()
        self.called: list[str] = []
        self.fail = fail
        self.reserve, self.check, self.charge, self.ship = (
            self._step(name, receipt if name == "charge" else None) for name in ("reserve", "check", "charge", "ship")
        )

        def checkout(order_id: int) -> int | dict[str, int]:
            outcome: int | dict[str, int] = body(self, order_id)
            return outcome

        self.checkout = self.durable.workflow(checkout)

    def _step(self, name: str, result: Any) -> StepFunction[[], Receipt | None]:
        def called() -> Receipt | None:
            self.called.append(name)
            if self.fail == name:
                raise LookupError(f"no {name}")
            return None if result is None else result(1000)

        called.__annotations__["return"] = result
        called.__name__ = called.__qualname__ = name
        return self.durable.step(called)


def first(code: Code, order_id: int) -> Any:
    code.reserve()
    code.charge()
    code.ship()
    return order_id


@pytest.fixture
def history(session_factory: Sessions) -> Callable[..., History]:
    """Execute code, and export what it recorded."""

    def make(code: Code) -> History:
        with session_factory() as session:
            with contextlib.suppress(LookupError):
                Executor(session).run(code.checkout, 7)
            session.commit()
            (found,) = export(session, select(Workflow))
        loaded: History = json.loads(json.dumps(found))
        return loaded

    return make


def cut(history: History, *, after: str) -> History:
    """Return what it was when a step had just been recorded."""
    keys = [each["key"] for each in history["steps"]]
    return {**history, "steps": history["steps"][: keys.index(after) + 1], "status": "running", "output": None}


def check(history: History, body: Callable[[Code, int], Any], **options: Any) -> ReplayReport:
    code = Code(body, **options)
    report = replay(code.checkout, history)
    assert code.called == []
    return report


def test_same_code_fits_finished_and_unfinished_histories(history: Callable[..., History]) -> None:
    finished = history(Code(first))
    report = check(finished, first)
    assert report.fits
    assert report.recorded == report.visited == ("reserve", "charge", "ship")
    assert str(report) == f"workflow 'checkout' {finished['id']}: the current code does what was recorded"


def test_end_of_an_unfinished_history_is_a_success(history: Callable[..., History]) -> None:
    report = check(cut(history(Code(first)), after="reserve"), first)
    assert report.fits
    assert report.visited == ("reserve", "charge")


def test_removed_step_is_named(history: Callable[..., History]) -> None:
    def removed(code: Code, order_id: int) -> Any:
        code.reserve()
        code.ship()
        return order_id

    report = check(history(Code(first)), removed)
    assert report.differences == ("recorded and not visited: 'charge'",)
    assert str(report).endswith("  recorded: reserve, charge, ship\n  visited:  reserve, ship")


def test_added_step_in_the_middle_is_named(history: Callable[..., History]) -> None:
    def added(code: Code, order_id: int) -> Any:
        code.reserve()
        code.check()
        code.charge()
        code.ship()
        return order_id

    finished = history(Code(first))
    assert check(finished, added).differences == (
        "'check' is called and has no recorded outcome, while the history goes on with 'charge', 'ship'",
    )


def test_added_step_at_the_end_of_a_finished_history_is_named(history: Callable[..., History]) -> None:
    def added(code: Code, order_id: int) -> Any:
        first(code, order_id)
        code.check()
        return order_id

    finished = history(Code(first))
    assert check(finished, added).differences == (
        "'check' is called and has no recorded outcome, and the workflow had succeeded",
    )
    assert check({**finished, "status": "running", "output": None}, added).fits
    cancelled = {**finished, "status": "cancelled", "output": None}
    crashed = {
        **finished,
        "status": "failed",
        "output": None,
        "error": {"type": "sqla_durable.errors:MaxAttemptsError"},
    }
    assert check(cancelled, added).fits
    assert check(crashed, added).fits


def test_other_order_is_named(history: Callable[..., History]) -> None:
    def reordered(code: Code, order_id: int) -> Any:
        code.charge()
        code.reserve()
        code.ship()
        return order_id

    assert check(history(Code(first)), reordered).differences == ("'reserve' is visited after what was recorded later",)


def test_renamed_step_with_the_old_key_is_named(history: Callable[..., History]) -> None:
    def renamed(code: Code, order_id: int) -> Any:
        code.reserve()
        code.check.options(step_key="charge")()
        code.ship()
        return order_id

    report = check(history(Code(first, receipt=None)), renamed, receipt=None)
    assert report.differences == ("'charge' was recorded by step 'charge' and is now of step 'check'",)


def test_patched_change_fits_old_and_new_histories(history: Callable[..., History]) -> None:
    def second(code: Code, order_id: int) -> Any:
        code.reserve()
        if patched("check"):
            code.check()
        code.charge()
        code.ship()
        return order_id

    old = history(Code(first))
    for found in (old, cut(old, after="ship"), cut(old, after="charge")):
        assert check(found, second).visited == ("reserve", "charge", "ship")
    assert check(cut(old, after="reserve"), second).visited == ("reserve", "#patched/check", "check")


def test_deprecated_patch_fits_its_marker(history: Callable[..., History]) -> None:
    def third(code: Code, order_id: int) -> Any:
        code.reserve()
        deprecate_patch("check")
        code.charge()
        code.ship()
        return order_id

    marked = history(Code(third))
    assert [each["key"] for each in marked["steps"]] == ["reserve", "#patched/check", "charge", "ship"]
    assert check(marked, third).fits
    assert check(marked, first).fits


def test_outcome_that_todays_annotation_does_not_read_is_named(history: Callable[..., History]) -> None:
    @dataclass(frozen=True)
    class InDollars:
        dollars: int

    (difference,) = check(history(Code(first)), first, receipt=InDollars).differences
    assert difference.startswith("'charge': the stored result of step 'charge' does not fit the annotation")


def test_input_that_todays_annotation_does_not_read_is_named(history: Callable[..., History]) -> None:
    found = {**history(Code(first)), "input": {"order": 7}}
    (difference,) = check(found, first).differences
    assert "missing ['order_id'], unknown ['order']" in difference


def test_other_result_is_named(history: Callable[..., History]) -> None:
    def other(code: Code, order_id: int) -> Any:
        return {"order": first(code, order_id)}

    assert check(history(Code(first)), other).differences == ("it returned 7 and now {'order': 7}",)


def test_recorded_failure_is_raised_again_and_compared(history: Callable[..., History]) -> None:
    def forgiving(code: Code, order_id: int) -> Any:
        try:
            return first(code, order_id)
        except LookupError:
            return 0

    def angry(code: Code, order_id: int) -> Any:
        try:
            return first(code, order_id)
        except LookupError as error:
            raise ValueError("no") from error

    failed = history(Code(first, fail="charge"))
    assert failed["status"] == "failed"
    assert check(failed, first).fits
    assert check(failed, forgiving).differences == ("it failed with builtins:LookupError and now returns 0",)
    assert check(failed, angry).differences == (
        "it failed with builtins:LookupError and now fails with builtins:ValueError: no",
    )


def test_code_that_swallows_everything_is_stopped_nevertheless(history: Callable[..., History]) -> None:
    def swallowing(code: Code, order_id: int) -> Any:
        try:
            code.reserve()
            code.check()
        except BaseException:
            return order_id
        return order_id

    assert check(cut(history(Code(first)), after="reserve"), swallowing).visited == ("reserve", "check")


# Async


def asynchronous(*, gather: bool = True, added: bool = False) -> tuple[AsyncWorkflowFunction[[int], int], list[str]]:
    durable, called = Durable(), list[str]()

    def step(name: str) -> Any:
        async def call(number: int) -> int:
            called.append(f"{name} {number}")
            return number

        call.__name__ = call.__qualname__ = name
        return durable.step(call)

    one, two, three = step("one"), step("two"), step("three")

    @durable.step
    def write(session: Session, number: int) -> int:
        called.append("write")
        return number

    @durable.workflow(name="parallel")
    async def parallel(number: int) -> int:
        if gather:
            await asyncio.gather(one(1), two(2), one(3))
        else:
            await asyncio.gather(one(1), two(2))
        await asyncio.sleep(0)
        if added:
            await three(4)
        return await to_thread(write, number)

    return parallel, called


def recorded(*keys: str, **more: Any) -> History:
    steps = [
        {
            "key": key,
            "name": key.partition("#")[0],
            "position": place,
            "status": "succeeded",
            "output": 1,
            "error": None,
        }
        for place, key in enumerate(keys, 1)
    ]
    blank = {"format": "sqla-durable history 1", "id": "00000000-0000-0000-0000-000000000007", "attempt": 1}
    outcome = {"name": "parallel", "version": None, "status": "running", "output": None, "error": None}
    return {**blank, **outcome, "input": {"number": 1}, "steps": steps, **more}


def test_async_workflow_is_replayed_with_its_parallel_steps() -> None:
    workflow, called = asynchronous()
    full = recorded("one", "two", "one#2", "write", status="succeeded", output=1)
    assert replay(workflow, full).fits
    assert replay(workflow, recorded("two")).fits
    assert replay(workflow, recorded("one", "two", "one#2")).visited == ("one", "two", "one#2", "write")
    assert replay(asynchronous(gather=False)[0], full).differences == ("recorded and not visited: 'one#2'",)
    assert replay(asynchronous(added=True)[0], full).differences == (
        "'three' is called and has no recorded outcome, while the history goes on with 'write'",
    )
    assert called == []


async def test_replay_of_an_async_workflow_in_an_event_loop_is_refused() -> None:
    with pytest.raises(UsageError, match="call it in a plain def, or in a thread"):
        replay(asynchronous()[0], recorded())
    assert (await asyncio.to_thread(replay, asynchronous()[0], recorded())).fits


# Export


def test_export_takes_records_ids_and_selects(session_factory: Sessions) -> None:
    code = Code(first)
    with session_factory() as session:
        Executor(session).run(code.checkout, 7)
        pending = code.checkout.start(session, 8)
        whole = export(session, select(Workflow).order_by(Workflow.id))
        assert [each["status"] for each in whole] == ["succeeded", "pending"]
        assert whole[1]["steps"] == []
        assert export(session, pending) == export(session, pending.id) == whole[1:]
        assert export(session, [pending, pending.id]) == whole[1:]
        assert export(session, select(Workflow.id)) == whole
        assert export(session, []) == []
        with pytest.raises(ArgumentError, match="'checkout' is not a workflow"):
            export(session, select(Workflow.name))
        assert all(replay(code.checkout, each).fits for each in whole)


async def test_export_over_an_async_session_is_awaited(
    async_session_factory: async_sessionmaker[AsyncSession],
) -> None:
    async with async_session_factory() as session:
        workflow = await Code(first).checkout.start(session, 8)
        (found,) = await export(session, workflow)
        assert found["id"] == str(workflow.id)
        assert found["input"] == {"order_id": 8}


def test_steps_that_wait_and_errors_travel(session_factory: Sessions, history: Callable[..., History]) -> None:
    found = history(Code(first, fail="charge"))
    assert found["steps"][1]["error"]["type"] == "builtins:LookupError"
    with session_factory.begin() as session:
        session.execute(update(Step).where(Step.key == "charge").values(status="retrying", wake_at=Step.finished_at))
        session.execute(
            update(Workflow).values(status=WorkflowStatus.SUSPENDED, error=None, finished_at=None, token=None)
        )
        (waiting,) = export(session, select(Workflow))
    assert [each["status"] for each in waiting["steps"]] == ["succeeded", "retrying"]
    assert check(waiting, first).fits


@pytest.mark.parametrize("given", [{}, [], None, "x", {"format": "sqla-durable history 0"}])
def test_what_is_no_history_is_refused(given: Any) -> None:
    with pytest.raises(ArgumentError, match="is not a history: pass one element of the list that export"):
        replay(Code(first).checkout, given)


def test_history_of_another_workflow_is_refused() -> None:
    with pytest.raises(ArgumentError, match="is of workflow 'parallel', not of 'checkout'"):
        replay(Code(first).checkout, recorded())
