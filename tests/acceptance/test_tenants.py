"""Row level security by tenant, as docs/security.md has it: forced on every table, which a plain role owns."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine, event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import (
    Blob,
    Durable,
    Event,
    Execution,
    Interceptor,
    Signal,
    Step,
    StreamItem,
    Worker,
    Workflow,
    complete_callback,
    create_blob,
    create_callback,
    errors,
    manage,
    send_signal,
    send_update,
    set_event,
    start_child,
    start_many,
    wait_signal,
    write_stream,
)
from sqla_durable.models import Audit, BlobChunk, StoredBlob
from sqla_durable.models.views import VIEWS
from sqla_durable.store.rights import ROLES
from tests.acceptance.shells import PATIENCE, POLL
from tests.store import races
from tests.support.roles import DENIED, Roles, recipe, refused, roles, sqlstate_of

HERE = "tests/acceptance/test_tenants.py"
GRANTED = ("starter", "signaller", "updater", "answerer", *ROLES)
NAMES = (*GRANTED, "app", "acme", "globex")
FOR_ALL, BY_HEADERS, BY_TAGS = (recipe(HERE, number) for number in range(3))
tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Tenant(Interceptor):
    """Carries the caller's tenant along."""

    def start(self, workflow: str, headers: dict[str, str]) -> None:
        headers["tenant"] = tenant.get()

    @contextmanager
    def workflow(self, execution: Execution) -> Generator[None]:
        token = tenant.set(execution.headers["tenant"])
        try:
            yield
        finally:
            tenant.reset(token)


durable = Durable(interceptors=[Tenant()])


@durable.workflow
def child() -> str:
    return tenant.get()


@durable.step
def attach() -> Blob:
    with create_blob() as writer:
        writer.write(b"x")
    return writer.blob


@durable.workflow
def report() -> str:
    attach()
    seen = start_child(child).result()
    set_event("status", "asked")
    write_stream("log", "asked")
    callback = create_callback(str)
    set_event("token", callback.token)
    return f"{seen} {wait_signal('go', str)} {callback.result()}"


@contextmanager
def acting(name: str) -> Generator[None]:
    token = tenant.set(name)
    try:
        yield
    finally:
        tenant.reset(token)


@dataclass(frozen=True)
class Place:
    """The database of the tenants.

    Attributes:
        app: the application's sessions, as the tenant of the context.
        worker: those of workers.
    """

    roles: Roles
    app: sessionmaker[Session]
    worker: sessionmaker[Session]

    def run(self, action: Callable[[Session], Any]) -> Any:
        with self.app.begin() as session:
            return action(session)


def set_tenant(connection: Connection) -> None:
    connection.execute(text("SELECT set_config('app.tenant', :tenant, false)"), {"tenant": tenant.get()})


@contextmanager
def made(engine: Engine, url: str, sql: str) -> Generator[Roles]:
    with roles(engine, url, *NAMES) as given:
        given.grant(*GRANTED)
        given.execute(
            "GRANT starter, signaller, updater, answerer TO app",
            # What operators have, of its own workflows.
            "GRANT SELECT, UPDATE, DELETE ON durable.workflow, durable.step, durable.signal, durable.event, "
            "durable.stream_item, durable.blob, durable.blob_chunk TO app",
            "GRANT INSERT ON durable.workflow, durable.step, durable.event, durable.stream_item TO app",
            "GRANT INSERT (is_notice) ON durable.signal TO app",
            FOR_ALL,
            sql,
        )
        yield given


@pytest.fixture
def place(engine: Engine, direct_url: str) -> Generator[Place]:
    with made(engine, direct_url, BY_HEADERS) as given:
        app = given.engine("app")
        event.listen(app, "begin", set_tenant)
        yield Place(given, sessionmaker(app), sessionmaker(given.engine("work")))


