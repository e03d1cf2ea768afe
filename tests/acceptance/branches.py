"""What stories about branches of a workflow share: branches in either form, their steps, and their keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from sqla_durable import Step, parallel
from tests.acceptance.application import Application, Form, drive
from tests.acceptance.shells import Shell
from tests.support.domain import Entry

on_loop = pytest.mark.shells(["async-executor", "async-joined", "async-worker"])
in_threads = pytest.mark.shells(["executor", "joined", "worker"])
on_workers = pytest.mark.shells(["worker", "async-worker"])
Branch = Callable[[], Coroutine[Any, Any, Any]]


async def beside(app: Application, *branches: Branch) -> list[Any]:
    """Execute branches beside each other, in either form, all to their ends; then raise the first error."""
    if app.form is Form.ASYNC:
        found = await asyncio.gather(*(each() for each in branches), return_exceptions=True)
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found
    return list(parallel(*map(_driven, branches)))


def _driven(branch: Branch) -> Callable[[], Any]:
    def driven() -> Any:
        return drive(branch())

    driven.__qualname__ = branch.__qualname__
    return driven


def keys(shell: Shell, workflow_id: UUID) -> list[str]:
    return sorted(each.key for each in shell.one(workflow_id).steps)


def the_keys(shell: Shell) -> list[str]:
    with shell.sessionmaker() as session:
        return sorted(session.scalars(select(Step.key)))


def reserve(session: Session, cents: int) -> int:
    session.add(Entry(account="a", cents=cents))
    return cents


def double(cents: int) -> int:
    return 2 * cents


def same(cents: int) -> int:
    return cents


def refuse_odd(number: int) -> int:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number


def named(name: str, branch: Branch) -> Branch:
    async def called() -> Any:
        return await branch()

    called.__qualname__ = name
    return called
