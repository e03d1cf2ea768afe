"""Streams: what a workflow writes item by item, and others read meanwhile."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import tenacity
from sqlalchemy import select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

import sqla_durable.asyncio as aio
from sqla_durable import StreamItem, Workflow, WorkflowStatus, current, manage, read_stream, write_stream
from sqla_durable.errors import (
    ArgumentError,
    DecodingError,
    EncodingError,
    NotFoundError,
    ResultTimeoutError,
    UsageError,
)
from tests.acceptance import either
from tests.acceptance.application import AnyWorkflow, Application, Form
from tests.acceptance.readers import PATIENCE, stream, values
from tests.acceptance.shells import AsyncShell, Shell
from tests.store import races

pytestmark = pytest.mark.few_shells

SOON = timedelta(milliseconds=50)


def _only(shell: Shell) -> UUID:
    with shell.sessionmaker() as session:
        return session.scalars(select(Workflow.id)).one()


def _start(shell: Shell, workflow: AnyWorkflow[..., Any]) -> UUID:
    with shell.client() as client:
        workflow_id: UUID = client.start(workflow).id
        client.flush()
        client.commit()
    return workflow_id


# behaviour: C5
def test_items_have_numbers_without_gaps_and_the_attempt_that_wrote_them(shell: Shell, app: Application) -> None:
    def book(session: Session) -> None:
        write_stream("log", "booked", session=session)

    async def charge() -> None:
        await either.write_stream("log", "one", "two")
        await either.write_stream("other", [1])

    booking, charging = app.transactional(book), app.publishing(charge)

    async def checkout() -> None:
        await either.write_stream("log", "begun")
        await booking()
        await charging()
        await either.write_stream("log", None)

    shell.run(app.workflow(checkout))
    entries = stream(shell, _only(shell), "log")
    assert [(each.number, each.value, each.step_key, each.attempt, each.try_number) for each in entries] == [
        (0, "begun", "write_stream(log)", 1, None),
        (1, "booked", "book", 1, 1),
        (2, "one", "charge", 1, 1),
        (3, "two", "charge", 1, 1),
        (4, None, "write_stream(log)#2", 1, None),
    ]
    assert values(stream(shell, _only(shell), "log", start=3)) == ["two", None]
    assert values(stream(shell, _only(shell), "other", wanted=list[int])) == [[1]]
    assert stream(shell, _only(shell), "nobody's") == []


# behaviour: C5 E2
def test_between_steps_an_item_is_written_exactly_once(shell: Shell, app: Application) -> None:
    async def checkout() -> str:
        await either.write_stream("log", 1, 2)
        await either.close_stream("log")
        return "done"

    workflow = app.workflow(checkout)
    shell.run(workflow)
    shell.crashed(_only(shell))
    assert shell.finish(workflow, _only(shell)) == "done"
    assert values(stream(shell, _only(shell), "log")) == [1, 2]
    assert [each.key for each in shell.one(_only(shell)).steps] == ["write_stream(log)", "close_stream(log)"]


# behaviour: C5
@pytest.mark.shells(("executor", "async-executor", "asyncpg-worker", "mixed-worker"))
def test_a_plain_steps_stream_is_read_while_the_step_runs(shell: Shell, app: Application) -> None:
    read_one = threading.Event()

    async def answer() -> None:
        await either.write_stream("answer", "first")
        if app.form is Form.ASYNC:
            await asyncio.to_thread(read_one.wait)
        else:
            read_one.wait()
        await either.write_stream("answer", "second")

    answering = app.publishing(answer)

    async def agent() -> None:
        await answering()

    workflow_id = _start(shell, app.workflow(agent))
    with shell.background():
        if isinstance(shell, AsyncShell):
            read = shell.runner.run(_read_one_then_all(shell, workflow_id, read_one))
        else:
            entries = read_stream(shell.sessionmaker, workflow_id, "answer", str, timeout=PATIENCE)
            read = [next(entries).value]
            read_one.set()
            read += [each.value for each in entries]
    assert read == ["first", "second"]


async def _read_one_then_all(shell: AsyncShell, workflow_id: UUID, read_one: threading.Event) -> list[str]:
    read: list[str] = []
    async for entry in aio.read_stream(shell.async_sessionmaker, workflow_id, "answer", str, timeout=PATIENCE):
        read.append(entry.value)
        read_one.set()
    return read


@pytest.mark.shells(("async-executor", "async-worker", "asyncpg-worker"))
def test_a_sync_step_of_an_async_workflow_writes_from_its_thread(shell: Shell, app: Application) -> None:
    @app.durable.step
    def in_thread() -> None:
        write_stream("log", "thread")
        asyncio.run(inner())

    async def inner() -> None:
        await aio.write_stream("log", "loop in the thread")

    @app.durable.step
    async def by_the_way() -> None:
        await asyncio.to_thread(write_stream, "log", "thread of an async step")

    async def agent() -> None:
        await aio.to_thread(in_thread)
        await by_the_way()

    shell.run(app.workflow(agent))
    assert values(stream(shell, _only(shell), "log")) == ["thread", "loop in the thread", "thread of an async step"]


@pytest.mark.shells(("async-executor", "async-worker"))
def test_a_write_from_another_event_loop_is_awaited(shell: Shell, app: Application) -> None:
    @app.durable.step
    def in_thread() -> str:
        return asyncio.run(inner())

    async def inner() -> str:
        await aio.close_stream("log")
        with pytest.raises(UsageError, match="closed"):
            await aio.write_stream("log", "late")
        return "refused"

    async def agent() -> str:
        return await aio.to_thread(in_thread)

    assert shell.run(app.workflow(agent)) == "refused"


@pytest.mark.shells(("async-executor", "async-joined", "async-worker", "asyncpg-worker"))
def test_steps_that_write_at_the_same_time_take_turns(shell: Shell, app: Application) -> None:
    @app.durable.step
    async def count(upto: int) -> None:
        for number in range(upto):
            await aio.write_stream("log", number, -number)

    async def agent() -> None:
        await asyncio.gather(*(count(10) for _ in range(8)))

    shell.run(app.workflow(agent))
    entries = stream(shell, _only(shell), "log")
    assert [each.number for each in entries] == list(range(160))
    for key in {each.step_key for each in entries}:
        assert [each.value for each in entries if each.step_key == key] == [
            each for number in range(10) for each in (number, -number)
        ]


def test_items_of_a_failed_try_are_marked_and_a_stream_that_it_closed_goes_on(shell: Shell, app: Application) -> None:
    async def answer() -> None:
        execution = current()
        assert execution is not None
        await either.write_stream("answer", f"try {execution.try_number}")
        await either.close_stream("answer")
        if execution.try_number == 1:
            raise ConnectionError("try again")

    answering = app.publishing(answer, wait=tenacity.wait_none())

    async def agent() -> None:
        await answering()

    shell.run(app.workflow(agent))
    entries = stream(shell, _only(shell), "answer")
    assert [(each.number, each.value, each.try_number) for each in entries] == [(0, "try 1", 1), (2, "try 2", 2)]


# behaviour: C5
def test_a_closed_stream_is_closed(shell: Shell, app: Application) -> None:
    async def late() -> None:
        await either.write_stream("log", 2)

    writing = app.publishing(late)

    async def agent() -> str:
        await either.write_stream("log", 1)
        await either.close_stream("log")
        with pytest.raises(UsageError, match="the stream 'log' is closed"):
            await either.write_stream("log", 2)
        with pytest.raises(UsageError, match="the stream 'log' is closed"):
            await writing()
        return "went on"

    assert shell.run(app.workflow(agent)) == "went on"
    assert values(stream(shell, _only(shell), "log")) == [1]
    assert stream(shell, _only(shell), "log", start=2) == []


def test_a_stream_is_closed_twice_without_harm(shell: Shell, app: Application) -> None:
    async def closing() -> None:
        await either.write_stream("log", 1)
        await either.close_stream("log")
        await either.close_stream("log")

    closed = app.publishing(closing)

    async def agent() -> str:
        await closed()
        await either.close_stream("log")
        await either.close_stream("log")
        return "done"

    workflow = app.workflow(agent)
    assert shell.run(workflow) == "done"
    shell.crashed(_only(shell))
    assert shell.finish(workflow, _only(shell)) == "done"
    assert values(stream(shell, _only(shell), "log")) == [1]


# behaviour: C5
@pytest.mark.shells(("executor", "async-executor", "worker"))
def test_a_reader_ends_when_the_stream_is_closed_and_when_the_workflow_ends(shell: Shell, app: Application) -> None:
    go_on = threading.Event()

    async def hold() -> None:
        if app.form is Form.ASYNC:
            await asyncio.to_thread(go_on.wait)
        else:
            go_on.wait()

    holding = app.publishing(hold)

    async def agent() -> None:
        await either.write_stream("closed", 1)
        await either.close_stream("closed")
        await either.write_stream("open", 1)
        await holding()
        await either.write_stream("open", *range(2, 1_200))

    workflow_id = _start(shell, app.workflow(agent))
    with shell.background():
        assert values(stream(shell, workflow_id, "closed")) == [1]
        assert stream(shell, workflow_id, "closed", start=2) == []
        with pytest.raises(ResultTimeoutError, match=r"has no item [01]"):
            stream(shell, workflow_id, "open", timeout=SOON)
        go_on.set()
        assert values(stream(shell, workflow_id, "open")) == list(range(1, 1_200))


@pytest.mark.shells(("worker", "async-worker"))
def test_a_cancelled_workflow_writes_nothing_more_and_its_readers_end(shell: Shell, app: Application) -> None:
    go_on = threading.Event()
    written: list[int] = []

    async def answer() -> None:
        await either.write_stream("answer", 1)
        if app.form is Form.ASYNC:
            await asyncio.to_thread(go_on.wait)
        else:
            go_on.wait()
        await either.write_stream("answer", 2)
        written.append(2)

    answering = app.publishing(answer)

    async def agent() -> None:
        await answering()

    workflow_id = _start(shell, app.workflow(agent))
    with shell.background():
        with shell.sessionmaker() as session:
            wanted = select(StreamItem.number).where(StreamItem.workflow_id == workflow_id)
            races.wait_until(lambda: _seen(session, wanted))
        with shell.sessionmaker.begin() as session:
            assert manage.cancel(session, workflow_id) == [workflow_id]
        go_on.set()
        assert values(stream(shell, workflow_id, "answer")) == [1]
    assert written == []
    assert shell.one(workflow_id).status is WorkflowStatus.CANCELLED


def _seen(session: Session, wanted: Any) -> bool:
    session.rollback()
    return session.scalars(wanted).first() is not None


# behaviour: C6
def test_an_item_that_cannot_be_sent_fails_the_senders_operation_only(shell: Shell, app: Application) -> None:
    async def answer() -> str:
        with pytest.raises(EncodingError, match="item of stream 'log' cannot be stored"):
            await either.write_stream("log", "fine", object())
        with pytest.raises(ArgumentError, match="has no value"):
            await either.write_stream("log")
        with pytest.raises(TypeError, match="positional argument"):
            await either.close_stream("log", 1)
        await either.write_stream("log", "fine")
        return "went on"

    answering = app.publishing(answer)

    async def agent() -> str:
        await answer()
        return await answering()

    assert shell.run(app.workflow(agent)) == "went on"
    assert values(stream(shell, _only(shell), "log")) == ["fine", "fine"]
    with pytest.raises(DecodingError, match="item of stream 'log'"):
        stream(shell, _only(shell), "log", wanted=int)


@pytest.mark.shells(("executor", "async-executor"))
def test_what_cannot_be_read_is_refused(shell: Shell) -> None:
    with pytest.raises(NotFoundError):
        stream(shell, uuid7(), "log")
    with pytest.raises(ArgumentError, match="negative"):
        stream(shell, uuid7(), "log", start=-1)
    with pytest.raises(ArgumentError, match="is blank"):
        stream(shell, uuid7(), " ")
