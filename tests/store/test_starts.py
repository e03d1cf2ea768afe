"""Workflows are started once for each key, one by one and many at once, whatever others do meanwhile."""

from __future__ import annotations

from functools import partial
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable.errors import KeyNotVisibleError
from sqla_durable.models import Workflow
from sqla_durable.store import NewWorkflow, starts
from tests.store import races
from tests.support.statements import executed_on


def new(key: str | None = None, **options: object) -> NewWorkflow:
    return NewWorkflow(**{"id": uuid7(), "name": "checkout", "input": "{}", "queue": "default", "key": key, **options})  # type: ignore[arg-type]


def count(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Workflow)) or 0


def test_the_same_key_gives_the_same_record(session_factory: sessionmaker[Session]) -> None:
    with session_factory.begin() as session:
        first = starts.insert_unless_known(session, new("k"))
        assert starts.insert_unless_known(session, new("k")) is first
        assert starts.insert_unless_known(session, new("k", name="refund")) is not first


def test_a_caller_that_lost_the_race_for_a_key_takes_the_winners_record(engine: Engine) -> None:
    # behaviour: T9
    with races.transaction(engine) as one, races.transaction(engine) as other:
        winner = starts.insert_unless_known(one.session, new("k")).id
        starting = other.begin_blocked(races.one(new("k")))
        one.session.commit()
        assert starting.result() == winner
        assert count(other.session) == 1  # its transaction is usable
        other.session.commit()


def test_a_caller_whose_rival_rolls_back_starts_its_own(engine: Engine) -> None:
    with races.transaction(engine) as one, races.transaction(engine) as other:
        rolled_back = starts.insert_unless_known(one.session, new("k")).id
        mine = new("k")
        starting = other.begin_blocked(races.one(mine))
        one.session.rollback()
        assert starting.result() == mine.id != rolled_back
        other.session.commit()


def test_many_are_inserted_in_order_with_known_keys_in_their_places(session_factory: sessionmaker[Session]) -> None:
    with session_factory.begin() as session:
        known = starts.insert_unless_known(session, new("b")).id
        batch = [new("c"), new(), new("b"), new("a"), new("c"), new()]
        ids = starts.insert_many(session, batch)
        assert ids == [batch[0].id, batch[1].id, known, batch[3].id, batch[0].id, batch[5].id]
        assert count(session) == 5


def test_many_without_keys_are_inserted_by_one_statement_that_returns_nothing(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    batch = [new(), new(priority=1), new(headers={"a": "\u20ac"})]
    with session_factory.begin() as session, executed_on(engine) as executed:
        assert starts.insert_many(session, batch) == [each.id for each in batch]
        (inserting,) = executed
        assert "RETURNING" not in inserting.statement
        assert [each.priority for each in session.scalars(select(Workflow).order_by(Workflow.id))] == [0, 1, 0]
        assert [each.headers for each in session.scalars(select(Workflow).order_by(Workflow.id))] == [
            None,
            None,
            {"a": "\u20ac"},
        ]


def test_a_row_without_a_key_that_was_not_inserted_is_not_passed_over(session_factory: sessionmaker[Session]) -> None:
    with session_factory.begin() as session:
        session.execute(
            text(
                "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;"
                "CREATE TRIGGER skip BEFORE INSERT ON durable.workflow FOR EACH ROW "
                "WHEN (NEW.name = 'refund') EXECUTE FUNCTION skip()"
            )
        )
        with pytest.raises(KeyNotVisibleError):
            starts.insert_many(session, [new(), new(name="refund")])
        session.rollback()


def test_one_key_under_two_names_is_two_workflows(session_factory: sessionmaker[Session]) -> None:
    with session_factory.begin() as session:
        batch = [new("k"), new("k", name="refund")]
        ids = [each.id for each in batch]
        assert starts.insert_many(session, batch) == ids
        assert starts.insert_many(session, [new("k"), new("k", name="refund")]) == ids
        assert starts.insert_many(session, [new("k", name="refund"), new("k")]) == ids[::-1]
        assert count(session) == 2


def test_two_bulk_starts_of_the_same_keys_in_opposite_orders_do_not_deadlock(engine: Engine) -> None:
    # behaviour: C3
    keys = [f"key-{number}" for number in range(500)]

    def start(order: list[str]) -> list[UUID]:
        with Session(engine) as session:
            ids = starts.insert_many(session, [new(each) for each in order])
            session.commit()
            return sorted(ids)

    for _ in range(5):
        both = [races.Concurrent(partial(start, order)) for order in (keys, keys[::-1])]
        first, second = [each.result() for each in both]
        assert first == second
        with Session(engine) as session:
            session.execute(text("DELETE FROM durable.workflow"))
            session.commit()


def test_a_bulk_start_waits_for_another_transactions_key_and_takes_its_record(engine: Engine) -> None:
    with races.transaction(engine) as one, races.transaction(engine) as other:
        winner = starts.insert_unless_known(one.session, new("k")).id
        mine = [new("j"), new("k")]
        starting = other.begin_blocked(lambda session: starts.insert_many(session, mine))
        one.session.commit()
        assert starting.result() == [mine[0].id, winner]
