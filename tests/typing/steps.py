"""Steps as type checkers see them: the session parameter is gone, everything else is the function's own.

A wrong call carries `type: ignore`, which both checkers report as unnecessary as soon as the call is accepted.
"""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, assert_type

import tenacity
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import (
    Durable,
    Execution,
    StepExecution,
    StepFunction,
    TransactionalStep,
    current,
    current_step,
    parallel,
    run_step,
)

durable = Durable()


@dataclass(frozen=True)
class Receipt:
    number: int


@durable.step
def reserve(session: Session, order_id: int, *, quantity: int = 1) -> Receipt:
    raise NotImplementedError


@durable.step
async def areserve(session: AsyncSession, order_id: int, *, quantity: int = 1) -> Receipt:
    raise NotImplementedError


@durable.step
def charge(order_id: int, cents: int = 0) -> Receipt:
    raise NotImplementedError


@durable.step(heartbeat_timeout=timedelta(seconds=30))
async def import_lines() -> int:
    raise NotImplementedError


@durable.step(name="acharge", stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_exponential(max=60))
async def acharge(order_id: int, cents: int = 0) -> Receipt:
    raise NotImplementedError


@durable.step(retry=tenacity.retry_if_exception_type(OSError))
def reserve_with_options(session: Session, order_id: int) -> Receipt:
    raise NotImplementedError


@durable.step(name="areserve_with_options", timeout=timedelta(seconds=5), total_timeout=timedelta(hours=1))
async def areserve_with_options(session: AsyncSession, order_id: int) -> Receipt:
    raise NotImplementedError


@durable.step
def no_arguments() -> None: ...


@durable.step
def only_session(session: Session) -> None: ...


def kinds(session: Session, async_session: AsyncSession) -> None:
    assert_type(no_arguments, StepFunction[[], None])
    assert_type(only_session, TransactionalStep[[], None])
    assert_type(import_lines, aio.AsyncStepFunction[[], int])
    as_step: StepFunction[..., Receipt] = charge
    as_async: aio.AsyncStepFunction[..., Receipt] = acharge
    as_transactional: TransactionalStep[..., Receipt] = reserve_with_options
    as_async_transactional: aio.AsyncTransactionalStep[..., Receipt] = areserve_with_options
    del as_step, as_async, as_transactional, as_async_transactional


def sync_workflow() -> None:
    assert_type(reserve(1), Receipt)
    assert_type(reserve(1, quantity=2), Receipt)
    assert_type(reserve(order_id=1), Receipt)
    assert_type(reserve_with_options(1), Receipt)
    assert_type(charge(1), Receipt)
    assert_type(charge(1, cents=2), Receipt)
    assert_type(charge.options(step_key="deposit")(1), Receipt)
    assert_type(reserve.options(step_key="first")(1, quantity=2), Receipt)
    assert_type(no_arguments(), None)
    assert_type(only_session(), None)


async def async_workflow() -> None:
    assert_type(await areserve(1), Receipt)
    assert_type(await areserve(1, quantity=2), Receipt)
    assert_type(await areserve_with_options(1), Receipt)
    assert_type(await acharge(1, 2), Receipt)
    assert_type(await acharge.options(step_key="deposit")(1), Receipt)
    assert_type(await aio.to_thread(reserve, 1, quantity=2), Receipt)
    assert_type(await aio.to_thread(charge, 1), Receipt)
    coroutine: Coroutine[Any, Any, Receipt] = acharge(1)
    assert_type(await coroutine, Receipt)


async def outside_a_workflow(session: Session, async_session: AsyncSession) -> None:
    assert_type(reserve(session, 1, quantity=2), Receipt)
    assert_type(await areserve(async_session, 1), Receipt)


def inline(fetch: Callable[[str], int]) -> None:
    def book(session: Session, cents: int) -> Receipt:
        raise NotImplementedError

    assert_type(run_step("fetch", fetch, "url"), int)
    assert_type(run_step("book", book, 5), Receipt)


async def async_inline(fetch: Callable[[str], int], afetch: Callable[[str], Coroutine[Any, Any, int]]) -> None:
    def book(session: Session, cents: int) -> Receipt:
        raise NotImplementedError

    async def abook(session: AsyncSession, cents: int) -> Receipt:
        raise NotImplementedError

    assert_type(await aio.run_step("fetch", fetch, "url"), int)
    assert_type(await aio.run_step("afetch", afetch, "url"), int)
    assert_type(await aio.run_step("book", book, 5), Receipt)
    assert_type(await aio.run_step("abook", abook, cents=5), Receipt)
    assert_type(durable.step(fetch, name="fetch")("url"), int)


def first_parameter_that_may_be_a_session(anything: Any, cents: int) -> Receipt:
    raise NotImplementedError


def limits() -> None:
    """Know a limit: a first parameter of type `Any` could take a session, so it is dropped. Annotate it better."""
    durable.step(first_parameter_that_may_be_a_session)(1)


def branches(functions: list[Callable[[], int]]) -> None:
    assert_type(parallel(lambda: charge(1), lambda: 7), tuple[Receipt, int])
    assert_type(parallel(partial(charge, 1), max_workers=1), tuple[Receipt])
    assert_type(parallel(*functions), tuple[int, ...])
    parallel(charge(1))  # type: ignore[call-overload]


def where() -> None:
    execution = current()
    assert_type(execution, Execution | None)
    if execution is not None:
        assert_type(execution.idempotency_key, str | None)
        assert_type(execution.attempt, int)
    step = current_step()
    assert_type(step, StepExecution)
    assert_type(step.step, str)
    assert_type(step.try_number, int)
    assert_type(step.idempotency_key, str)


async def wrong_calls(session: Session, async_session: AsyncSession) -> None:
    reserve("one")  # type: ignore[call-overload]
    reserve(1, amount=2)  # type: ignore[call-overload]
    reserve()  # type: ignore[call-overload]
    reserve(async_session, 1)  # type: ignore[call-overload]
    await areserve("one")  # type: ignore[call-overload]
    await areserve(session, 1)  # type: ignore[call-overload]
    await aio.to_thread(reserve, "one")  # type: ignore[arg-type]
    charge("one")  # type: ignore[arg-type]
    charge(1, 2, 3)  # type: ignore[call-arg]
    charge(1, amount=2)  # type: ignore[call-arg]
    await acharge(None)  # type: ignore[arg-type]
    await charge(1)  # type: ignore[misc]
    await aio.to_thread(acharge, 1)  # type: ignore[arg-type]
    await aio.to_thread(len, "one")  # type: ignore[arg-type]
    charge.options("deposit")  # type: ignore[call-arg]
    charge.options(kee="deposit")  # type: ignore[call-arg]
    receipt: int = charge(1)  # type: ignore[assignment]
    del receipt
    run_step("charge", charge, "one")  # type: ignore[call-overload]
    durable.step(1)  # type: ignore[call-overload]
    durable.step(stop=3)  # type: ignore[call-overload]
    durable.step(wait=timedelta(seconds=1))  # type: ignore[call-overload]
    durable.step(nme="charge")  # type: ignore[call-overload]
