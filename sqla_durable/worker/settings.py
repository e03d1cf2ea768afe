"""What a worker's settings must be, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from sqlalchemy import Engine, SingletonThreadPool, StaticPool
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.checks import require_duration
from sqla_durable.durable import Durable
from sqla_durable.errors import SessionError
from sqla_durable.inspection import SessionKind
from sqla_durable.store import schema

_OWN_CONNECTIONS = 5  # the writer and the heartbeat hold one each; claims, maintenance, what is handed back
_ENOUGH_TO_HOLD_ONE = 3
_ENOUGH_TO_HOLD_TWO = 8
_SHORTEST_LIMIT = 5.0


def engine_of(sync: sessionmaker[Session] | None, asynchronous: async_sessionmaker[AsyncSession] | None) -> Engine:
    """Give the engine for the worker's own statements: the async one if there is one, so that no thread is needed."""
    if asynchronous is not None:
        return schema.engine_of(asynchronous().sync_session)
    assert sync is not None  # noqa: S101 (checked when the worker was made)
    return schema.engine_of(sync())


def chosen_queues(durable: Durable, given: Iterable[str] | None) -> list[str]:
    """Give the queues to claim from; by default those of the workflows that are known."""
    if given is None:
        return sorted({"default"} | {each.queue for each in durable.registry})
    chosen = [given] if isinstance(given, str) else sorted(set(given))
    if not chosen or not all(each.strip() for each in chosen):
        raise ValueError(f"queues={given!r} names no queue: give at least one, or leave it out.")
    return chosen


def chosen_versions(given: Iterable[str] | None) -> list[str]:
    """Give the versions to claim; none means all of them."""
    if given is None:
        return []
    chosen = [given] if isinstance(given, str) else sorted(set(given))
    if not chosen or not all(each.strip() for each in chosen):
        raise ValueError(f"versions={given!r} names no version: give at least one, or leave it out to claim all.")
    return chosen


def require_sessionmakers(
    durable: Durable,
    sync: sessionmaker[Session] | None,
    asynchronous: async_sessionmaker[AsyncSession] | None,
) -> None:
    """Refuse a worker that could not open the sessions that its steps take."""
    require_type(sync, sessionmaker, "sessionmaker")
    require_type(asynchronous, async_sessionmaker, "async_sessionmaker")
    if sync is None and asynchronous is None:
        raise SessionError(
            "a worker needs a sessionmaker or an async_sessionmaker, here or in Durable(...): without, it has no "
            "database."
        )
    for step in durable.registry.steps():
        if step.session is SessionKind.SYNC and sync is None:
            raise SessionError(f"step {step.name!r} takes a Session: give the worker a sessionmaker.")
        if step.session is SessionKind.ASYNC and asynchronous is None:
            raise SessionError(f"step {step.name!r} takes an AsyncSession: give the worker an async_sessionmaker.")
        maker = sync if step.session is SessionKind.SYNC else asynchronous
        wanted = step.session_class
        if wanted is not None and maker is not None and not issubclass(maker.class_, wanted):
            raise SessionError(
                f"step {step.name!r} takes a {wanted.__module__}.{wanted.__qualname__}, and the worker's sessions are "
                f"of {maker.class_.__module__}.{maker.class_.__qualname__}: give it "
                f"{type(maker).__name__}(engine, class_={wanted.__qualname__})."
            )


def require_type(given: object, kind: type, name: str) -> None:
    """Refuse an engine, a session, or a factory of the other kind where a factory of sessions is needed."""
    if given is None or isinstance(given, kind):
        return
    for other in (sessionmaker, async_sessionmaker):
        if isinstance(given, other):
            raise SessionError(f"{name}={given!r} is for the other kind of session: pass it as {other.__name__}=.")
    raise SessionError(f"{name}={given!r} is no {kind.__name__}: pass the factory, such as {kind.__name__}(engine).")


def require_pool(engine: Engine) -> None:
    """Refuse a pool in which the worker's own statements would share a connection with those of steps.

    Raises:
        SessionError: it is a StaticPool or a SingletonThreadPool.
    """
    if isinstance(engine.pool, (StaticPool, SingletonThreadPool)):
        raise SessionError(
            f"the pool of {engine!r} gives all the same connection: a worker needs several, for its heartbeat beside "
            "the steps. Give it an engine with pool_size=5 or more."
        )


def require_codecs(durable: Durable) -> None:
    """Find annotations that cannot be stored now, and not in the middle of a workflow."""
    for workflow in durable.registry:
        _ = workflow.arguments, workflow.result
    for step in durable.registry.steps():
        _ = step.result


def pool_capacity(engine: Engine) -> int:
    """Give how many connections steps may hold so that the pool has some left for the worker itself."""
    size = _pool_size(engine)
    if size is None:
        return 10  # NullPool and its like set no limit of their own
    return int(max(1, min(32, size - _OWN_CONNECTIONS)))


def connections_to_hold(engine: Engine) -> int:
    """Tell how many of the pool's connections the worker may keep: one for its heartbeat, one for its writer."""
    size = _pool_size(engine)
    if size is None or size >= _ENOUGH_TO_HOLD_TWO:
        return 2
    return int(size >= _ENOUGH_TO_HOLD_ONE)


def time_limit(lease: timedelta) -> float:
    """Give the seconds after which a transaction of the worker's own is cut off: a lease, and not too few."""
    return max(_SHORTEST_LIMIT, lease.total_seconds())


def heartbeat_limit(lease: timedelta) -> float:
    """Give the same for a heartbeat: short enough for another one within the lease."""
    return max(_SHORTEST_LIMIT / 3, lease.total_seconds() / 3)


def _pool_size(engine: Engine) -> float | None:
    size = getattr(engine.pool, "size", None)
    if size is None:
        return None
    overflow = int(getattr(engine.pool, "_max_overflow", 0))
    return float("inf") if overflow < 0 else size() + overflow


def at_least(value: int, least: int, name: str) -> int:
    """Refuse a number that is too small."""
    if value < least:
        raise ValueError(f"{name}={value!r} is too small: at least {least}.")
    return value


def within(value: int, least: int, most: int, name: str) -> int:
    """Refuse a number that is too small or too large."""
    if at_least(value, least, name) > most:
        raise ValueError(f"{name}={value!r} is too large: at most {most:,}.")
    return value


def positive(value: timedelta, name: str) -> timedelta:
    """Refuse what is not a duration."""
    require_duration(value, name)
    if value <= timedelta():
        raise ValueError(f"{name}={value!r} is not a duration: give a timedelta longer than zero.")
    return value
