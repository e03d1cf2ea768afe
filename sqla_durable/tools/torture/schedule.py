"""Which faults come when, and to whom: a pure function of the seed.

Repeating a seed repeats the kinds, their order, the gaps, the victims and the lengths. What the operating system and
PostgreSQL make of it, which process is scheduled when and who gets a lock first, no seed can repeat.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What can go wrong."""

    KILL = "kill"  # SIGKILL to one or two
    KILL_ALL = "kill-all"  # SIGKILL to all: somebody must start before anybody can take over
    FREEZE = "freeze"  # SIGSTOP for longer than the lease, then SIGCONT
    STALL = "stall"  # the same to a worker whose idle transactions nobody ends meanwhile
    STOP = "stop"  # SIGTERM
    TERMINATE = "terminate"  # pg_terminate_backend
    RESTART = "restart"  # of the server, fast
    CRASH = "crash"  # of the server: immediate, so that it recovers from its WAL
    OUTAGE = "outage"  # no server for a while
    CUT = "cut"  # connections are reset
    DELAY = "delay"  # every packet takes longer for a while
    BLACKHOLE = "blackhole"  # bytes are swallowed for a while, then connections are reset
    REFUSE = "refuse"  # connections are reset, and no new ones accepted for a while


_EVERYBODY = frozenset({Fault.KILL_ALL, Fault.RESTART, Fault.CRASH, Fault.OUTAGE})
_ALONE = frozenset({Fault.FREEZE, Fault.STALL, Fault.STOP})
_LENGTHS = {
    Fault.STALL: (2.0, 4.0),
    Fault.FREEZE: (2.0, 4.0),
    Fault.DELAY: (0.5, 2.0),
    Fault.BLACKHOLE: (0.5, 3.0),
    Fault.REFUSE: (0.3, 2.0),
}
_GAPS = (0.05, 0.6)
_DELAYS = (0.01, 0.15)


@dataclass(frozen=True, slots=True)
class Injection:
    """One fault to be injected.

    Attributes:
        number: its place in the schedule, from 1.
        kind: what happens.
        gap: seconds of peace before it.
        victims: the places of the workers that it is aimed at; all of them where the server itself is.
        seconds: how long it lasts; 0 where it is a moment.
        delay: seconds that every packet takes, where it is a delay.
        one: for `terminate`, whether one backend of each victim goes, or all of them.
    """

    number: int
    kind: Fault
    gap: float
    victims: tuple[int, ...]
    seconds: float = 0.0
    delay: float = 0.0
    one: bool = False


def schedule(seed: int, *, kinds: Sequence[Fault], workers: int, outage: float) -> Iterator[Injection]:
    """Give the faults of a seed, without an end.

    Every kind comes once in a round, in an order of its own, so that none is rare.

    Args:
        seed: decides everything.
        kinds: the kinds to choose from.
        workers: how many places of workers there are; at least two.
        outage: how many seconds an outage lasts.
    """
    chance = random.Random(f"{seed}/faults")  # noqa: S311 (repeatable, not secret)
    number = 0
    while True:
        for kind in chance.sample(sorted(set(kinds)), len(set(kinds))):
            number += 1
            yield Injection(
                number=number,
                kind=kind,
                gap=chance.uniform(*_GAPS),
                victims=_victims(chance, kind, workers),
                seconds=outage if kind is Fault.OUTAGE else chance.uniform(*_LENGTHS.get(kind, (0.0, 0.0))),
                delay=chance.uniform(*_DELAYS) if kind is Fault.DELAY else 0.0,
                one=chance.random() < 0.5,
            )


def is_guarded(place: int) -> bool:
    """Tell whether the server ends the idle transactions of the worker in this place: in every other one it does.

    One that is frozen between a statement and its COMMIT keeps its locks until it goes on, or until the server ends
    its transaction (`idle_in_transaction_session_timeout`). Both must be right; only the first is quick.
    """
    return place % 2 == 0


def _victims(chance: random.Random, kind: Fault, workers: int) -> tuple[int, ...]:
    """Choose one worker, sometimes two, and for connections and the way to the server sometimes all."""
    everyone = tuple(range(workers))
    if kind in (Fault.FREEZE, Fault.STALL):
        everyone = tuple(each for each in everyone if is_guarded(each) is (kind is Fault.FREEZE))
    if kind in _EVERYBODY:
        return everyone
    several = 1 if kind in _ALONE else chance.choice([1, 1, 2, 1 if kind is Fault.KILL else workers])
    return tuple(sorted(chance.sample(everyone, min(several, workers))))
