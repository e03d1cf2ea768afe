"""The verbs with a `select()`: exactly the rows of one evaluation, less those that were changed and no longer fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select, text, union_all
from sqlalchemy.orm import Session, aliased

from sqla_durable import Workflow, WorkflowStatus, manage
from tests.store import races
from tests.support.forged import forged

COUNT, LIMIT = 200, 5
VERBS: dict[str, tuple[Any, str]] = {
    "cancel": (manage.cancel, "pending"),
    "resume": (manage.resume, "cancelled"),
    "retry": (manage.retry, "failed"),
    "rewind": (partial(manage.rewind, to_step="charge"), "failed"),
    "delete": (manage.delete, "failed"),
    "fork": (manage.fork, "failed"),
}
every_verb = pytest.mark.parametrize(("verb", "status"), VERBS.values(), ids=VERBS)


def enqueued(session: Session, status: str, count: int = COUNT) -> list[UUID]:
    """Insert workflows of a status, each with a step, and give their ids in order."""
    with forged(session):
        session.execute(
            text(
                "INSERT INTO durable.workflow (name, status, finished_at, error) "
                "SELECT 'checkout', CAST(:status AS text), "
                "CASE WHEN CAST(:status AS text) <> 'pending' THEN statement_timestamp() END, "
                "CASE WHEN CAST(:status AS text) = 'failed' THEN jsonb_build_object('type', 'ValueError') END "
                "FROM generate_series(1, :count)"
            ),
            {"status": status, "count": count},
        )
    session.execute(
        text(
            "INSERT INTO durable.step (workflow_id, key, name, position, status, output, attempt, started_at) "
            "SELECT id, 'charge', 'charge', 1, 'succeeded', '1', 1, statement_timestamp() FROM durable.workflow"
        )
    )
    session.commit()
    return list(session.scalars(select(Workflow.id).order_by(Workflow.id)))


def any_five(_: list[UUID]) -> Any:
    return select(Workflow).order_by(func.random()).limit(LIMIT)


@every_verb
def test_a_limit_without_a_stable_order_gives_as_many_as_it_says(session: Session, verb: Any, status: str) -> None:
    # behaviour: M1
    enqueued(session, status)
    assert len(verb(session, any_five([]))) == LIMIT


def of_an_alias(_: list[UUID]) -> Any:
    other = aliased(Workflow)
    return select(other).order_by(func.random()).limit(LIMIT)


def of_a_cte(_: list[UUID]) -> Any:
    chosen = select(Workflow.id).order_by(func.random()).limit(LIMIT).cte("chosen")
    return select(Workflow).join(chosen, chosen.c.id == Workflow.id)


def of_a_union(ids: list[UUID]) -> Any:
    low, high = (select(Workflow.id).where(half) for half in (Workflow.id < ids[100], Workflow.id >= ids[100]))
    return union_all(low.order_by(func.random()).limit(2), high.order_by(func.random()).limit(3))


def of_models_in_a_union(ids: list[UUID]) -> Any:
    return select(Workflow).where(Workflow.id == ids[0]).union(select(Workflow).where(Workflow.id.in_(ids[:LIMIT])))


CHOICES: dict[str, Callable[[list[UUID]], Any]] = {
    "offset": lambda _: select(Workflow).order_by(func.random()).offset(COUNT - LIMIT),
    "fetch": lambda _: select(Workflow.id).order_by(func.random()).fetch(LIMIT),
    "volatile condition": lambda _: select(Workflow).where(func.random() < 0.5).limit(LIMIT),
    "distinct": lambda _: select(Workflow.id).distinct().where(func.random() < 0.5).limit(LIMIT),
    "grouped": lambda _: select(Workflow.id).group_by(Workflow.id).having(func.random() < 0.5).limit(LIMIT),
    "alias": of_an_alias,
    "CTE": of_a_cte,
    "union": of_a_union,
    "union of models": of_models_in_a_union,
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_every_form_of_a_select_is_evaluated_once(session: Session, choice: Callable[[list[UUID]], Any]) -> None:
    # behaviour: M1
    ids = enqueued(session, "failed")
    assert len(manage.delete(session, choice(ids))) == LIMIT
    assert len(session.scalars(select(Workflow.id)).all()) == COUNT - LIMIT


def test_a_select_that_skips_locked_rows_waits_for_nobody(engine: Engine, session: Session) -> None:
    ids = enqueued(session, "failed", 10)
    with races.transaction(engine) as holder:
        for each in ids[:3]:
            races.lock(holder.session, each)
        free = select(Workflow).order_by(Workflow.id).limit(4).with_for_update(skip_locked=True)
        assert manage.delete(session, free) == ids[3:7]


def changed_meanwhile(engine: Engine, verb: Any, ids: list[UUID], change: str) -> list[UUID]:
    """Let somebody change the first of three workflows while the verb waits for its row; give what the verb gives."""
    ordered = select(Workflow).where(Workflow.priority == 0).order_by(Workflow.id).limit(2)
    with races.transaction(engine) as holder, races.transaction(engine) as operator:
        holder.session.execute(text(f"UPDATE durable.workflow SET {change} WHERE id = :id"), {"id": ids[0]})
        waiting = operator.begin_blocked(lambda session: verb(session, ordered))
        holder.session.commit()
        done: list[UUID] = waiting.result()
        operator.session.commit()
        return done


locking = pytest.mark.parametrize(
    ("verb", "status"), [each for name, each in VERBS.items() if name != "fork"], ids=[*VERBS][:-1]
)


@locking
def test_what_was_changed_and_no_longer_fits_is_left_alone_and_nothing_comes_instead(
    engine: Engine, session: Session, verb: Any, status: str
) -> None:
    # behaviour: M1
    ids = enqueued(session, status, 3)
    assert changed_meanwhile(engine, verb, ids, "priority = 1") == ids[1:2]


@locking
def test_what_was_changed_and_still_fits_is_meant(engine: Engine, session: Session, verb: Any, status: str) -> None:
    # behaviour: M1
    ids = enqueued(session, status, 3)
    assert changed_meanwhile(engine, verb, ids, "version = '2'") == ids[:2]


def test_what_was_claimed_meanwhile_is_cancelled_if_its_queue_is_meant(engine: Engine, session: Session) -> None:
    ids = enqueued(session, "pending", 2)
    with races.transaction(engine) as claimer, races.transaction(engine) as operator:
        races.claim(claimer.session)
        cancelling = operator.begin_blocked(
            lambda session: manage.cancel(session, select(Workflow).where(Workflow.queue == "default"))
        )
        claimer.session.commit()
        assert cancelling.result() == ids
        operator.session.commit()
    assert {races.status_of(engine, each) for each in ids} == {WorkflowStatus.CANCELLED}
