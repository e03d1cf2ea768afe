"""SIGKILL on workers that claim from queues with limits: no commit leaves more running than allowed.

A constraint trigger of the test counts at each commit of a claim, one commit after another.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from sqla_durable import Workflow
from sqla_durable.definitions.queues import QueueOptions
from sqla_durable.store import queues, timers
from tests.crash import child
from tests.store import races
from tests.support.domain import Entry

SEED = 17
PERIOD = timedelta(milliseconds=200)
RATE, KEY_RATE = 6, 3
LIMITS: dict[str, dict[str, Any]] = {
    "concurrency": {"concurrency": 3},
    "hold": {"concurrency": 3, "while_suspended": "hold"},
    "keys": {"concurrency": 5, "per_key": 2},
    "hold keys": {"per_key": 1, "while_suspended": "hold"},
    "skip": {"fifo": "skip"},
    "block": {"fifo": "block", "concurrency": 2},
    "rate": {"rate": (RATE, PERIOD), "per_worker": 4},
    "key rate": {"key_rate": (KEY_RATE, PERIOD), "fair": True},
    "everything": {"rate": (RATE, PERIOD), "key_rate": (KEY_RATE, PERIOD), "fifo": "skip", "concurrency": 2},
}
KINDS = "small", "sleepy", "small_async"
KEYS = "a", "b", "c"

AUDIT = """
CREATE TABLE audit (what text, queue text, "by" text, found bigint, at timestamptz DEFAULT clock_timestamp());
CREATE TABLE claimed (number bigserial, id uuid, queue text, "by" text, at timestamptz, starts boolean);
CREATE FUNCTION note_claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO claimed (id, queue, "by", at, starts)
    VALUES (NEW.id, NEW.queue, NEW."by", statement_timestamp(), OLD.place IS NULL OR OLD.crashes > 0);
    RETURN NULL;
END $$;
CREATE FUNCTION count_claimed() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    limits durable.queue;
    counted bigint;
BEGIN
    PERFORM set_config('lock_timeout', '0', true);
    PERFORM pg_advisory_xact_lock(17);
    SELECT * INTO limits FROM durable.queue WHERE name = NEW.queue;
    SELECT count(*) INTO counted FROM durable.workflow WHERE queue = NEW.queue
        AND (status = 'running' OR (status = 'suspended' AND place = 'finished'));
    IF counted > limits.concurrency THEN
        INSERT INTO audit (what, queue, found) VALUES ('concurrency', NEW.queue, counted);
    END IF;
    SELECT count(*) INTO counted FROM durable.workflow WHERE queue = NEW.queue AND "by" = NEW."by"
        AND (status = 'running' OR (status = 'suspended' AND place IN ('finished', 'key', 'key_failed')));
    IF counted > (CASE WHEN limits.fifo IS NULL THEN limits.per_key ELSE 1 END) THEN
        INSERT INTO audit (what, queue, "by", found) VALUES ('key', NEW.queue, NEW."by", counted);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER note_claim AFTER UPDATE ON durable.workflow FOR EACH ROW
    WHEN (NEW.status = 'running' AND OLD.status = 'pending') EXECUTE FUNCTION note_claim();
CREATE CONSTRAINT TRIGGER count_claimed AFTER UPDATE ON durable.workflow DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (NEW.status = 'running' AND OLD.status = 'pending') EXECUTE FUNCTION count_claimed();
"""


def prepare(engine: Engine, count: int) -> None:
    """Set the limits, start workflows in each queue, and let the database audit."""
    with Session(engine) as session:
        for name, options in LIMITS.items():
            queues.put(session, name, QueueOptions(**options))
            for number in range(count):
                kind, by = KINDS[number % 3], KEYS[number // 3 % 3]
                given = {"account": f"{name}/{number}"}
                session.add(Workflow(name=kind, queue=name, by=by, input=given))
        session.commit()
    with engine.begin() as connection:
        connection.exec_driver_sql(AUDIT)


def unfinished(engine: Engine) -> int:
    """Let all waits and backoffs end; return how many workflows are not finished."""
    with Session(engine) as session, session.begin():
        timers.advance(session, 7_200)
        return session.execute(select(func.count()).where(Workflow.finished_at.is_(None))).scalar_one()


# behaviour: Q2 Q3 Q5 R5
@pytest.mark.timeout(180)
def test_no_limit_is_exceeded_while_workers_are_killed(database_url: str, engine: Engine, thorough: bool) -> None:
    """Three processes, one of which is killed again and again."""
    chance = random.Random(SEED)
    count = 60 if thorough else 18
    prepare(engine, count)
    options: dict[str, Any] = {"queues": [*LIMITS]}
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(child.worker(database_url, **options))
        for _ in range(20 if thorough else 6):
            unfinished(engine)  # so that what is suspended goes on beside the others
            child.kill_worker_after(chance.uniform(0.2, 0.6), database_url, **options)
        races.wait_until(lambda: unfinished(engine) == 0, what="the ends", seconds=60)
    check(engine, count)


def check(engine: Engine, count: int) -> None:
    """Prove what the audit has seen, the rates over all windows, and the order of each key."""
    with Session(engine) as session:
        assert session.execute(text("SELECT * FROM audit")).all() == []
        found = session.scalars(select(Workflow).order_by(Workflow.id)).all()
        claimed = session.execute(text("SELECT * FROM claimed ORDER BY number")).all()
        entries = session.execute(select(func.count()).where(Entry.note.is_(None))).scalar_one()
    assert {str(each.status) for each in found} == {"succeeded"}
    assert len(found) == count * len(LIMITS)
    assert entries == 2 * len(found)  # what a workflow writes, it has written once
    assert len(claimed) > len(found)
    for name, options in LIMITS.items():
        starts = [each for each in claimed if each.queue == name and each.starts]
        if "rate" in options:
            check_rate([each.at for each in starts], RATE)
        for key in KEYS:
            of_key = [each for each in starts if each.by == key]
            if "key_rate" in options:
                check_rate([each.at for each in of_key], KEY_RATE)
            if "fifo" in options:
                order = list(dict.fromkeys(each.id for each in of_key))
                assert order == [each.id for each in found if (each.queue, each.by) == (name, key)]


def check_rate(times: list[Any], rate: int) -> None:
    """Prove that no window of the period has more starts than the rate."""
    assert len(times) > rate
    ordered = sorted(times)
    assert all(later - first >= PERIOD for first, later in zip(ordered, ordered[rate:], strict=False))
