"""The claim of receivers, and the histories that come with claims."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text, update
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import manage
from sqla_durable.models import Queue, Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import Awaited, Claimed, Fence, Suspend, attempts, claims, signals, steps, timers
from sqla_durable.store.claims import _CLAIM_RECEIVERS  # pyright: ignore[reportPrivateUsage]
from tests.store import races
from tests.store.plans import MODES, explain, fill

APPROVED = Awaited(signal="approved")
OTHER = uuid7()


def receiver(engine: Engine, *, is_sent: bool = True, delay: float | None = None, **columns: Any) -> UUID:
    """Make a workflow that has one step and waits for a signal, which was sent."""
    with Session(engine) as session:
        races.enqueue(session, **columns)
        (claimed,) = races.claim(session, queues=[columns.get("queue", "default")])
        steps.record(session, races.checkpoint(claimed.fence))
        races.end(session, [Suspend(claimed.fence, delay, [APPROVED])])
        session.commit()
    if is_sent:
        send(engine, claimed.fence.workflow_id)
    return claimed.fence.workflow_id


def send(engine: Engine, workflow_id: UUID, name: str = "approved") -> None:
    with Session(engine) as session:
        signals.send(session, [workflow_id], name=name, payload="7", key=None)
        session.commit()


def claim(session: Session, *ids: UUID, **options: Any) -> list[Claimed]:
    """Claim receivers; nothing is committed."""
    given: dict[str, Any] = {"worker_id": OTHER, "token": uuid7(), "queues": ["default"], "names": ["checkout"]}
    given |= {"limit": 10, **options}
    return claims.claim_receivers(session, ids, **given)


def claimed_ids(engine: Engine, *ids: UUID, **options: Any) -> list[UUID]:
    with Session(engine) as session:
        found = [each.fence.workflow_id for each in claim(session, *ids, **options)]
        session.commit()
        return found


def test_a_receiver_is_claimed_with_its_history_and_takes_its_signal(engine: Engine) -> None:
    workflow_id = receiver(engine, delay=3_600)
    with Session(engine) as session:
        (claimed,) = claim(session, workflow_id)
        session.commit()
        assert (list(claimed.history), claimed.is_unread) == (["charge"], False)
        row = session.get_one(Workflow, workflow_id)
        assert (row.status, row.worker_id, row.awaits, row.wake_at) == (WorkflowStatus.RUNNING, OTHER, None, None)
        assert signals.take(session, races.checkpoint(claimed.fence, "signal:approved"), name="approved") == "7"
        session.commit()
        assert signals.deliver(session, limit=10) == (1, 0)  # the notice of the suspended workflow to itself


def test_what_nobody_has_sent_to_stays(engine: Engine) -> None:
    silent, rejected = receiver(engine, is_sent=False), receiver(engine, is_sent=False)
    send(engine, rejected, name="rejected")
    assert claimed_ids(engine, silent, rejected, uuid7()) == []


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"queue": "mail"}, {}),
        ({}, {"names": ["other"]}),
        ({"version": "1"}, {"versions": ["2"]}),
    ],
    ids=["queue", "name", "version"],
)
def test_what_another_worker_is_to_claim_stays(
    engine: Engine, columns: dict[str, Any], options: dict[str, Any]
) -> None:
    assert claimed_ids(engine, receiver(engine, **columns), **options) == []


def test_a_paused_queue_and_a_deadline_keep_a_receiver(engine: Engine) -> None:
    late = receiver(engine)
    with Session(engine) as session:
        session.execute(update(Workflow).values(deadline_at=datetime(2020, 1, 1, tzinfo=UTC)))
        session.commit()
    assert claimed_ids(engine, late) == []
    workflow_id = receiver(engine)
    with Session(engine) as session:
        session.add(Queue(name="default", paused_at=datetime.now(UTC)))
        session.commit()
    assert claimed_ids(engine, workflow_id) == []


def test_no_more_are_claimed_than_there_are_slots(engine: Engine) -> None:
    ids = [receiver(engine) for _ in range(3)]
    first = claimed_ids(engine, *ids, limit=2)
    assert len(first) == 2
    assert sorted([*first, *claimed_ids(engine, *ids, limit=2)]) == sorted(ids)


Race = Callable[[Session, UUID], object]
RACES: dict[str, Race] = {
    "claim": lambda session, workflow_id: claim(session, workflow_id),
    "deliver": lambda session, _: signals.deliver(session, limit=10),
    "wake": lambda session, _: timers.wake_due(session, limit=10),
    "cancel": lambda session, workflow_id: manage.cancel(session, workflow_id),
}


@pytest.mark.parametrize("other", RACES)
@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
def test_a_receiver_that_another_transaction_has_is_passed_over(engine: Engine, other: str, commits: bool) -> None:
    workflow_id = receiver(engine, delay=0)
    with races.transaction(engine) as first, Session(engine) as second:
        RACES[other](first.session, workflow_id)
        assert claim(second, workflow_id) == []
        second.commit()
        (first.session.commit if commits else first.session.rollback)()
        assert len(claim(second, workflow_id)) == (not commits)


@pytest.mark.parametrize("other", ["claim", "deliver", "wake"])
def test_others_pass_over_a_receiver_that_is_being_claimed(engine: Engine, other: str) -> None:
    workflow_id = receiver(engine, delay=0)
    with Session(engine) as first, Session(engine) as second:
        (claimed,) = claim(first, workflow_id)
        RACES[other](second, workflow_id)
        second.commit()
        first.commit()
        assert second.get_one(Workflow, workflow_id).token == claimed.fence.token
        assert attempts.still_owned(second, [claimed.fence])
        RACES[other](second, workflow_id)  # and nothing wakes it twice
        second.commit()
        assert attempts.still_owned(second, [claimed.fence])


def test_a_cancel_waits_for_the_claim_and_ends_the_attempt(engine: Engine) -> None:
    workflow_id = receiver(engine)
    with Session(engine) as first, races.transaction(engine) as second:
        (claimed,) = claim(first, workflow_id)
        cancelling = second.begin_blocked(lambda session: manage.cancel(session, workflow_id))
        first.commit()
        cancelling.result()
        second.session.commit()
        assert not attempts.still_owned(first, [claimed.fence])


def test_a_signal_that_is_committed_after_a_claim_began_is_left_to_the_delivery(engine: Engine) -> None:
    """In whichever order the two commit, one of them finds the other."""
    workflow_id = receiver(engine, is_sent=False)
    with Session(engine) as sender, Session(engine) as claimer:
        signals.send(sender, [workflow_id], name="approved", payload="7", key=None)
        assert claim(claimer, workflow_id) == []
        sender.commit()
        claimer.commit()
        assert signals.deliver(claimer, limit=10)[1] == 1
        claimer.commit()
    assert races.status_of(engine, workflow_id) is WorkflowStatus.PENDING


_PAUSE = """
CREATE FUNCTION durable.pause() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('application_name') = 'pauses' THEN PERFORM pg_advisory_xact_lock(4711); END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER pause BEFORE UPDATE ON durable.workflow FOR EACH STATEMENT EXECUTE FUNCTION durable.pause()
"""


@contextmanager
def paused(engine: Engine, statement: Callable[[Session], Any]) -> Generator[races.Concurrent[Any]]:
    """Let a statement that updates workflows wait between its snapshot and its locks, until the block ends."""
    with engine.begin() as connection:
        connection.execute(text(_PAUSE))
    with races.transaction(engine) as paused, Session(engine) as holder:
        paused.session.execute(text("SET application_name = 'pauses'"))
        holder.execute(text("SELECT pg_advisory_lock(4711)"))
        waiting = paused.begin_blocked(statement)
        yield waiting
        holder.execute(text("SELECT pg_advisory_unlock(4711)"))
        waiting.result()
        paused.session.commit()


@pytest.mark.new_database
@pytest.mark.parametrize("waits_for", ["queue", "signal"])
def test_a_history_that_grew_after_the_claim_began_is_read_again(engine: Engine, waits_for: str) -> None:
    """The claim sees neither the step nor the attempt that recorded it; its locks see that the row is another one."""
    workflow_id = receiver(engine)
    if waits_for == "queue":
        with Session(engine) as session:
            signals.deliver(session, limit=10)
            session.commit()
        statement: Callable[[Session], list[Claimed]] = lambda session: races.claim_only(session).claimed  # noqa: E731
        back: Callable[[Session, Fence], object] = lambda session, fence: attempts.release(session, [fence])  # noqa: E731
    else:
        statement = lambda session: claim(session, workflow_id)  # noqa: E731
        back = lambda session, fence: races.end(session, [Suspend(fence, None, [APPROVED])])  # noqa: E731
    with paused(engine, statement) as claiming, Session(engine) as session:
        (earlier,) = statement(session)
        steps.record(session, races.checkpoint(earlier.fence, "ship", position=2))
        back(session, earlier.fence)
        session.commit()
    (claimed,) = claiming.result()
    assert (claimed.is_unread, claimed.history) == (True, {})
    with Session(engine) as session:
        assert list(claims.with_histories(session, [claimed])[0].history) == ["charge", "ship"]


@pytest.mark.parametrize(
    ("count", "output", "comes"),
    [(0, "1", True), (50, "1", True), (51, "1", False), (1, '"' + uuid7().hex * 1_000 + '"', False)],
    ids=["none", "most", "too many", "too large"],
)
def test_a_short_history_comes_with_the_claim(engine: Engine, count: int, output: str, comes: bool) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        session.execute(text("ALTER TABLE durable.step ALTER output SET STORAGE EXTERNAL"))
        for number in range(1, count + 1):
            steps.record(session, races.checkpoint(fence, f"step {number}", output=output, position=number))
        attempts.release(session, [fence])
        (claimed,) = races.claim_only(session).claimed
        assert claimed.is_unread is not comes
        (read,) = claims.with_histories(session, [claimed])
        assert read.history == steps.histories(session, [fence.workflow_id]).get(fence.workflow_id, {})
        assert len(read.history) == count
        session.rollback()


@pytest.mark.new_database
def test_a_receiver_is_found_by_its_id_among_many(engine: Engine) -> None:
    with Session(engine) as session:
        fill(session, 100_000)
    workflow_id = receiver(engine)
    parameters: dict[str, Any] = {
        "ids": f"{{{workflow_id}}}",
        "queues": ["default"],
        "limit": 10,
        "new_token": uuid7(),
        "claimant": OTHER,
    } | claims.name_parameters(["checkout"], [])
    with Session(engine) as session:
        plans = [explain(session, _CLAIM_RECEIVERS, parameters, mode=mode) for mode in MODES]
    for plan in plans:
        assert not plan.scans("workflow"), plan
        assert not plan.scans("step"), plan
        assert plan.buffers() < 60, plan
