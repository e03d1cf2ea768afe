"""What a worker's settings must be, and how often its loops poll, pause and try again.

The constants are in seconds unless they say otherwise.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sqla_durable.api.durable import Durable
from sqla_durable.definitions.blobs import ObjectStore
from sqla_durable.definitions.checks import require_duration
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.inspection import SessionKind
from sqla_durable.definitions.log import Log
from sqla_durable.errors import SessionError
from sqla_durable.execution.worker.subscribed import Subscribed
from sqla_durable.store import schema

BEATS = 3
"""How often a worker beats in a lease."""

COMPARE_ALL_EVERY = 10
"""Every how many beats the worker looks for claimed workflows that it does not know of."""

HINT_SPACING = 0.01
"""Between two hints that the heartbeat follows: many cancels are one comparison."""

CLAIM_SPACING = 0.005
"""Between two hints that claims follow: many of them are one claim."""

CLAIM_PAUSES = (0.01, 0.05, 0.25)
"""Between claims after the last one that found something."""

SHORTEST_POLL = 0.01
"""Between two polls of the maintenance, however many timers there are."""

RECLAIM_EVERY = 10
"""Beats between two reclaims; what is seen to be abandoned is reclaimed at once."""

WARN_EVERY = 60.0
"""Between two warnings about what waits and is not claimed here."""

FORGET_EVERY = 3_600.0
"""Between two deletions of the rows of dead workers."""

SWEEP_EVERY = 60.0
"""Between two sweeps of blobs that nothing needs any more."""

RENOTIFY_EVERY = 60.0
"""Between two repairs of notices that are missing."""

ROW_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Between two tries to write a row that another transaction locks."""

EXECUTING_CHECK = 0.05
"""Between two checks whether a step in a thread has ended."""

MISMATCH_PAUSE = 60.0
"""Until a strict workflow whose history does not fit the code is tried again."""

CLEANUP_TIME = 10.0
"""Until an attempt that was cancelled, and has not ended, is cancelled again."""

CANCELLED_GRACE = 2.0
"""For async attempts to be released after they were cancelled."""

LAST_GRACE = 5.0
"""After the grace, in which the database must be reached to leave in good order."""

_SHORTEST_LIMIT = 5.0
_DRIVERS = ("psycopg", "asyncpg")

log = Log("sqla_durable.worker")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the parts of a worker are to know of it.

    Attributes:
        worker_id: its id in the worker table.
        name: what that shows.
        queues: those that it claims from, as far as they are known.
        names: the workflows that it knows.
        versions: those of the code that it claims; none means all of them.
        concurrency: how many workflows it executes at once.
        transactions: how many transactional steps of each kind hold a connection at once.
        lease: how long its workflows are its own after a heartbeat.
        poll_interval: how long it waits between two polls.
        grace: how long a stop waits for steps that are being executed.
        max_attempts: how many attempts in a row may lose their worker.
        until_empty: whether it stops when nothing waits in its queues, and it executes nothing.
        blobs: where the bytes of blobs are; None for the table.
    """

    worker_id: UUID
    name: str
    queues: Subscribed
    names: list[str]
    versions: list[str]
    concurrency: int
    transactions: int
    lease: timedelta
    poll_interval: timedelta
    grace: timedelta
    max_attempts: int
    until_empty: bool = False
    blobs: ObjectStore | None = None


def engine_of(sync: sessionmaker[Session] | None, asynchronous: async_sessionmaker[AsyncSession] | None) -> Engine:
    """Return the engine for the worker's own statements: the async one if there is one, so that no thread is needed."""
    if asynchronous is not None:
        return schema.engine_of(asynchronous().sync_session)
    assert sync is not None  # noqa: S101 (checked when the worker was made)
    return schema.engine_of(sync())


def shown_name(given: str | None) -> str:
    """Return the name of a worker; by default host and process id."""
    return given or f"{socket.gethostname()}:{os.getpid()}"


def chosen_queues(durable: Durable, given: Iterable[str] | None) -> list[str]:
    """Return the queues to claim from; by default those of the workflows that are known."""
    if given is None:
        declared = {each.name for each in durable.registry.queues()}
        return sorted({"default"} | declared | {each.options.queue for each in durable.registry})
    chosen = [given] if isinstance(given, str) else sorted(set(given))
    if not chosen or not all(each.strip() for each in chosen):
        raise ValueError(f"queues={given!r} names no queue: give at least one, or leave it out.")
    return chosen


def chosen_versions(given: Iterable[str] | None) -> list[str]:
    """Return the versions to claim; none means all of them."""
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
    engine = "db.engine" if isinstance(given, scoped_session) else "engine"  # of Flask-SQLAlchemy
    raise SessionError(f"{name}={given!r} is no {kind.__name__}: pass the factory, such as {kind.__name__}({engine}).")


def require_codecs(durable: Durable) -> None:
    """Find annotations that cannot be stored now, and not in the middle of a workflow."""
    for workflow in durable.registry:
        _ = workflow.arguments, workflow.result
    for step in durable.registry.steps():
        _ = step.result


def require_driver(engine: Engine) -> None:
    """Refuse a driver on which no worker is tested.

    Raises:
        SessionError: it is neither psycopg nor asyncpg.
    """
    driver = engine.dialect.driver
    if driver not in _DRIVERS:
        raise SessionError(
            f"{engine!r} uses the driver {driver!r}: a worker needs psycopg or asyncpg. Give it an engine of its own, "
            "create_engine('postgresql+psycopg://...'); what starts workflows may keep its driver."
        )


def time_limit(lease: timedelta) -> float:
    """Return the seconds after which a transaction of the worker's own is cut off: a lease, and not too few."""
    return max(_SHORTEST_LIMIT, lease.total_seconds())


def heartbeat_limit(lease: timedelta) -> float:
    """Return the same for a heartbeat: short enough for another one within the lease."""
    return max(_SHORTEST_LIMIT / 3, lease.total_seconds() / 3)


def at_least(value: int, least: int, name: str) -> int:
    """Refuse a number that is too small."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}.")
    return value


def within(value: int, least: int, most: int, name: str) -> int:
    """Refuse a number that is too small or too large."""
    if at_least(value, least, name) > most:
        raise ValueError(f"{name}={value!r} is too large: at most {most:,}.")
    return value


def duration(value: timedelta, name: str) -> timedelta:
    """Refuse what is no duration, or a negative one."""
    require_duration(value, name)
    return value


def positive(value: timedelta, name: str) -> timedelta:
    """Refuse what is not a duration."""
    require_duration(value, name)
    if value <= timedelta():
        raise ValueError(f"{name} must be longer than zero, got {value.total_seconds():g} seconds.")
    return value
