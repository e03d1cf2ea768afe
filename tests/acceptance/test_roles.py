"""The sets of rights: a role with one of them can do what it is for, and nothing else."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable
import sqla_durable.asyncio
from sqla_durable import (
    Event,
    Executor,
    Worker,
    Workflow,
    complete_callback,
    create_callback,
    errors,
    manage,
    send_signal,
    send_update,
    set_event,
    start_child,
    start_many,
    start_with_signal,
    start_with_update,
    wait_signal,
    wait_update,
    write_stream,
)
from sqla_durable.store import hints
from tests.acceptance.rights import VERBS, Verb, World, durable, expected, greet, tried, verbs_of
from tests.acceptance.shells import PATIENCE, POLL
from tests.store import races
from tests.support.domain import Entry
from tests.support.roles import Roles, sqlstate_of
from tests.support.statements import executed_on


@durable.step
def book(session: Session, cents: int) -> int:
    session.add(Entry(account="roles", cents=cents, note=None))
    return cents


@durable.workflow
def everything(cents: int) -> str:
    booked = book(cents)
    child = start_child(greet, "child").result()
    set_event("status", "booked")
    write_stream("log", "booked")
    said = wait_signal("go", str)
    request = wait_update("change", int)
    request.reply(request.payload + 1)
    token = create_callback(str)
    set_event("token", token.token)
    return f"{booked} {child} {said} {token.result()}"


async def tried_async(engine: AsyncEngine, verb: Verb, world: World) -> str:
    async with AsyncSession(engine) as session:
        try:
            called = verb(cast("Any", session), world)
            if inspect.isawaitable(called):
                await called
            await session.flush()
        except DBAPIError as error:
            return sqlstate_of(error)
    return ""


# What each may do


def test_each_role_does_what_it_is_for_and_nothing_else(granted: Roles, world: World) -> None:
    for role in VERBS:
        engine = granted.engine(role)
        found = {name: tried(engine, verb, world) for verbs in VERBS.values() for name, verb in verbs.items()}
        assert found == expected(role), role


def test_error_says_which_rights_are_missing(granted: Roles, world: World) -> None:
    wanted: dict[str, Callable[[Session], object]] = {
        "starter": lambda session: greet.options(key="new").start(session, "x"),
        "signaller": lambda session: send_signal(session, world.pending, "go", 1),
        "updater": lambda session: send_update(session, world.pending, "change", 1),
        "answerer": lambda session: complete_callback(session, world.token, 1),
        "canceller": lambda session: manage.cancel(session, world.pending),
        "scheduler": lambda session: manage.run_schedule(session, "nightly"),
        "operator": lambda session: manage.retry(session, world.failed),
    }
    for rights, verb in wanted.items():
        with Session(granted.engine("reader")) as session, pytest.raises(DBAPIError) as caught:
            verb(session)
        assert f"the session's role needs the rights of `{rights}`" in caught.value.__notes__[0]
    worker = Worker(durable, sessionmaker=sessionmaker(granted.engine("reader")))
    with pytest.raises(DBAPIError) as caught, worker:
        pass
    assert re.match(r"the role of '\w+' needs the rights of `worker`", caught.value.__notes__[0])


async def test_the_roles_in_async_code(granted: Roles, world: World) -> None:
    for role in VERBS:
        engine = granted.async_engine(role)
        found = {
            name: await tried_async(engine, verb, world)
            for verbs in verbs_of(sqla_durable.asyncio).values()
            for name, verb in verbs.items()
        }
        await engine.dispose()
        assert found == expected(role), role


def test_a_started_record_is_whole_for_who_may_not_read_payloads(granted: Roles, world: World) -> None:
    with Session(granted.engine("starter")) as session:
        new = greet.start(session, "x")
        keyed = greet.options(key="new").start(session, "x")
        session.flush()
        for each in (new, keyed):
            assert (each.status, each.queue, each.attempt, each.input) == ("pending", "default", 1, {"name": "x"})
            assert (each.output, each.error, each.headers, each.version) == (None, None, None, "7")
        known = greet.options(key="known").start(session, "x")
        assert (known.id, known.status) == (world.done, "succeeded")
        with pytest.raises(DBAPIError, match="permission denied"):
            _ = known.output


def test_an_application_starts_signals_waits_and_cancels(granted: Roles, world: World) -> None:
    """With the sets that the page names for an application, and without those of a reader."""
    granted.execute("GRANT caller, signaller, canceller TO starter")
    sessions = sessionmaker(granted.engine("starter"), expire_on_commit=False)
    with sessions.begin() as session:
        workflow = greet.start(session, "x")
        send_signal(session, workflow.id, "go", key="once")
    with sessions() as session:
        assert session.scalars(select(Workflow.status).where(Workflow.id == workflow.id)).one() == "pending"
        with pytest.raises(DBAPIError, match="permission denied"):
            session.get(Workflow, workflow.id)
    with sessions.begin() as session:
        assert manage.cancel(session, workflow.id) == [workflow.id]
    with pytest.raises(errors.WorkflowCancelledError):
        greet.handle(sessions, workflow.id).result()
    with pytest.raises(errors.WorkflowFailedError):
        greet.handle(sessions, world.failed).result()


def test_who_replaces_and_cancels_starts_in_the_place_of_older_ones(granted: Roles) -> None:
    """Also where it holds records of older ones, which are not read again before it asks for them."""
    granted.execute("GRANT canceller TO replacer")
    sessions = sessionmaker(granted.engine("replacer"), expire_on_commit=False)
    newer = greet.options(key="k", on_conflict="cancel_running")
    with sessions.begin() as session:
        first = newer.start(session, "x")
    with sessions.begin() as session:
        session.add(first)
        second = newer.start(session, "y")
        replaced = greet.options(key="k", on_conflict="replace").start(session, "z")
        assert (replaced.id, replaced.status) == (second.id, "pending")
    with Session(granted.engine("reader")) as session:
        found = session.scalars(select(Workflow).where(Workflow.id.in_([first.id, second.id])).order_by(Workflow.id))
        assert [(str(each.status), each.former_key) for each in found] == [("cancelled", "k"), ("pending", None)]


def test_the_error_of_who_may_only_start_names_the_rights_of_a_rule(granted: Roles) -> None:
    with Session(granted.engine("starter")) as session:
        with pytest.raises(DBAPIError, match="permission denied") as caught:
            greet.options(key="known", unique="unfinished").start(session, "x")
        assert any("`replacer`" in each for each in caught.value.__notes__)


def test_a_service_with_two_roles_starts_with_a_signal_or_an_update(granted: Roles) -> None:
    granted.execute("GRANT starter TO signaller, updater")
    with Session(granted.engine("signaller")) as session:
        start_with_signal(session, greet.options(key="k").bind("x"), "go", 1)
        session.commit()
    with sessionmaker(granted.engine("updater")).begin() as session:
        _, sent = start_with_update(session, greet.options(key="k").bind("x"), "change", 1)
    with pytest.raises(errors.ResultTimeoutError):
        sent.result(timeout=timedelta())


def test_a_worker_s_role_works(engine: Engine, granted: Roles) -> None:
    """A worker with a child, a signal, an update and a callback, each from its own role."""
    granted.execute("GRANT ALL ON public.entry TO worker", "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO worker")
    with sessionmaker(granted.engine("starter")).begin() as session:
        workflow_id = everything.start(session, 3).id
        limited = greet.options(queue="limited", by="a").start(session, "a").id
    with sessionmaker(granted.engine("signaller")).begin() as session:
        send_signal(session, workflow_id, "go", "went")
    with sessionmaker(granted.engine("updater")).begin() as session:
        sent = send_update(session, workflow_id, "change", 1, reply=int)
    with sessionmaker(granted.engine("scheduler")).begin() as session:
        manage.put_schedule(session, "nightly", greet.bind("night"), cron="0 3 * * *", missed="run_all")
    fired = select(func.count()).where(Workflow.schedule == "nightly", Workflow.finished_at.is_not(None))
    with engine.begin() as connection:  # yesterday's tick was missed
        last = "date_trunc('day', statement_timestamp(), 'UTC') - interval '21 hours'"
        connection.execute(text(f"UPDATE durable.schedule SET next_at = {last}, due_at = {last}"))
    reader = granted.engine("reader")
    with Worker(durable, sessionmaker=sessionmaker(granted.engine("worker")), poll_interval=POLL):
        assert sent.result(timeout=PATIENCE) == 2
        with Session(reader) as session:
            assert races.wait_until(lambda: session.scalar(fired), seconds=PATIENCE.total_seconds())
            token = races.wait_until(lambda: token_in(session, workflow_id), seconds=PATIENCE.total_seconds()) or ""
        with sessionmaker(granted.engine("answerer")).begin() as session:
            complete_callback(session, token, "answered")
        result = everything.handle(sessionmaker(reader), workflow_id).result(timeout=PATIENCE)
        assert greet.handle(sessionmaker(reader), limited).result(timeout=PATIENCE) == "hello a"
    assert result == "3 hello child went answered"
    with Session(granted.engine("worker")) as session:
        assert Executor(session).run(greet, "inline") == "hello inline"


def token_in(session: Session, workflow_id: UUID) -> str | None:
    session.rollback()
    query = select(Event.value).where(Event.workflow_id == workflow_id, Event.key == "token")
    found: str | None = session.scalars(query).one_or_none()
    return found


# Notifications


def test_a_flood_of_notifications_makes_no_worker_busy(engine: Engine, granted: Roles) -> None:
    """Tens of thousands a second, for a second, from a role without any right on the tables."""
    worked = create_engine(engine.url)
    flood = text(
        "SELECT count(pg_notify(:channel, kind || n)) "
        "FROM generate_series(1, 20) n, unnest(ARRAY['', 'q:default', 's:', 'l:', 'q:x', 'w:']) kind"
    )
    granted.execute("REVOKE ALL ON ALL TABLES IN SCHEMA durable FROM reader")
    outsider = granted.engine("reader").execution_options(isolation_level="AUTOCOMMIT")
    ids: list[UUID] = []
    with (
        executed_on(worked) as executed,
        Worker(durable, sessionmaker=sessionmaker(worked)),
        outsider.connect() as connection,
    ):
        began = time.monotonic()
        while (seconds := time.monotonic() - began) < 1 or not all_done(engine, ids):
            for _ in range(20):
                connection.execute(flood, {"channel": hints.channel("durable")})
            with sessionmaker(engine).begin() as session:
                ids += start_many(session, [greet.bind("x")]) if seconds < 1 else []
            assert seconds < PATIENCE.total_seconds()
        count = len(executed)
    worked.dispose()
    assert count < 60 + 50 * seconds + 5 * len(ids), (count, seconds, len(ids))


def all_done(engine: Engine, ids: Sequence[UUID]) -> bool:
    with Session(engine) as session:
        query = select(func.count()).where(Workflow.id.in_(ids), Workflow.finished_at.is_not(None))
        return session.scalars(query).one() == len(ids)
