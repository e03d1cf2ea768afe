"""Random workflows of branches in branches, what their steps' keys must be, and a gate that decides how fast each is.

A program is executed with every live branch brought to a gate before one of them goes on: the order in which steps end
is drawn, and nothing depends on the machine.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from hypothesis import strategies as st

from sqla_durable import current, parallel
from tests.acceptance.application import Form, drive


@dataclass(frozen=True)
class Call:
    """A call of a step."""

    step: str


@dataclass(frozen=True)
class Together:
    """Calls of steps that are awaited together, in the branch that makes them."""

    steps: tuple[str, ...]


@dataclass(frozen=True)
class Fork:
    """Branches, each of a name and a block."""

    branches: tuple[tuple[str, Block], ...]


Block: TypeAlias = "tuple[Call | Together | Fork, ...]"
STEPS = ("a", "b")
_calls = st.builds(Call, st.sampled_from(STEPS))
_togethers = st.builds(Together, st.lists(st.sampled_from(STEPS), min_size=1, max_size=3).map(tuple))
_leaves = st.lists(_calls | _togethers, max_size=3).map(tuple)


def _forks(blocks: st.SearchStrategy[Block]) -> st.SearchStrategy[Block]:
    named = st.tuples(st.sampled_from(["x", "y"]), blocks)
    forks = st.builds(Fork, st.lists(named, min_size=1, max_size=3).map(tuple))
    return st.lists(_calls | _togethers | forks, min_size=1, max_size=3).map(tuple)


programs: st.SearchStrategy[Block] = _forks(st.recursive(_leaves, _forks, max_leaves=6))


def expected(block: Block, path: str = "") -> list[Any]:
    """Return what a program must return: the keys of its steps, by the rule and not by the code that is tested."""
    steps, branches = Counter[str](), Counter[str]()

    def key(counter: Counter[str], name: str) -> str:
        counter[name] += 1
        occurrence = "" if counter[name] == 1 else f"#{counter[name]}"
        return f"{path}{name}{occurrence}"

    found: list[Any] = []
    for node in block:
        match node:
            case Call(step):
                found.append(key(steps, step))
            case Together(names):
                found.append([key(steps, name) for name in names])
            case Fork(forked):
                found.append([expected(inner, key(branches, name) + "/") for name, inner in forked])
    return found


def leaves(found: Any) -> Iterator[str]:
    """Yield the keys in what a program returns."""
    if isinstance(found, str):
        yield found
    else:
        for each in found:
            yield from leaves(each)


class PowerCut(BaseException):
    """Ends an attempt in the middle of its steps."""


@dataclass
class Gate:
    """Where steps wait until every live branch has come, or has ended; then one of them goes on, as drawn.

    Args:
        order: which of those that wait goes on next, again and again.
        kills: after how many steps since the last time everything is killed.
    """

    order: list[int]
    kills: list[int]
    executed: Counter[str] = field(default_factory=Counter[str])

    def __post_init__(self) -> None:
        self._choices = itertools.cycle(self.order or [0])
        self._changed = threading.Condition()

    def begin(self) -> None:
        """Begin another attempt."""
        with self._changed:
            self.live = 1
            self._waiting: dict[str, Callable[[], None]] = {}
            self._until_kill = self.kills.pop(0) if self.kills else None
            self.killed = False

    def change_live(self, by: int) -> None:
        """Count branches that begin or end."""
        with self._changed:
            self.live += by
            self._release_next()

    def step(self) -> str:
        """Wait in a thread."""
        gone = threading.Event()
        key = self._arrive(gone.set)
        assert gone.wait(60)
        return self._leave(key)

    async def astep(self) -> str:
        """Wait in a task."""
        gone = asyncio.Event()
        key = self._arrive(gone.set)
        await gone.wait()
        return self._leave(key)

    def _arrive(self, go: Callable[[], None]) -> str:
        execution = current()
        assert execution is not None
        assert execution.step is not None
        with self._changed:
            self._waiting[execution.step] = go
            self._release_next()
        return execution.step

    def _leave(self, key: str) -> str:
        if self.killed:
            raise PowerCut
        self.executed[key] += 1
        return key

    def _release_next(self) -> None:
        if self.killed:
            going = list(self._waiting)
        elif self._waiting and len(self._waiting) == self.live:
            if self._until_kill == 0:
                self.killed = True
                going = list(self._waiting)
            else:
                waiting = sorted(self._waiting)
                going = [waiting[next(self._choices) % len(waiting)]]
                self._until_kill = None if self._until_kill is None else self._until_kill - 1
        else:
            return
        for each in going:
            self._waiting.pop(each)()


class Interpreter:
    """Executes programs as workflow code, of either form."""

    def __init__(self, form: Form, gate: Gate, steps: dict[str, Any]) -> None:
        self._form = form
        self._gate = gate
        self._steps = steps

    async def run(self, block: Block) -> list[Any]:
        """Execute a block in the branch that the code is in."""
        found: list[Any] = []
        for node in block:
            match node:
                case Call(step):
                    found.append(await self._steps[step]())
                case Together(names):
                    found.append(await self._together(names))
                case Fork(branches):
                    self._gate.change_live(len(branches) - 1)
                    made = [self._branch(name, inner) for name, inner in branches]
                    found.append(await (self._in_tasks(made) if self._form is Form.ASYNC else self._in_threads(made)))
                    self._gate.change_live(1)
        return found

    async def _together(self, names: tuple[str, ...]) -> list[Any]:
        if self._form is Form.SYNC:
            return [await self._steps[name]() for name in names]
        self._gate.change_live(len(names) - 1)
        calls = [self._ending(self._steps[name].step()) for name in names]
        found = list(await asyncio.gather(*calls))
        self._gate.change_live(1)
        return found

    def _ending(self, call: Coroutine[Any, Any, str]) -> asyncio.Future[str]:
        task = asyncio.ensure_future(call)
        task.add_done_callback(lambda _: self._gate.change_live(-1))
        return task

    def _branch(self, name: str, block: Block) -> Callable[[], Coroutine[Any, Any, list[Any]]]:
        async def branch() -> list[Any]:
            try:
                return await self.run(block)
            finally:
                self._gate.change_live(-1)

        branch.__qualname__ = name
        return branch

    async def _in_tasks(self, branches: list[Callable[[], Coroutine[Any, Any, list[Any]]]]) -> list[Any]:
        if len(branches) % 2:
            return list(await asyncio.gather(*(each() for each in branches)))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each()) for each in branches]
        return [each.result() for each in tasks]

    async def _in_threads(self, branches: list[Callable[[], Coroutine[Any, Any, list[Any]]]]) -> list[Any]:
        def called(branch: Callable[[], Coroutine[Any, Any, list[Any]]]) -> Callable[[], list[Any]]:
            def driven() -> list[Any]:
                return drive(branch())

            driven.__qualname__ = branch.__qualname__
            return driven

        return list(parallel(*map(called, branches)))
