"""Which faults come when, and to which workers: a pure function of the seed; and the settings of the workers.

Repeating a seed repeats the kinds, their order, the pauses, the victims and the durations. It cannot repeat which
process the operating system schedules when, nor which transaction gets a lock first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

CONCURRENCY = 12
LEASE, POLL, GRACE = 1.5, 0.1, 10.0
MAX_ATTEMPTS = 32_767
"""The largest number: workers die all the time here, and no workflow should fail because of that."""

POOL, OUTSIDE_POOL = 8, 3
CONNECTIONS = 2 * (POOL + OUTSIDE_POOL)
"""How many connections a worker opens at most."""


_PAUSES = (0.05, 0.6)
_DELAYS = (0.01, 0.15)


class Fault(StrEnum):
    """What can go wrong."""

    KILL = "kill"  # SIGKILL to one or two
    KILL_ALL = "kill-all"  # SIGKILL to all: a new worker must start before anything is reclaimed
    FREEZE = "freeze"  # SIGSTOP for longer than the lease, then SIGCONT
    STALL = "stall"  # the same to a worker whose idle transactions the server does not end
    STOP = "stop"  # SIGTERM
    TERMINATE = "terminate"  # pg_terminate_backend
    RESTART = "restart"  # of the server, fast
    CRASH = "crash"  # of the server: immediate, so that it recovers from its WAL
    OUTAGE = "outage"  # no server for a while
    CUT = "cut"  # connections are reset
    DELAY = "delay"  # every packet takes longer for a while
    BLACKHOLE = "blackhole"  # bytes are swallowed for a while, then connections are reset
    REFUSE = "refuse"  # connections are reset, and no new ones accepted for a while


_ALL_WORKERS = frozenset({Fault.KILL_ALL, Fault.RESTART, Fault.CRASH, Fault.OUTAGE})
_ONE_WORKER = frozenset({Fault.FREEZE, Fault.STALL, Fault.STOP})
_DURATIONS = {
    Fault.STALL: (2.0, 4.0),
    Fault.FREEZE: (2.0, 4.0),
    Fault.DELAY: (0.5, 2.0),
    Fault.BLACKHOLE: (0.5, 3.0),
    Fault.REFUSE: (0.3, 2.0),
}


@dataclass(frozen=True, slots=True)
class Injection:
    """One fault to be injected.

    Attributes:
        number: its position in the schedule, from 1.
        kind: what happens.
        pause: seconds without a fault before it.
        victims: the numbers of the workers that it hits; all of them where it hits the server itself.
        seconds: how long it lasts; 0 where it is instantaneous.
        delay: for `delay`, the seconds by which every packet is delayed.
        one_backend: for `terminate`, whether one backend of each victim is terminated, or all of them.
    """

    number: int
    kind: Fault
    pause: float
    victims: tuple[int, ...]
    seconds: float = 0.0
    delay: float = 0.0
    one_backend: bool = False


def schedule(seed: int, *, kinds: Sequence[Fault], workers: int, outage: float) -> Iterator[Injection]:
    """Yield the faults of a seed, without end.

    They come in rounds: every kind once, in random order, so that none is rare.

    Args:
        seed: decides everything.
        kinds: the kinds to choose from.
        workers: how many workers there are; at least two.
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
                pause=chance.uniform(*_PAUSES),
                victims=_victims(chance, kind, workers),
                seconds=outage if kind is Fault.OUTAGE else chance.uniform(*_DURATIONS.get(kind, (0.0, 0.0))),
                delay=chance.uniform(*_DELAYS) if kind is Fault.DELAY else 0.0,
                one_backend=chance.random() < 0.5,
            )


def is_guarded(worker: int) -> bool:
    """Return whether the server ends the idle transactions of the worker with this number, as for every other one.

    A worker that is frozen between a statement and its COMMIT keeps its locks until it continues, or until the server
    ends its transaction (`idle_in_transaction_session_timeout`). Both must be correct.
    """
    return worker % 2 == 0


def _victims(chance: random.Random, kind: Fault, workers: int) -> tuple[int, ...]:
    """Return one worker, sometimes two, and for connections and the network sometimes all."""
    everyone = tuple(range(workers))
    if kind in (Fault.FREEZE, Fault.STALL):
        everyone = tuple(each for each in everyone if is_guarded(each) is (kind is Fault.FREEZE))
    if kind in _ALL_WORKERS:
        return everyone
    several = 1 if kind in _ONE_WORKER else chance.choice([1, 1, 2, 1 if kind is Fault.KILL else workers])
    return tuple(sorted(chance.sample(everyone, min(several, workers))))
