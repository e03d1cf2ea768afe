"""How the code that writes or reads a blob gets at the database, and at what blocks: in its place, of either kind.

A channel's methods are coroutines; those of blocking code never suspend.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import override

from sqla_durable.api.polling import PollingEngine
from sqla_durable.api.sessions import AnySession, read, write
from sqla_durable.definitions.inspection import SessionKind
from sqla_durable.errors import UsageError
from sqla_durable.operations.calls import StepCall
from sqla_durable.runtime.context import Context
from sqla_durable.store import Connectable, schema

T = TypeVar("T")


class Channel(ABC):
    """How statements are executed, and what blocks is called."""

    commits = False
    """Whether what `within` executes is committed when it returns."""

    @abstractmethod
    async def within(self, statement: Callable[[Any], T]) -> T:
        """Execute a statement where it belongs."""

    async def alone(self, statement: Callable[[Session], T]) -> T:
        """Execute a statement on a connection of its own, and commit."""
        raise NotImplementedError

    async def block(self, function: Callable[[], T]) -> T:
        """Call what may block."""
        return function()


class _Async(Channel):
    @override
    async def block(self, function: Callable[[], T]) -> T:
        return await asyncio.to_thread(function)


class OfSession(Channel):
    """The transaction of a session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @override
    async def within(self, statement: Callable[[Session], T]) -> T:
        return read(self._session, statement, name="open_blob")


class WritingInSession(OfSession):
    """The transaction of a session, which is written in."""

    @override
    async def within(self, statement: Callable[[Session], T]) -> T:
        return write(self._session, statement, name="create_blob", rights="uploader")

    @override
    async def alone(self, statement: Callable[[Session], T]) -> T:
        with Session(schema.engine_of(self._session)) as own:
            value = statement(own)
            own.commit()
            return value


class OfAsyncSession(_Async):
    """The transaction of an `AsyncSession`."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    @override
    async def within(self, statement: Callable[[Session], T]) -> T:
        return await self._session.run_sync(read, statement, name="open_blob")


class WritingInAsyncSession(OfAsyncSession):
    """The transaction of an `AsyncSession`, which is written in."""

    @override
    async def within(self, statement: Callable[[Session], T]) -> T:
        return await self._session.run_sync(write, statement, name="create_blob", rights="uploader")

    @override
    async def alone(self, statement: Callable[[Session], T]) -> T:
        async with AsyncSession(AsyncEngine(schema.engine_of(self._session.sync_session))) as own:
            value = await own.run_sync(statement)
            await own.commit()
            return value


class OfMaker(Channel):
    """Short transactions on the engine of a sessionmaker."""

    def __init__(self, source: sessionmaker[Session]) -> None:
        self._engine = PollingEngine.of_sync(source, name="open_blob")

    @override
    async def within(self, statement: Callable[[Session], T]) -> T:
        return self._engine.read(statement)


class OfAsyncMaker(_Async):
    """Short transactions on the engine of an `async_sessionmaker`."""

    def __init__(self, source: async_sessionmaker[AsyncSession]) -> None:
        self._engine = PollingEngine.of_async(source, name="open_blob")

    @override
    async def within(self, statement: Callable[[Session], T]) -> T:
        return await self._engine.read_async(statement)


class OfStep(Channel):
    """Transactions of their own, where a plain step is executed."""

    def __init__(self, context: Context, step: StepCall, *, is_async: bool) -> None:
        self._runtime, self._position, self._is_async = context.runtime, step.position, is_async
        self.commits = context.runtime.recorder.commits

    @override
    async def within(self, statement: Callable[[Connectable], T]) -> T:
        done = self._runtime.perform_in_step(self._position, lambda runtime, _: runtime.recorder.execute(statement))
        return cast("T", await done if self._is_async else done)

    @override
    async def block(self, function: Callable[[], T]) -> T:
        return await asyncio.to_thread(function) if self._is_async else function()


def channel_of_writing(context: Context | None, session: AnySession | None, *, is_async: bool) -> Channel:
    """Return how a blob is written in this place.

    Raises:
        UsageError: it cannot be.
    """
    if context is not None and context.step is None:
        raise UsageError(
            f"create_blob() was called in the code of workflow {context.attempt.name!r}, which is executed again on "
            "each replay: call it in a step."
        )
    step = None if context is None else context.step
    if context is not None and step is not None and step.definition.session is SessionKind.NONE:
        if session is not None:
            raise UsageError(
                f"create_blob() was given a session in step {step.position.shown!r}, which is plain and writes at "
                "once: leave it out, or let the step take a Session, and pass that one."
            )
        return OfStep(context, step, is_async=is_async)
    if session is None:
        where = "outside a workflow" if step is None else f"in step {step.position.shown!r}, which is transactional,"
        raise UsageError(f"create_blob() was called {where} without a session: pass it, session=session.")
    return WritingInAsyncSession(session) if isinstance(session, AsyncSession) else WritingInSession(session)
