"""The issue's list of bad input: each gets an error that says what happened and what to do, and loses nothing."""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable import (
    BoundWorkflow,
    Durable,
    Executor,
    Step,
    Worker,
    Workflow,
    WorkflowStatus,
    get_event,
    models,
    start_many,
)
from sqla_durable.asyncio import AsyncExecutor
from sqla_durable.errors import (
    ArgumentError,
    DatabaseUnavailableError,
    DecodingError,
    DefinitionError,
    EncodingError,
    NotFoundError,
    PayloadTooLargeError,
    SchemaError,
    SessionError,
    UsageError,
)
from tests.acceptance.shells import POLL
from tests.support.databases import Databases
from tests.support.domain import Base, Entry, Order

pytestmark = pytest.mark.few_shells

Sessions = sessionmaker[Session]
durable = Durable(payload_limit=10_000)


@durable.workflow
def ship(order_id: int, price: Decimal = Decimal(1), note: str = "", weight: float = 1.0) -> str:
    return f"{order_id} {price} {note} {weight}"


@durable.workflow
def carry(anything: Any) -> Any:
    return anything


@durable.workflow
async def aship(order_id: int) -> str:
    return str(order_id)


@durable.step
def book(session: Session, cents: int) -> int:
    session.add(Entry(account="book", cents=cents, note=None))
    return cents


@durable.workflow
def bookkeep(cents: int) -> int:
    return book(cents)


@contextmanager
def caller_survives(maker: Sessions) -> Generator[Session]:
    """Do something wrong in a caller's transaction: what the caller has written before and after is committed."""
    with maker.begin() as session:
        session.add(Order(customer="before", total_cents=1))
        session.flush()
        yield session
        session.add(Order(customer="after", total_cents=2))
    with maker() as session:
        assert session.scalars(select(Order.customer).order_by(Order.id)).all() == ["before", "after"]
        assert session.scalars(select(Workflow)).all() == []


# --- an unknown workflow name


def test_unknown_workflow_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no workflow named 'shipp' is registered: did you mean 'ship'") as caught:
        durable.registry.workflow("shipp")
    assert "Import the module that defines it" in str(caught.value)
    with pytest.raises(UsageError, match=r"registered are \['aship', "):
        durable.registry.workflow("xyz")


# behaviour: R9
def test_row_that_no_worker_here_knows_stays_for_one_that_does(session_factory: Sessions) -> None:
    stranger = Durable()
    stranger_ship = stranger.workflow(lambda: "strange", name="stranger")
    known = Durable()

    @known.workflow
    def familiar() -> str:
        return "known"

    with session_factory.begin() as session:
        strange_id = stranger_ship.start(session).id
        known_id = familiar.start(session).id
    with Worker(known, sessionmaker=session_factory, poll_interval=POLL):
        assert familiar.handle(session_factory, known_id).result(timeout=timedelta(seconds=30)) == "known"
    with session_factory() as session:
        record = session.get_one(Workflow, strange_id)
        assert (record.status, record.attempt, record.error) == (WorkflowStatus.PENDING, 1, None)
    with Worker(stranger, sessionmaker=session_factory, poll_interval=POLL):
        assert stranger_ship.handle(session_factory, strange_id).result(timeout=timedelta(seconds=30)) == "strange"


