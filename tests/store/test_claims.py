from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable.models import Queue, Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import Verdict, attempts, backlog, claims, steps
from sqla_durable.store.claims import FRONT, Range
from tests.store import races
from tests.store.plans import explain, fill
from tests.support.domain import Order


def test_two_claims_never_take_the_same_row(engine: Engine, session_factory: sessionmaker[Session]) -> None:
    # behaviour: Q2
    with session_factory() as session:
        ids = races.enqueue(session, 10)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        first = races.claim(one.session, 6)
        second = races.claim(other.session, 6)  # would wait for ever if it waited
        one.session.commit()
        other.session.commit()
    assert [each.fence.workflow_id for each in first + second] == ids
    assert len(first) == 6


def test_many_claims_at_once_take_each_row_once(engine: Engine, session_factory: sessionmaker[Session]) -> None:
    with session_factory() as session:
        ids = races.enqueue(session, 200)

    def drain() -> list[object]:
        taken: list[object] = []
        while True:
            with Session(engine) as session:
                claimed = races.claim(session, 7)
                session.commit()
            if not claimed:
                return taken
            taken += [each.fence.workflow_id for each in claimed]

    taken = [each for thread in [races.Concurrent(drain) for _ in range(4)] for each in thread.result()]
    assert len(taken) == 200
    assert set(taken) == set(ids)


def test_the_first_and_last_places_of_all_are_claimed_in_their_order(engine: Engine) -> None:
    places = ["0001-01-02 00:00Z", "2026-01-01", "9999-12-30 00:00Z"]
    with Session(engine) as session:
        for number, place in enumerate(places):
            insert = "INSERT INTO durable.workflow (name, input, enqueued_at) VALUES ('checkout', :input, :place)"
            session.execute(text(insert), {"input": f'{{"number": {number}}}', "place": place})
        ranges = races.from_front(["default"])
        numbers: list[str] = []
        while batch := claims.claim(
            session, worker_id=races.WORKER, token=uuid7(), ranges=ranges, names=["checkout"], limit=1
        ).claimed:
            numbers += [each.input for each in batch]
    assert numbers == [f'{{"number": {number}}}' for number in range(len(places))]


def test_a_claim_takes_no_more_than_its_limit_over_all_queues(session_factory: sessionmaker[Session]) -> None:
    # behaviour: Q12
    with session_factory() as session:
        for queue in ("a", "b", "c"):
            races.enqueue(session, 5, queue=queue)
        assert len(races.claim(session, 4, queues=["a", "b", "c"])) == 4
        session.commit()
        assert session.query(Workflow).filter_by(status=WorkflowStatus.RUNNING).count() == 4


