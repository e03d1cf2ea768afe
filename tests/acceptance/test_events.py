"""Events: what a workflow shows to others under a key."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import tenacity
from sqlalchemy import select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Workflow, current, get_event, set_event
from sqla_durable.errors import (
    ArgumentError,
    DecodingError,
    EncodingError,
    EventNotSetError,
    NotFoundError,
    PayloadTooLargeError,
    ResultTimeoutError,
    SessionError,
    UsageError,
)
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.readers import event
from tests.acceptance.shells import Shell
from tests.support.domain import Entry

pytestmark = pytest.mark.few_shells

SOON = timedelta(milliseconds=50)
SYNC_EXECUTOR = pytest.mark.shells(("executor",))


@dataclass(frozen=True)
class Place:
    shelf: int
    row: str


def _only(shell: Shell) -> UUID:
    with shell.sessionmaker() as session:
        return session.scalars(select(Workflow.id)).one()


def _history(shell: Shell) -> list[tuple[str, Any, str | None]]:
    with shell.sessionmaker() as session:
        record = session.scalars(select(Workflow)).one()
        return [(each.key, each.value, each.step_key) for each in record.events]


# behaviour: C4
def test_the_latest_value_counts_and_the_history_stays(shell: Shell, app: Application) -> None:
    async def checkout() -> None:
        await either.set_event("status", "packing")
        await either.set_event("place", Place(3, "b"))
        await either.set_event("status", None)
        await either.set_event("status", "sent")

    shell.run(app.workflow(checkout))
    assert event(shell, _only(shell), "status", wanted=str) == "sent"
    assert event(shell, _only(shell), "place", wanted=Place) == Place(3, "b")
    assert _history(shell) == [
        ("status", "packing", "set_event(status)"),
        ("place", {"row": "b", "shelf": 3}, "set_event(place)"),
        ("status", None, "set_event(status)#2"),
        ("status", "sent", "set_event(status)#3"),
    ]


# behaviour: C4 E2
def test_an_event_between_steps_is_set_exactly_once(shell: Shell, app: Application) -> None:
    async def checkout() -> str:
        await either.set_event("status", "packing")
        return "done"

    workflow = app.workflow(checkout)
    shell.run(workflow)
    shell.crashed(_only(shell))
    assert shell.finish(workflow, _only(shell)) == "done"
    assert _history(shell) == [("status", "packing", "set_event(status)")]
    assert [(each.key, each.attempt) for each in shell.one(_only(shell)).steps] == [("set_event(status)", 1)]


# behaviour: C4
def test_an_event_of_a_transactional_step_commits_with_it(shell: Shell, app: Application) -> None:
    failures = [True]

    def book(session: Session, account: str) -> None:
        session.add(Entry(account=account, cents=1))
        set_event("booked", account, session=session)
        if failures:
            failures.pop()
            raise ConnectionError("try again")

    booking = app.transactional(book, wait=tenacity.wait_none())

    async def checkout() -> None:
        await booking("a")

    shell.run(app.workflow(checkout))
    assert _history(shell) == [("booked", "a", "book")]
    with shell.sessionmaker() as session:
        assert len(session.scalars(select(Entry)).all()) == 1


def test_an_event_of_a_plain_step_is_set_at_once_and_again_by_the_next_try(shell: Shell, app: Application) -> None:
    async def charge() -> None:
        execution = current()
        assert execution is not None
        await either.set_event("try", execution.try_number)
        if execution.try_number == 1:
            raise ConnectionError("try again")

    charging = app.publishing(charge, wait=tenacity.wait_none())

    async def checkout() -> None:
        await charging()

    shell.run(app.workflow(checkout))
    assert _history(shell) == [("try", 1, "charge"), ("try", 2, "charge")]


# behaviour: C6
def test_a_value_that_cannot_be_sent_fails_the_senders_operation_only(shell: Shell, app: Application) -> None:
    app.durable.options = replace(app.durable.options, payload_limit=1_000)
    seen: list[type] = []

    async def checkout() -> str:
        for value in (object(), "\0", float("nan"), "\ud800", "x" * 2_000, Entry(account="a", cents=1)):
            try:
                await either.set_event("status", value)
            except EncodingError as error:
                seen.append(type(error))
        await either.set_event("status", "fine")
        return "went on"

    assert shell.run(app.workflow(checkout)) == "went on"
    assert [*map(_is_size, seen)] == [False, False, False, False, True, False]
    assert event(shell, _only(shell), "status") == "fine"


def _is_size(kind: type) -> bool:
    return kind is PayloadTooLargeError


# behaviour: C6
def test_a_value_that_cannot_be_sent_fails_the_workflow_with_a_clear_error(shell: Shell, app: Application) -> None:
    async def checkout() -> None:
        await either.set_event("status", object())

    with pytest.raises(EncodingError, match="value of event 'status' cannot be stored"):
        shell.run(app.workflow(checkout))


def test_a_key_that_cannot_be_stored_is_refused(shell: Shell, app: Application) -> None:
    async def checkout() -> None:
        await either.set_event(" ", 1)

    async def marked() -> None:
        await either.set_event("/" * 990, 1)  # three bytes each in the key of the operation

    with pytest.raises(ArgumentError, match="key of an event is ' '"):
        shell.run(app.workflow(checkout))
    with pytest.raises(ArgumentError, match="key of an event is '//"):
        shell.run(app.workflow(marked))


def test_a_session_belongs_to_a_transactional_step(shell: Shell, app: Application) -> None:
    async def with_session() -> None:
        await either.set_event("status", 1, session=shell.sessionmaker())

    async def plain() -> None:
        await either.set_event("status", 1, session=shell.sessionmaker())

    def forgotten(_session: Session) -> None:
        set_event("status", 1)

    in_plain, in_transaction = app.publishing(plain), app.transactional(forgotten)

    async def call_plain() -> None:
        await in_plain()

    async def call_transactional() -> None:
        await in_transaction()

    for workflow, said in (
        (app.workflow(with_session), "between steps"),
        (app.workflow(call_plain), "is plain and writes at once"),
        (app.workflow(call_transactional), "without the session of step"),
    ):
        with pytest.raises(UsageError, match=said):
            shell.run(workflow)


def test_a_finished_workflow_without_the_event_is_an_error(shell: Shell, app: Application) -> None:
    async def checkout() -> None:
        await either.set_event("status", 1)

    shell.run(app.workflow(checkout))
    with pytest.raises(EventNotSetError, match="is succeeded and has never set the event 'place'") as raised:
        event(shell, _only(shell), "place")
    assert (raised.value.workflow_id, raised.value.key) == (_only(shell), "place")
    with pytest.raises(DecodingError, match="value of event 'status'"):
        event(shell, _only(shell), "status", wanted=Place)


@pytest.mark.shells(("executor", "async-executor", "asyncpg-worker"))
def test_an_event_that_is_not_set_is_waited_for(shell: Shell, app: Application) -> None:
    async def checkout() -> None:
        await either.set_event("status", "set")

    workflow = app.workflow(checkout)
    with shell.client() as client:
        workflow_id = client.start(workflow).id
        client.flush()
        client.commit()
    with pytest.raises(ResultTimeoutError, match="has not set the event 'status'"):
        event(shell, workflow_id, "status", timeout=SOON)
    with shell.background():
        assert event(shell, workflow_id, "status") == "set"


@pytest.mark.shells(("executor", "async-executor"))
def test_an_event_of_nobody_is_refused(shell: Shell) -> None:
    with pytest.raises(NotFoundError):
        event(shell, uuid7(), "status")
    with pytest.raises(ArgumentError, match="is blank"):
        event(shell, uuid7(), "")


@SYNC_EXECUTOR
def test_a_blocking_wait_is_refused_in_an_event_loop(shell: Shell) -> None:
    async def wait() -> None:
        get_event(shell.sessionmaker, uuid7(), "status")

    with pytest.raises(UsageError):
        asyncio.run(wait())
    with pytest.raises(SessionError, match="takes a Session"):
        get_event(1, uuid7(), "status")  # type: ignore[arg-type]


async def test_outside_a_workflow_nothing_happens() -> None:
    durable = Durable()

    @durable.step
    def shown(value: str) -> str:
        set_event("status", value)
        return value

    assert shown("a") == "a"
    await aio.set_event("status", 1)


@pytest.mark.shells(("async-worker", "async-executor"))
def test_branch_sets_an_event_of_its_own(shell: Shell, app: Application) -> None:
    async def checkout() -> None:
        await asyncio.create_task(set_in_task())

    async def set_in_task() -> None:
        await aio.set_event("status", 1)

    shell.run(app.workflow(checkout))
    assert [each.key for each in shell.one(shell.only).steps] == ["set_in_task/set_event(status)"]