def test_worker_warns_of_names_that_it_does_not_know(session_factory: Sessions) -> None:
    known = Durable()
    known.workflow(lambda: None, name="familiar")
    with session_factory.begin() as session:
        session.add(Workflow(name="stranger"))
    warnings: queue.Queue[str] = queue.Queue()
    handler = logging.Handler()
    handler.emit = lambda record: warnings.put(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("sqla_durable.worker")
    log.addHandler(handler)
    try:
        with Worker(known, sessionmaker=session_factory, poll_interval=POLL):
            warning = warnings.get(timeout=30)
    finally:
        log.removeHandler(handler)
    assert "workflows named 'stranger' wait in the queues 'default' and are not registered here" in warning
    assert "a worker that knows them will claim them. Registered here: 'familiar'." in warning


# --- an argument that does not fit


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        (("seven",), {}, "argument 'order_id' of workflow 'ship' does not fit its annotation: .*, got str"),
        (("7",), {}, "got str"),
        ((7.0,), {}, "got float"),
        ((True,), {}, "got bool"),
        ((1, "free"), {}, "argument 'price' of workflow 'ship' .*, got str"),
        ((1,), {"note": 7}, "argument 'note' of workflow 'ship' .*, got int"),
        ((), {}, r"workflow 'ship' takes \(order_id: .*missing a required argument: 'order_id'"),
        ((1,), {"colour": "red"}, "unexpected keyword argument 'colour'"),
        ((1, Decimal(1), "", 1.0, 5), {}, "too many positional arguments"),
    ],
)
def test_argument_that_does_not_fit_is_refused(
    session_factory: Sessions, args: tuple[Any, ...], kwargs: dict[str, Any], said: str
) -> None:
    with caller_survives(session_factory) as session:
        with pytest.raises(ArgumentError, match=said) as caught:
            ship.start(session, *args, **kwargs)
        assert isinstance(caught.value, TypeError)
        assert "Nothing was started" in str(caught.value)


def test_option_in_the_place_of_an_argument_is_explained(session_factory: Sessions) -> None:
    said = r"Options go before the call: ship.options\(key=...\).start\(session"
    with caller_survives(session_factory) as session, pytest.raises(ArgumentError, match=said):
        ship.start(session, 1, key="order-1")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "stored",
    [{}, {"order_id": "seven"}, {"order_id": 1, "colour": "red"}],
    ids=["missing", "wrong", "unknown"],
)
def test_row_whose_input_does_not_fit_fails_alone_and_says_so(
    session_factory: Sessions, stored: dict[str, Any]
) -> None:
    with session_factory.begin() as session:
        bad = Workflow(name="ship", input=stored)
        session.add(bad)
        good_id = ship.start(session, 7).id
        session.flush()
        bad_id = bad.id
    with Worker(durable, sessionmaker=session_factory, async_sessionmaker=None, poll_interval=POLL):
        assert ship.handle(session_factory, good_id).result(timeout=timedelta(seconds=30)).startswith("7 ")
        with pytest.raises(DecodingError, match=r"stored .* of workflow 'ship'"):
            ship.handle(session_factory, bad_id).result(timeout=timedelta(seconds=30))


def test_orm_instance_as_an_argument_is_refused(session_factory: Sessions) -> None:
    with caller_survives(session_factory) as session:
        order = session.scalars(select(Order)).one()
        with pytest.raises(
            ArgumentError, match=r"argument 'anything' .* is an ORM instance of Order: pass its primary"
        ):
            carry.start(session, order)
        with pytest.raises((ArgumentError, EncodingError)):
            carry.start(session, [order])


def test_orm_class_as_an_annotation_is_refused() -> None:
    def wrong(order: Order) -> None: ...

    with pytest.raises(DefinitionError, match=r"annotated with the ORM class Order: .*Pass its primary key"):
        Durable().workflow(wrong)


# --- what PostgreSQL's jsonb cannot hold, and what is too large


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (lambda: ship.bind(1, note="a\0b"), r"argument 'note' .*PostgreSQL stores no NUL character"),
        (lambda: carry.bind({"a\0": 1}), "NUL"),
        (lambda: ship.bind(1, note="\ud800"), "argument 'note' .*surrogate"),
        (lambda: carry.bind(["\udfff"]), "surrogate"),
        (lambda: ship.bind(1, weight=float("nan")), "argument 'weight' .*(nan|NaN|float)"),
        (lambda: ship.bind(1, weight=float("-inf")), "argument 'weight' .*(inf|float)"),
        (lambda: carry.bind([float("inf")]), "argument 'anything' .*(inf|float)"),
        (lambda: carry.bind(b"bytes"), "no annotation and is of type bytes.*Annotate it, for example with 'bytes'"),
        (lambda: carry.bind(object()), "no annotation and is of type object"),
        (lambda: carry.bind({1: 2}), "no annotation and is of type dict"),
    ],
)
def test_value_that_jsonb_cannot_hold_is_refused(
    session_factory: Sessions, bound: Callable[[], BoundWorkflow], said: str
) -> None:
    with caller_survives(session_factory) as session, pytest.raises(EncodingError, match=said):
        start_many(session, (bound() for _ in range(2)))


