"""The views, against what real workflows leave behind, and states that are hard to reach; what they read."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session, sessionmaker
from tenacity import stop_after_attempt, wait_fixed

from sqla_durable import (
    Durable,
    Executor,
    Worker,
    create_callback,
    manage,
    map_children,
    parallel,
    sleep,
    start_child,
    wait_event,
    wait_first,
    wait_signal,
    wait_update,
)
from tests.store import races
from tests.store.plans import Plan
from tests.support.databases import Databases
from tests.support.forged import forged

HOUR = timedelta(hours=1)
STOPPED, REACHED = threading.Event(), threading.Event()
durable = Durable()

Row: TypeAlias = dict[str, Any]


@durable.step
def hold() -> None:
    REACHED.set()
    STOPPED.wait(races.PATIENCE)


@durable.step
def charge(amount: int) -> int:
    if amount < 0:
        raise ValueError("negative")
    return amount


@durable.step(stop=stop_after_attempt(5), wait=wait_fixed(HOUR.total_seconds()))
def unstable() -> None:
    raise ConnectionError("refused")


@durable.workflow(queue="busy")
def blocked() -> None:
    hold()


@durable.workflow
def timer() -> None:
    sleep(HOUR)


@durable.workflow
def two_signals() -> None:
    parallel(lambda: wait_signal("order/7"), lambda: wait_signal("b", timeout=HOUR))


@durable.workflow
def update() -> None:
    wait_update("address", str)


@durable.workflow
def callback() -> None:
    parallel(create_callback(timeout=HOUR, step_key="bank").result, create_callback().result)


@durable.workflow
def event(other: str) -> None:
    wait_event(UUID(other), "f(x)")


@durable.workflow
def child(number: int) -> int:
    if number:
        wait_signal("go")
    return number


@durable.workflow
def first() -> None:
    wait_first([start_child(child, 0), start_child(child, 1)])
    wait_first([start_child(child, 2)])


@durable.workflow
def mapped() -> None:
    map_children(child, [1, 2, 3], max_concurrency=2)


@durable.workflow
def retry() -> None:
    unstable()


@durable.workflow
def failing(amount: int) -> None:
    for each in (1, 2, amount):
        charge(each)


@durable.workflow
def wrapping() -> None:
    try:
        charge(-1)
    except ValueError as error:
        raise LookupError("no such order") from error


@durable.workflow
def recovering() -> None:
    try:
        charge(-1)
    except ValueError:
        charge(1)
    raise KeyError("elsewhere")


@dataclass
class Scenario:
    """What the tests read: the rows while a worker ran; the rest as it is now, and ids by workflow."""

    engine: Engine
    ids: dict[str, UUID] = field(default_factory=dict[str, UUID])
    live: dict[str, list[Row]] = field(default_factory=dict[str, list[Row]])

    def rows(self, view: str, order: str = "1, 2", **equal: Any) -> list[Row]:
        """Return rows of a view."""
        where = " AND ".join(f"{each} = :{each}" for each in equal) or "true"
        with self.engine.connect() as connection:
            found = connection.execute(text(f"SELECT * FROM durable.{view} WHERE {where} ORDER BY {order}"), equal)
            return [dict(each) for each in found.mappings()]


@pytest.fixture(scope="module")
def scenario(databases: Databases) -> Generator[Scenario]:
    with databases.migrated("durable") as url:
        engine = create_engine(url)
        scenario = Scenario(engine)
        try:
            _run(scenario, sessionmaker(engine))
            with Session(engine) as session:
                _forge(session, scenario)
                session.commit()
            yield scenario
        finally:
            engine.dispose()


def _run(scenario: Scenario, maker: sessionmaker[Session]) -> None:
    """Execute workflows until they wait or have ended, and one that is blocked meanwhile."""
    with maker.begin() as session:
        manage.put_queue(session, "idle", concurrency=3)
        manage.put_queue(session, "paused")
        manage.pause_queue(session, "paused")
        started = [
            each.start(session) for each in (blocked, timer, two_signals, update, callback, first, mapped, retry)
        ]
        started += [failing.start(session, -1), failing.start(session, -5), failing.start(session, 3)]
        started += [wrapping.start(session), recovering.start(session)]
        started += [child.options(delay=HOUR, tags={"tenant": "7"}).start(session, 1)]
        started += [child.options(queue="paused").start(session, 0), child.options(queue="nobody").start(session, 1)]
        session.flush()
        for each in started:
            scenario.ids.setdefault(each.name, each.id)
    with Worker(durable, sessionmaker=maker, queues=["default", "busy", "paused"], concurrency=30, name="w1"):
        assert REACHED.wait(races.PATIENCE)
        races.wait_until(lambda: ("default", 0, 0, 2, 11, None) in _depth(scenario))
        scenario.live = {each: scenario.rows(each) for each in ("queue_depth", "worker_load")}
        scenario.live["blocked"] = scenario.rows("workflow_overview", name="blocked")
        STOPPED.set()
        races.wait_until(lambda: scenario.rows("workflow_overview", name="blocked", status="succeeded"))
    with maker() as session:
        scenario.ids["event"] = Executor(session).run_until_waiting(event, str(scenario.ids["timer"])).id


def _depth(scenario: Scenario) -> list[tuple[Any, ...]]:
    return [_counts(each) for each in scenario.rows("queue_depth")]


def _counts(row: Row) -> tuple[Any, ...]:
    return tuple(row[each] for each in ("queue", "pending", "running", "delayed", "suspended", "concurrency"))


def _forge(session: Session, scenario: Scenario) -> None:
    """Make what no workflow reaches in a test: crashes, a worker that died, a fork that polls, a cancelled call."""
    manage.cancel(session, scenario.ids["update"])
    fork = manage.fork(session, scenario.ids["failing"], from_step="charge#3")
    scenario.ids["fork"] = fork.id
    dead = uuid4()
    session.execute(
        text(
            "INSERT INTO durable.worker (id, name, queues, slots, started_at, heartbeat_at, lease_expires_at) "
            "SELECT :dead, 'dead', ARRAY['lost'], 2, old, old, old + interval '30 s' "
            "FROM (SELECT statement_timestamp() - interval '2 hours' AS old) AS made"
        ),
        {"dead": dead},
    )
    with forged(session):
        session.execute(
            text(
                "INSERT INTO durable.workflow (name, queue, status, token, worker_id, started_at, attempt, crashes, "
                "wake_at) VALUES "
                "('lost', 'lost', 'running', gen_random_uuid(), :dead, statement_timestamp(), 1, 0, NULL), "
                "('crashing', 'lost', 'suspended', NULL, NULL, statement_timestamp(), 4, 3, "
                "statement_timestamp() + interval '1 hour'), "
                "('polling', 'lost', 'suspended', NULL, NULL, statement_timestamp(), 1, 0, "
                "statement_timestamp() + interval '30 s')"
            ),
            {"dead": dead},
        )
    session.execute(
        text(
            "INSERT INTO durable.step (workflow_id, key, name, position, status, error, attempt, started_at) "
            """SELECT id, 'charge', 'charge', 1, 'failed', '{"type": "x:Y", "cancelled": {"order": 1}}', 1, """
            "statement_timestamp() FROM durable.workflow WHERE name = 'lost'"
        )
    )


# behaviour: M4
def test_waiting_for_names_what_each_suspended_workflow_waits_for(scenario: Scenario) -> None:
    found = scenario.rows("waiting_for", "workflow, kind, what, step")
    shown = [
        (each["workflow"], each["kind"], each["what"], each["step"], each["until"] is not None, bool(each["child_id"]))
        for each in found
    ]
    assert shown == [
        ("callback", "callback", "bank", "bank", True, False),
        ("callback", "callback", "create_callback", "create_callback", False, False),
        ("child", "deferred", None, None, False, False),
        ("child", "delay", None, None, True, False),
        *[("child", "signal", "go", "signal:go", False, False)] * 4,
        ("crashing", "crash", None, None, True, False),
        ("event", "event", "f(x)", "wait_event(f(x))", False, False),
        ("first", "child", "child", None, False, True),
        ("first", "children", None, "first#2", False, False),
        *[("mapped", "child", "child", None, False, True)] * 2,
        ("mapped", "children", "child", "map:child", False, False),
        ("polling", "timer", None, None, True, False),
        ("retry", "retry", "unstable", "unstable", True, False),
        ("timer", "timer", None, "sleep", True, False),
        ("two_signals", "signal", "b", "lambda#2/signal:b", True, False),
        ("two_signals", "signal", "order/7", "lambda/signal:order%2F7", False, False),
    ]
    unknown = {each["workflow"] for each in found if each["since"] is None}
    assert unknown == {"crashing", "polling"}
    suspended = {each["id"] for each in scenario.rows("workflow_overview", status="suspended")}
    assert {each["workflow_id"] for each in found} == suspended


def test_queue_depth_has_every_queue_with_work_or_a_row(scenario: Scenario) -> None:
    assert [_counts(each) for each in scenario.live["queue_depth"]] == [
        ("busy", 0, 1, 0, 0, None),
        ("default", 0, 0, 2, 11, None),
        ("idle", 0, 0, 0, 0, 3),
        ("nobody", 1, 0, 0, 0, None),
        ("paused", 1, 0, 0, 0, None),
    ]
    rows = scenario.rows("queue_depth")
    assert {each["queue"]: (each["pending_since"] is None, each["paused_at"] is None) for each in rows} == {
        "default": (False, True),  # the fork
        "idle": (True, True),
        "lost": (True, True),
        "nobody": (False, True),
        "paused": (False, False),
    }
    assert [each["running"] for each in scenario.rows("queue_depth", queue="lost")] == [1]


def test_worker_load_counts_what_live_and_dead_workers_execute(scenario: Scenario) -> None:
    (live,) = scenario.live["worker_load"]
    assert (live["name"], live["is_alive"], live["executing"], live["slots"]) == ("w1", True, 1, 30)
    assert live["oldest_started_at"] >= live["started_at"]
    (dead,) = scenario.rows("worker_load")
    assert (dead["name"], dead["is_alive"], dead["executing"]) == ("dead", False, 1)


def test_workflow_overview_has_a_row_for_each_and_no_payload(scenario: Scenario) -> None:
    (running,) = scenario.live["blocked"]
    assert (running["status"], running["worker"], running["queue"]) == ("running", "w1", "busy")
    assert running["took"] > timedelta(0) <= running["waited"]
    (ended,) = scenario.rows("workflow_overview", name="blocked")
    assert (ended["status"], ended["worker"], ended["error_type"]) == ("succeeded", None, None)
    assert ended["took"] == ended["finished_at"] - ended["started_at"]
    failed = scenario.rows("workflow_overview", name="wrapping")[0]
    assert (failed["error_type"], failed["error_message"]) == ("builtins:LookupError", "no such order")
    (delayed,) = [each for each in scenario.rows("workflow_overview", name="child") if each["tags"]]
    assert (delayed["tags"], delayed["took"], delayed["waited"] > timedelta(0)) == ({"tenant": "7"}, None, True)
    (cancelled,) = scenario.rows("workflow_overview", status="cancelled")
    assert cancelled["name"] == "update"
    fork = scenario.rows("workflow_overview", id=scenario.ids["fork"])[0]
    assert fork["forked_from"] == scenario.ids["failing"]
    assert len(scenario.rows("workflow_overview")) == 27
    assert not {"input", "output", "error", "headers"} & set(fork)


def test_step_latency_counts_each_execution_once_by_hour(scenario: Scenario) -> None:
    """Without what a fork has copied, without calls that the code has cancelled, and without what still waits."""
    found = scenario.rows("step_latency", "workflow, step, hour")
    counts: dict[tuple[str, str], list[int]] = {}
    for each in found:  # an hour may begin in between
        assert each["hour"].minute == each["hour"].second == 0
        assert timedelta(0) <= each["p50"] <= each["p95"] <= each["longest"]
        total = counts.setdefault((each["workflow"], each["step"]), [0, 0, 0])
        for place, name in enumerate(("calls", "failed", "tries")):
            total[place] += each[name]
    assert counts["failing", "charge"] == [9, 2, 9]
    assert counts["recovering", "charge"] == [2, 1, 2]
    assert counts["blocked", "hold"] == [1, 0, 1]
    assert not {("lost", "charge"), ("retry", "unstable"), ("timer", "sleep")} & set(counts)


def test_failure_groups_name_the_step_that_made_them_fail(scenario: Scenario) -> None:
    found = scenario.rows("failure_groups", "workflow")
    assert [(each["workflow"], each["step"], each["error_type"], each["workflows"]) for each in found] == [
        ("failing", "charge", "builtins:ValueError", 2),
        ("recovering", None, "builtins:KeyError", 1),
        ("wrapping", "charge", "builtins:LookupError", 1),
    ]
    (failing, *_) = found
    assert failing["first_at"] <= failing["last_at"]
    last = scenario.rows("workflow_overview", id=failing["last_id"])[0]
    assert (last["finished_at"], last["error_message"]) == (failing["last_at"], failing["last_message"])


FINISHED = (
    "INSERT INTO durable.workflow (name, status, finished_at, started_at, output) "
    "SELECT 'checkout', 'succeeded', statement_timestamp(), statement_timestamp(), '1' FROM generate_series(1, 5000)"
)
STEPS = (
    "INSERT INTO durable.step (workflow_id, key, name, position, status, output, attempt, started_at) "
    "SELECT id, 'charge' || n, 'charge', n, 'succeeded', '1', 1, statement_timestamp() "
    "FROM durable.workflow, generate_series(1, 2) AS n"
)
UNFINISHED = (
    "INSERT INTO durable.workflow (name, status, token, worker_id, started_at, wake_at, awaits) "
    "SELECT 'checkout', status, token, :worker, statement_timestamp(), "
    "CASE status WHEN 'suspended' THEN statement_timestamp() + interval '1 hour' END, "
    """CASE status WHEN 'suspended' THEN '[{"signal": "a"}]'::jsonb END """
    "FROM (SELECT (ARRAY['pending', 'running', 'suspended'])[n % 3 + 1] AS status, "
    "CASE n % 3 WHEN 1 THEN gen_random_uuid() END AS token FROM generate_series(1, 30) AS n) AS made"
)
WORKERS = (
    "INSERT INTO durable.worker (id, name, queues, lease_expires_at) "
    "VALUES (:worker, 'w', ARRAY['default'], statement_timestamp() + interval '1 hour')"
)


@pytest.mark.new_database
def test_views_of_what_is_unfinished_do_not_read_what_has_finished(engine: Engine) -> None:
    # behaviour: M4 G1
    with Session(engine) as session:
        for table in ("workflow", "step"):
            session.execute(text(f"ALTER TABLE durable.{table} SET (autovacuum_enabled = off)"))
        with forged(session):
            session.execute(text(FINISHED))
            session.execute(text(STEPS))
            session.execute(text(UNFINISHED), {"worker": races.WORKER})
        session.execute(text(WORKERS), {"worker": races.WORKER})
        session.commit()
        _expect_few_pages(session)
        session.execute(text("ANALYZE durable.workflow, durable.step"))
        _expect_few_pages(session)


def _expect_few_pages(session: Session) -> None:
    indexes = {
        "queue_depth": ["workflow_pending_idx", "workflow_running_idx", "workflow_suspended_idx"],
        "waiting_for": ["workflow_suspended_idx", "step_pkey"],
        "worker_load": ["workflow_running_idx"],
    }
    for view, used in indexes.items():
        plan = _plan(session, f"SELECT * FROM durable.{view}")
        assert all(map(plan.uses, used)), (view, plan)
        assert not plan.scans("workflow"), (view, plan)
        assert not plan.scans("step"), (view, plan)
        assert plan.buffers() < 150, (view, plan)


def _plan(session: Session, query: str) -> Plan:
    (plan,) = session.execute(text(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}")).scalar_one()
    return Plan(plan["Plan"])
