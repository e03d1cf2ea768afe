"""Batch steps: one call for what many workflows ask for, and an outcome for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import tenacity
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Step, Worker, manage, start_many
from sqla_durable.errors import ArgumentError, DefinitionError
from tests.acceptance.shells import PATIENCE, POLL
from tests.store.races import wait_until

LONG = timedelta(minutes=5)
SHORT = timedelta(milliseconds=20)


class Doubling:
    """Workflows whose step doubles numbers in batches, and notes the batches."""

    def __init__(self, *, is_async: bool, size: int, within: timedelta, **options: Any) -> None:
        self.durable = Durable()
        self.batches: list[list[int]] = []
        self.entered: list[int] = []
        self.left: list[int] = []
        self.is_async = is_async

        def double(numbers: list[int]) -> list[int]:
            self.batches.append(numbers)
            return self.results(numbers)

        async def double_async(numbers: list[int]) -> list[int]:
            self.batches.append(numbers)
            await asyncio.sleep(0)
            return self.results(numbers)

        decorator = self.durable.batch_step(size=size, within=within, name="double", **options)
        step = decorator(double)
        async_step = self.durable.batch_step(size=size, within=within, name="double_async", **options)(double_async)

        def work(number: int) -> int:
            return step(number)

        async def work_async(number: int) -> int:
            self.entered.append(number)
            try:
                return int(await async_step(number))
            finally:
                self.left.append(number)

        self.work: Any = self.durable.workflow(work_async) if is_async else self.durable.workflow(work)

    def results(self, numbers: list[int]) -> list[Any]:
        return [2 * each for each in numbers]

    def outcomes(self, maker: sessionmaker[Session], makers: dict[str, Any], count: int, **options: Any) -> list[Any]:
        with maker.begin() as session:
            ids = start_many(session, [self.work.bind(number) for number in range(count)])
        with Worker(self.durable, **makers, poll_interval=POLL, **options):
            return [self.outcome(maker, each) for each in ids]

    def outcome(self, maker: sessionmaker[Session], workflow_id: Any) -> Any:
        try:
            return self.work.handle(maker, workflow_id).result(timeout=PATIENCE)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


@pytest.fixture
def makers(
    session_factory: sessionmaker[Session], async_session_factory: async_sessionmaker[AsyncSession]
) -> dict[str, Any]:
    return {"sessionmaker": session_factory, "async_sessionmaker": async_session_factory}


@pytest.mark.parametrize("is_async", [True, False])
def test_a_full_batch_is_one_call_with_an_outcome_for_each(
    session_factory: sessionmaker[Session], makers: dict[str, Any], is_async: bool
) -> None:
    doubling = Doubling(is_async=is_async, size=10, within=LONG)
    outcomes = doubling.outcomes(session_factory, makers, 30, concurrency=30)
    assert outcomes == [2 * number for number in range(30)]
    assert [len(each) for each in doubling.batches] == [10, 10, 10]
    with session_factory() as session:
        recorded: list[Any] = [*session.scalars(select(Step.output))]
    assert sorted(recorded) == sorted(outcomes)


@pytest.mark.parametrize("is_async", [True, False])
def test_what_came_within_the_time_is_a_batch_too(
    session_factory: sessionmaker[Session], makers: dict[str, Any], is_async: bool
) -> None:
    doubling = Doubling(is_async=is_async, size=1_000, within=SHORT)
    assert doubling.outcomes(session_factory, makers, 5) == [0, 2, 4, 6, 8]
    assert sorted(number for each in doubling.batches for number in each) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("is_async", [True, False])
def test_an_exception_in_the_list_is_the_outcome_of_its_item_and_one_that_is_raised_that_of_all(
    session_factory: sessionmaker[Session], makers: dict[str, Any], is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubling = Doubling(is_async=is_async, size=3, within=LONG)

    def refuse_one(numbers: list[int]) -> list[int | ValueError]:
        return [ValueError(f"no {each}") if each == 1 else each for each in numbers]

    monkeypatch.setattr(doubling, "results", refuse_one)
    assert doubling.outcomes(session_factory, makers, 3) == [0, "ValueError: no 1", 2]

    def refuse(numbers: list[int]) -> list[int]:
        raise ValueError("none of them")

    monkeypatch.setattr(doubling, "results", refuse)
    assert doubling.outcomes(session_factory, makers, 3) == ["ValueError: none of them"] * 3


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize(("returned", "shown"), [([1], "1 results"), (None, "None"), ("ab", "'ab'")])
def test_another_number_of_results_is_refused(
    session_factory: sessionmaker[Session],
    makers: dict[str, Any],
    is_async: bool,
    returned: Sequence[int],
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    doubling = Doubling(is_async=is_async, size=2, within=LONG)

    def answer(_: list[int]) -> Sequence[int]:
        return returned

    monkeypatch.setattr(doubling, "results", answer)
    first, second = doubling.outcomes(session_factory, makers, 2)
    assert first == second
    assert f"was given 2 items and returned {shown}: return a list with one result" in first


@pytest.mark.parametrize("is_async", [True, False])
def test_a_retry_is_in_another_batch(
    session_factory: sessionmaker[Session], makers: dict[str, Any], is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = {"stop": tenacity.stop_after_attempt(3), "wait": tenacity.wait_none()}
    doubling = Doubling(is_async=is_async, size=100, within=SHORT, **policy)
    tries: dict[int, int] = {}

    def sometimes(numbers: list[int]) -> list[Any]:
        for each in numbers:
            tries[each] = tries.get(each, 0) + 1
        return [ValueError("later") if each % 2 and tries[each] < 3 else each for each in numbers]

    monkeypatch.setattr(doubling, "results", sometimes)
    assert doubling.outcomes(session_factory, makers, 4) == [0, 1, 2, 3]
    assert tries == {0: 1, 1: 3, 2: 1, 3: 3}


def test_one_that_is_cancelled_leaves_the_others_alone(
    session_factory: sessionmaker[Session], makers: dict[str, Any]
) -> None:
    doubling = Doubling(is_async=True, size=3, within=LONG)
    with session_factory.begin() as session:
        first = doubling.work.start(session, 0).id
    with Worker(doubling.durable, **makers, poll_interval=POLL):
        wait_until(lambda: doubling.entered == [0])  # cancelled before, it would enter nothing
        with session_factory.begin() as session:
            manage.cancel(session, first)
        wait_until(lambda: doubling.left == [0])
        with session_factory.begin() as session:
            others = start_many(session, [doubling.work.bind(number) for number in (1, 2, 3)])
        assert [doubling.outcome(session_factory, each) for each in others] == [2, 4, 6]
    assert all(0 not in each for each in doubling.batches)


def test_outside_a_workflow_it_is_the_function_of_one_item() -> None:
    @Durable().batch_step(size=2, within=SHORT)
    def increment(numbers: list[int]) -> list[int]:
        return [number + 1 for number in numbers]

    assert increment(1) == 2
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(increment, range(4))) == [1, 2, 3, 4]


def test_what_cannot_be_a_batch_step_is_refused() -> None:
    durable = Durable()
    make: Any = durable.batch_step

    def write(session: Session, numbers: list[int]) -> list[int]:
        return numbers

    def increment(numbers: list[int]) -> list[int]:
        return numbers

    def one(text: str) -> int:
        return len(text)

    def result(texts: list[str]) -> int:
        return len(texts)

    def two(texts: list[str], model: str) -> list[int]:
        return [len(text + model) for text in texts]

    def untyped(texts, model=None):  # type: ignore[no-untyped-def]
        return texts  # pyright: ignore[reportUnknownVariableType]

    def loose(texts: Iterable[str]) -> tuple[int, ...]:
        return tuple(map(len, texts))

    functions: list[Callable[[list[int]], list[int]]] = [lambda numbers: numbers]
    (nameless,) = functions
    for each in one, result, two:
        with pytest.raises(DefinitionError, match=r"is a function \(text.*: take one list of items"):
            make(size=2)(each)
    make(size=2)(untyped)
    make(size=2)(loose)
    with pytest.raises(DefinitionError, match="takes a session, whose transaction would be that of many workflows"):
        make(size=2)(write)
    with pytest.raises(DefinitionError, match="has no name to record it by"):
        make(size=2)(nameless)
    for size in (1, 0, -1, 1.5, None):
        with pytest.raises(ArgumentError, match="is no size of a batch: pass 2 or more"):
            make(size=size)(increment)
    with pytest.raises(ArgumentError, match="within"):
        make(size=2, within=timedelta())(increment)
    with pytest.raises(DefinitionError, match="batch_step is a method of a Durable object"):
        Durable.batch_step(make, size=2)


@pytest.mark.parametrize("is_async", [True, False])
def test_an_error_that_no_future_can_hold_is_the_outcome_of_its_item(
    session_factory: sessionmaker[Session], makers: dict[str, Any], is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubling = Doubling(is_async=is_async, size=3, within=LONG)

    def results(numbers: list[int]) -> list[Any]:
        return [StopIteration(number) if number == 0 else number for number in numbers]

    monkeypatch.setattr(doubling, "results", results)
    outcomes = doubling.outcomes(session_factory, makers, 3)
    assert outcomes == ["RuntimeError: coroutine raised StopIteration", 1, 2]


@pytest.mark.parametrize("is_async", [True, False])
def test_a_call_that_exits_ends_no_worker(
    session_factory: sessionmaker[Session], makers: dict[str, Any], is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(numbers: list[int]) -> list[int]:
        raise SystemExit(1)

    doubling = Doubling(is_async=is_async, size=2, within=LONG)
    monkeypatch.setattr(doubling, "results", leave)
    assert all("failed with builtins:SystemExit: 1" in each for each in doubling.outcomes(session_factory, makers, 2))


@pytest.mark.parametrize("is_async", [True, False])
def test_each_item_has_the_traceback_of_its_own_failure_only(
    session_factory: sessionmaker[Session], makers: dict[str, Any], is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(numbers: list[int]) -> list[int]:
        raise ValueError("none of them")

    doubling = Doubling(is_async=is_async, size=8, within=LONG)
    monkeypatch.setattr(doubling, "results", refuse)
    doubling.outcomes(session_factory, makers, 8)
    with session_factory() as session:
        tracebacks = [each["traceback"] for each in session.scalars(select(Step.error)) if each is not None]
    assert len(tracebacks) == 8
    assert {each.count("in refuse") for each in tracebacks} == {1}
    assert max(each.count(", in call\n") for each in tracebacks) <= 1


def test_a_call_that_nobody_waits_for_any_more_is_cancelled(
    session_factory: sessionmaker[Session], makers: dict[str, Any]
) -> None:
    """As the function of a step is at its time limit."""
    durable = Durable()
    cancelled: list[list[int]] = []

    @durable.batch_step(size=2, within=SHORT, timeout=timedelta(milliseconds=300))
    async def hang(numbers: list[int]) -> list[int]:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(numbers)
        return numbers

    @durable.workflow
    async def work(number: int) -> int:
        return await hang(number)

    with session_factory.begin() as session:
        ids = start_many(session, [work.bind(number) for number in range(2)])
    with Worker(durable, **makers, poll_interval=POLL):
        for each in ids:
            with pytest.raises(Exception, match="time"):
                work.handle(session_factory, each).result(timeout=PATIENCE)
        wait_until(lambda: cancelled)
    assert sorted(number for each in cancelled for number in each) == [0, 1]


def test_what_the_function_does_to_its_list_changes_no_count(
    session_factory: sessionmaker[Session], makers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    doubling = Doubling(is_async=False, size=3, within=LONG)

    def results(numbers: list[int]) -> list[Any]:
        return [2 * numbers.pop(0) for _ in range(len(numbers))]

    monkeypatch.setattr(doubling, "results", results)
    assert doubling.outcomes(session_factory, makers, 3) == [0, 2, 4]
