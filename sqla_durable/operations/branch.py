"""The branches of a workflow, which run concurrently, and how each assigns keys to its operations.

A branch counts the operations that it calls and the branches that it opens, so that no key depends on how fast another
branch is. The task or thread that executes a branch is its home; the runtimes determine it.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress

from sqla_durable.errors import UsageError

_NOT_IN_NAMES = str.maketrans(dict.fromkeys("#/<>", ""))


class Branch:
    """A branch of a workflow's own code: `""` is the function itself, `"pay#2"` the second branch named `pay`.

    Attributes:
        path: the names of the branches from the workflow's function down to it, with their occurrences.
        awaited_threads: how many threads with branches of its own it waits for, while it does nothing else.
        has_caught_up: whether it has reached a step that is not recorded.
        unwound_by: what was raised in its code to end the attempt.
    """

    def __init__(self, path: str = "", *, outer: _Scope | None = None) -> None:
        self.path = path
        self.awaited_threads = 0
        self.has_caught_up = False
        self.unwound_by: object = None
        self._own = _Scope(path)
        self._outer = outer  # the scope that the code was in which has opened this branch
        self._scopes: list[_Scope] = []

    def __repr__(self) -> str:
        return f"<Branch {self.path!r}>"

    def open(self, name: str) -> Branch:
        """Return the next branch of this name; called in the branch itself, in the order of its code."""
        return Branch(self._innermost.next_branch(name), outer=self._scope)

    def key(self, name: str, *, explicit: str | None = None) -> str:
        """Return the key of the next operation of this name; an explicit one is the whole scope's, or workflow's."""
        innermost = self._scopes[-1] if self._scopes else self._own
        key = innermost.next_operation(explicit or name)
        if explicit is None:
            return key
        return explicit if self._scope is None else self._scope.under(explicit)

    @contextmanager
    def scope(self, name: str) -> Generator[None]:
        """Number the operations and branches in the block apart from the others.

        Raises:
            UsageError: the scope is in another one that was entered in another branch, and a third branch has used the
                name in that.
        """
        self._scopes.append(_Scope(self._scope_path(name)))
        try:
            yield
        finally:
            self._scopes.pop()

    def _scope_path(self, name: str) -> str:
        if self._scopes or self._outer is None:
            return self._innermost.next_branch(name)
        # Relative to the outer scope, without the name of this branch: that may be a library's own affair.
        if self._outer.users.setdefault(name, self) is not self:
            raise UsageError(
                f"two tasks or threads use the scope {name!r} in scope {self._outer.path!r}: their order would depend "
                "on which is faster. Give each scope a name of its own."
            )
        return self._outer.next_branch(name)

    @property
    def _innermost(self) -> _Scope:
        return self._scopes[-1] if self._scopes else self._own

    @property
    def _scope(self) -> _Scope | None:
        return self._scopes[-1] if self._scopes else self._outer


class _Scope:
    """A part of the history in which operations and branches are counted.

    Attributes:
        users: by name, the branches that have opened scopes in this one, apart from the branch that has entered it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.users: dict[str, Branch] = {}
        self._operations: defaultdict[str, int] = defaultdict(int)
        self._branches: defaultdict[str, int] = defaultdict(int)

    def next_operation(self, name: str) -> str:
        self._operations[name] = count = self._operations[name] + 1
        key = name if count == 1 else f"{name}#{count}"
        return f"{self.path}/{key}" if self.path else key

    def next_branch(self, name: str) -> str:
        self._branches[name] = count = self._branches[name] + 1
        return self.under(name if count == 1 else f"{name}#{count}")

    def under(self, key: str) -> str:
        return f"{self.path}/{key}" if self.path else key


