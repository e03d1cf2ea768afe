"""A key whose row cannot be seen: an error that says so, a transaction that goes on, and no loop."""

from __future__ import annotations

from collections.abc import Callable, Generator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Delete, Engine, Update, create_engine, event, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import (
    Durable,
    Executor,
    Worker,
    Workflow,
    WorkflowStatus,
    manage,
    models,
    send_signal,
    send_update,
    start_child,
    start_many,
    start_with_signal,
)
from sqla_durable.errors import KeyNotVisibleError
from sqla_durable.store import connection_of, keys
from tests.support.domain import Entry
from tests.support.statements import executed_on

POLL = timedelta(milliseconds=20)
durable = Durable()


@durable.workflow
def greet(name: str) -> str:
    return f"hello {name}"


@pytest.fixture
def tenant(engine: Engine) -> Generator[str]:
    """The options of a connection whose role does not see the workflows on the queue `secret`."""
    role = f"tenant_{engine.url.database}"
    statements = [
        f"CREATE ROLE {role}",
        f"GRANT USAGE ON SCHEMA durable TO {role}",
        f"GRANT ALL ON ALL TABLES IN SCHEMA durable TO {role}",
        f"GRANT ALL ON ALL SEQUENCES IN SCHEMA durable TO {role}",
        "ALTER TABLE durable.workflow ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY tenant ON durable.workflow USING (queue <> 'secret') WITH CHECK (true)",
    ]
    with engine.begin() as connection:
        for each in statements:
            connection.execute(text(each))
    yield f"-c role={role}"
    with engine.begin() as connection:
        for each in ("DROP POLICY tenant ON durable.workflow", f"DROP OWNED BY {role}", f"DROP ROLE {role}"):
            connection.execute(text(each))
        connection.execute(text("ALTER TABLE durable.workflow DISABLE ROW LEVEL SECURITY"))


@pytest.fixture
def tenants(engine: Engine, tenant: str) -> Generator[Engine]:
    """An engine whose role does not see a workflow `greet` of the key `k` and one of the key `other`."""
    with Session(engine) as session:
        for key in ("k", "other"):
            greet.options(key=key, queue="secret").start(session, "secret")
        session.commit()
    limited = create_engine(engine.url, connect_args={"options": tenant})
    yield limited
    limited.dispose()


def count(session: Session, name: str = "greet") -> int:
    return session.scalars(select(func.count()).where(Workflow.name == name)).one()


# Row level security

RULES: dict[str, dict[str, Any]] = {
    "unfinished": {"unique": "unfinished"},
    "refuse": {"on_conflict": "refuse"},
    "replace": {"on_conflict": "replace"},
    "debounce": {"debounce": POLL, "longest_wait": POLL},
    "throttle": {"throttle": POLL},
    "cancel_running": {"on_conflict": "cancel_running"},
}


def start_with_rule(options: dict[str, Any], session: Session, _: Workflow) -> object:
    return greet.options(key="k", **options).start(session, "x")


def start_many_with_rule(options: dict[str, Any], session: Session, _: Workflow) -> object:
    keyed = [greet.options(key=key, **options).bind("x") for key in ("free", "k")]
    return start_many(session, [*keyed, greet.bind("y")])


# behaviour: O3 T9
def test_a_hidden_key_is_an_error_and_the_transaction_goes_on(tenants: Engine) -> None:
    attempts: dict[str, Callable[[Session, Workflow], object]] = {
        "start": lambda session, _: greet.options(key="k").start(session, "x"),
        "start_with_signal": lambda session, _: start_with_signal(session, greet.options(key="k").bind("x"), "go"),
        "start_many": lambda session, _: start_many(
            session, [greet.options(key=key).bind("x") for key in ("free", "k")] + [greet.bind("y")]
        ),
        "fork": lambda session, seen: manage.fork(session, seen, key="other"),
    }
    for name, options in RULES.items():
        attempts[name] = partial(start_with_rule, options)
        attempts[f"many {name}"] = partial(start_many_with_rule, options)
    with Session(tenants) as session:
        seen = greet.start(session, "seen")
        session.flush()
        for what, attempt in attempts.items():
            with executed_on(tenants) as executed, pytest.raises(KeyNotVisibleError, match="row level") as caught:
                attempt(session, seen)
            assert (caught.value.name, caught.value.is_newer) == ("greet", False), what
            assert caught.value.key == ("other" if what == "fork" else "k")
            assert len(executed) <= 5 * keys.MOST_REPEATS
        assert count(session) == 1
        session.commit()
        assert count(session) == 1


