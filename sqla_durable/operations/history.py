"""The check of a history against the operations that today's code calls, and the decisions about patches.

An attempt notes its calls here. Nothing here stops it: the end of the workflow asks for the `Mismatch`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from sqla_durable.definitions.checks import unescape_key
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.store import Recorded

PATCH = "#patched"
"""The name of the records that mark patches; the name of a user's step never begins with `#`."""

FIRED = "#timer"
"""The name of the records of asyncio timers that fired, which does not depend on the code alone."""

_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How the operations that an attempt called differ from those that earlier attempts recorded.

    Attributes:
        recorded: the keys of the history, in its order.
        visited: the keys that the attempt called, in its order.
        not_visited: recorded, and not called.
        moved: called after what was recorded later.
        renamed: keys with the name of the step that recorded them, and of the one that has them now.
    """

    recorded: tuple[str, ...]
    visited: tuple[str, ...]
    not_visited: tuple[str, ...]
    moved: tuple[str, ...]
    renamed: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        found = [
            _listed("recorded and not visited: ", self.not_visited),
            _listed("visited in another order than recorded: ", self.moved),
            "; ".join(
                f"{unescape_key(key)!r} was recorded by step {unescape_key(was)!r} and is now {unescape_key(now)!r}"
                for key, was, now in self.renamed
            ),
        ]
        histories = _listed("\n  recorded: ", self.recorded) + _listed("\n  visited:  ", self.visited)
        return "; ".join(each for each in found if each) + histories


@dataclass(frozen=True, slots=True)
class Patch:
    """Whether the workflow takes the new path; with a key, the marker of that is still to be recorded at its place."""

    is_new: bool
    key: str | None = None
    place: int = 0


class HistoryCheck:
    """The operations that one attempt has called, compared with the history that it was claimed with.

    Operations are compared within their branch only, whose path their keys begin with: the order between branches
    depends on timing.

    Attributes:
        count: how many operations were called.
    """

    def __init__(self, history: Mapping[str, Recorded]) -> None:
        self.history = history
        self._unvisited = {key: None for key, each in history.items() if each.name not in (PATCH, FIRED)}
        self._left_in = Counter(map(_branch, self._unvisited)) if history else None
        self._last_in: dict[str, int] = {}
        self._last = 0
        self._visited: list[tuple[str, str]] = []
        self.count = 0
        self._patches: dict[str, bool] = {}

    @property
    def all_visited(self) -> bool:
        """Whether everything recorded was called, so that further calls are new."""
        return not self._unvisited

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that were called, in their order."""
        return tuple(key for key, _ in self._visited)

    def add_call(self, key: str, name: str) -> int:
        """Note that an operation is called, and return its place in the order of the history.

        That of its record; otherwise the one after the previous operation, even in the middle of the history, so that
        a step that was added there is not taken for one that was moved.
        """
        self._visited.append((key, name))
        self.count += 1
        if self._left_in is None:  # a new workflow: nothing to compare with
            self._last += 1
            return self._last
        branch, recorded = _branch(key), self.history.get(key)
        if recorded is None:
            before = self._last_in.get(branch, self._last)
            place = (before if self._left_in[branch] else max(before, self._last)) + 1
        else:
            place = recorded.position
            self._unvisited.pop(key, None)
            self._left_in[branch] -= name != PATCH
        self._last_in[branch] = self._last = place
        return place

    def patched(self, patch_id: str) -> Patch:
        """Decide, once in an attempt, whether the workflow takes the new path of a patch.

        It does if an earlier attempt took it, or if no earlier attempt can have passed this point.
        """
        known = self._patches.get(patch_id)
        if known is not None:
            return Patch(known)
        key = f"{PATCH}/{patch_id}"
        marked = key in self.history
        decided = self._patches[patch_id] = marked or self.all_visited
        if not decided:
            return Patch(False)
        place = self.add_call(key, PATCH)
        return Patch(True) if marked else Patch(True, key, place)

    def mismatch(self) -> Mismatch | None:
        """Return the difference at the end of the workflow; None if everything recorded was called, in its order."""
        if not self.history:
            return None
        moved, renamed = self._moved(), self._renamed()
        if not (self._unvisited or moved or renamed):
            return None
        in_order = sorted(self.history.values(), key=lambda each: each.position)
        return Mismatch(
            recorded=tuple(each.key for each in in_order),
            visited=self.keys,
            not_visited=tuple(each.key for each in in_order if each.key in self._unvisited),
            moved=moved,
            renamed=renamed,
        )

    def _renamed(self) -> tuple[tuple[str, str, str], ...]:
        known = [(self.history[key], name) for key, name in self._visited if key in self.history]
        return tuple((was.key, was.name, now) for was, now in known if was.name != now)

    def _moved(self) -> tuple[str, ...]:
        branches: dict[str, list[Recorded]] = {}
        for key, name in self._visited:
            if key in self.history and name != PATCH:
                branches.setdefault(_branch(key), []).append(self.history[key])
        return tuple(key for visited in branches.values() for key in _moved_among(visited))


def _moved_among(visited: Sequence[Recorded]) -> list[str]:
    """Return the keys that were called after something that was recorded later."""
    moved: list[str] = []
    highest = 0
    for number, each in enumerate(visited):
        if each.position < highest and not _follows(visited, number):
            moved.append(each.key)
        highest = max(highest, each.position)
    return moved


def _follows(visited: Sequence[Recorded], number: int) -> bool:
    """Return whether one is in its place nevertheless: after steps that a later deploy has added before it.

    The first of those has the same place, because added steps cannot renumber recorded ones.
    """
    place = visited[number].position
    for before in range(number - 1, -1, -1):
        if visited[before].position <= place:
            return visited[before].position == place or before == number - 1
    return False


def _branch(key: str) -> str:
    return key.rpartition("/")[0]


def _listed(label: str, keys: tuple[str, ...]) -> str:
    more = f" and {len(keys) - _SHOWN:,} more" if len(keys) > _SHOWN else ""
    return label + ", ".join(repr(unescape_key(key)) for key in keys[:_SHOWN]) + more if keys else ""