class Branches:
    """The live branches of one attempt, and where each is executed. Thread-safe.

    Attributes:
        calls: the tasks that each execute one call of an operation and are not branches.
        has_new: whether tasks were created since the workflow's code last let them begin.
    """

    def __init__(self) -> None:
        self.root = Branch()
        self.lock = threading.RLock()
        self._current_home: Callable[[], object] | None = None
        self._at: dict[object, Branch] = {}
        self.calls: set[object] = set()
        self.has_new = False
        self._starting: list[Branch] = []

    def begin(self, current_home: Callable[[], object]) -> None:
        """Register the current task or thread as the home of the workflow's own code.

        Args:
            current_home: returns the task or thread that the code is in, or None.
        """
        self._current_home = current_home
        self._at[current_home()] = self.root

    def end(self) -> None:
        """Forget where the workflow's own code was executed, which has ended: a task would refer to itself by it."""
        self.leave(next((home for home, each in self._at.items() if each is self.root), None))

    def here(self) -> Branch | None:
        """Return the branch that the code is in; None in a task or thread that does not belong to the workflow."""
        return self.at(self.home())

    def at(self, home: object) -> Branch | None:
        """Return the branch that is executed in a task or thread."""
        return self.root if self._current_home is None else self._at.get(home)

    def require_here(self, what: str, *, workflow: str) -> Branch:
        """Return the branch that the code is in.

        Raises:
            UsageError: it is not in a branch.
        """
        branch = self.here()
        if branch is None:
            raise no_branch(what, workflow)
        return branch

    def home(self) -> object:
        """Return the task or thread that the code is in, or None."""
        return None if self._current_home is None else self._current_home()

    def begin_threads(self, parent: Branch, first: Sequence[Branch]) -> None:
        """Note that a branch waits for threads, each of which begins with one of these branches."""
        with self.lock:
            self._starting += first
            parent.awaited_threads = len(first)

    def enter(self, branch: Branch, home: object) -> None:
        """Register a task or thread as another home of a branch."""
        self.has_new = True
        with self.lock:
            self._at[home] = branch
            with suppress(ValueError):
                self._starting.remove(branch)

    def leave(self, home: object) -> None:
        """Unregister a task or thread that has ended."""
        with self.lock:
            self._at.pop(home, None)

    def enter_call(self, home: object) -> None:
        """Register a task that executes one call of an operation."""
        self.has_new = True
        with self.lock:
            self.calls.add(home)

    def leave_call(self, home: object) -> None:
        """Unregister such a task, which has ended."""
        with self.lock:
            self.calls.discard(home)

    def end_thread(self, parent: Branch, home: object) -> None:
        """Unregister a thread that a branch waits for; after the last one the branch continues."""
        with self.lock:
            self.leave(home)
            parent.awaited_threads -= 1

    def end_threads(self, parent: Branch) -> None:
        """Note that a branch continues, although some of its threads may not have begun."""
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
    def only_root_is_left(self) -> bool:
        """Whether no code is being executed beside the workflow's own, neither branches nor calls of operations."""
        return len(self._at) <= 1 and not self.calls

    @property
    def left_open(self) -> list[str]:
        """The live branches beside the workflow's own code."""
        return [each.path for each in self.homes.values() if each is not self.root]

    def all_wait_or_are_in(self, homes: Iterable[object]) -> bool:
        """Return whether every branch waits for its threads, or is executed in one of these homes."""
        with self.lock:
            among = set(homes)
            return not self._starting and all(each.awaited_threads or home in among for home, each in self._at.items())


def no_branch(what: str, workflow: str) -> UsageError:
    """Return the error for a call that is in no branch of a workflow."""
    return UsageError(
        f"{what} was called in a task or thread that is no branch of workflow {workflow!r}: its place in the history "
        "would depend on timing. Call it in the workflow's own code, in a task that this code makes itself "
        "(asyncio.gather, TaskGroup, create_task), or in a function given to parallel()."
    )


def name_of(code: object) -> str:
    """Return the name under which the branches of a function, or of its coroutine, are counted.

    The qualified name of its definition, without enclosing functions, which may be renamed.
    """
    while isinstance(code, functools.partial):
        code = code.func  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    qualified = getattr(code, "__qualname__", None) or type(code).__qualname__  # pyright: ignore[reportUnknownArgumentType]
    return str(qualified).rpartition("<locals>.")[2].translate(_NOT_IN_NAMES)