@pytest.fixture
def reports(place: Place) -> dict[str, UUID]:
    """A report of each tenant that is waiting for its callback's answer."""
    ids: dict[str, UUID] = {}
    for name in ("acme", "globex"):
        with acting(name):
            ids[name] = place.run(lambda session: report.options(key=f"{tenant.get()}:1").start(session).id)
    with Worker(durable, sessionmaker=place.worker, poll_interval=POLL):
        for name, workflow_id in ids.items():
            with acting(name):
                races.wait_until(partial(token_of, place, workflow_id), seconds=PATIENCE.total_seconds())
    return ids


def token_of(place: Place, workflow_id: UUID) -> str | None:
    query = select(Event.value).where(Event.workflow_id == workflow_id, Event.key == "token")
    found: str | None = place.run(lambda session: session.scalars(query).one_or_none())
    return found


def changing(statement: str, **parameters: object) -> Callable[[Session], int]:
    """Return the action that executes a statement, and gives how many rows it changed."""

    def action(session: Session) -> int:
        return session.connection().execute(text(statement), parameters).rowcount

    return action


def outcome(place: Place, action: Callable[[Session], Any]) -> Any:
    """Return what an action gives, or the SQLSTATE with which it is refused."""
    try:
        return place.run(action)
    except DBAPIError as error:
        return sqlstate_of(error)


# What is seen


def test_a_tenant_sees_its_own_only(place: Place, reports: dict[str, UUID]) -> None:
    for name, own in reports.items():
        with acting(name), place.app() as session:
            seen = set(session.scalars(select(Workflow.id)))
            family = set(session.scalars(select(Workflow.id).where((Workflow.id == own) | (Workflow.parent_id == own))))
            assert seen == family
            assert len(seen) == 2
            assert session.scalars(select(BlobChunk.blob_id)).all() == session.scalars(select(StoredBlob.id)).all()
            for table in (Step, Event, StreamItem, StoredBlob):
                assert set(session.scalars(select(table.workflow_id))) == {own}, table
            other = next(each for of, each in reports.items() if of != name)
            handle = report.handle(place.app, other)
            with pytest.raises(errors.NotFoundError):
                handle.result(timeout=timedelta())
            with pytest.raises(errors.ResultTimeoutError):
                report.handle(place.app, own).result(timeout=timedelta())
    assert place.run(lambda session: session.scalars(select(Workflow.id)).all()) == []
    with place.roles.engine("app").connect() as connection:  # without the setting
        assert connection.execute(select(Workflow.id)).all() == []
    with place.roles.engine("migrate").connect() as connection:
        assert connection.execute(select(Workflow.id)).all() == []


# What is started


def test_a_tenant_starts_its_own_only(place: Place) -> None:
    new = "INSERT INTO durable.workflow (name, key, headers) VALUES ('child', {}, {})"
    own, forged = "jsonb_build_object('tenant', 'acme')", "jsonb_build_object('tenant', 'globex')"
    forgeries = {
        new.format("NULL", own): 1,
        new.format("'acme:1'", own): 1,
        new.format("NULL", forged): DENIED,
        new.format("NULL", "NULL"): DENIED,
        new.format("'globex:1'", own): DENIED,
        new.format("'1'", own): DENIED,
        f"UPDATE durable.workflow SET headers = {forged}": DENIED,
    }
    with acting("acme"):
        found = {each: outcome(place, changing(each)) for each in forgeries}
    assert found == forgeries


def start_seven(session: Session) -> UUID:
    return child.options(key=f"{tenant.get()}:7").start(session).id


def test_two_tenants_have_the_same_keys(place: Place) -> None:
    for name in ("acme", "globex"):
        with acting(name):
            first = place.run(start_seven)
            assert place.run(start_seven) == first
            ids = place.run(partial(start_many, bound=[child.options(key=f"{name}:{each}").bind() for each in (7, 8)]))
            assert ids[0] == first
            assert len(place.run(lambda session: session.scalars(select(Workflow.id)).all())) == 2


