"""Driving an operation without an event loop."""

from __future__ import annotations

import asyncio

import pytest

from sqla_durable.errors import UsageError
from sqla_durable.operations.runtime import run_blocking


async def _value() -> int:
    return 7


async def _nested() -> int:
    return await _value() + await _value()


async def _raises() -> int:
    raise ValueError("no")


def test_operation_that_never_suspends_is_driven_to_its_end() -> None:
    assert run_blocking(_nested()) == 14


def test_error_of_the_operation_is_raised() -> None:
    with pytest.raises(ValueError, match="no"):
        run_blocking(_raises())


def test_operation_that_suspends_is_a_clear_error_and_is_closed() -> None:
    closed: list[bool] = []

    async def suspends() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            closed.append(True)

    with pytest.raises(UsageError, match="async code was called from a sync workflow or step: make the workflow"):
        run_blocking(suspends())
    assert closed == [True]
