"""What type checkers know of updates; see `test_typing`."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, assert_type
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import (
    BoundWorkflow,
    Durable,
    UpdateHandle,
    UpdateRequest,
    Workflow,
    send_update,
    start_with_update,
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
    request.reply(Saved("Elm"), session=session)
    request.reject("too late", session=session)


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
    wait_update("number", int, timeout=3)  # type: ignore[arg-type]
    request.reject()  # type: ignore[call-arg]
    request.reject(7)  # type: ignore[arg-type]


@durable.workflow
async def amoving() -> None:
    request = await aio.wait_update("set_address", Address, validate=is_known)
    assert_type(request, aio.AsyncUpdateRequest[Address])
    assert_type(await aio.wait_update("anything"), aio.AsyncUpdateRequest[Any])
    await request.reply(Saved("Elm"))
    assert_type(request.sync_request, UpdateRequest[Address])


def sending(maker: sessionmaker[Session], session: Session, workflow: Workflow, bound: BoundWorkflow) -> None:
    request = send_update(session, workflow, "set_address", Address("Elm"), reply=Saved, key="once")
    assert_type(request, UpdateHandle[Saved])
    assert_type(request.result(timeout=timedelta(seconds=1)), Saved)
    assert_type(send_update(session, workflow.id, "set_address"), UpdateHandle[Any])
    assert_type(start_with_update(session, bound, "add", 1, reply=int), tuple[Workflow, UpdateHandle[int]])
    assert_type(update_handle(maker, UUID(int=0), 7, reply=Saved), UpdateHandle[Saved])
    send_update(session, [workflow], "set_address")  # type: ignore[arg-type]
    send_update(maker, workflow, "set_address")  # type: ignore[arg-type]
    update_handle(maker, workflow, "7")  # type: ignore[arg-type]


async def asending(maker: async_sessionmaker[AsyncSession], session: AsyncSession, workflow: Workflow) -> None:
    request = await aio.send_update(session, workflow, "set_address", Address("Elm"), reply=Saved)
    assert_type(request, aio.AsyncUpdateHandle[Saved])
    assert_type(await request.result(), Saved)
    assert_type(await request, Saved)
    assert_type(await aio.send_update(session, workflow, "set_address"), aio.AsyncUpdateHandle[Any])
    assert_type(aio.update_handle(maker, workflow, request.id, reply=Saved), aio.AsyncUpdateHandle[Saved])


async def wrong_namespace(session: Session, async_session: AsyncSession, workflow: Workflow) -> None:
    send_update(async_session, workflow, "set_address")  # type: ignore[arg-type]
    await aio.send_update(session, workflow, "set_address")  # type: ignore[arg-type]
    await wait_update("set_address")  # type: ignore[misc]
