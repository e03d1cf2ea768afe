"""Callbacks under races: one outcome, whoever writes it, and nobody of the worker waits for who answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import complete_callback, errors, fail_callback, heartbeat_callback, manage, unwinding
from sqla_durable.models import Signal, Step
from sqla_durable.operations.callback import CallbackRecord
from sqla_durable.store import Awaited, Checkpoint, Fence, Suspend, callbacks, continuations, signals
from sqla_durable.store.callbacks import (
    _HOLD,  # pyright: ignore[reportPrivateUsage]
    _READ,  # pyright: ignore[reportPrivateUsage]
)
from sqla_durable.testing import advance
from tests.store import races
from tests.store.plans import explain
from tests.support.forged import forged

MINUTE = timedelta(minutes=1)


def make(engine: Engine, *, due: bool = False) -> tuple[Fence, CallbackRecord]:
    """Record a callback of a claimed workflow, of a minute that may have passed."""
    (fence,) = races.claimed_fences(engine)
    made = CallbackRecord.new(fence.workflow_id, within=MINUTE, heartbeat=MINUTE)
    with Session(engine) as session:
        races.record(session, [checkpoint(fence, made)])
        if due:
            advance(session, MINUTE)
        session.commit()
    return fence, made


def checkpoint(fence: Fence, made: CallbackRecord) -> Checkpoint:
    return races.checkpoint(fence, "create_callback", output=made.to_json())


def expire(engine: Engine, fence: Fence) -> bool:
    with Session(engine) as session:
        session.execute(text("SET lock_timeout = '2s'"))
        found = callbacks.expire(session, races.checkpoint(fence), key="create_callback")
        session.commit()
        return found


def outcomes(engine: Engine) -> list[object]:
    with Session(engine) as session:
        return list(session.scalars(select(Signal.payload).where(Signal.key == "outcome")))


def test_of_two_answers_at_once_one_stands_and_both_learn_which(engine: Engine) -> None:
    _, made = make(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other, races.transaction(engine) as same:
        complete_callback(one.session, made.reveal_token(), 1)
        second = other.begin_blocked(lambda session: fail_callback(session, made.reveal_token(), "no"))
        third = same.begin_blocked(lambda session: complete_callback(session, made.reveal_token(), 1))
        one.session.commit()
        with pytest.raises(errors.CallbackFinishedError, match="was completed already"):
            second.result()
        other.session.rollback()
        third.result()
    assert outcomes(engine) == [{"value": 1}]


# behaviour: O3 T9
def test_answer_that_is_newer_than_the_snapshot_is_an_error_and_the_transaction_goes_on(engine: Engine) -> None:
    _, made = make(engine)
    with Session(engine.execution_options(isolation_level="REPEATABLE READ")) as session, Session(engine) as other:
        session.execute(text("SELECT 1"))
        complete_callback(other, made.reveal_token(), 1)
        other.commit()
        with pytest.raises(errors.KeyNotVisibleError, match="snapshot") as caught:
            complete_callback(session, made.reveal_token(), 1)
        assert made.reveal_token() not in str(caught.value)
        session.execute(text("SELECT 1"))
    assert outcomes(engine) == [{"value": 1}]


def test_answer_that_is_rolled_back_leaves_the_callback_to_the_other(engine: Engine) -> None:
    _, made = make(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        complete_callback(one.session, made.reveal_token(), 1)
        second = other.begin_blocked(lambda session: complete_callback(session, made.reveal_token(), 2))
        one.session.rollback()
        second.result()
        other.session.commit()
    assert outcomes(engine) == [{"value": 2}]


def test_answer_by_sql_that_holds_nothing_is_waited_for_too(engine: Engine) -> None:
    fence, made = make(engine)
    insert = text(
        "INSERT INTO durable.signal (workflow_id, name, key, payload, is_answer) "
        "VALUES (:id, :name, 'outcome', '7', true)"
    )
    with races.transaction(engine) as one, races.transaction(engine) as other:
        one.session.execute(insert, {"id": fence.workflow_id, "name": made.signal})
        second = other.begin_blocked(lambda session: complete_callback(session, made.reveal_token(), 2))
        one.session.commit()
        with pytest.raises(errors.CallbackFinishedError, match="was completed already"):
            second.result()


@pytest.mark.parametrize("commits", [True, False])
def test_answer_in_an_open_transaction_is_not_overtaken_by_the_time(engine: Engine, commits: bool) -> None:
    """It was looked at while there was time, which is over now."""
    fence, made = make(engine, due=True)
    with races.transaction(engine) as foreign:
        assert hold(foreign.session, made) == "create_callback"
        assert callbacks.answer(foreign.session, fence.workflow_id, signal=made.signal, payload='{"value": 1}')
        assert not expire(engine, fence)
        end = foreign.session.commit if commits else foreign.session.rollback
        end()
        assert expire(engine, fence)
    assert outcomes(engine) == [{"value": 1} if commits else {"expired": "timeout"}]


def hold(session: Session, made: CallbackRecord) -> str | None:
    digest = hashlib.sha256(made.reveal_token().encode()).hexdigest()
    locked = callbacks.hold(session, made.workflow_id, digest=digest)
    return None if locked is None else locked.key


def test_heartbeat_in_an_open_transaction_is_not_overtaken_by_the_silence(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    made = CallbackRecord.new(fence.workflow_id, within=None, heartbeat=MINUTE)
    with Session(engine) as session:
        races.record(session, [checkpoint(fence, made)])
        advance(session, MINUTE)
        session.commit()
    with races.transaction(engine) as foreign:
        hold(foreign.session, made)
        callbacks.beat(foreign.session, fence.workflow_id, "create_callback")
        assert not expire(engine, fence)
        foreign.session.commit()
    assert not expire(engine, fence)
    assert outcomes(engine) == []


@pytest.mark.parametrize("call", [complete_callback, partial(fail_callback, message="no"), heartbeat_callback])
def test_what_comes_too_late_is_refused_before_and_after_that_is_written(
    engine: Engine, call: Callable[[Session, str], None]
) -> None:
    fence, made = make(engine, due=True)
    for _ in range(2):
        with Session(engine) as session, pytest.raises(errors.CallbackFinishedError, match="not answered in time"):
            call(session, made.reveal_token())
        assert expire(engine, fence)
    assert outcomes(engine) == [{"expired": "timeout"}]


def test_attempt_that_lost_its_workflow_lets_nothing_expire(engine: Engine) -> None:
    fence, _ = make(engine, due=True)
    with pytest.raises(unwinding.AttemptLost):
        expire(engine, Fence(fence.workflow_id, uuid7()))
    assert outcomes(engine) == []


def test_an_uncommitted_answer_blocks_nothing_and_wakes_when_it_is_committed(engine: Engine) -> None:
    fence, made = make(engine)
    with races.transaction(engine) as foreign:
        complete_callback(foreign.session, made.reveal_token(), 1)
        with Session(engine) as session:
            session.execute(text("SET lock_timeout = '1s'"))
            assert races.record(session, [races.checkpoint(fence)]) == {(fence.workflow_id, "charge")}
            assert races.end(session, [Suspend(fence, 60.0, [Awaited(signal=made.signal)])])
            session.commit()
            assert signals.deliver(session, limit=10) == (1, 0)
            session.commit()
        foreign.session.commit()
    with Session(engine) as session:
        assert signals.deliver(session, limit=10) == (1, 1)


def test_deletion_and_answer_wait_for_each_other_and_never_in_a_circle(engine: Engine) -> None:
    fence, made = make(engine)
    with Session(engine) as session:
        races.cancel(session, fence.workflow_id)
        session.commit()
    with races.transaction(engine) as foreign, races.transaction(engine) as operator:
        hold(foreign.session, made)
        deleting = operator.begin_blocked(lambda session: manage.delete(session, fence.workflow_id))
        assert callbacks.answer(foreign.session, fence.workflow_id, signal=made.signal, payload='{"value": 1}')
        foreign.session.commit()
        deleting.result()
        operator.session.commit()
    with Session(engine) as session, pytest.raises(errors.NotFoundError):
        complete_callback(session, made.reveal_token(), 1)


def test_heartbeats_are_one_row_and_change_no_other(engine: Engine) -> None:
    fence, made = make(engine)
    with Session(engine) as session:
        before = session.get_one(Step, (fence.workflow_id, "create_callback")).finished_at
        for _ in range(3):
            heartbeat_callback(session, made.reveal_token())
            session.commit()
        (record,) = session.scalars(select(Step).execution_options(populate_existing=True))
        assert record.started_at <= before < record.finished_at
        assert session.scalars(select(Signal)).all() == []


@pytest.mark.new_database
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_finding_a_callback_reads_its_own_workflow_only(engine: Engine, mode: str) -> None:
    fence, made = make(engine)
    others = text(
        "INSERT INTO durable.workflow (name, status, finished_at) "
        "SELECT 'old', 'cancelled', statement_timestamp() FROM generate_series(1, 5000)"
    )
    steps = text(
        "INSERT INTO durable.step (workflow_id, key, name, position, status, output, attempt, started_at) "
        "SELECT id, 'create_callback', 'create_callback', 1, 'succeeded', '{}', 1, statement_timestamp() "
        "FROM durable.workflow WHERE name = 'old'"
    )
    with Session(engine) as session:
        with forged(session):
            for each in (others, steps):
                session.execute(each)
        session.commit()
        session.execute(text("ANALYZE durable.step, durable.workflow, durable.signal"))
        session.commit()
        given = {"owner_id": fence.workflow_id}
        asked = {"callback_key": "create_callback", "signal_name": made.signal, "payload": "7"}
        for plan in (
            explain(session, _HOLD, {**given, "digest": "0"}, mode=mode),
            explain(session, _READ, given | asked, mode=mode),
        ):
            assert not plan.scans("step"), plan
            assert not plan.scans("workflow"), plan
            assert plan.buffers() < 30, plan


def test_outcomes_are_deleted_when_the_workflow_continues_as_new(engine: Engine) -> None:
    """Nobody would read them, and the rows of a workflow that runs for ever do not grow with its rounds."""
    fence, made = make(engine)
    with Session(engine) as session, session.begin():
        complete_callback(session, made.reveal_token(), 1)
    with Session(engine) as session, session.begin():
        assert continuations.continue_as_new(session, fence, given="{}")
    assert outcomes(engine) == []
    with Session(engine) as session, pytest.raises(errors.NotFoundError):
        complete_callback(session, made.reveal_token(), 1)