async def test_a_tenant_starts_in_async_code(place: Place) -> None:
    app = place.roles.async_engine("app")
    event.listen(app.sync_engine, "begin", set_tenant)
    for name in ("acme", "globex"):
        with acting(name):
            async with AsyncSession(app) as session, session.begin():
                workflow = await child.options(key=f"{name}:7").start(session)
                await aio.send_signal(session, workflow, "go")
            async with AsyncSession(app) as session:
                assert (await session.scalars(select(Workflow.key))).all() == [f"{name}:7"]
                assert len((await session.scalars(select(Signal.id))).all()) == 1
    await app.dispose()


def test_children_only_under_parents_that_are_seen(place: Place, reports: dict[str, UUID]) -> None:
    new = (
        "INSERT INTO durable.workflow (name, headers, parent_id, parent_key) "
        "VALUES ('child', jsonb_build_object('tenant', 'acme'), :parent, 'x')"
    )
    with acting("acme"):
        found = {name: outcome(place, changing(new, parent=each)) for name, each in reports.items()}
    assert found == {"acme": 1, "globex": DENIED}


# What is reached


def test_a_tenant_reaches_its_own_only(place: Place, reports: dict[str, UUID]) -> None:
    own, other = reports["acme"], reports["globex"]
    with acting("globex"):
        token = token_of(place, other)
    verbs: dict[str, tuple[Callable[[Session, UUID], object], object]] = {
        "signal": (lambda session, to: send_signal(session, to, "go", 1), errors.NotFoundError),
        "update": (lambda session, to: send_update(session, to, "change", 1), errors.NotFoundError),
        "fork": (lambda session, to: manage.fork(session, to, key="acme:fork"), errors.NotFoundError),
        "cancel": (lambda session, to: manage.cancel(session, to), []),
        "retry": (lambda session, to: manage.retry(session, to), []),
        "delete": (lambda session, to: manage.delete(session, to), []),
    }
    with acting("acme"):
        for name, (verb, expected) in verbs.items():
            with place.app() as session:
                if isinstance(expected, type):
                    with pytest.raises(errors.NotFoundError):
                        verb(session, other)
                else:
                    assert verb(session, other) == expected, name
            with place.app() as session:
                verb(session, own)
        with place.app() as session, pytest.raises(errors.NotFoundError):
            complete_callback(session, str(token), "forged")
        for statement in (
            "INSERT INTO durable.signal (workflow_id, name) VALUES (:id, 'go')",
            "INSERT INTO durable.event (workflow_id, key, value) VALUES (:id, 'status', '1')",
            "INSERT INTO durable.step (workflow_id, key, name, position, status, attempt, started_at) "
            "VALUES (:id, 'x', 'x', 9, 'waiting', 1, now())",
        ):
            assert outcome(place, changing(statement, id=other)) == DENIED
            assert outcome(place, changing(statement, id=own)) == 1
        for statement in (
            "UPDATE durable.workflow SET status = 'cancelled', finished_at = now() WHERE id = :id",
            "UPDATE durable.step SET finished_at = now() WHERE workflow_id = :id",
            "DELETE FROM durable.event WHERE workflow_id = :id",
        ):
            assert outcome(place, changing(statement, id=other)) == 0


def test_a_worker_serves_all_tenants(place: Place, reports: dict[str, UUID]) -> None:
    results: dict[str, str] = {}
    with Worker(durable, sessionmaker=place.worker, poll_interval=POLL):
        for name, own in reports.items():
            with acting(name):
                token = str(token_of(place, own))
                place.run(partial(send_signal, workflows=own, name="go", payload="went"))
                place.run(partial(complete_callback, token=token, value="answered"))
                results[name] = report.handle(place.app, own).result(timeout=PATIENCE)
    assert results == {"acme": "acme went answered", "globex": "globex went answered"}
    with sessionmaker(place.roles.engine("operate")).begin() as session:
        assert len(manage.delete(session, select(Workflow))) == 4