def test_payload_over_the_limit_is_refused_with_both_sizes(session_factory: Sessions) -> None:
    with caller_survives(session_factory) as session:
        with pytest.raises(
            PayloadTooLargeError, match=r"argument 'note' .* is 10,\d\d\d bytes .* limit of 10,000"
        ) as caught:
            ship.start(session, 1, note="x" * 10_500)
        assert (caught.value.size, caught.value.limit) == (10_502, 10_000)
        assert "Store it in a table or a file and pass its key" in str(caught.value)
        with pytest.raises(PayloadTooLargeError):
            carry.start(session, ["ö" * 5_000])  # counted in bytes, not in characters


def test_limit_counts_all_arguments_together(session_factory: Sessions) -> None:
    limited = Durable(payload_limit=100)

    @limited.workflow
    def pair(one: str, two: str) -> str:
        return one + two

    said = "the input of workflow 'pair'"
    with caller_survives(session_factory) as session, pytest.raises(PayloadTooLargeError, match=said):
        pair.start(session, "x" * 60, "y" * 60)


def test_result_over_the_limit_fails_the_workflow(session_factory: Sessions) -> None:
    limited = Durable(payload_limit=100)

    @limited.workflow
    def long(times: int) -> str:
        return "x" * times

    with session_factory() as session:
        assert Executor(session).run(long, 50) == "x" * 50
        with pytest.raises(PayloadTooLargeError, match="the result of workflow 'long' is 202 bytes"):
            Executor(session).run(long, 200)
        assert set(session.scalars(select(Workflow.status))) == {WorkflowStatus.SUCCEEDED, WorkflowStatus.FAILED}


# --- a database that does not fit


