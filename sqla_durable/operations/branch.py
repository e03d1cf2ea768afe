"""The branches of a workflow: which of its own code runs beside other code of its own, and who is who among them.

A branch counts the operations that it calls and the branches that it opens, so that no key depends on another branch's
speed. Where a branch is executed, in a task or a thread, is its home; what that is, the runtimes know.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from sqla_durable.errors import UsageError

_NOT_IN_NAMES = str.maketrans(dict.fromkeys("#/<>", ""))


class Branch:
    """A line of a workflow's own code: `""` is the function itself, `"pay#2"` the second `pay` beside it.

    Attributes:
        path: its names from the workflow's function downwards, with their occurrences.
        awaited_threads: how many threads with branches of its own it waits for, and for nothing else.
        has_caught_up: whether it has come to a step that is not recorded.
        signal: the signal that ends the attempt, once its code has got it.
    """

    def __init__(self, path: str = "") -> None:
        self.path = path
        self.awaited_threads = 0
        self.has_caught_up = False
        self.signal: object = None
        self._operations: Counter[str] = Counter()
        self._children: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Branch {self.path!r}>"

    def open(self, name: str) -> Branch:
        """Give the next branch of this name; called in the branch itself, in the order of its code."""
        self._children[name] += 1
        return Branch(self._under(_counted(name, self._children[name])))

    def key(self, name: str, *, explicit: str | None = None) -> str:
        """Give the key of the next operation of this name; an explicit one is the whole workflow's."""
        self._operations[explicit or name] += 1
        return explicit or self._under(_counted(name, self._operations[name]))

    def _under(self, key: str) -> str:
        return f"{self.path}/{key}" if self.path else key


class Branches:
    """The live branches of one attempt, and where each of them is executed. Callable from any thread.

    Attributes:
        calls: the tasks that are one call of an operation each, and no branch.
        has_new: whether tasks were made since the workflow's code last let them begin.
    """

    def __init__(self) -> None:
        self.root = Branch()
        self.lock = threading.RLock()
        self._whereabouts: Callable[[], object] | None = None
        self._at: dict[object, Branch] = {}
        self.calls: set[object] = set()
        self.has_new = False
        self._starting: list[Branch] = []

    def begin(self, whereabouts: Callable[[], object]) -> None:
        """Begin with the workflow's own code, here.

        Args:
            whereabouts: gives the task or thread that the code is in, or None.
        """
        self._whereabouts = whereabouts
        self._at[whereabouts()] = self.root

    def here(self) -> Branch | None:
        """Give the branch that the code is in; None in a task or thread that is none of the workflow's."""
        if self._whereabouts is None:
            return self.root
        home = self._whereabouts()
        return None if home is None else self._at.get(home)

    def require_here(self, what: str, *, workflow: str) -> Branch:
        """Give the branch that the code is in.

        Raises:
            UsageError: it is in none.
        """
        branch = self.here()
        if branch is None:
            raise UsageError(
                f"{what} was called in a task or thread that is no branch of workflow {workflow!r}: its place in the "
                "history would depend on which is faster. Call it in the workflow's own code, in a task that this code "
                "makes itself (asyncio.gather, TaskGroup, create_task), or in a function given to parallel()."
            )
        return branch

    def home(self) -> object:
        """Give the task or thread that the code is in, or None."""
        return None if self._whereabouts is None else self._whereabouts()

    def begin_threads(self, parent: Branch, first: Sequence[Branch]) -> None:
        """Note that a branch waits for threads, one for each of these branches to begin with."""
        with self.lock:
            self._starting += first
            parent.awaited_threads = len(first)

    def enter(self, branch: Branch, home: object) -> None:
        """Let a branch be executed there, beside where it is already."""
        self.has_new = True
        with self.lock:
            self._at[home] = branch
            with suppress(ValueError):
                self._starting.remove(branch)

    def leave(self, home: object) -> None:
        """Forget a task or thread that has ended."""
        with self.lock:
            self._at.pop(home, None)

    def enter_call(self, home: object) -> None:
        """Note a task that is one call of an operation."""
        self.has_new = True
        with self.lock:
            self.calls.add(home)

    def leave_call(self, home: object) -> None:
        """Forget one that has ended."""
        with self.lock:
            self.calls.discard(home)

    def end_thread(self, parent: Branch, home: object) -> None:
        """Forget a thread that a branch waits for; after the last it goes on."""
        with self.lock:
            self.leave(home)
            parent.awaited_threads -= 1

    def end_threads(self, parent: Branch) -> None:
        """Note that a branch goes on, although threads of its own may not have begun."""
        with self.lock:
            if parent.awaited_threads:
                parent.awaited_threads = 0
                self._starting.clear()

    @property
    def homes(self) -> dict[object, Branch]:
        """Where the live branches are executed, the workflow's own code included."""
        with self.lock:
            return dict(self._at)

    @property
    def left_open(self) -> list[str]:
        """The live branches beside the workflow's own code."""
        return [each.path for each in self.homes.values() if each is not self.root]

    def all_join_or_are_among(self, carriers: Iterable[object]) -> bool:
        """Tell whether every branch waits for others, or is executed in one of these homes."""
        with self.lock:
            among = set(carriers)
            return not self._starting and all(each.awaited_threads or home in among for home, each in self._at.items())


def name_of(code: object) -> str:
    """Give the name under which the branches of a function, or of a coroutine of it, are counted.

    That of its definition, with its class but without the functions around it: those may be renamed.
    """
    while isinstance(code, functools.partial):
        code = code.func  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    qualified = getattr(code, "__qualname__", None) or type(code).__qualname__  # pyright: ignore[reportUnknownArgumentType]
    return str(qualified).rpartition("<locals>.")[2].translate(_NOT_IN_NAMES)


def _counted(name: str, occurrence: int) -> str:
    return name if occurrence == 1 else f"{name}#{occurrence}"
