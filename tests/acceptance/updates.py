"""What stories of updates share: a workflow that is asked to set an address."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import select

import sqla_durable.asyncio as aio
from sqla_durable import Event, update_handle
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.shells import AnyUpdate, AsyncShell, Shell


@dataclass
class Address:
    street: str
    country: str = "de"


@dataclass
class Saved:
    line: str


async def awaited(outcome: Any) -> Any:
    """Return the outcome of an operation, in either form."""
    return await outcome if inspect.isawaitable(outcome) else outcome


async def asked(kind: Any = Address, **options: Any) -> Any:
    return await awaited(either.wait_update("set_address", kind, **options))


def in_europe(address: Address) -> None:
    if address.country not in ("de", "fr"):
        raise ValueError(f"{address.country} is not in Europe\0\ud800")


def ask(shell: Shell, workflow: UUID, payload: object = None, **options: Any) -> AnyUpdate:
    """Send an update and commit that."""
    with shell.client() as client:
        request: AnyUpdate = client.update(workflow, "set_address", payload, **options)
        client.commit()
    return request


def send(shell: Shell, workflow: UUID, name: str) -> None:
    with shell.client() as client:
        client.signal(workflow, name)
        client.commit()


def again(shell: Shell, request: AnyUpdate, **options: Any) -> AnyUpdate:
    """Make the handle again from the ids, as another process does."""
    if isinstance(shell, AsyncShell):
        return aio.update_handle(shell.async_sessionmaker, request.workflow_id, request.id, **options)
    return update_handle(shell.sessionmaker, request.workflow_id, request.id, **options)


def keys(shell: Shell, workflow: UUID) -> list[str]:
    return [each.key for each in shell.one(workflow).steps]


def answers(shell: Shell) -> list[tuple[Any, str | None]]:
    with shell.sessionmaker() as session:
        found = session.scalars(select(Event).where(Event.key.startswith("#reply:")).order_by(Event.id))
        return [(each.value, each.step_key) for each in found]


def answering(app: Application, value: object = "saved", **options: Any) -> Any:
    """A workflow that answers one update."""

    async def answer_one() -> str:
        request = await asked(**options)
        await awaited(request.reply(value))
        return str(request.payload.street)

    return app.workflow(answer_one)