@pytest.fixture
def unmigrated(empty_database_url: str) -> Generator[Sessions]:
    engine = create_engine(empty_database_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE mine (id int)"))
    yield sessionmaker(engine)
    engine.dispose()


def _uses(maker: Sessions) -> dict[str, Callable[[], object]]:
    def start() -> None:
        with maker.begin() as session:
            ship.start(session, 1)

    def run() -> None:
        with maker() as session:
            Executor(session).run(ship, 1)

    def wait() -> None:
        ship.handle(maker, uuid7()).result(timeout=timedelta(seconds=1))

    return {"start": start, "executor": run, "worker": Worker(bare, sessionmaker=maker).run, "handle": wait}


bare = Durable()
bare.workflow(lambda: None, name="bare")
UPGRADE = f"sqla_durable.migrations.upgrade({models.REVISION!r})"
USES = pytest.mark.parametrize("use", ["start", "executor", "worker", "handle"])


@USES
def test_unmigrated_database_is_named(unmigrated: Sessions, use: str) -> None:
    with pytest.raises(SchemaError, match=r"the durable tables are not in postgresql.*schema 'durable'") as caught:
        _uses(unmigrated)[use]()
    assert f"Run `alembic upgrade heads` with a revision that calls {UPGRADE}, or for a try " in str(caught.value)


def test_callers_transaction_survives_an_unmigrated_database(unmigrated: Sessions) -> None:
    with unmigrated.begin() as session:
        session.execute(text("INSERT INTO mine VALUES (1)"))
        with pytest.raises(SchemaError):
            ship.start(session, 1)
        session.execute(text("INSERT INTO mine VALUES (2)"))
    with unmigrated() as session:
        assert session.scalars(text("SELECT id FROM mine ORDER BY id")).all() == [1, 2]


@USES
@pytest.mark.parametrize(
    ("comment", "expected", "said"),
    [
        ("sqla-durable durable_0000", SchemaError, "are at .*durable_0000.*; this package needs 'durable_0001'"),
        (None, SchemaError, "are at 'an unknown revision'"),
        ("sqla-durable durable_9999", SchemaError, "are at 'durable_9999', newer than this package"),
    ],
)
def test_schema_of_another_age_is_named(
    session_factory: Sessions, use: str, comment: str | None, expected: type[Exception], said: str
) -> None:
    with session_factory.begin() as session:
        session.execute(text(f"COMMENT ON TABLE durable.workflow IS {'NULL' if comment is None else repr(comment)}"))
    with pytest.raises(expected, match=said):
        _uses(session_factory)[use]()


def test_missing_schema_of_a_tenant_is_named(engine: Engine) -> None:
    elsewhere = sessionmaker(engine.execution_options(schema_translate_map={"durable": "tenant_9"}))
    with elsewhere() as session, pytest.raises(SchemaError, match="schema 'tenant_9'"):
        ship.start(session, 1)
    with sessionmaker(engine).begin() as session:
        assert ship.start(session, 1).name == "ship"  # and the other schema is not mistaken for it


@pytest.mark.parametrize(
    ("change", "value"),
    [("port", 1), ("database", "not_there"), ("username", "nobody"), ("host", "/nowhere")],
)
def test_worker_with_a_wrong_url_says_which(database_url: str, change: str, value: Any) -> None:
    url = make_url(database_url)
    if change in ("port", "host"):
        url = url.set(host="127.0.0.1" if change == "port" else value, port=1, query={})
    else:
        url = url.set(**{change: value})
    engine = create_engine(url.set(password="secret"))
    with pytest.raises(DatabaseUnavailableError, match=r"(?s)cannot be reached: .*Check the URL") as caught:
        Worker(bare, sessionmaker=sessionmaker(engine), start_timeout=timedelta()).run()
    assert "secret" not in str(caught.value)
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_async_worker_with_a_wrong_url_says_which(database_url: str, driver: str) -> None:
    url = make_url(database_url).set(drivername=f"postgresql+{driver}", database="not_there")

    async def serve() -> None:
        engine = create_async_engine(url)
        try:
            with pytest.raises(DatabaseUnavailableError, match=r"(?s)not_there.*cannot be reached: .*Check the URL"):
                await Worker(bare, async_sessionmaker=async_sessionmaker(engine), start_timeout=timedelta()).serve()
        finally:
            await engine.dispose()

    asyncio.run(serve())


# --- a session that is not the right one


def test_unbound_session_is_refused() -> None:
    with pytest.raises(SessionError, match="has no engine for the durable tables: bind the sessionmaker"):
        ship.start(Session(), 1)
    with pytest.raises(SessionError, match="has no engine"):
        Executor(Session()).run(ship, 1)
    with pytest.raises(SessionError, match="has no engine"):
        ship.handle(sessionmaker(), uuid7())


def test_session_on_another_database_product_is_refused() -> None:
    engine = create_engine("sqlite://")
    with Session(engine) as session, pytest.raises(SessionError, match="is bound to sqlite: durable workflows need Po"):
        ship.start(session, 1)
    engine.dispose()


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        (None, r"workflow.start\(session, 1\)"),
        ("session", r"workflow.start\(session, 1\)"),
        (7, r"workflow.start\(session, 1\)"),
        (sessionmaker(), r"open one by `with sessionmaker\(\)"),
        (scoped_session(sessionmaker()), r"write db.session\(\)"),
        (SimpleNamespace(session=scoped_session(sessionmaker())), r"write db.session\(\)"),
        (create_engine("sqlite://"), r"make one: Session\(engine\)"),
        (create_async_engine("postgresql+asyncpg://"), r"make one: AsyncSession\("),
    ],
)
def test_something_else_in_the_place_of_the_session_is_refused(given: Any, cure: str) -> None:
    with pytest.raises(SessionError, match=f"the caller's Session or AsyncSession comes first, got .*{cure}"):
        ship.start(given, 1)


