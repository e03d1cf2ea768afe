"""`manage.explain_pending`: each reason for which a workflow does not start."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import Workflow, WorkflowStatus, manage
from sqla_durable.asyncio import manage as async_manage
from sqla_durable.errors import NotFoundError
from sqla_durable.models import Worker
from sqla_durable.store import claims, workers
from tests.store import races

MINUTE = timedelta(minutes=1)


@pytest.fixture
def session(engine: Engine) -> Any:
    with Session(engine) as session:
        workers.beat(session, worker_id=races.WORKER, name="ada", queues=["default"], names=["checkout"], lease=MINUTE)
        session.commit()
        yield session


def claim(session: Session, limit: int = 1) -> None:
    claims.claim_limited(
        session,
        worker_id=races.WORKER,
        token=uuid7(),
        queue="default",
        executing=0,
        names=["checkout"],
        limit=limit,
    )
    session.commit()


def reasons(session: Session, workflow_id: UUID) -> str:
    return "\n".join(manage.explain_pending(session, workflow_id))


def test_nothing_keeps_it(session: Session) -> None:
    (one,) = races.enqueue(session)
    assert (
        reasons(session, one) == "nothing keeps it: a worker with a free slot claims it at its next poll at the latest."
    )


def test_a_paused_queue_and_key(session: Session) -> None:
    (one,) = races.enqueue(session, by="a")
    manage.put_queue(session, "default", fair=True)
    manage.pause_key(session, "default", "a")
    manage.pause_queue(session, "default")
    assert "queue 'default' has been paused since " in reasons(session, one)
    assert "key 'a' of its queue has been paused since " in reasons(session, one)
    manage.resume_key(session, "default", "a")
    manage.resume_queue(session, "default")
    assert reasons(session, one).startswith("nothing keeps it")


def test_places_that_are_taken_with_their_holders(session: Session) -> None:
    manage.put_queue(session, "default", concurrency=2, per_key=1)
    first, other, second, third = (races.enqueue(session, by=by)[0] for by in ("a", "b", "a", "c"))
    claim(session, 2)
    of_key = reasons(session, second)
    assert "2 of 2 places of queue 'default' are taken: checkout " in of_key
    assert f"1 of 1 places of key 'a' are taken: checkout {first} (running on ada since " in of_key
    assert str(other) not in of_key.splitlines()[1]
    assert "key 'c'" not in reasons(session, third)
    assert "1 of its queue comes before it, but keys take turns." in reasons(session, third)


def test_what_keeps_a_place_itself_is_not_in_its_own_way(session: Session) -> None:
    manage.put_queue(session, "default", concurrency=1, per_key=1, while_suspended="hold")
    (one,) = races.enqueue(session, by="a", place="finished")
    (other,) = races.enqueue(session, by="a")
    assert reasons(session, one).startswith("nothing keeps it")
    assert f"1 of 1 places of queue 'default' are taken: checkout {one} (pending" in reasons(session, other)
    assert f"1 of 1 places of key 'a' are taken: checkout {one} (pending" in reasons(session, other)


def test_a_suspended_one_that_keeps_its_place_and_when_it_started(session: Session) -> None:
    manage.put_queue(session, "default", concurrency=1, while_suspended="hold")
    first, second = races.enqueue(session, 2)
    claim(session)
    suspended = {"status": WorkflowStatus.SUSPENDED, "token": None, "worker_id": None}
    session.execute(update(Workflow).where(Workflow.id == first).values(**suspended))
    session.commit()
    assert f"taken: checkout {first} (suspended, started 20" in reasons(session, second)


def test_a_rate_that_is_used_up_and_until_when(session: Session) -> None:
    manage.put_queue(session, "default", rate=(1, MINUTE), key_rate=(1, timedelta(hours=1)))
    _, second = races.enqueue(session, 2, by="a")
    claim(session)
    text = reasons(session, second)
    assert "1 of 1 starts of queue 'default' in 1m are used: there is room again at 20" in text
    assert "1 of 1 starts of key 'a' in 1h are used: there is room again at 20" in text


def test_what_comes_before_it_in_its_key(session: Session) -> None:
    manage.put_queue(session, "default", fifo="block")
    first, second, third = races.enqueue(session, 3, by="a")
    claim(session)
    failed = {"status": WorkflowStatus.FAILED, "error": {"type": "x"}, "finished_at": datetime.now(UTC)}
    session.execute(update(Workflow).where(Workflow.id == first).values(**failed))
    session.commit()
    assert f"1 of 1 places of key 'a' are taken: checkout {first} (failed: retry it" in reasons(session, second)
    assert "1 of key 'a' comes before it." in reasons(session, third)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"queue": "mail"}, "no live worker claims from queue 'mail': those that live claim from 'default'."),
        ({"name": "x"}, "of the live workers of queue 'default', 'ada', none knows a workflow named 'x'."),
        ({"version": "2"}, "no live worker of queue 'default' claims the version '2'."),
    ],
)
def test_no_worker_claims_it(session: Session, columns: dict[str, Any], reason: str) -> None:
    session.execute(update(Worker).values(versions=["1"]))
    (one,) = races.enqueue(session, **columns)
    assert reasons(session, one) == reason
    session.execute(update(Worker).values(names=None, versions=[], queues=["default", "mail"]))  # of an older package
    session.commit()
    assert reasons(session, one).startswith("nothing keeps it")


def test_a_worker_that_claims_by_a_pattern_is_one_of_those_of_the_queue(session: Session) -> None:
    session.execute(update(Worker).values(queues=["default", "mail.*"]))
    (one,), (other,) = races.enqueue(session, queue="mail.eu"), races.enqueue(session, queue="mails")
    assert reasons(session, one).startswith("nothing keeps it")
    assert reasons(session, other).endswith("'mails': those that live claim from 'default', 'mail.*'.")


def test_workers_that_execute_as_many_of_the_queue_as_each_may(session: Session) -> None:
    manage.put_queue(session, "default", per_worker=1)
    first, second = races.enqueue(session, 2)
    assert reasons(session, first).startswith("nothing keeps it")
    claim(session)
    assert reasons(session, second) == "each live worker of queue 'default' executes 1 of it, which is its per_worker."
    workers.beat(session, worker_id=uuid7(), name="bob", queues=["default"], names=["checkout"], lease=MINUTE)
    session.commit()
    assert reasons(session, second).startswith("nothing keeps it")


def test_workers_whose_slots_are_taken(session: Session) -> None:
    (first,), (second,) = races.enqueue(session, queue="other"), races.enqueue(session)
    session.execute(update(Worker).values(slots=1, queues=["default", "other"]))
    session.commit()
    assert reasons(session, second).startswith("nothing keeps it")
    assert [each.fence.workflow_id for each in races.claim(session, queues=["other"])] == [first]
    session.commit()
    taken = "all slots of the workers that could execute it are taken: 'ada' (1 of 1)."
    assert reasons(session, second) == taken
    workers.beat(session, worker_id=uuid7(), name="bob", queues=["default"], names=["checkout"], slots=9, lease=MINUTE)
    session.commit()
    assert reasons(session, second).startswith("nothing keeps it")


def test_no_worker_is_alive(session: Session) -> None:
    (one,) = races.enqueue(session)
    workers.end_lease(session, races.WORKER)
    assert reasons(session, one) == "no live worker claims from queue 'default': no worker is alive."


def test_it_is_not_pending(session: Session) -> None:
    one, two = races.enqueue(session, 2)
    assert manage.explain_pending(session, session.get_one(Workflow, one)) != []
    races.claim(session)
    assert reasons(session, one) == "it is running."
    session.execute(update(Workflow).where(Workflow.id == two).values(status=WorkflowStatus.SUSPENDED))
    session.commit()
    assert reasons(session, two) == "it is suspended until what it awaits is there."
    races.cancel(session, two)
    assert reasons(session, two) == "it was cancelled."
    with pytest.raises(NotFoundError):
        manage.explain_pending(session, uuid7())


async def test_in_async_code(async_session_factory: async_sessionmaker[AsyncSession]) -> None:
    async with async_session_factory() as session:
        record = Workflow(name="checkout", input={})
        session.add(record)
        await session.flush()
        assert await async_manage.explain_pending(session, record) == [
            "no live worker claims from queue 'default': no worker is alive."
        ]
