"""What a claim of a queue with limits reads, however much waits; and what queues without limits pay for it."""

from __future__ import annotations

from collections.abc import Generator
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
from sqlalchemy import Engine, event, func, select, text
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable import Durable, Worker, Workflow
from sqla_durable.store import claims, work
from tests.store import races
from tests.store.plans import Plan, explain
from tests.store.test_limits import MINUTE, make

MODES = "force_custom_plan", "force_generic_plan"
SETTINGS: dict[str, dict[str, Any]] = {
    "fair": {"fair": True},
    "per_key": {"per_key": 1},
    "key_rate": {"key_rate": 5, "key_rate_period": MINUTE},
    "fifo": {"fifo": "block"},
    "concurrency": {"concurrency": 10_000},
    "hold": {"concurrency": 30_000, "while_suspended": "hold"},
    "rate": {"rate": 50, "rate_period": MINUTE},
    "aging": {"aging": MINUTE},
}
KEYED = "fair", "per_key", "key_rate", "fifo"
FULL = 400

WAITING = (
    "INSERT INTO durable.workflow (name, by, priority) "
    "SELECT 'checkout', 'k' || lpad((n % 10000)::text, 5, '0'), n % 3 FROM generate_series(1, :number) n"
)
GOING_ON = (
    "INSERT INTO durable.workflow (name, by, place) SELECT 'checkout', 'g' || n, 'finished' "
    "FROM generate_series(1, 20000) n"
)
USED = (
    "INSERT INTO durable.queue_use (queue, used_at, by, claim, number) "
    "SELECT 'default', statement_timestamp(), 'k' || lpad((n % 100)::text, 5, '0'), gen_random_uuid(), 1 "
    "FROM generate_series(1, 5000) n"
)
RUNNING = (
    "UPDATE durable.workflow SET status = 'running', token = gen_random_uuid(), worker_id = gen_random_uuid(), "
    "started_at = statement_timestamp() WHERE id IN "
    f"(SELECT DISTINCT ON (by) id FROM durable.workflow WHERE by < 'k{FULL:05}')"
)


@pytest.fixture
def session(engine: Engine) -> Generator[Session]:
    with Session(engine) as session:
        session.execute(text("ALTER TABLE durable.workflow SET (autovacuum_enabled = off)"))
        session.execute(text(WAITING), {"number": 20_000})
        session.commit()
        yield session


def plan_of(session: Session, settings: str, *, mode: str) -> Plan:
    """Return the plan of a claim of ten."""
    session.execute(text("DELETE FROM durable.queue"))
    session.commit()
    session.expunge_all()
    make(session, **SETTINGS[settings])
    return explained(session, mode=mode)


def explained(session: Session, *, mode: str) -> Plan:
    parameters: dict[str, Any] = {"limit": 10, "new_token": uuid7(), "claimant": races.WORKER}
    parameters |= {"queue": "default", "here": 0} | claims.name_parameters(["checkout"], [])
    return explain(session, claims._CLAIM_LIMITED, parameters, mode=mode)  # pyright: ignore[reportPrivateUsage]


def check(session: Session, most: dict[str, int]) -> None:
    """Prove that no claim reads more pages, nor the table from its beginning to its end."""
    for settings, mode in product(SETTINGS, MODES):
        plan = plan_of(session, settings, mode=mode)
        assert plan.rows("CTE chosen") == 10, (settings, mode)
        assert plan.uses("workflow_by_idx") or settings not in KEYED, (settings, mode)
        assert not plan.scans("workflow"), (settings, mode, plan)
        assert plan.buffers() <= most.get(settings, most["others"]), (settings, mode, plan.buffers(), plan)


def check_without_statistics_and_with_them(session: Session, most: dict[str, int]) -> None:
    check(session, most)
    session.execute(text("ANALYZE durable.workflow"))
    session.commit()
    check(session, most)


# behaviour: Q11
@pytest.mark.new_database
def test_a_claim_reads_a_few_pages_among_ten_thousand_keys(session: Session) -> None:
    session.execute(text(WAITING), {"number": 80_000})
    check_without_statistics_and_with_them(session, {"others": 600})


@pytest.mark.new_database
def test_full_keys_that_are_passed_cost_some_pages_each(session: Session) -> None:
    session.execute(text(RUNNING))
    session.execute(text("ANALYZE durable.workflow"))
    check(session, {"per_key": 16 * FULL, "fifo": 16 * FULL, "others": 1_200})