def test_executor_refuses_the_other_kind_of_session() -> None:
    with pytest.raises(SessionError, match="Use AsyncExecutor for an AsyncSession"):
        Executor(AsyncSession())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(SessionError, match="Use Executor for a Session"):
        AsyncExecutor(Session())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_sessionmaker_in_place_of_a_session_is_refused_with_how_to_open_one() -> None:
    with pytest.raises(SessionError, match=r"open one by `with sessionmaker\(\)"):
        Executor(sessionmaker())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(SessionError, match=r"open one by `async with async_sessionmaker\(\)"):
        AsyncExecutor(async_sessionmaker())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_sessionmaker_of_the_other_kind_is_refused_with_the_argument_it_belongs_to() -> None:
    with pytest.raises(SessionError, match="pass it as async_sessionmaker="):
        Worker(Durable(), sessionmaker=async_sessionmaker())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(SessionError, match=r"such as sessionmaker\(db.engine\)"):
        Worker(Durable(), sessionmaker=scoped_session(sessionmaker()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(SessionError, match="pass it as sessionmaker="):
        Worker(Durable(), async_sessionmaker=sessionmaker())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("given", [ship, "01a1ff9e-3ac3-73b6-a389-efb2572e1900", None, 7])
def test_something_else_in_the_place_of_a_workflow_is_refused(given: Any) -> None:
    with pytest.raises(ArgumentError, match="is no workflow: give a Workflow record, or its id as a UUID"):
        get_event(sessionmaker(create_engine("postgresql+psycopg://")), given, "status")


def test_step_over_two_databases_is_refused_and_writes_nothing(session_factory: Sessions, databases: Databases) -> None:
    two = Durable()

    @two.step
    def both(session: Session) -> None:
        session.add(Entry(account="here", cents=1, note=None))
        session.flush()
        session.connection(bind_arguments={"mapper": Workflow})

    @two.workflow
    def span() -> None:
        both()

    with databases.migrated("durable") as other_url:
        other = create_engine(other_url)
        first = session_factory.kw["bind"]
        split = sessionmaker(binds={models.Base: other, Base: first})
        with split() as session, pytest.raises(UsageError, match="uses two databases in one session"):
            Executor(session).run(span)
        with sessionmaker(other)() as session:
            assert session.scalars(select(Workflow.status)).all() == [WorkflowStatus.FAILED]
        other.dispose()
    with session_factory() as session:
        assert session.scalars(select(Entry)).all() == []


def test_durable_tables_found_through_binds(session_factory: Sessions) -> None:
    engine = session_factory.kw["bind"]
    with sessionmaker(binds={models.Base: engine, Base: engine}).begin() as session:
        order = Order(customer="Ada", total_cents=1)
        session.add(order)
        order.workflow = ship.start(session, 7)
    with session_factory() as session:
        assert session.scalars(select(Order)).one().workflow is not None


def test_two_sessionmakers_to_two_databases_are_refused(session_factory: Sessions, databases: Databases) -> None:
    with databases.migrated("durable") as other_url:

        async def serve() -> None:
            engine = create_async_engine(other_url)
            try:
                worker = Worker(bare, sessionmaker=session_factory, async_sessionmaker=async_sessionmaker(engine))
                with pytest.raises(SessionError, match="lead to different databases or schemas"):
                    await worker.serve()
            finally:
                await engine.dispose()

        asyncio.run(serve())


def test_worker_without_a_database_is_refused() -> None:
    with pytest.raises(SessionError, match="a worker needs a sessionmaker or an async_sessionmaker"):
        Worker(Durable())


def test_worker_without_the_sessions_that_its_steps_take_is_refused(database_url: str) -> None:
    engine = create_async_engine(database_url)
    with pytest.raises(SessionError, match="step 'book' takes a Session: give the worker a sessionmaker"):
        Worker(durable, async_sessionmaker=async_sessionmaker(engine))


# --- called in the wrong place


def test_transactional_step_outside_a_workflow_is_explained() -> None:
    with pytest.raises(UsageError, match=r"step 'book' takes a Session, .*pass one, book\(session, ...\)"):
        book(7)


async def test_sync_calls_in_a_running_event_loop_are_refused(session_factory: Sessions) -> None:
    with session_factory.begin() as session:
        record = ship.start(session, 7)
        session.flush()
        session.expunge(record)
    with session_factory() as session:
        with pytest.raises(UsageError, match=r"Executor.run\(\) would block the event loop .*: use AsyncExecutor"):
            Executor(session).run(ship, 1)
        with pytest.raises(UsageError, match=r"Executor.execute\(\) would block"):
            Executor(session).execute(ship, record)
    with pytest.raises(UsageError, match=r"Handle.result\(\) would block .*await ship.handle"):
        ship.handle(session_factory, record).result()
    with pytest.raises(UsageError, match=r"Worker.run\(\) would block .*async with worker"):
        Worker(bare, sessionmaker=session_factory).run()
    with session_factory() as session:
        assert session.scalars(select(Workflow.status)).all() == [WorkflowStatus.PENDING]


def test_workflow_of_the_other_kind_is_refused(session_factory: Sessions) -> None:
    with session_factory() as session:
        with pytest.raises(UsageError, match=r"workflow 'aship' is async def: execute it with AsyncExecutor"):
            Executor(session).run(aship, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(ArgumentError, match=r"an executor runs a function decorated with @durable.workflow, got"):
            Executor(session).run(print, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        assert session.scalars(select(Workflow)).all() == []


def test_executor_refuses_to_wait_for_a_delay(session_factory: Sessions) -> None:
    with session_factory() as session, pytest.raises(ArgumentError, match="an executor executes now"):
        Executor(session).run(ship.options(delay=timedelta(hours=1)), 1)


def test_unknown_workflow_id_is_explained(session_factory: Sessions) -> None:
    missing = uuid7()
    with session_factory() as session, pytest.raises(NotFoundError, match=f"no workflow {missing} is visible"):
        Executor(session).execute(ship, missing)
    with pytest.raises(NotFoundError, match="is the transaction that started it committed"):
        ship.handle(session_factory, missing).result()


def test_workflow_whose_arguments_have_no_names_is_refused() -> None:
    def positional(*orders: int) -> None: ...
    def named(**orders: int) -> None: ...

    for fn, parameter in ((positional, r"\*orders"), (named, r"\*\*orders")):
        with pytest.raises(DefinitionError, match=f"takes {parameter}.*: arguments are stored by parameter name"):
            Durable().workflow(fn)


def test_definitions_that_cannot_work_are_refused() -> None:
    bad = Durable()

    async def async_with_session(session: Session) -> None: ...
    def sync_with_async_session(session: AsyncSession) -> None: ...
    def workflow_with_session(session: Session) -> None: ...

    with pytest.raises(DefinitionError, match=r"is async def and takes a Session, .*: take an AsyncSession"):
        bad.step(async_with_session)
    with pytest.raises(DefinitionError, match=r"is def and takes an AsyncSession, .*: make it async def"):
        bad.step(sync_with_async_session)
    with pytest.raises(DefinitionError, match="takes a session: a workflow lives longer than any transaction"):
        bad.workflow(workflow_with_session)
    with pytest.raises(DefinitionError, match="name the step with name="):
        bad.step(lambda: None)
    with pytest.raises(DefinitionError, match="which is 1,001 bytes long"):
        bad.workflow(lambda: None, name="a" * 1001)
    with pytest.raises(DefinitionError, match="stop=3 is not a tenacity object: pass, for example"):
        bad.step(lambda: None, name="x", stop=3)  # type: ignore[call-overload]  # pyright: ignore


def test_result_annotation_that_cannot_be_stored_is_found_when_its_name_is_known(session_factory: Sessions) -> None:
    def connect() -> "Connected":  # type: ignore[name-defined]  # noqa: F821, UP037  # pyright: ignore
        called.append(True)

    called: list[bool] = []
    bad = Durable()
    step = bad.step(connect)  # pyright: ignore

    @bad.workflow
    def connecting() -> None:
        ignored: Any = step  # pyright: ignore
        ignored()

    globals()["Connected"] = Engine
    with pytest.raises(DefinitionError, match=r"result of step 'connect' is annotated .*Engine.*cannot be stored"):
        Worker(bad, sessionmaker=session_factory)
    with session_factory() as session, pytest.raises(DefinitionError, match="result of step 'connect'"):
        Executor(session).run(connecting)
    assert not called
    del globals()["Connected"]


def test_step_arguments_may_be_anything(session_factory: Sessions) -> None:
    clients = Durable()

    @clients.step
    def ask(client: Engine, callback: Callable[[], int]) -> int:
        return callback()

    @clients.workflow
    def asking() -> int:
        return ask(create_engine("sqlite://"), lambda: 7)

    with session_factory() as session:
        assert Executor(session).run(asking) == 7
        assert session.scalars(select(Step.output)).all() == [7]


def test_worker_in_the_background_that_cannot_start_says_so_at_once() -> None:
    engine = create_engine("sqlite://")
    with pytest.raises(SessionError, match="is bound to sqlite"), Worker(Durable(), sessionmaker=sessionmaker(engine)):
        pytest.fail("it has not started")
    engine.dispose()
