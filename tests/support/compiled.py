"""Statements that are compiled once for a test run, and not once for each test's engines.

An engine keeps what it has compiled. Tests have engines of their own that execute each statement once or twice, and
would spend a quarter of their time in the compiler. Engines whose dialects are configured alike compile alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, MutableMapping
from typing import Any

import pytest
from sqlalchemy import Dialect, Engine
from sqlalchemy.util import LRUCache

from sqla_durable.store.driver import DriverStatement

Key = tuple[Any, ...]

_PLAIN: tuple[type[object], ...] = (str, int, float, tuple, frozenset, type(None))
_compiled: LRUCache[Key, Any] = LRUCache(5_000)
_texts: dict[Key, Any] = {}


class SharedCache(MutableMapping[Key, Any]):
    """The view of one engine: its dialect in the keys of SQLAlchemy is replaced by how that dialect is configured."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._configured: Key | None = None

    def __getitem__(self, key: Key) -> Any:
        return _compiled[self._shared(key)]

    def get(self, key: Key, default: Any = None) -> Any:
        return _compiled.get(self._shared(key), default)

    def __setitem__(self, key: Key, value: Any) -> None:
        _compiled[self._shared(key)] = value

    def __delitem__(self, key: Key) -> None:
        del _compiled[self._shared(key)]

    def __iter__(self) -> Iterator[Key]:
        return iter(())

    def __len__(self) -> int:
        return len(_compiled)

    def _shared(self, key: Key) -> Key:
        dialect, *rest = key
        if dialect is not self._dialect:
            return key
        if self._configured is None:  # when the first statement comes, the dialect has seen the server
            self._configured = configuration(dialect)
        return (self._configured, *rest)


def configuration(dialect: Dialect) -> Key:
    """Return what distinguishes a dialect from another of its class: its plain values, and who its functions are."""
    return (type(dialect), *sorted((name, _comparable(value)) for name, value in vars(dialect).copy().items()))


def _comparable(value: object) -> Hashable:
    if isinstance(value, _PLAIN):
        return f"{value!r}"
    # Helpers that each dialect makes of its own; a function that the application passes is the same object.
    return str(id(value)) if callable(value) and not isinstance(value, type) else type(value).__qualname__


def share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every engine that is made from now on share what is compiled."""
    make = Engine.__init__

    def make_sharing(self: Engine, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        if self._compiled_cache is not None:  # pyright: ignore[reportPrivateUsage]
            self._compiled_cache = SharedCache(self.dialect)  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(Engine, "__init__", make_sharing)
    compile_text = DriverStatement._compiled  # pyright: ignore[reportPrivateUsage]

    def compile_once(self: DriverStatement, dialect: Dialect, schemas: Mapping[str | None, str | None] | None) -> Any:
        key = (self, configuration(dialect), None if schemas is None else tuple(schemas.items()))
        if key not in _texts:
            _texts[key] = compile_text(self, dialect, schemas)
        return _texts[key]

    monkeypatch.setattr(DriverStatement, "_compiled", compile_once)
