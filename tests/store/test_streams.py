"""Items of streams: numbers without gaps, whoever writes at the same time; nothing of who does not own the workflow."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.errors import NotFoundError
from sqla_durable.models import Step, StreamItem
from sqla_durable.store import Fence, Origin, streams
from sqla_durable.store.streams import Append, Appended
from sqla_durable.unwinding import AttemptLost
from tests.store import races


def origin(fence: Fence, *, step_key: str = "answer", attempt: int = 1, try_number: int | None = 1) -> Origin:
    return Origin(fence, attempt, step_key, try_number)


def append(session: Session, who: Origin, *values: str | None) -> Appended:
    return streams.append(session, who, name="log", values=values)


def written(engine: Engine) -> Sequence[tuple[int, object]]:
    with Session(engine) as session:
        return [(each.number, each.value) for each in session.scalars(select(StreamItem).order_by(StreamItem.number))]


def test_an_append_that_waited_for_another_comes_after_it(engine: Engine) -> None:
    # behaviour: C5
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        append(one.session, origin(fence), "1", "2", "3")
        appending = other.begin_blocked(lambda session: append(session, origin(fence, step_key="b"), "4", "5"))
        one.session.commit()
        assert appending.result() is Appended.WRITTEN
        other.session.commit()
    assert written(engine) == [(number, number + 1) for number in range(5)]


def test_an_append_that_waited_for_a_close_is_refused(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        append(one.session, origin(fence), None)
        appending = other.begin_blocked(lambda session: append(session, origin(fence, step_key="b"), "4", "5"))
        one.session.commit()
        assert appending.result() is Appended.CLOSED


def test_an_append_that_waited_for_a_cancel_writes_nothing(engine: Engine) -> None:
    # behaviour: R3
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        races.cancel(one.session, fence.workflow_id)
        appending = other.begin_blocked(lambda session: append(session, origin(fence), "1"))
        one.session.commit()
        with pytest.raises(AttemptLost):
            appending.result()
        other.session.commit()
    assert written(engine) == []


def test_another_token_writes_nothing(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    stranger = Fence(fence.workflow_id, uuid7())
    with Session(engine) as session:
        with pytest.raises(AttemptLost):
            append(session, origin(stranger), "1")
        with pytest.raises(AttemptLost):
            streams.record(session, races.checkpoint(stranger), name="log", values=["1"])
        session.commit()
    assert written(engine) == []
    assert races.history_of(engine, fence.workflow_id) == []


def test_what_is_recorded_is_written_once_under_one_key(engine: Engine) -> None:
    # behaviour: E2
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        for _ in range(2):
            recorded = streams.record(session, races.checkpoint(fence), name="log", values=["1", "2"])
            assert recorded is Appended.WRITTEN
            session.commit()
    assert written(engine) == [(0, 1), (1, 2)]
    assert races.history_of(engine, fence.workflow_id) == ["charge"]


def test_what_is_recorded_while_an_earlier_try_commits_is_written_once(engine: Engine) -> None:
    """The acknowledgement is lost while the commit is still on its way, and the statement is sent again."""
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        streams.record(one.session, races.checkpoint(fence), name="log", values=["1", "2"])
        again = other.begin_blocked(
            lambda session: streams.record(session, races.checkpoint(fence), name="log", values=["1", "2"])
        )
        one.session.commit()
        assert again.result() is Appended.WRITTEN
        other.session.commit()
    assert written(engine) == [(0, 1), (1, 2)]


def test_a_closed_stream_is_opened_by_the_next_try_of_the_step_that_closed_it_only(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        append(session, origin(fence), "1")
        assert append(session, origin(fence), None) is Appended.WRITTEN
        assert append(session, origin(fence), None) is Appended.WRITTEN
        assert append(session, origin(fence), "2") is Appended.CLOSED
        assert append(session, origin(fence, step_key="b"), "2") is Appended.CLOSED
        assert streams.record(session, races.checkpoint(fence), name="log", values=["2"]) is Appended.CLOSED
        assert append(session, origin(fence, try_number=2), "3") is Appended.WRITTEN
        assert append(session, origin(fence, attempt=2), "4") is Appended.WRITTEN
        session.commit()
        assert session.scalars(select(Step)).all() == []
    assert written(engine) == [(0, 1), (1, None), (2, 3), (3, 4)]


def test_closing_what_is_closed_is_recorded(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        append(session, origin(fence), None)
        assert streams.record(session, races.checkpoint(fence), name="log", values=[None]) is Appended.WRITTEN
        session.commit()
    assert written(engine) == [(0, None)]
    assert races.history_of(engine, fence.workflow_id) == ["charge"]


def test_a_poll_returns_a_page_and_whether_the_stream_has_ended(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    workflow_id = fence.workflow_id
    with Session(engine) as session:
        assert streams.read(session, workflow_id, "log", start=0, limit=9) == streams.Page([], ended=False)
        append(session, origin(fence), "1", "null", "3")
        page = streams.read(session, workflow_id, "log", start=1, limit=1)
        assert [(each.number, each.value) for each in page.items] == [(1, "null")]
        assert not page.ended
        append(session, origin(fence), None)
        assert streams.read(session, workflow_id, "log", start=9, limit=9) == streams.Page([], ended=True)
        assert not streams.read(session, workflow_id, "other", start=0, limit=9).ended
        races.cancel(session, workflow_id)
        assert streams.read(session, workflow_id, "other", start=0, limit=9).ended
        with pytest.raises(NotFoundError):
            streams.read(session, uuid7(), "log", start=0, limit=9)


def test_a_batch_appends_to_the_streams_of_workflows_whose_rows_are_not_locked(engine: Engine) -> None:
    # behaviour: C5
    fences = races.claimed_fences(engine, 5)
    lost = Fence(fences[4].workflow_id, uuid7())
    appends = [Append(origin(each), "log", ["1", "2", "3"]) for each in (*fences[:4], lost)]
    with races.transaction(engine) as caller, Session(engine) as session:
        append(session, origin(fences[1]), "0")
        append(session, origin(fences[2], step_key="b"), None)
        session.commit()
        races.lock(caller.session, fences[3].workflow_id)
        found = streams.append_many(session, appends)
        closing = streams.append_many(session, [Append(origin(fences[2]), "log", [None])])
        session.commit()
    assert found == [Appended.WRITTEN, Appended.WRITTEN, Appended.CLOSED, None, None]
    assert closing == [Appended.WRITTEN]
    assert [len(items_of(engine, each)) for each in fences] == [3, 4, 1, 0, 0]
    assert items_of(engine, fences[1]) == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_what_another_has_appended_since_a_batch_began_is_not_written_over(engine: Engine) -> None:
    """It read the last number before the other's commit, and found the row free after it."""
    (fence,) = races.claimed_fences(engine)
    with Session(engine.execution_options(isolation_level="REPEATABLE READ")) as old, Session(engine) as session:
        assert not streams.read(old, fence.workflow_id, "log", start=0, limit=1).items
        append(session, origin(fence), "1")
        session.commit()
        with pytest.raises(DBAPIError, match="could not serialize"):
            streams.append_many(old, [Append(origin(fence), "log", ["2", "3"])])
    assert written(engine) == [(0, 1)]


def items_of(engine: Engine, fence: Fence) -> Sequence[tuple[int, object]]:
    wanted = select(StreamItem).where(StreamItem.workflow_id == fence.workflow_id).order_by(StreamItem.number)
    with Session(engine) as session:
        return [(each.number, each.value) for each in session.scalars(wanted)]