# behaviour: O3
async def test_a_hidden_key_is_an_error_in_async_code(tenants: Engine, tenant: str) -> None:
    role = {"server_settings": {"role": tenant.removeprefix("-c role=")}}
    engine = create_async_engine(tenants.url.set(drivername="postgresql+asyncpg"), connect_args=role)
    async with AsyncSession(engine) as session:
        with pytest.raises(KeyNotVisibleError):
            await greet.options(key="k").start(session, "x")
        with pytest.raises(KeyNotVisibleError):
            await aio.start_many(session, [greet.options(key="k").bind("x")])
        assert (await greet.options(key="free").start(session, "x")).key == "free"
        await session.commit()
    await engine.dispose()


# behaviour: O3
def test_a_child_with_a_hidden_key_is_the_failure_of_its_step(tenants: Engine, engine: Engine) -> None:
    """On a worker; it is recorded, so that a replay goes the same way, and what was started beside it is cancelled."""
    application = Durable()
    application.workflow(name="greet", queue="greetings")(greet.definition.fn)
    caught: list[str] = []

    @application.workflow
    def parent() -> str:
        try:
            start_child(greet.options(key="k"), "x")
        except KeyNotVisibleError as error:
            caught.append(error.key)
        return "went on"

    with Session(engine) as session:
        workflow_id = parent.start(session).id
        session.commit()
    worker = Worker(application, sessionmaker=sessionmaker(tenants), queues=["default"], poll_interval=POLL)
    with worker, Session(engine) as session:
        assert parent.handle(session, workflow_id).result(timeout=timedelta(seconds=30)) == "went on"
    with Session(engine) as session:
        steps = session.get_one(Workflow, workflow_id).steps
        assert [(each.name, each.status) for each in steps] == [("start:greet", "failed")]
    assert caught == ["k"]


# Whoever deletes it again and again


