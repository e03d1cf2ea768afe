"""The six stories of docs/architecture.md, traced: which files and functions of the package each passes through.

    python -m tests.stories                  # starts an embedded server
    python -m tests.stories --url URL        # uses this database, and creates its tables there
    python -m tests.stories --functions      # prints the functions too, in the order of their first call
    python -m tests.stories --write          # writes the figures into docs/architecture.md

Everything runs in one process, so what the worker does besides, such as polls and heartbeats, is counted too; in
brackets is what is left without the functions that an idle worker calls as well. The numbers vary a little from run to
run: whether a poll, a heartbeat or a hint falls into a story is a matter of time.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

import sqla_durable
import sqla_durable.asyncio as aio
from sqla_durable import Durable, Worker, Workflow, embedded, metadata
from sqla_durable.asyncio import send_signal, start_child, wait_signal

ROOT = str(Path(sqla_durable.__file__).parent) + "/"
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
IDLE = 11.0  # seconds, with polls and heartbeats
BEGIN, END = "<!-- written by python -m tests.stories --write -->", "<!-- until here -->"


@dataclass(frozen=True)
class Call:
    """One call of a function of the package.

    Attributes:
        caller: the file that calls; empty if it is not one of the package.
        file: the file of the function.
        function: its name.
    """

    caller: str
    file: str
    function: str


@dataclass(frozen=True)
class Story:
    """The calls of one story."""

    name: str
    calls: tuple[Call, ...]

    def without(self, idle: Story) -> Story:
        """Return the story without the functions that an idle worker calls as well."""
        known = set(idle.functions)
        return Story(self.name, tuple(each for each in self.calls if (each.file, each.function) not in known))

    @property
    def files(self) -> list[str]:
        """The files, in the order of their first call."""
        return list(dict.fromkeys(each.file for each in self.calls))

    @property
    def functions(self) -> list[tuple[str, str]]:
        """The functions with their files, in the order of their first call."""
        return list(dict.fromkeys((each.file, each.function) for each in self.calls))

    @property
    def arrows(self) -> int:
        """How many pairs of files call each other, counted once for each direction."""
        return len({(each.caller, each.file) for each in self.calls if each.caller and each.caller != each.file})

    def __str__(self) -> str:
        counts = f"{len(self.files)} files, {len(self.functions)} functions, {self.arrows} arrows"
        return f"{self.name}: {counts}\n    {' '.join(self.files)}"


@dataclass
class Recorder:
    """Records the calls of all threads that start after `install`, while it is switched on."""

    calls: list[Call] = field(default_factory=list[Call])
    is_on: bool = False

    def install(self) -> None:
        sys.setprofile(self._on_event)
        threading.setprofile(self._on_event)

    def uninstall(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    @contextmanager
    def recording(self) -> Any:
        self.calls.clear()
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False

    def _on_event(self, frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not self.is_on:
            return
        if not code.co_filename.startswith(ROOT) or code.co_name.startswith("<"):
            return
        caller = frame.f_back.f_code.co_filename if frame.f_back else ""
        short = caller.removeprefix(ROOT) if caller.startswith(ROOT) else ""
        self.calls.append(Call(short, code.co_filename.removeprefix(ROOT), code.co_name))


class Base(DeclarativeBase): ...


class Row(Base):
    __tablename__ = "story_row"
    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]


durable = Durable()


@durable.step
async def plain_step(value: int) -> int:
    return value + 1


@durable.step
async def transactional_step(session: AsyncSession, value: int) -> int:
    session.add(Row(value=value))
    return value


@durable.step
async def slow_step(value: int) -> int:
    await asyncio.sleep(60)
    return value


@durable.workflow
async def takes_plain_step(value: int) -> int:
    return await plain_step(value)


@durable.workflow
async def takes_transactional_step(value: int) -> int:
    return await transactional_step(value)


@durable.workflow
async def waits_for_signal(value: int) -> int:
    return await wait_signal("go", int)


@durable.workflow
async def takes_slow_step(value: int) -> int:
    return await slow_step(value)


@durable.workflow
async def child(value: int) -> int:
    return value * 2


@durable.workflow
async def starts_child(value: int) -> int:
    return await (await start_child(child, value))


async def trace(url: str) -> AsyncIterator[Story]:
    """Execute the six stories on this database; yield what an idle worker does, and each story with its calls."""
    recorder = Recorder()
    recorder.install()
    engine, async_engine = create_engine(url), create_async_engine(url)
    sessions, async_sessions = sessionmaker(engine), async_sessionmaker(async_engine)
    metadata.create_all(engine)
    Base.metadata.create_all(engine)
    try:
        started = await _start(recorder, sessions)
        worker = Worker(
            durable, sessionmaker=sessions, async_sessionmaker=async_sessions, poll_interval=timedelta(seconds=2)
        )
        async with worker:
            await asyncio.sleep(1)
            with recorder.recording():
                await asyncio.sleep(IDLE)
            yield Story("an idle worker", tuple(recorder.calls))
            yield started
            yield await _executed(recorder, async_sessions, "a worker runs a plain step", takes_plain_step)
            yield await _executed(recorder, async_sessions, "a transactional step, async", takes_transactional_step)
            name = "wait for a signal, be sent one, go on"
            yield await _executed(recorder, async_sessions, name, waits_for_signal, 1.5, _send)
            name = "a cancel reaches a running step"
            yield await _executed(
                recorder, async_sessions, name, takes_slow_step, 1.0, aio.manage.cancel, only_after=True
            )
            yield await _executed(recorder, async_sessions, "a child is started and awaited", starts_child)
    finally:
        recorder.uninstall()
        await async_engine.dispose()
        engine.dispose()


async def _start(recorder: Recorder, sessions: sessionmaker[Session]) -> Story:
    with sessions.begin() as session:
        takes_plain_step.start(session, 0)  # the schema is checked once
    with recorder.recording(), sessions.begin() as session:
        takes_plain_step.start(session, 1)
    return Story("start in a transaction", tuple(recorder.calls))


async def _executed(
    recorder: Recorder,
    sessions: async_sessionmaker[AsyncSession],
    name: str,
    workflow: Any,
    delay: float = 0.0,
    between: Callable[[AsyncSession, Workflow], Awaitable[Any]] | None = None,
    *,
    only_after: bool = False,
) -> Story:
    """Trace a workflow from its start to its outcome; with `only_after`, from what happens in between."""
    await asyncio.sleep(1)  # the worker has become idle
    async with sessions.begin() as session:
        started = await workflow.start(session, 1)
    with recorder.recording():
        if between is not None:
            await asyncio.sleep(delay)
            if only_after:
                recorder.calls.clear()
            async with sessions.begin() as session:
                await between(session, started)
        with suppress(sqla_durable.errors.WorkflowCancelledError):
            await asyncio.wait_for(workflow.handle(sessions, started).result(), 15)
    return Story(name, tuple(recorder.calls))


async def _send(session: AsyncSession, workflow: Workflow) -> None:
    await send_signal(session, workflow, "go", 7)


def table(stories: list[Story], idle: Story) -> str:
    """Return the figures of all stories, as the page shows them."""
    lines = ["| story | files | functions | arrows between files |", "| --- | ---: | ---: | ---: |"]
    for story in stories:
        own = story.without(idle)
        pairs = (
            (len(story.files), len(own.files)),
            (len(story.functions), len(own.functions)),
            (story.arrows, own.arrows),
        )
        lines.append(f"| {story.name} | " + " | ".join(f"{every} ({rest})" for every, rest in pairs) + " |")
    return "\n".join(lines)


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.stories", description=__doc__)
    parser.add_argument("--url", help="the database; by default an embedded server is started")
    parser.add_argument("--functions", action="store_true", help="print the functions too")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/architecture.md")
    given = parser.parse_args()
    server = None if given.url else embedded.server()
    try:
        idle, *stories = [story async for story in trace(given.url or (server.url if server else ""))]
    finally:
        if server is not None:
            server.stop()
    for story in stories:
        print(story, f"\n    its own: {story.without(idle)}" if given.functions else "")
        if given.functions:
            print("\n".join(f"    {file}: {function}" for file, function in story.without(idle).functions))
    if given.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(stories, idle)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    asyncio.run(main())
