"""The order of the revisions in `versions`, and which of them lie between two."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from sqla_durable.errors import UsageError


@dataclass(frozen=True, slots=True)
class Revision:
    """One module of `versions`: its name, its predecessor, and what it does to a schema."""

    name: str
    after: str | None
    upgrade: Callable[[str | None], None]
    downgrade: Callable[[str | None], None]

    @classmethod
    def of(cls, module: ModuleType) -> Revision:
        """Read it from the module."""
        return cls(module.revision, module.down_revision, module.upgrade, module.downgrade)


def load(package: ModuleType) -> list[Revision]:
    """Return all revisions of a package, oldest first, as one line without branches."""
    modules = pkgutil.iter_modules(package.__path__)
    found = [Revision.of(importlib.import_module(f"{package.__name__}.{module.name}")) for module in modules]
    following = {revision.after: revision for revision in found}
    history: list[Revision] = []
    name: str | None = None
    while name in following:
        history.append(following[name])
        name = history[-1].name
    return history


def between(history: list[Revision], target: str, *, since: str | None) -> list[Revision]:
    """Return the revisions after `since` up to `target`, oldest first.

    Raises:
        UsageError: one of them is not in the history, or `target` is not the later one.
    """
    names = [revision.name for revision in history]
    end = _position(target, names) + 1
    start = 0 if since is None else _position(since, names) + 1
    if start >= end:
        raise UsageError(
            f"there is nothing between since={since!r} and {target!r}: since must be an earlier one of {names}."
        )
    return history[start:end]


def _position(name: str, names: list[str]) -> int:
    if name not in names:
        raise UsageError(
            f"there is no revision {name!r} in this version of sqla-durable, which has {names}: write one of them, "
            f"such as {names[-1]!r}, or install the version that has it."
        )
    return names.index(name)
