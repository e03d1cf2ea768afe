"""What an operation costs does not grow with what is over: the pages of the 10,000th are those of the first."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TypeAlias
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.models.base import StepStatus
from sqla_durable.store import (
    Awaited,
    Fence,
    NewWorkflow,
    Origin,
    Suspend,
    attempts,
    callbacks,
    children,
    continuations,
    events,
    signals,
    steps,
    streams,
    updates,
)
from tests.store import races
from tests.store.plans import pages
from tests.support.forged import forged

Operation: TypeAlias = Callable[[Session, Fence], object]

MORE = 10_000
SLACK = 6, 1.1  # pages, and a share: an index may be a level higher
MOST = 280  # pages: the dearest of these delivers nine signals; each index of the table adds some
MODES = ("force_custom_plan", "force_generic_plan")
UPDATE = 1_000_000_000  # ids of updates that are waiting, one for each workflow

_OLD = """
INSERT INTO durable.step (workflow_id, key, name, position, status, output, attempt, started_at)
    SELECT :old, 'charge#' || n, 'charge', n, 'succeeded', '1', 1, statement_timestamp()
    FROM generate_series(1, :more) n;
INSERT INTO durable.signal (workflow_id, name, key, delivered_at, consumed_by, is_update)
    SELECT :old, name, CASE n % 2 WHEN 1 THEN 'key' || n END, statement_timestamp(), 'step' || n,
           nullif(starts_with(name, '#'), false)
    FROM generate_series(1, :more) n, unnest(ARRAY['approved', '#update:change']) name;
INSERT INTO durable.signal (workflow_id, name, key, payload, delivered_at, is_answer)
    SELECT :old, '#callback:' || n, 'outcome', '{"value": 1}', statement_timestamp(), true
    FROM generate_series(1, :more) n;
INSERT INTO durable.event (workflow_id, key, value) SELECT :old, 'status', '1' FROM generate_series(1, :more);
INSERT INTO durable.event (workflow_id, key, id, value)
    SELECT workflow_id, '#reply:' || id, id, '{"reply": 1}' FROM durable.signal WHERE name = '#update:change';
INSERT INTO durable.stream_item (workflow_id, name, number, value, attempt)
    SELECT :old, 'log', n, '1', 1 FROM generate_series(0, :more) n;
INSERT INTO durable.workflow (name, status, output, finished_at, parent_id, parent_key)
    SELECT 'child', 'succeeded', '1', statement_timestamp(), :old, 'start:child#' || n FROM generate_series(1, :more) n;
INSERT INTO durable.signal (workflow_id, name, delivered_at, consumed_by)
    SELECT id, 'approved', statement_timestamp(), 'step' FROM durable.workflow WHERE name = 'child'
"""
"""A workflow that has had 10,000 of everything, beside as many others."""

_WAITING = """
INSERT INTO durable.signal (workflow_id, name) VALUES (:id, 'approved');
INSERT INTO durable.signal (workflow_id, name, id, key, is_update) OVERRIDING SYSTEM VALUE
    VALUES (:id, '#update:change', :update, 'asked', true);
INSERT INTO durable.step (workflow_id, key, name, position, status, output, attempt, started_at)
    VALUES (:id, 'callback', 'create_callback', 99999, 'succeeded',
            '{"signal": "#callback:done", "token": "t", "timeout": null, "heartbeat": null}', 1, statement_timestamp());
INSERT INTO durable.signal (workflow_id, name, key, payload, is_answer)
    VALUES (:id, '#callback:done', 'outcome', '{"value": 1}', true);
INSERT INTO durable.event (workflow_id, key, value) VALUES (:id, 'status', '2');
INSERT INTO durable.stream_item (workflow_id, name, number, value, attempt) VALUES (:id, 'log', 10001, '1', 1)
    ON CONFLICT DO NOTHING;
INSERT INTO durable.workflow (name, id, status, output, finished_at, parent_id, parent_key)
    VALUES ('child', :child, 'succeeded', '1', statement_timestamp(), :id, 'start:child')
