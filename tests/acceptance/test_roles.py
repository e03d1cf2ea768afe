"""The rights that docs/security.md grants: each role can do what it is for, and an attack is refused."""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias, cast
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Connection, Engine, create_engine, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable
import sqla_durable.asyncio
from sqla_durable import (
    Durable,
    Event,
    Executor,
    Queue,
    Signal,
    Step,
    StreamItem,
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
from sqla_durable.operations.callback import CallbackRecord
from sqla_durable.store import hints
from tests.acceptance.shells import PATIENCE, POLL
from tests.store import races
from tests.support.domain import Entry
from tests.support.roles import (
    BY_TASK,
    CHECKED,
    DENIED,
    GENERATED,
    TASKS,
    Roles,
    recipe,
    refused,
    roles,
    sqlstate_of,
)
from tests.support.statements import executed_on

DAY = timedelta(days=1)
durable = Durable(version="7")

Verb: TypeAlias = Callable[[Session, "World"], object]


@durable.step
def book(session: Session, cents: int) -> int:
    session.add(Entry(account="roles", cents=cents, note=None))
    return cents


@durable.workflow
def greet(name: str) -> str:
    return f"hello {name}"


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


@dataclass(frozen=True)
class World:
    """What the verbs are about."""

    pending: UUID
    failed: UUID
    cancelled: UUID
    done: UUID
    owner: UUID
    token: str


@pytest.fixture
def granted(engine: Engine, direct_url: str) -> Generator[Roles]:
    """The roles of the page."""
    with roles(engine, direct_url, *TASKS, sql=recipe(BY_TASK)) as made:
        yield made


@pytest.fixture
def world(engine: Engine) -> World:
    """A workflow of each kind, one of which has made a callback."""
    (owner,) = races.claimed_fences(engine)
    made = CallbackRecord.new(owner.workflow_id, within=DAY, heartbeat=DAY)
    with Session(engine) as session:
        races.record(session, [races.checkpoint(owner, "create_callback", output=made.to_json())])
        pending, failed, cancelled = (greet.start(session, each).id for each in ("a", "b", "c"))
        done = greet.options(key="known").start(session, "d").id
        session.flush()
        finished = "UPDATE durable.workflow SET finished_at = statement_timestamp(), "
        error = json.dumps({"type": "builtins:ValueError"})
        session.execute(
            text(f"{finished} status = 'failed', token = id, error = :error WHERE id = :id"),
            {"id": failed, "error": error},
        )
        session.execute(text(f"{finished} status = 'cancelled' WHERE id = :id"), {"id": cancelled})
        session.execute(text(f"{finished} status = 'succeeded', output = '\"d\"' WHERE id = :id"), {"id": done})
        session.add(Event(workflow_id=done, key="status", value="booked"))
        session.commit()
    return World(pending, failed, cancelled, done, owner.workflow_id, made.reveal_token())


def pause(session: Session, _: World) -> None:
    session.add(Queue(name="mail", paused_at=func.now()))


def verbs_of(api: Any) -> Mapping[str, Mapping[str, Verb]]:
    """Return what each role is for, by the names of one namespace, `sqla_durable` or `sqla_durable.asyncio`."""
    return {
        "starter": {
            "start": lambda session, _: greet.start(session, "x"),
            "start with options": lambda session, _: greet.options(
                delay=DAY, timeout=DAY, deadline=2 * DAY, priority=1, queue="mail"
            ).start(session, "x"),
            "start under a key": lambda session, _: greet.options(key="new", delay=DAY, deadline=DAY).start(
                session, "x"
            ),
            "start under a known key": lambda session, _: greet.options(key="known").start(session, "x"),
            "start many": lambda session, _: api.start_many(session, [greet.bind("x"), greet.bind("y")]),
            "start many under keys": lambda session, _: api.start_many(
                session, [greet.options(key=each, delay=DAY).bind("x") for each in ("known", "new")]
            ),
        },
        "caller": {
            "result": lambda session, world: greet.handle(session, world.done).result(),
            "event": lambda session, world: api.get_event(session, world.done, "status"),
        },
        "signaller": {
            "signal": lambda session, world: api.send_signal(session, world.pending, "go", 1),
            "signal under a key": lambda session, world: api.send_signal(
                session, [world.pending, world.owner], "go", 1, key="k"
            ),
        },
        "updater": {
            "update": lambda session, world: api.send_update(session, world.pending, "change", 1),
            "update under a key": lambda session, world: api.send_update(session, world.pending, "change", 1, key="k"),
        },
        "answerer": {
            "complete": lambda session, world: api.complete_callback(session, world.token, 1),
            "fail": lambda session, world: api.fail_callback(session, world.token, "no"),
            "keep alive": lambda session, world: api.heartbeat_callback(session, world.token),
        },
        "canceller": {
            "cancel": lambda session, world: api.manage.cancel(session, [world.pending, world.owner]),
        },
        "operator": {
            "resume": lambda session, world: api.manage.resume(session, world.cancelled),
            "retry": lambda session, world: api.manage.retry(session, world.failed),
            "rewind": lambda session, world: api.manage.rewind(session, world.owner, to_step="create_callback"),
            "fork": lambda session, world: api.manage.fork(session, world.owner),
            "delete": lambda session, world: api.manage.delete(
                session, select(Workflow).where(Workflow.id == world.done)
            ),
            "pause a queue": pause,
        },
        "reader": {
            "read workflows": lambda session, _: session.execute(select(Workflow)),
            "read steps": lambda session, _: session.execute(select(Step)),
            "read signals": lambda session, _: session.execute(select(Signal)),
            "read events": lambda session, _: session.execute(select(Event)),
            "read streams": lambda session, _: session.execute(select(StreamItem)),
            "read queues": lambda session, _: session.execute(select(Queue)),
        },
    }


VERBS = verbs_of(sqla_durable)
WITH_POLICIES = {
    "operator": {*VERBS["reader"], *VERBS["caller"], "cancel", "start", "start many", "start under a known key"},
    "reader": {*VERBS["caller"]},
    "updater": {"event"},
}
ALSO = WITH_POLICIES | {"updater": {*VERBS["signaller"], "event"}, "answerer": {*VERBS["signaller"]}}


def expected(role: str, also: Mapping[str, set[str]] = ALSO) -> dict[str, str]:
    allowed = {*VERBS[role], *also.get(role, set())}
    return {verb: "" if verb in allowed else DENIED for verbs in VERBS.values() for verb in verbs}


def tried(engine: Engine, verb: Verb, world: World) -> str:
    """Carry a verb out and take it back; return the SQLSTATE of its error."""
    with Session(engine) as session:
        try:
            verb(session, world)
            session.flush()
        except DBAPIError as error:
            return sqlstate_of(error)
    return ""


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
    with sessionmaker(granted.engine("signaller")).begin() as session:
        send_signal(session, workflow_id, "go", "went")
    with sessionmaker(granted.engine("updater")).begin() as session:
        sent = send_update(session, workflow_id, "change", 1, reply=int)
    reader = granted.engine("reader")
    with Worker(durable, sessionmaker=sessionmaker(granted.engine("worker")), poll_interval=POLL):
        assert sent.result(timeout=PATIENCE) == 2
        with Session(reader) as session:
            token = races.wait_until(lambda: token_in(session, workflow_id), seconds=PATIENCE.total_seconds()) or ""
        with sessionmaker(granted.engine("answerer")).begin() as session:
            complete_callback(session, token, "answered")
        result = everything.handle(sessionmaker(reader), workflow_id).result(timeout=PATIENCE)
    assert result == "3 hello child went answered"
    with Session(granted.engine("worker")) as session:
        assert Executor(session).run(greet, "inline") == "hello inline"


def token_in(session: Session, workflow_id: UUID) -> str | None:
    session.rollback()
    query = select(Event.value).where(Event.workflow_id == workflow_id, Event.key == "token")
    found: str | None = session.scalars(query).one_or_none()
    return found


# Attacks


def test_a_starter_forges_nothing(granted: Roles, world: World) -> None:
    engine = granted.engine("starter")
    new = "INSERT INTO durable.workflow (name, key, {}) VALUES ('greet', 'forged', {})"
    columns = {
        "output": "'1'",
        "error": "'{}'",
        "token": "gen_random_uuid()",
        "worker_id": "gen_random_uuid()",
        "started_at": "now()",
        "finished_at": "now()",
        "awaits": "'[]'",
        "attempt": "7",
        "crashes": "1",
        "cancellation": "'requested'",
        "continued_at": "now()",
        "created_at": "now()",
        "enqueued_at": "'2020-01-01'",
        "parent_id": f"'{world.owner}'",
        "parent_key": "'x'",
        "detached": "true",
        "forked_from": f"'{world.owner}'",
    }
    assert {name: refused(engine, new.format(name, value)) for name, value in columns.items()} == dict.fromkeys(
        columns, DENIED
    )
    statuses = ("running", "succeeded", "failed", "cancelled")
    assert [refused(engine, new.format("status", f"'{each}'")) for each in statuses] == [CHECKED] * 4
    for each in (
        "INSERT INTO durable.workflow (name, key, status, output, finished_at) "
        "VALUES ('greet', 'forged', 'succeeded', '\"gold\"', now())",
        "INSERT INTO durable.workflow SELECT * FROM durable.workflow",
        "INSERT INTO durable.workflow (id, name) VALUES (gen_random_uuid(), 'greet') "
        "ON CONFLICT (id) DO UPDATE SET name = 'greet'",
        "UPDATE durable.workflow SET status = 'pending'",
        "UPDATE durable.workflow SET priority = -1",
        "DELETE FROM durable.workflow",
        "SELECT input FROM durable.workflow",
        "SELECT output FROM durable.workflow",
        "SELECT headers FROM durable.workflow",
        "SELECT id FROM durable.workflow FOR UPDATE",
        "LOCK TABLE durable.workflow IN EXCLUSIVE MODE",
        "TRUNCATE durable.workflow",
        "SELECT key FROM durable.step",
        "INSERT INTO durable.step (workflow_id, key, name, position, status, attempt, started_at) "
        f"VALUES ('{world.owner}', 'x', 'x', 1, 'waiting', 1, now())",
        f"INSERT INTO durable.signal (workflow_id, name) VALUES ('{world.owner}', 'go')",
        "SELECT id FROM durable.worker",
        "INSERT INTO durable.queue (name, paused_at) VALUES ('default', now())",
    ):
        assert refused(engine, each) == DENIED, each


_ID, _TIME = "0190a0a0-0000-7000-8000-000000000001", "2026-01-01 00:00:00Z"
STATES: Mapping[str, Mapping[str, str]] = {
    "running": {"token": _ID, "worker_id": _ID, "started_at": _TIME},
    "succeeded": {"output": '"gold"', "finished_at": _TIME},
    "failed": {"error": '{"type": "builtins:ValueError"}', "finished_at": _TIME},
    "cancelled": {"finished_at": _TIME},
}


def new_row(status: str) -> str:
    """Return the columns and values of a new row of a status, for an INSERT."""
    given = {"name": "greet", "key": "forged", "status": status, **STATES.get(status, {})}
    values = ", ".join(f"'{each}'" for each in given.values()).replace(":", r"\:")
    return f"({', '.join(given)}) VALUES ({values})"


def test_nobody_inserts_a_forged_state(granted: Roles) -> None:
    for role in TASKS:
        engine = granted.engine(role)
        for status in STATES:
            assert refused(engine, f"INSERT INTO durable.workflow {new_row(status)}") == DENIED, (role, status)
            alone = refused(engine, f"INSERT INTO durable.workflow (name, status) VALUES ('greet', '{status}')")
            assert alone in (DENIED, CHECKED), (role, status)


WAYS: Mapping[str, str] = {
    "INSERT": "INSERT INTO durable.workflow {row}",
    "DO NOTHING": "INSERT INTO durable.workflow {row} ON CONFLICT DO NOTHING",
    "DO UPDATE": "INSERT INTO durable.workflow {row} ON CONFLICT (id) DO UPDATE SET priority = 1",
    "WITH": "WITH new AS (INSERT INTO durable.workflow {row} RETURNING id) SELECT id FROM new",
    "MERGE": "MERGE INTO durable.workflow USING (SELECT) AS one ON false WHEN NOT MATCHED THEN INSERT {row}",
    "view": "INSERT INTO public.workflows {row}",
}


def inserted(connection: Connection, statement: str) -> None:
    connection.execute(text(statement))


def copied(connection: Connection, status: str) -> None:
    """Insert a row of a status by COPY."""
    given = {"name": "greet", "key": "forged", "status": status, **STATES.get(status, {})}
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(f"COPY durable.workflow ({', '.join(given)}) FROM STDIN") as copy:
        copy.write_row(list(given.values()))


def refusal(engine: Engine, insert: Callable[[Connection, str], None], what: str) -> tuple[str, ...]:
    """Insert and roll back; return what PostgreSQL says of the refusal."""
    with engine.connect() as connection:
        try:
            insert(connection, what)
        except (DBAPIError, psycopg.Error) as error:
            said = cast("Any", getattr(error, "orig", error)).diag
            return said.sqlstate, f"{said.schema_name}.{said.table_name}", said.constraint_name, said.message_primary
    return ()


def test_whoever_may_insert_whole_rows_forges_no_state(granted: Roles, world: World, engine: Engine) -> None:
    """A role with INSERT on the table, and its owner, a superuser: a later start would return the outcome."""
    granted.execute(
        "GRANT INSERT, SELECT, UPDATE ON durable.workflow TO starter",
        "CREATE VIEW public.workflows AS SELECT * FROM durable.workflow",
        "GRANT INSERT ON public.workflows TO starter",
    )
    wanted = {"pending": (), **{status: refused_by_the_trigger(status) for status in STATES}}
    for each in (granted.engine("starter"), engine):
        for way, statement in WAYS.items():
            new = {status: statement.format(row=new_row(status)) for status in wanted}
            assert {status: refusal(each, inserted, new[status]) for status in wanted} == wanted, way
        assert {status: refusal(each, copied, status) for status in wanted} == wanted
    with Session(granted.engine("starter")) as session:
        assert greet.options(key="forged").start(session, "x").status == "pending"


def refused_by_the_trigger(status: str) -> tuple[str, ...]:
    message = (
        "a new workflow is pending, or suspended until wake_at: insert it without token and finished_at, got status"
    )
    return CHECKED, "durable.workflow", "workflow_new_check", f"{message} '{status}'"


def test_what_a_new_row_may_be_goes_in_and_old_rows_are_changed_as_before(world: World, engine: Engine) -> None:
    again = "INSERT INTO durable.workflow (id, name) VALUES (:id, 'greet') ON CONFLICT (id) DO UPDATE SET {} "
    delayed = (
        "INSERT INTO durable.workflow (name, status, wake_at, started_at) VALUES ('greet', 'suspended', now(), now())"
    )
    with engine.connect() as connection:
        connection.execute(text(delayed))
        for change in ("priority = 1", "status = 'succeeded', output = '1', finished_at = now()"):
            status = connection.scalar(text(f"{again.format(change)} RETURNING status"), {"id": world.done})
            assert status == "succeeded"


def test_the_owner_loads_rows_from_elsewhere_while_the_trigger_is_disabled(engine: Engine) -> None:
    disable, enable = recipe(BY_TASK, 2).strip().split("-- load\n")
    succeeded = f"INSERT INTO durable.workflow {new_row('succeeded')}"
    with engine.begin() as connection:
        connection.execute(text(disable))
        connection.execute(text(succeeded))
        connection.execute(text(enable))
    assert refused(engine, succeeded) == CHECKED


def starting(**options: Any) -> Verb:
    return lambda session, _: greet.options(**options).start(session, "x")


def starting_many(**options: Any) -> Verb:
    return lambda session, _: start_many(session, [greet.options(**options).bind("x")])


def test_what_is_left_out_of_the_grant_cannot_be_chosen(granted: Roles, world: World) -> None:
    granted.execute("REVOKE INSERT (headers, priority, queue, status, key) ON durable.workflow FROM starter")
    engine = granted.engine("starter")
    assert tried(engine, lambda session, _: greet.start(session, "x"), world) == ""
    assert tried(engine, lambda session, _: start_many(session, [greet.bind("x")]), world) == ""
    options: tuple[dict[str, Any], ...] = ({"priority": 1}, {"queue": "mail"}, {"delay": DAY}, {"key": "k"})
    for each in options:
        assert tried(engine, starting(**each), world) == DENIED, each
        assert tried(engine, starting_many(**each), world) == DENIED, each
    headers = "INSERT INTO durable.workflow (name, headers) VALUES ('greet', '{}')"
    assert refused(engine, headers.replace(":", r"\:")) == DENIED


def test_a_hidden_key_starts_nothing_for_who_may_not_delete(granted: Roles, world: World, engine: Engine) -> None:
    granted.execute(
        "ALTER TABLE durable.workflow ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY hides ON durable.workflow TO starter USING (id <> '{world.done}') WITH CHECK (true)",
    )
    with Session(granted.engine("starter")) as session:
        bound = [greet.options(key=each).bind("x") for each in ("free", "known")]
        with pytest.raises(errors.KeyNotVisibleError, match="'known'"):
            start_many(session, bound)
        session.commit()
    with Session(engine) as session:
        assert session.scalars(select(Workflow.key).where(Workflow.key.is_not(None))).all() == ["known"]


def test_a_canceller_gives_no_outcome(granted: Roles, world: World) -> None:
    engine = granted.engine("canceller")
    change = "UPDATE durable.workflow SET {} WHERE finished_at IS NULL"
    for status in ("succeeded", "failed"):
        assert refused(engine, change.format(f"status = '{status}', finished_at = now()")) == CHECKED, status
    for each in (
        *(change.format(f"{column} = NULL") for column in ("output", "error", "key", "deadline_at", "headers")),
        change.format("queue = 'mail'"),
        change.format("priority = 1"),
        "DELETE FROM durable.workflow",
        "SELECT input FROM durable.workflow",
        "SELECT output FROM durable.workflow",
        "SELECT payload FROM durable.signal",
        "UPDATE durable.signal SET consumed_by = 'x'",
        "SELECT key FROM durable.step",
        INSERT.format(", key", ", 'x'").replace(":id", f"'{world.owner}'").replace(":name", "'go'"),
    ):
        assert refused(engine, each) == DENIED, each
    notice = INSERT.format(", is_notice", ", true")
    assert refused(engine, notice, id=world.owner, name="go") == CHECKED


ENGINE_NAMES = ("#suspended", "#child", "#orphans", "#callback:{}", "#update:change", "#", "#whatever")
INSERT = "INSERT INTO durable.signal (workflow_id, name{}) VALUES (:id, :name{})"


def test_a_signaller_sends_nothing_of_the_engine_s(granted: Roles, world: World, engine: Engine) -> None:
    signaller = granted.engine("signaller")
    with Session(engine) as session:
        signalled = Step.output["signal"].astext
        name_of_callback: str = session.scalars(select(signalled).where(Step.workflow_id == world.owner)).one()
    assert name_of_callback.startswith("#callback:")
    for name in (*ENGINE_NAMES, name_of_callback):
        given = {"id": world.owner, "name": name}
        assert refused(signaller, INSERT.format("", ""), **given) == CHECKED, name
        for column in ("is_answer", "is_update", "is_notice"):
            assert refused(signaller, INSERT.format(f", {column}", ", true"), **given) == DENIED, (name, column)
        with Session(signaller) as session, pytest.raises(errors.ArgumentError):
            send_signal(session, world.owner, name)
    for column, value in {"delivered_at": "now()", "consumed_by": "'x'", "created_at": "now()"}.items():
        assert refused(signaller, INSERT.format(f", {column}", f", {value}"), id=world.owner, name="go") == DENIED
    chosen = "INSERT INTO durable.signal (workflow_id, name, id) {} VALUES (:id, 'go', 1)"
    assert refused(signaller, chosen.format("OVERRIDING SYSTEM VALUE"), id=world.owner) == DENIED
    assert refused(engine, chosen.format(""), id=world.owner) == GENERATED
    for each in (
        "UPDATE durable.signal SET consumed_by = 'x'",
        "UPDATE durable.signal SET delivered_at = now()",
        "DELETE FROM durable.signal",
        "SELECT payload FROM durable.signal",
        "SELECT output FROM durable.step",
        "SELECT awaits FROM durable.workflow",
    ):
        assert refused(signaller, each) == DENIED, each


COLUMN_OF = {"updater": "is_update", "answerer": "is_answer", "operator": "is_notice"}
OWN = {"updater": {"#update:x"}, "answerer": {"#callback:x"}, "operator": {"#suspended", "#child", "#orphans", "#x"}}


def test_each_kind_of_name_needs_its_own_column(granted: Roles, world: World) -> None:
    names = ("go", "#suspended", "#child", "#orphans", "#x", "#update:x", "#callback:x")
    for role, own in COLUMN_OF.items():
        engine = granted.engine(role)
        for name in names:
            for column in ("is_update", "is_answer", "is_notice"):
                outcome = refused(engine, INSERT.format(f", {column}", ", true"), id=world.owner, name=name)
                allowed = "" if name in OWN[role] else CHECKED
                assert outcome == (allowed if column == own else DENIED), (role, name, column)


def test_policies_keep_answers_and_updates_apart_from_signals(granted: Roles, engine: Engine, world: World) -> None:
    granted.execute(*recipe(BY_TASK, 1).split(";\n")[:-1])
    for role in VERBS:
        own = granted.engine(role)
        found = {name: tried(own, verb, world) for verbs in VERBS.values() for name, verb in verbs.items()}
        assert found == expected(role, WITH_POLICIES), role
    sent = {
        role: refused(granted.engine(role), INSERT.format("", ""), id=world.owner, name="go")
        for role in ("signaller", "updater", "answerer")
    }
    assert sent == {"signaller": "", "updater": DENIED, "answerer": DENIED}


# Notifications


def test_a_flood_of_notifications_makes_no_worker_busy(engine: Engine, granted: Roles) -> None:
    """Tens of thousands a second, for two seconds, from a role without any right on the tables."""
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
        while (seconds := time.monotonic() - began) < 2 or not all_done(engine, ids):
            for _ in range(20):
                connection.execute(flood, {"channel": hints.channel("durable")})
            with sessionmaker(engine).begin() as session:
                ids += start_many(session, [greet.bind("x")]) if seconds < 2 else []
            assert seconds < PATIENCE.total_seconds()
        count = len(executed)
    worked.dispose()
    assert count < 60 + 50 * seconds + 5 * len(ids), (count, seconds, len(ids))


def all_done(engine: Engine, ids: Sequence[UUID]) -> bool:
    with Session(engine) as session:
        query = select(func.count()).where(Workflow.id.in_(ids), Workflow.finished_at.is_not(None))
        return session.scalars(query).one() == len(ids)
