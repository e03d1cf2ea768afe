"""What type checkers know of updates; see `test_typing`."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, assert_type
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import (
    AsyncUpdate,
    BoundWorkflow,
    Durable,
    Update,
    UpdateRequest,
    Workflow,
    start_with_update,
    update,
    update_handle,
    wait_update,
)

durable = Durable()


@dataclass
class Address:
    street: str


@dataclass
class Saved:
    line: str


def in_europe(address: Address) -> None: ...


async def is_known(address: Address) -> bool:
    return bool(address.street)


@durable.step
def save(session: Session, request: UpdateRequest[Address]) -> None:
    assert_type(request.payload, Address)
    assert_type(request.reply(session, Saved("Elm")), Awaitable[None])
    request.reject(session, "too late")


@durable.workflow
def moving() -> None:
    request = wait_update("set_address", Address, validate=in_europe, timeout=timedelta(days=1))
    assert_type(request, UpdateRequest[Address])
    assert_type(wait_update("anything"), UpdateRequest[Any])
    save(request)
    request.reply()
    request.reply(Saved("Elm"))
    request.reject("no")
    wait_update("number", int, validate=in_europe)  # type: ignore[arg-type]
    wait_update("number", int, timeout=3)  # type: ignore[call-overload]
    request.reject()  # type: ignore[call-overload]
    request.reject(7)  # type: ignore[call-overload]


@durable.workflow
async def amoving() -> None:
    request = await wait_update.aio("set_address", Address, validate=is_known)
    assert_type(request, UpdateRequest[Address])
    await request.reply(Saved("Elm"))


def sending(maker: sessionmaker[Session], session: Session, workflow: Workflow, bound: BoundWorkflow) -> None:
    request = update(session, workflow, "set_address", Address("Elm"), reply=Saved, key="once")
    assert_type(request, Update[Saved])
    assert_type(request.result(timeout=timedelta(seconds=1)), Saved)
    assert_type(update(session, workflow.id, "set_address"), Update[Any])
    assert_type(start_with_update(session, bound, "add", 1, reply=int), tuple[Workflow, Update[int]])
    assert_type(update_handle(maker, UUID(int=0), 7, reply=Saved), Update[Saved])
    update(session, [workflow], "set_address")  # type: ignore[call-overload]
    update(maker, workflow, "set_address")  # type: ignore[call-overload]
    update_handle(maker, workflow, "7")  # type: ignore[call-overload]


async def asending(maker: async_sessionmaker[AsyncSession], session: AsyncSession, workflow: Workflow) -> None:
    request = await update(session, workflow, "set_address", Address("Elm"), reply=Saved)
    assert_type(request, AsyncUpdate[Saved])
    assert_type(await request.result(), Saved)
    assert_type(await request, Saved)
    assert_type(await update(session, workflow, "set_address"), AsyncUpdate[Any])
    assert_type(update_handle(maker, workflow, request.id, reply=Saved), AsyncUpdate[Saved])