"""


def operations(update_id: int, child: UUID) -> dict[str, Operation]:
    """Each operation on a workflow for which one of everything waits."""
    new = races.checkpoint

    def step(session: Session, fence: Fence) -> object:
        return steps.record(session, new(fence, "new"))

    def batch(session: Session, fence: Fence) -> object:
        return attempts.write_batch(session, [new(fence, "new")])

    def suspended_and_delivered(session: Session, fence: Fence) -> None:
        races.end(session, [Suspend(fence, None, (Awaited(signal="approved"),))])
        assert signals.deliver(session, limit=100)[1] == 1

    def child_started(session: Session, fence: Fence) -> object:
        one = NewWorkflow(uuid7(), "child", "{}", "default", parent_id=fence.workflow_id, parent_key="start:new")
        return children.start(session, new(fence, "new"), [one], active=9)

    return {
        "step": step,
        "step in a batch": batch,
        "wait": lambda s, f: steps.begin_wait(s, new(f, "new")._replace(status=StepStatus.WAITING, output=None)),
        "suspend": lambda s, f: races.end(s, [Suspend(f, None, (Awaited(signal="approved"),))]),
        "finish": lambda s, f: races.end(s, [races.success(f)]),
        "send a signal": lambda s, f: signals.send(s, [f.workflow_id], name="approved", payload="1", key=None),
        "send a signal with a key": lambda s, f: signals.send(
            s, [f.workflow_id], name="approved", payload="1", key="a"
        ),
        "deliver": suspended_and_delivered,
        "take a signal": lambda s, f: signals.take(s, new(f, "new"), name="approved"),
        "take no signal": lambda s, f: signals.take(s, new(f, "new"), name="rejected"),
        "look whom an update is for": lambda s, f: updates.receiver(s, f.workflow_id, name="change", key="asked"),
        "send an update": lambda s, f: updates.send(s, f.workflow_id, name="change", payload="1", key=None),
        "find an update": lambda s, f: updates.oldest(s, workflow_id=f.workflow_id, name="change"),
        "find no update": lambda s, f: updates.oldest(s, workflow_id=f.workflow_id, name="other"),
        "take an update": lambda s, f: updates.take(s, new(f, "new"), update_id=update_id),
        "refuse an update": lambda s, f: updates.refuse(s, f, update_id=update_id, reason="no"),
        "answer an update": lambda s, f: updates.record_answer(s, new(f, "new"), update_id=update_id, answer="1"),
        "read an update": lambda s, f: updates.read(s, f.workflow_id, update_id),
        "answer a callback": lambda s, f: callbacks.answer(s, f.workflow_id, signal="#callback:new", payload="1"),
        "read a callback": lambda s, f: callbacks.read(s, f.workflow_id, "callback"),
        "expire a callback": lambda s, f: callbacks.expire(s, new(f, "new"), key="callback"),
        "set an event": lambda s, f: events.record(s, new(f, "new"), key="status", value="1"),
        "get an event": lambda s, f: events.latest(s, f.workflow_id, "status"),
        "wait for an event": lambda s, f: events.take(s, new(f, "new"), workflow_id=f.workflow_id, key="status"),
        "append to a stream": lambda s, f: streams.append(s, Origin(f, 1, "step", 1), name="log", values=["1"]),
        "read a stream": lambda s, f: streams.read(s, f.workflow_id, "log", start=10_001, limit=500),
        "start a child": child_started,
        "look at a child": lambda s, f: children.awaited(s, f.workflow_id, workflow_ids=[child]),
        "take a child": lambda s, f: children.take_outcome(s, new(f, "new"), workflow_id=child),
    }


def given(engine: Engine) -> dict[str, tuple[Fence, int, UUID]]:
    """Make a workflow that has had 10,000 of everything, and one that has had nothing; one of each waits for both."""
    young, old = races.claimed_fences(engine, 2)
    found = {"young": (young, UPDATE, uuid7()), "old": (old, UPDATE + 1, uuid7())}
    with engine.begin() as connection:
        for table in ("workflow", "step", "signal", "event", "stream_item"):
            connection.execute(text(f"ALTER TABLE durable.{table} SET (autovacuum_enabled = off)"))
        with forged(connection):
            _execute(connection, _OLD, old=old.workflow_id, more=MORE)
            for fence, update_id, child in found.values():
                _execute(connection, _WAITING, id=fence.workflow_id, update=update_id, child=child)
    return found


def _execute(connection: Connection, statements: str, **parameters: object) -> None:
    for each in statements.split(";\n"):
        wanted = {name: value for name, value in parameters.items() if re.search(rf"(?<!:):{name}\b", each)}
        connection.execute(text(each.replace('": ', '"\\: ')), wanted)


# behaviour: G1
@pytest.mark.new_database
def test_the_ten_thousandth_costs_what_the_first_does(engine: Engine) -> None:
    """With and without statistics, with custom and generic plans."""
    found = given(engine)
    grown: dict[tuple[str, ...], tuple[int, int]] = {}
    for statistics in ("none", "new"):
        if statistics == "new":
            with engine.begin() as connection:
                connection.execute(text("ANALYZE"))
        for mode in MODES:
            for name in operations(*found["young"][1:]):
                young, old = (cost(engine, name, each, mode=mode) for each in found.values())
                if old > young * SLACK[1] + SLACK[0] or old > MOST:
                    grown[name, statistics, mode] = young, old
    assert not grown, "\n".join(f"{name}: {touched}" for name, touched in grown.items())


def cost(engine: Engine, name: str, of: tuple[Fence, int, UUID], *, mode: str) -> int:
    """Return how many pages an operation touches."""
    fence, update_id, child = of
    with Session(engine) as session:
        session.execute(text(f"SET LOCAL plan_cache_mode = {mode}"))
        return pages(session, partial(operations(update_id, child)[name], session, fence))


_SENT = """
INSERT INTO durable.signal (workflow_id, name, key, payload, delivered_at, consumed_by, is_update)
    SELECT :id, name, CASE n % 10 WHEN 0 THEN 'key' || n END, '"long"', statement_timestamp(), 'step' || n,
           nullif(starts_with(name, '#'), false)
    FROM generate_series(1, 200) n, unnest(ARRAY['approved', '#update:change']) name;