def test_a_claim_passes_over_rows_that_an_open_transaction_holds(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    with session_factory() as session:
        locked, free = races.enqueue(session, 2)
    with races.transaction(engine) as caller, session_factory() as session:
        races.cancel(caller.session, locked)
        assert [each.fence.workflow_id for each in races.claim(session, 2)] == [free]


def test_a_claim_is_not_hindered_by_an_open_transaction_that_refers_to_the_workflow(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    """A foreign key takes KEY SHARE on the row until the caller commits."""
    with session_factory() as session:
        (workflow_id,) = races.enqueue(session)
    with races.transaction(engine) as caller, session_factory() as session:
        caller.session.add(Order(customer="Ada", total_cents=1, workflow_id=workflow_id))
        caller.session.flush()
        (claimed,) = races.claim(session)
        session.commit()
        assert steps.record(session, races.checkpoint(claimed.fence)) is Verdict.RECORDED
        session.commit()
        assert attempts.finish(session, races.success(claimed.fence))
        session.commit()
        caller.session.commit()


def test_first_in_first_out_within_a_priority_and_the_lowest_priority_first(
    session_factory: sessionmaker[Session],
) -> None:
    # behaviour: Q1
    with session_factory() as session:
        late = races.enqueue(session, 2, priority=5)
        normal = races.enqueue(session, 2)
        early = races.enqueue(session, 2, priority=-1)
        claimed = [races.claim(session)[0].fence.workflow_id for _ in range(3)] + [
            each.fence.workflow_id for each in races.claim(session, 10)
        ]
    assert claimed == early + normal + late


def test_one_priority_holds_across_queues(session_factory: sessionmaker[Session]) -> None:
    with session_factory() as session:
        (second,) = races.enqueue(session, queue="a", priority=2)
        (first,) = races.enqueue(session, queue="b", priority=1)
        claimed = races.claim(session, 1, queues=["a", "b"])
        assert [each.fence.workflow_id for each in claimed] == [first]
        assert races.claim(session, 1, queues=["a", "b"])[0].fence.workflow_id == second


def test_names_and_queues_that_are_not_asked_for_stay(session_factory: sessionmaker[Session]) -> None:
    # behaviour: R9
    with session_factory() as session:
        races.enqueue(session, name="unknown")
        races.enqueue(session, queue="elsewhere")
        assert races.claim(session, 10) == []
        assert backlog.unknown_names(session, queues=["default"], names=["checkout"]) == ["unknown"]


def test_versions_that_are_not_asked_for_stay_and_those_without_one_do_not(
    session_factory: sessionmaker[Session],
) -> None:
    with session_factory() as session:
        for version in ("1", None, "2", "3"):
            races.enqueue(session, version=version)
        known = {"queues": ["default", "empty"], "versions": ["2", "4"]}
        assert backlog.other_versions(session, **known) == ["1", "3"]
        assert len(races.claim(session, 10, versions=["2", "4"])) == 2
        assert len(races.claim(session, 10, versions=["4"])) == 0
        assert len(races.claim(session, 10)) == 2
        assert backlog.other_versions(session, **known) == []
        assert backlog.other_versions(session, **{**known, "queues": []}) == []  # none fits a pattern yet


def test_a_paused_queue_is_skipped_until_it_is_resumed(session_factory: sessionmaker[Session]) -> None:
    # behaviour: Q8
    with session_factory() as session:
        races.enqueue(session)
        (other,) = races.enqueue(session, queue="other")
        queue = Queue(name="default", paused_at=datetime.now(UTC))
        session.add(queue)
        session.commit()
        claimed = races.claim(session, 10, queues=["default", "other"])
        assert [each.fence.workflow_id for each in claimed] == [other]
        queue.paused_at = None
        session.commit()
        assert len(races.claim(session, 10)) == 1


def test_a_claim_brings_the_history_and_counts_from_the_first_start(session_factory: sessionmaker[Session]) -> None:
    with session_factory() as session:
        races.enqueue(session)
        (claimed,) = races.claim(session)
        started_at = session.query(Workflow.started_at).scalar()
        steps.record(session, races.checkpoint(claimed.fence, output='{"a": 1}'))
        attempts.release(session, [claimed.fence])
        session.commit()
        (again,) = races.claim(session)
        assert again.attempt == 1
        assert again.fence.token != claimed.fence.token
        assert again.history["charge"].output == '{"a": 1}'
        assert session.query(Workflow.started_at).scalar() == started_at


def test_claim_one_waits_for_the_row_and_sees_what_became_of_it(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    with session_factory() as session:
        (workflow_id,) = races.enqueue(session)
    with races.transaction(engine) as canceller, races.transaction(engine) as claimer:
        races.cancel(canceller.session, workflow_id)
        claiming = claimer.begin_blocked(
            lambda session: claims.claim_one(session, workflow_id, worker_id=races.WORKER, token=uuid7())
        )
        canceller.session.commit()
        assert claiming.result() is None


def test_a_claim_goes_on_after_the_place_that_the_last_one_reached(session_factory: sessionmaker[Session]) -> None:
    with session_factory() as session:
        ids = races.enqueue(session, 6)
        first = _claim(session, FRONT, 2)
        races.enqueue(session, priority=-1)
        second = _claim(session, first.last_positions["default"][0], 2)
        assert [each.fence.workflow_id for each in (*first.claimed, *second.claimed)] == ids[:4]
        from_front = _claim(session, FRONT, 9)
        assert [each.fence.workflow_id for each in from_front.claimed][1:] == ids[4:]
        assert _claim(session, from_front.last_positions["default"][0], 9) == claims.Batch([], {})


def test_each_queue_has_a_place_of_its_own(session_factory: sessionmaker[Session]) -> None:
    with session_factory() as session:
        for name in ("a", "b"):
            races.enqueue(session, 3, queue=name)
        batch = _claim(session, FRONT, 4, "a", "b")
        assert set(batch.last_positions) == {"a", "b"}
        after = {name: [Range(place)] for name, reached in batch.last_positions.items() for place in reached.values()}
        rest = claims.claim(session, worker_id=races.WORKER, token=uuid7(), ranges=after, names=["checkout"], limit=9)
        assert len(batch.claimed) + len(rest.claimed) == 6


def _claim(session: Session, after: claims.ScanPosition, limit: int, *names: str) -> claims.Batch:
    listened = {each: [Range(after)] for each in names or ("default",)}
    return claims.claim(
        session, worker_id=races.WORKER, token=uuid7(), ranges=listened, names=["checkout"], limit=limit
    )


@pytest.mark.new_database
def test_what_an_open_transaction_keeps_dead_costs_a_claim_at_the_front_and_none_behind(engine: Engine) -> None:
    """As pages of the index and the table, which do not depend on the machine."""
    with Session(engine) as old, Session(engine) as session:
        session.execute(text("ALTER TABLE durable.workflow SET (autovacuum_enabled = off)"))
        races.enqueue(session, 3_000)
        old.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        old.execute(text("SELECT FROM durable.workflow LIMIT 1"))  # from here on, nothing that dies is removed
        reached = _claim(session, FRONT, 2_900).last_positions["default"][0]
        session.commit()
        pages = {place: _pages(session, place) for place in (FRONT, reached)}
    assert pages[reached] < 60, pages
    assert pages[FRONT] > 5 * pages[reached], pages


def _pages(session: Session, after: claims.ScanPosition) -> int:
    parameters = _parameters({"default": [Range(after)]})
    plan = explain(session, claims._CLAIM, parameters, mode="force_generic_plan")  # pyright: ignore[reportPrivateUsage]
    return plan.buffers("CTE claimable")


def _parameters(ranges: claims.Ranges, *versions: str) -> dict[str, Any]:
    claim = {"limit": 10, "new_token": uuid7(), "claimant": races.WORKER}
    return claim | claims.name_parameters(["checkout"], versions) | claims.range_parameters(ranges)


@pytest.mark.parametrize("versions", [(), ("1", "2")], ids=["all versions", "some versions"])
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_the_claim_reads_the_head_of_its_index_and_nothing_else(
    session_factory: sessionmaker[Session], mode: str, versions: tuple[str, ...]
) -> None:
    # behaviour: Q11
    with session_factory() as session:
        fill(session)
        parameters = _parameters(races.from_front(["default", "other"]), *versions)
        plan = explain(session, claims._CLAIM, parameters, mode=mode)  # pyright: ignore[reportPrivateUsage]
    assert plan.uses("workflow_pending_idx"), plan
    assert not plan.scans("workflow"), plan
    assert plan.rows("CTE claimable") == 10, plan
    assert plan.buffers("CTE claimable") < 120, plan
