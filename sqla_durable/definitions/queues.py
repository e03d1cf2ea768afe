"""How the limits and turns of queues are declared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, cast, get_args

from sqla_durable.definitions.checks import fault_in, require_duration, require_text
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.errors import ArgumentError

WhileSuspended: TypeAlias = Literal["release", "hold"]
Fifo: TypeAlias = Literal["skip", "block"]
Rate: TypeAlias = "tuple[int, timedelta]"

_MOST = 1_000_000
_MOST_OF_RATE = 100_000
_HEAVIEST = 1_000
_LONGEST = timedelta(days=366)
_SHORTEST = timedelta(milliseconds=1)


class QueueKeywords(TypedDict, total=False):
    """The keyword arguments of `Durable.queue` and `manage.put_queue`, for type checkers."""

    concurrency: int | None
    per_worker: int | None
    per_key: int | None
    rate: Rate | None
    key_rate: Rate | None
    while_suspended: WhileSuspended
    fifo: Fifo | None
    fair: bool
    weights: Mapping[str, int] | None
    aging: timedelta | None


@dataclass(frozen=True, slots=True)
class QueueOptions:
    """The settings of a queue; see `Durable.queue`."""

    concurrency: int | None = None
    per_worker: int | None = None
    per_key: int | None = None
    rate: Rate | None = None
    key_rate: Rate | None = None
    while_suspended: WhileSuspended = "release"
    fifo: Fifo | None = None
    fair: bool = False
    weights: Mapping[str, int] | None = None
    aging: timedelta | None = None

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            ArgumentError: one is out of range, or contradicts another.
        """
        for name in ("concurrency", "per_worker", "per_key"):
            _require_count(getattr(self, name), name, _MOST)
        for name in ("rate", "key_rate"):
            _require_rate(getattr(self, name), name)
        for name, known in (("while_suspended", get_args(WhileSuspended)), ("fifo", (*get_args(Fifo), None))):
            if getattr(self, name) not in known:
                raise ArgumentError(f"{name}={getattr(self, name)!r} is none of {', '.join(map(repr, known))}.")
        if not isinstance(self.fair, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(f"fair={self.fair!r} is neither True nor False.")
        if self.aging is not None:
            _require_period(self.aging, "aging")
        if not isinstance(self.weights, Mapping | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(f'weights={self.weights!r} is no mapping: pass a number for each key, {{"ada": 3}}.')
        for key, weight in (self.weights or {}).items():
            fault = fault_in(key)
            if fault is not None:
                raise ArgumentError(f"weights has the key {key!r}, which {fault}: pass a text that is not blank.")
            _require_count(weight, f"weights[{key!r}]", _HEAVIEST)
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.fifo is not None and self.per_key not in (None, 1):
            raise ArgumentError(
                f"fifo={self.fifo!r} executes one workflow of a key at a time, and per_key={self.per_key} says another "
                "number: leave per_key out."
            )
        if self.while_suspended == "hold" and self.fifo is not None:
            raise ArgumentError(
                "with fifo a suspended workflow keeps the place of its key in any case: leave while_suspended out."
            )
        if self.while_suspended == "hold" and self.concurrency is None and self.per_key is None:
            raise ArgumentError(
                "while_suspended='hold' keeps a place of concurrency or per_key, and neither is given: give one."
            )
        if self.weights and not (self.fair or self.per_key or self.key_rate or self.fifo):
            raise ArgumentError("weights are those of keys that take turns: pass fair=True too.")

    @property
    def columns(self) -> dict[str, Any]:
        """The settings as columns of the queue's row."""
        (rate, rate_period), (key_rate, key_rate_period) = self.rate or (None, None), self.key_rate or (None, None)
        return {
            "concurrency": self.concurrency,
            "per_worker": self.per_worker,
            "per_key": self.per_key,
            "rate": rate,
            "rate_period": rate_period,
            "key_rate": key_rate,
            "key_rate_period": key_rate_period,
            "while_suspended": self.while_suspended,
            "fifo": self.fifo,
            "fair": self.fair,
            "aging": self.aging,
        }


def require_queue_name(name: str) -> None:
    """Refuse what is not the name of one queue.

    Raises:
        ArgumentError: it is no text, is blank, or is a pattern.
    """
    require_text(name, what="queue's name")
    if "*" in name:
        raise ArgumentError(
            f"the queue's name is {name!r}, which is a pattern: a worker claims by patterns, and each queue has "
            "settings and a pause of its own."
        )


def fitting(patterns: Iterable[str]) -> re.Pattern[str]:
    """Return what matches, as a whole, the names of queues that fit a pattern; `*` stands for any text."""
    known = [".*".join(map(re.escape, each.split("*"))) for each in patterns]
    return re.compile("|".join(f"(?:{each})" for each in known) or "(?!)", re.DOTALL)


def like(pattern: str) -> str:
    """Return a pattern as one of SQL's LIKE."""
    return "%".join(re.sub(r"([\\%_])", r"\\\1", each) for each in pattern.split("*"))


class QueueDeclaration(NamedTuple):
    """A queue as the application's code declares it."""

    name: str
    options: QueueOptions


def _require_count(value: object, name: str, most: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ArgumentError(f"{name}={value!r} is not an integer from 1 to {most:,}.")


def _require_rate(value: object, name: str) -> None:
    if value is None:
        return
    parts = cast("tuple[object, ...]", value) if isinstance(value, tuple) else ()
    if len(parts) != 2:
        raise ArgumentError(f"{name}={value!r} is no rate: pass a number and a period, (100, timedelta(minutes=1)).")
    number, period = parts
    if number is None:
        raise ArgumentError(f"{name}={value!r} has no number: leave {name} out, or pass a number and a period.")
    _require_count(number, f"{name}[0]", _MOST_OF_RATE)
    _require_period(period, f"{name}[1]")


def _require_period(value: Any, name: str) -> None:
    require_duration(value, name)
    if not _SHORTEST <= value <= _LONGEST:
        raise ArgumentError(f"{name}={value} is no period from a millisecond to 366 days.")