def test_a_role_for_each_tenant(engine: Engine, direct_url: str) -> None:
    by_role = BY_HEADERS.replace("current_setting('app.tenant', true)", "current_user")
    with made(engine, direct_url, by_role) as given:
        given.execute("GRANT app TO acme, globex")
        for role in ("acme", "globex"):
            own = given.engine(role)
            with own.connect() as connection:
                name = str(connection.execute(text("SELECT current_user")).scalar_one())
            with acting(name), sessionmaker(own).begin() as session:
                workflow = child.options(key=f"{name}:1").start(session)
                send_signal(session, workflow, "go")
                assert session.scalars(select(Workflow.key)).all() == [f"{name}:1"]
            with acting("owner"), Session(own) as session:
                child.start(session)
                with pytest.raises(DBAPIError, match="row-level security"):
                    session.flush()
            assert refused(own, "SET app.tenant = 'acme'") == ""
            with own.connect() as connection:
                assert len(connection.execute(select(Workflow.id)).all()) == 1


# By tags, with the roles of the command


plain = Durable()


@plain.step
def exported(name: str) -> str:
    return name


@plain.workflow
def export(name: str) -> str:
    return exported(name) + wait_signal("go", str)


def start_export(session: Session, **options: Any) -> UUID:
    name = tenant.get()
    given: dict[str, Any] = {"tags": {"tenant": name}, "by": name, "key": f"{name}:1", **options}
    return export.options(**given).start(session, "x").id


def test_a_tenant_by_tags_starts_signals_and_sees_its_own_only(engine: Engine, direct_url: str) -> None:
    """In the views too, which have the rights of their reader."""
    with made(engine, direct_url, BY_TAGS) as given:
        starter, reader, operator = (given.engine(each) for each in ("start", "read", "operate"))
        for each in (starter, reader):
            event.listen(each, "begin", set_tenant)
        starting, worker = sessionmaker(starter), sessionmaker(given.engine("work"))
        ids: dict[str, UUID] = {}
        for name, other in (("acme", "globex"), ("globex", "acme")):
            with acting(name):
                with starting.begin() as session:
                    ids[name] = start_export(session)
                for forged in ({"tags": {"tenant": other}}, {"tags": None}, {"by": other}, {"key": f"{other}:2"}):
                    with starting() as session, pytest.raises(DBAPIError, match="row-level security"):
                        start_export(session, **{"key": f"{name}:2", **forged})
        with sessionmaker(operator).begin() as session:
            session.add(Audit(who="ada", verb="cancel"))
        with acting("acme"), starting.begin() as session:
            assert [(row.id, row.status) for row in session.execute(select(Workflow.id, Workflow.status))] == [
                (ids["acme"], "pending")
            ]
            with pytest.raises(errors.NotFoundError):
                send_signal(session, ids["globex"], "go", "!")
            send_signal(session, ids["acme"], "go", "!")
        with Worker(plain, sessionmaker=worker, poll_interval=POLL), acting("acme"):
            assert export.handle(sessionmaker(reader), ids["acme"]).result(timeout=PATIENCE) == "x!"
            with acting("globex"):
                assert races.wait_until(lambda: seen_in_views(reader)["waiting_for"], seconds=PATIENCE.total_seconds())
        for name in ids:
            with acting(name):
                assert seen_in_views(reader) == {
                    "workflow_overview": 1,
                    "queue_depth": int(name == "globex"),
                    "step_latency": 2 if name == "acme" else 1,
                    "failure_groups": 0,
                    "waiting_for": int(name == "globex"),
                    "worker_load": 0,
                    "audit": 0,
                }
                with reader.connect() as connection:
                    assert connection.scalars(text("SELECT id FROM durable.workflow_overview")).all() == [ids[name]]
        assert seen_in_views(given.engine("read")) == dict.fromkeys([*VIEWS, "audit"], 0)  # without the setting
        assert seen_in_views(operator)["workflow_overview"] == 2


def seen_in_views(engine: Engine) -> dict[str, int]:
    """Return how many rows a role sees in each view, and in the audit."""
    with engine.connect() as connection:
        every = {each: text(f"SELECT count(*) FROM durable.{each}") for each in (*VIEWS, "audit")}
        return {name: connection.execute(counted).scalar_one() for name, counted in every.items()}
