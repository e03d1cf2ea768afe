"""Where the code is."""

from __future__ import annotations

import asyncio
import contextvars
import threading

from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Executor, current

request = contextvars.ContextVar[str]("request")
durable = Durable()


def test_outside_a_workflow_there_is_nothing() -> None:
    assert current() is None


async def test_outside_a_workflow_there_is_nothing_in_a_task() -> None:
    assert await asyncio.create_task(_current()) is None


async def _current() -> object:
    return current()


def test_thread_of_the_users_own_is_outside_the_workflow(session_factory: sessionmaker[Session]) -> None:
    found: list[object] = []

    @durable.step
    def ask() -> bool:
        thread = threading.Thread(target=lambda: found.append(current()))
        thread.start()
        thread.join()
        return current() is not None

    @durable.workflow
    def asking() -> bool:
        return ask()

    with session_factory() as session:
        assert Executor(session).run(asking)
    assert found == [None]


def test_context_variables_of_the_caller_are_seen(session_factory: sessionmaker[Session]) -> None:
    @durable.step
    def read() -> str:
        return request.get()

    @durable.workflow
    def reading() -> str:
        return read()

    request.set("r-1")
    with session_factory() as session:
        assert Executor(session).run(reading) == "r-1"


def test_context_ends_with_an_error(session_factory: sessionmaker[Session]) -> None:
    @durable.workflow
    def failing() -> None:
        raise ValueError("no")

    with session_factory() as session:
        try:
            Executor(session).run(failing)
        except ValueError:
            assert current() is None