INSERT INTO durable.event (workflow_id, key, id, value, created_at)
    SELECT workflow_id, '#reply:' || id, id, '{"reply": 1}', statement_timestamp() - interval '1 minute'
    FROM durable.signal WHERE name = '#update:change' AND consumed_by = ANY ('{step1,step2,step10}')
"""


def sent(session: Session) -> dict[tuple[str, bool], int]:
    """Count what was sent, by name and whether it has a key, and the answers."""
    counted = text("SELECT name, key IS NOT NULL AS keyed, count(*) FROM durable.signal GROUP BY 1, 2")
    found = {(str(name), bool(keyed)): int(count) for name, keyed, count in session.execute(counted)}
    return found | {("answers", True): int(session.execute(text("SELECT count(*) FROM durable.event")).scalar_one())}


# behaviour: G3
def test_a_new_round_forgets_what_was_taken_but_keys_and_answers_that_are_being_read(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with engine.begin() as connection:
        _execute(connection, _SENT, id=fence.workflow_id)
    with Session(engine) as session:
        assert continuations.continue_as_new(session, fence, given="{}")
        # Two updates without a key were answered a minute ago; the senders of the others may still be looking.
        kept = {("approved", True): 20, ("#update:change", True): 20, ("#update:change", False): 178}
        assert sent(session) == kept | {("answers", True): 1}
        payloads = text("SELECT DISTINCT payload::text FROM durable.signal")
        assert session.scalars(payloads).all() == ["null"]
        session.execute(text("UPDATE durable.signal SET delivered_at = delivered_at - interval '1 minute'"))
        (again,) = races.claim(session, 1)
        assert continuations.continue_as_new(session, again.fence, given="{}")
        del kept["#update:change", False]
        assert sent(session) == kept | {("answers", True): 1}
        known = updates.receiver(session, fence.workflow_id, name="change", key="key10")
        assert known is not None
        assert known.known is not None
        assert updates.read(session, fence.workflow_id, known.known) is not None