# behaviour: O3
def test_a_row_that_is_deleted_again_and_again_is_an_error(engine: Engine) -> None:
    """Each INSERT sees one that is there, and each search comes after its end."""
    other = create_engine(engine.url, isolation_level="AUTOCOMMIT")

    def interfere(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        with other.connect() as connection:
            inserts = statement.startswith("INSERT INTO durable.workflow")
            connection.execute(
                text(
                    "INSERT INTO durable.workflow (name, key) VALUES ('greet', 'k')"
                    if inserts
                    else "DELETE FROM durable.workflow WHERE key = 'k'"
                )
            )

    with Session(engine) as session:
        attempts: list[Callable[[], object]] = [
            lambda: greet.options(key="k").start(session, "x"),
            lambda: start_many(session, [greet.options(key="k").bind("x")]),
        ]
        for attempt in attempts:
            event.listen(engine, "before_cursor_execute", interfere)
            try:
                with executed_on(engine) as executed, pytest.raises(KeyNotVisibleError, match="deleted repeatedly"):
                    attempt()
            finally:
                event.remove(engine, "before_cursor_execute", interfere)
            assert len([each for each in executed if each.statement.startswith("INSERT")]) == keys.MOST_REPEATS
        assert greet.options(key="k").start(session, "x").key == "k"
    other.dispose()


# Snapshots


# behaviour: O3 T9
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_key_that_is_newer_than_the_snapshot_is_an_error_and_the_transaction_goes_on(
    engine: Engine, level: str
) -> None:
    with Session(engine) as session:
        known = greet.options(key="known").start(session, "x")
        send_signal(session, known, "go", key="old")
        session.commit()
    with Session(engine.execution_options(isolation_level=level)) as session, Session(engine) as other:
        session.add(Entry(account="a", cents=1, note=None))
        known = greet.options(key="known").start(session, "x")  # which takes the snapshot
        greet.options(key="k").start(other, "theirs")
        send_signal(other, known.id, "go", "theirs", key="new")
        send_update(other, known.id, "ask", key="u")
        other.commit()
        attempts: list[Callable[[], object]] = [
            lambda: greet.options(key="k").start(session, "x"),
            lambda: start_many(session, [greet.options(key=key).bind("x") for key in ("free", "k")]),
            lambda: send_update(session, known, "ask", key="u"),
            lambda: manage.fork(session, known, key="k"),
        ]
        for attempt in attempts:
            with pytest.raises(KeyNotVisibleError, match="snapshot") as caught:
                attempt()
            assert caught.value.is_newer
        send_signal(session, known, "go", "ours", key="new")  # which was sent already
        send_signal(session, known, "go", "ours", key="ours")
        assert greet.options(key="free").start(session, "x").key == "free"
        first, second = start_many(session, [greet.options(key=key).bind("x") for key in ("many", "free")])
        assert first != second
        session.commit()
    with Session(engine) as session:
        assert count(session) == 4
        sent = set(session.scalars(select(models.Signal.key).where(models.Signal.name == "go")))
        assert sent == {"old", "new", "ours"}
        assert session.scalars(select(Entry)).one()


# behaviour: O3 T4
def test_a_step_that_meets_a_newer_key_is_executed_again_with_a_newer_snapshot(engine: Engine) -> None:
    application = Durable()
    executed: list[None] = []

    @application.step(isolation_level="REPEATABLE READ")
    def greet_once(session: Session) -> str:
        session.execute(select(1))
        executed.append(None)
        if len(executed) == 1:
            with Session(engine) as other:
                greet.options(key="k").start(other, "theirs")
                other.commit()
        return str(greet.options(key="k").start(session, "ours").input["name"])

    @application.workflow
    def parent() -> str:
        return greet_once()

    with Session(engine) as session:
        assert Executor(session).run(parent) == "theirs"
    assert len(executed) == 2


# Replicas


class Routing(Session):
    """Sends what writes to one engine, and what reads to another, as SQLAlchemy's own documentation shows it."""

    primary: Engine
    replica: Engine

    def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Engine:
        if mapper is not None:
            assert mapper.class_ is not None
        writes = self._flushing or isinstance(clause, (Update, Delete))
        return self.primary if writes else self.replica


@pytest.fixture
def routing(engine: Engine) -> Generator[type[Routing]]:
    """A session class whose reads go to connections that write nothing, and see what is committed only."""
    replica = create_engine(engine.url, connect_args={"options": "-c default_transaction_read_only=on"})
    yield type("Routed", (Routing,), {"primary": engine, "replica": replica})
    replica.dispose()


# behaviour: O3
def test_a_session_that_reads_from_a_replica_finds_what_it_has_started(routing: type[Routing], engine: Engine) -> None:
    with routing() as session:
        first = greet.options(key="k").start(session, "x")
        assert greet.options(key="k").start(session, "y") is first
        assert start_many(session, [greet.options(key=key).bind("x") for key in ("k", "other")])[0] == first.id
        send_signal(session, first, "go", key="s")
        send_signal(session, first, "go", key="s")
        assert send_update(session, first, "ask", key="u").id == send_update(session, first, "ask", key="u").id
        assert manage.fork(session, first, key="f") is manage.fork(session, first, key="f")
        manage.cancel(session, first)
        assert first.status is WorkflowStatus.CANCELLED
        assert connection_of(session).engine is engine
        session.commit()
    with Session(engine) as session:
        assert count(session) == 3


# behaviour: O3
def test_an_executor_and_a_step_of_a_session_that_reads_from_a_replica(routing: type[Routing]) -> None:
    application = Durable()

    @application.step
    def book(session: Session) -> int:
        session.add(Entry(account="a", cents=1, note=None))
        return 1

    @application.workflow
    def parent() -> int:
        return book()

    with routing() as session:
        assert Executor(session).run(parent.options(key="k")) == 1
        assert Executor(session).run(parent.options(key="k")) == 1


# behaviour: O3
async def test_an_async_session_that_reads_from_a_replica_finds_what_it_has_started(
    routing: type[Routing], engine: Engine
) -> None:
    primary = create_async_engine(engine.url)
    replica = create_async_engine(routing.replica.url, connect_args={"options": "-c default_transaction_read_only=on"})
    kind = type("Routed", (Routing,), {"primary": primary.sync_engine, "replica": replica.sync_engine})
    async with AsyncSession(sync_session_class=kind) as session:
        first = await greet.options(key="k").start(session, "x")
        assert await greet.options(key="k").start(session, "y") is first
        await session.commit()
    await primary.dispose()
    await replica.dispose()


# What it costs


def test_a_start_under_a_key_is_one_statement_and_finding_it_two(engine: Engine) -> None:
    with Session(engine) as session:
        greet.options(key="warm").start(session, "x")
        with executed_on(engine) as executed:
            greet.options(key="k").start(session, "x")
            assert len(executed) == 1
            greet.options(key="k").start(session, "x")
            assert len(executed) == 3
        session.commit()
