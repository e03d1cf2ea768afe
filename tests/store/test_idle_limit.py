"""A transaction that holds our rows and is idle is ended by the server, so that a reclaim need not wait for it."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqla_durable.definitions.database_errors import is_outage
from sqla_durable.store import Verdict, steps, workers
from tests.store import races


@pytest.mark.parametrize(("own", "limit"), [("0", "5s"), ("1min", "5s"), ("1500ms", "1500ms")])
def test_the_last_statement_of_a_step_sets_the_limit_for_its_transaction_alone(
    engine: Engine, own: str, limit: str
) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        session.execute(text(f"SET idle_in_transaction_session_timeout = '{own}'"))
        session.commit()
        assert steps.record_last(session, races.checkpoint(fence)) is Verdict.RECORDED
        assert _limit(session) == limit
        session.commit()
        assert _limit(session) == own


def test_a_checkpoint_in_a_callers_transaction_leaves_its_limit_alone(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        steps.record(session, races.checkpoint(fence))
        assert _limit(session) == "0"


def test_a_reclaim_does_not_wait_for_a_transaction_whose_client_is_frozen(engine: Engine) -> None:
    """Between the statement of a checkpoint and its COMMIT, which then comes too late."""
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as frozen, Session(engine) as other:
        steps.record_last(frozen, races.checkpoint(fence))
        races.expire_leases(engine)
        assert workers.reclaim(other, max_attempts=9, limit=9) == []  # it is ended after 5 s, and not yet
        frozen.execute(text("SET LOCAL idle_in_transaction_session_timeout = '1ms'"))
        races.wait_until(lambda: workers.reclaim(other, max_attempts=9, limit=9), what="the reclaim")
        other.commit()
        with pytest.raises(DBAPIError) as late:
            frozen.commit()
        assert is_outage(late.value)
    assert races.history_of(engine, fence.workflow_id) == []


def _limit(session: Session) -> str:
    return str(session.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one())