@pytest.mark.new_database
def test_what_was_used_of_a_key_is_counted_once_by_its_index(session: Session) -> None:
    session.execute(text("ALTER TABLE durable.queue_use SET (autovacuum_enabled = off)"))
    make(session, key_rate=100_000, key_rate_period=MINUTE)
    session.execute(text(USED))
    session.commit()
    for statistics in (False, True):
        if statistics:
            session.execute(text("ANALYZE durable.queue_use"))
            session.commit()
        for mode in MODES:
            plan = explained(session, mode=mode)
            assert plan.rows("CTE chosen") == 10
            assert plan.loops("queue_use_by_idx") == 10
            assert plan.buffers() <= 1_000


@pytest.mark.new_database
def test_of_many_that_go_on_a_claim_reads_the_first(session: Session) -> None:
    session.execute(text(WAITING), {"number": 80_000})
    session.execute(text(GOING_ON))
    # The places that are kept are counted, as many as it allows.
    check_without_statistics_and_with_them(session, {"hold": 7_000, "others": 2_000})


@pytest.mark.new_database
def test_the_driver_prepares_the_claim_which_is_not_planned_each_time(engine: Engine, session: Session) -> None:
    """It takes much longer to plan than to execute."""
    session.execute(text("ANALYZE durable.workflow"))
    session.commit()
    given: dict[str, Any] = {"worker_id": races.WORKER, "names": ["checkout"], "queue": "default"}
    prepared = text("SELECT generic_plans FROM pg_prepared_statements WHERE strpos(statement, 'queue_use') > 0")
    for settings in SETTINGS.values():
        session.execute(text("DELETE FROM durable.queue"))
        session.commit()
        session.expunge_all()
        make(session, **settings)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for number in range(16):
                claims.claim_limited(connection, token=uuid7(), limit=1 + 100 * (number % 3), executing=0, **given)
            # After five by the driver, and five with custom plans.
            assert connection.execute(prepared).scalars().all() == [6], settings
            connection.invalidate()


@pytest.mark.new_database
def test_the_planner_expects_the_same_whatever_the_values(session: Session) -> None:
    """Else it may plan the claim again each time, because that looks cheaper."""
    session.execute(text("ANALYZE durable.workflow"))
    for settings in SETTINGS:
        custom, generic = (plan_of(session, settings, mode=mode).cost() for mode in MODES)
        assert generic <= custom + 20, settings


@pytest.mark.new_database
@pytest.mark.parametrize("mode", MODES)
def test_a_poll_reads_a_few_pages_more_for_a_queue_with_limits(session: Session, mode: str) -> None:
    session.execute(text("ANALYZE durable.workflow"))
    session.commit()
    before = poll(session, mode=mode)
    make(session, per_key=1)
    assert poll(session, mode=mode) < before + 8 < 50


def poll(session: Session, *, mode: str) -> int:
    """Return how many pages a poll reads."""
    parameters: dict[str, Any] = {
        "polling_id": races.WORKER,
        "within": 100.0,
        **claims.name_parameters(["checkout"], []),
    }
    parameters |= claims.range_parameters(races.from_front(["default"]))
    parameters |= work._scan_parameters(work.FULL_SCAN)  # pyright: ignore[reportPrivateUsage]
    # The less of two: a session whose catalogue caches were reset meanwhile reads the catalogue's pages, too.
    statement = work._FIND_WORK  # pyright: ignore[reportPrivateUsage]
    return min(explain(session, statement, parameters, mode=mode).buffers() for _ in range(2))


def test_a_worker_without_such_queues_sends_no_statement_about_them(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    durable = Durable()

    @durable.workflow
    def checkout() -> None: ...

    with session_factory() as session:
        races.enqueue(session, 20)
    statements: list[str] = []

    def see(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", see)
    with Worker(durable, sessionmaker=session_factory, poll_interval=timedelta(milliseconds=20)):
        races.wait_until(lambda: unfinished(session_factory) == 0)
    assert len(statements) > 5
    # A claim of all queues only asks whether a key is paused.
    assert not [each for each in statements if "queue_use" in each or "queue_key.weight" in each]


def unfinished(maker: sessionmaker[Session]) -> int:
    with maker() as session:
        return session.scalar(select(func.count()).where(Workflow.finished_at.is_(None))) or 0
