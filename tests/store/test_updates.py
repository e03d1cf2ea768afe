"""Updates: taken or refused once, and answered once, whoever else does so at the same time."""

from __future__ import annotations

from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.models import Event, Signal
from sqla_durable.store import Fence, Origin, Verdict, updates
from sqla_durable.store.updates import _READ  # pyright: ignore[reportPrivateUsage]
from sqla_durable.unwinding import AttemptLost
from tests.store import races
from tests.store.plans import explain

NAME = "set_address"


def send(engine: Engine, workflow_id: UUID) -> int:
    with Session(engine) as session:
        found = updates.send(session, workflow_id, name=NAME, payload='"Elm"', key=None)
        session.commit()
    assert found is not None
    return found


def answers(engine: Engine) -> list[tuple[Any, str | None]]:
    with Session(engine) as session:
        return [(each.value, each.step_key) for each in session.scalars(select(Event).order_by(Event.id))]


def recording(fence: Fence, update_id: int, *, key: str = "reply(a)", answer: str = "1") -> Any:
    return partial(updates.record_answer, checkpoint=races.checkpoint(fence, key), update_id=update_id, answer=answer)


def putting(fence: Fence, update_id: int) -> Any:
    return partial(updates.put_answer, origin=Origin(fence, 1, "save", 1), update_id=update_id, answer="2")


def test_an_answer_that_is_sent_twice_is_given_once(engine: Engine) -> None:
    """The acknowledgement of the first commit was lost, and it was still on its way."""
    # behaviour: E2
    (fence,) = races.claimed_fences(engine)
    update_id = send(engine, fence.workflow_id)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        assert recording(fence, update_id)(one.session) is Verdict.RECORDED
        again = other.begin_blocked(recording(fence, update_id))
        one.session.commit()
        assert again.result() is Verdict.RECORDED
        other.session.commit()
    assert answers(engine) == [(1, "reply(a)")]
    assert races.history_of(engine, fence.workflow_id) == ["reply(a)"]


@pytest.mark.parametrize("other", [recording, putting])
@pytest.mark.parametrize("commits", [True, False])
def test_of_two_answers_at_the_same_time_one_is_given(engine: Engine, other: Any, commits: bool) -> None:
    (fence,) = races.claimed_fences(engine)
    update_id = send(engine, fence.workflow_id)
    with races.transaction(engine) as first, races.transaction(engine) as second:
        putting_ = partial(updates.put_answer, origin=Origin(fence, 1, "first", 1), update_id=update_id, answer="0")
        assert putting_(first.session) is Verdict.RECORDED
        late = second.begin_blocked(other(fence, update_id))
        if commits:
            first.session.commit()
        else:
            first.session.rollback()
        assert late.result() is (Verdict.DUPLICATE if commits else Verdict.RECORDED)
        second.session.commit()
    (found,) = answers(engine)
    assert (found == (0, "first")) is commits
    assert len(races.history_of(engine, fence.workflow_id)) == int(other is recording and not commits)


def test_an_update_that_is_taken_meanwhile_is_not_refused(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    update_id = send(engine, fence.workflow_id)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        taking = races.checkpoint(fence, "update:set_address")
        assert updates.take(one.session, taking, update_id=update_id) == f'{{"id": {update_id}, "payload": "Elm"}}'
        refusing = other.begin_blocked(partial(updates.refuse, fence=fence, update_id=update_id, reason="no"))
        one.session.commit()
        refusing.result()
        other.session.commit()
        again = races.checkpoint(fence, "update:set_address#2", position=2)
        assert updates.take(one.session, again, update_id=update_id) is None
    assert answers(engine) == []
    with Session(engine) as session:
        assert session.scalars(select(Signal.consumed_by)).all() == ["update:set_address"]
        sent = updates.read(session, fence.workflow_id, update_id)
        assert sent is not None
        assert (sent.is_taken, sent.is_remembered) == (True, True)


def test_another_token_neither_takes_nor_refuses_nor_answers(engine: Engine) -> None:
    # behaviour: R3
    (fence,) = races.claimed_fences(engine)
    update_id = send(engine, fence.workflow_id)
    stranger = Fence(fence.workflow_id, uuid7())
    with Session(engine) as session:
        with pytest.raises(AttemptLost):
            updates.take(session, races.checkpoint(stranger), update_id=update_id)
        with pytest.raises(AttemptLost):
            updates.refuse(session, stranger, update_id=update_id, reason="no")
        assert recording(stranger, update_id)(session) is Verdict.LOST
        assert putting(stranger, update_id)(session) is Verdict.LOST
        session.commit()
        assert updates.oldest(session, workflow_id=fence.workflow_id, name=NAME) is not None
    assert answers(engine) == []


@pytest.mark.new_database
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_reading_an_update_costs_a_few_pages_among_many(engine: Engine, mode: str) -> None:
    (fence,) = races.claimed_fences(engine)
    update_id = send(engine, fence.workflow_id)
    filling = (
        "INSERT INTO durable.signal (workflow_id, name, consumed_by, is_update) "
        "SELECT :id, '#update:old', n, true FROM numbers",
        "INSERT INTO durable.event (workflow_id, key, value) SELECT :id, '#reply:' || n, '{}' FROM numbers",
        "INSERT INTO durable.step (workflow_id, key, name, position, status, output, attempt, started_at, finished_at) "
        "SELECT :id, n, n, 1, 'succeeded', '{}', 1, statement_timestamp(), statement_timestamp() FROM numbers",
    )
    with Session(engine) as session:
        for each in filling:
            numbers = "WITH numbers AS (SELECT n::text FROM generate_series(1000, 5000) AS n) "
            session.execute(text(numbers + each), {"id": fence.workflow_id})
        session.commit()
        session.execute(text("ANALYZE durable.signal, durable.event, durable.step"))
        session.commit()
        parameters = {"wanted_id": fence.workflow_id, "update_id": update_id, "answer_key": f"#reply:{update_id}"}
        plan = explain(session, _READ, parameters, mode=mode)
    assert not any(plan.scans(each) for each in ("signal", "event", "step")), plan
    assert plan.buffers() < 20, plan


def test_two_senders_of_one_key_send_one(engine: Engine) -> None:
    # behaviour: C2
    (fence,) = races.claimed_fences(engine)
    send_once = partial(updates.send, workflow_id=fence.workflow_id, name=NAME, payload="1", key="once")
    with races.transaction(engine) as one, races.transaction(engine) as other:
        first = send_once(one.session)
        late = other.begin_blocked(send_once)
        one.session.commit()
        assert late.result() is None
        found = updates.receiver(other.session, fence.workflow_id, name=NAME, key="once")
        assert found is not None
        assert found.known == first
