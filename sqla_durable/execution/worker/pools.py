"""How many connections of a pool the workers of this process need, and which worker has reserved them."""

from __future__ import annotations

import threading
from uuid import UUID
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, SingletonThreadPool, StaticPool
from sqlalchemy.pool import Pool

from sqla_durable.definitions.log import Log
from sqla_durable.errors import SessionError

log = Log("sqla_durable.worker")

_OWN_CONNECTIONS = 5  # the heartbeat, the writer and the claims keep one each; maintenance, releases
_ENOUGH_TO_HOLD_ONE = 3
_ENOUGH_TO_HOLD_TWO = 8
_ENOUGH_TO_HOLD_THREE = 12

_lock = threading.Lock()
_reserved: WeakKeyDictionary[Pool, dict[UUID, int]] = WeakKeyDictionary()


def require_pool(engine: Engine) -> None:
    """Refuse a pool in which the worker's own statements would share a connection with those of steps.

    Warns of one that is so small that they would wait for each other.

    Raises:
        SessionError: it is a StaticPool or a SingletonThreadPool.
    """
    if isinstance(engine.pool, (StaticPool, SingletonThreadPool)):
        raise SessionError(
            f"the pool of {engine!r} gives all the same connection: a worker needs several, for its heartbeat beside "
            "the steps. Give it an engine with pool_size=5 or more."
        )
    size = _pool_size(engine)
    if size is not None and size < _ENOUGH_TO_HOLD_ONE:
        log.warning(
            "the pool of %r has %d connection(s), so steps may keep the heartbeat and the claims waiting until the "
            "lease runs out: give the worker an engine with pool_size=%d or more",
            engine,
            size,
            _ENOUGH_TO_HOLD_TWO,
        )


def pool_capacity(engine: Engine) -> int:
    """Return how many connections steps may hold, so that the pool has some left for the workers themselves."""
    size = _left_in(engine)
    if size is None:
        return 10  # NullPool and its like set no limit of their own
    return int(max(1, min(32, size - _OWN_CONNECTIONS)))


def reserve(engine: Engine, worker_id: UUID) -> int:
    """Reserve connections of the pool for a worker; return how many it may keep: `open_databases` says for what.

    Workers that share a pool would otherwise keep all of it, and wait for each other in silence.

    Raises:
        SessionError: other workers of this process have reserved too many of them.
    """
    with _lock:
        left = _left_in(engine)
        enough = _ENOUGH_TO_HOLD_ONE, _ENOUGH_TO_HOLD_TWO, _ENOUGH_TO_HOLD_THREE
        hold = sum(left is None or left >= each for each in enough)
        others = _reserved.setdefault(engine.pool, {})
        if others and not hold:
            raise SessionError(
                f"the pool of {engine!r} has {_pool_size(engine):.0f} connections, and {len(others)} running worker(s) "
                f"of this process need {sum(others.values())} of them: {left:.0f} are left, and another worker needs "
                f"{_needs(1)}, or better {_needs(2)}. Raise pool_size by as many for each worker, or give it an engine "
                "of its own; one worker with a higher concurrency needs no more connections."
            )
        others[worker_id] = _needs(hold)
        return hold


def _needs(hold: int) -> int:
    """Return how many connections a worker needs: those it keeps, one for other statements, one for a step."""
    return hold + 2


def release_reserved(worker_id: UUID) -> None:
    """Release the connections that a worker has reserved."""
    with _lock:
        for each in list(_reserved.values()):
            each.pop(worker_id, None)


def _left_in(engine: Engine) -> float | None:
    """Return how many connections of the pool no worker has reserved; None where it has no limit."""
    size = _pool_size(engine)
    return None if size is None else size - sum(_reserved.get(engine.pool, {}).values())


def _pool_size(engine: Engine) -> float | None:
    size = getattr(engine.pool, "size", None)
    if size is None:
        return None
    overflow = int(getattr(engine.pool, "_max_overflow", 0))
    return float("inf") if overflow < 0 else size() + overflow
