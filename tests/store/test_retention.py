"""Retention: which policy decides, what goes with what, what is refused, and several workers at once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import Event, Workflow, manage
from sqla_durable.errors import ArgumentError
from sqla_durable.manage.retention import Batch, prune, skip_one
from sqla_durable.models import Retention
from sqla_durable.store import retention
from sqla_durable.store.retention import _FIND, _LOCK_TREES, FRONT  # pyright: ignore[reportPrivateUsage]
from tests.manage import histories
from tests.store import races
from tests.store.plans import MODES, explain
from tests.support.forged import forged
from tests.support.retained import DAY, ended, hold, left, row_of


def policy(engine: Engine, name: str = "all", *, days: float = 5, **options: Any) -> None:
    with Session(engine) as session, session.begin():
        manage.put_retention(session, name, keep=days * DAY, **options)


def batch(engine: Engine, limit: int = 100) -> Batch | None:
    """Execute what a worker does for a policy that is due, in a transaction of its own."""
    with engine.begin() as connection:
        taken = retention.take_due(connection)
        return None if taken is None else prune(connection, taken, limit=limit)


def everything(engine: Engine, limit: int = 100) -> int:
    """Execute batches of the policies that are due until their walks have ended; return how many are gone."""
    gone = 0
    while (done := batch(engine, limit)) is not None:
        gone += done.deleted
        if not done.is_last:
            make_due(engine)
    return gone


def make_due(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        session.execute(update(Retention).where(Retention.position.is_not(None)).values(due_at=None))


@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
def test_what_is_finished_for_long_enough_goes_with_its_rows(engine: Engine) -> None:
    with Session(engine) as session:
        gone = [ended(session), ended(session, days=5.01, status="cancelled")]
        stays = {ended(session, days=4.99), *races.enqueue(session)}
        session.add(Event(workflow_id=gone[0], key="progress", value=1))
        session.commit()
    policy(engine)
    assert batch(engine) == Batch(roots=2, deleted=2, refused=0, seen=gone[1], is_last=True)
    assert left(engine) == stays
    with Session(engine) as session:
        assert session.scalar(select(func.count()).select_from(Event)) == 0
    row = row_of(engine, "all")
    assert (row.deleted, row.refused, row.position) == (2, 0, None)
    assert row.due_at is not None
    assert row.last_at is not None
    assert row.due_at - row.last_at == timedelta(hours=1)
    assert batch(engine) is None, "it is due in an hour"


def test_the_most_specific_policy_that_fits_decides(engine: Engine) -> None:
    with Session(engine) as session:
        days: dict[tuple[str, str], list[float]] = {
            ("other", "succeeded"): [9, 11],
            ("pay_card", "succeeded"): [29, 31],
            ("pay_card", "failed"): [39, 41],
            ("pay_card_now", "succeeded"): [49, 51],
            ("pay", "succeeded"): [59, 61],
            ("pay", "failed"): [1, 3],
            ("payXcard", "succeeded"): [19, 21],
        }
        kept = {ended(session, days=each[0], name=name, status=status) for (name, status), each in days.items()}
        for (name, status), each in days.items():
            ended(session, days=each[1], name=name, status=status)
    policy(engine, "all", days=10)
    policy(engine, "all failed", days=15, status="failed")
    policy(engine, "a pattern", days=20, workflow="pay*")
    policy(engine, "a longer pattern", days=30, workflow="pay_*")
    policy(engine, "with status", days=40, workflow="pay_*", status=["failed", "cancelled"])
    policy(engine, "same, keeps longer", days=50, workflow="pay_*_now")
    policy(engine, "a name", days=60, workflow="pay")
    policy(engine, "a name with status", days=2, workflow="pay", status="failed")
    assert everything(engine) == len(days)
    assert left(engine) == kept


def test_a_tree_goes_as_a_whole_once_all_of_it_is_old(engine: Engine) -> None:
    with Session(engine) as session:
        root = ended(session)
        child = ended(session, parent_id=root, parent_key="a", name="child")
        young = ended(session, days=1, parent_id=child, parent_key="b", name="child")
        detached = ended(session, days=1, parent_id=root, parent_key="c", detached=True)
        (unfinished,) = races.enqueue(session)
        asked = [ended(session, parent_id=unfinished, parent_key=str(each), detached=each) for each in (True, False)]
        blocking = ended(session, status="failed", place="key_failed")
    policy(engine)
    assert everything(engine) == 0, "a member is young; a parent may still ask; others wait for one that failed"
    with Session(engine) as session:
        old = Workflow.finished_at - 10 * DAY
        session.execute(update(Workflow).where(Workflow.id == young).values(finished_at=old))
        session.execute(update(Retention).values(due_at=None))
        session.commit()
    assert everything(engine) == 3
    assert left(engine) == {detached, unfinished, *asked, blocking}
    with Session(engine) as session:
        assert histories.standing(session, detached).parent_id is None


@pytest.mark.new_database
@pytest.mark.parametrize("how", ["ON DELETE RESTRICT", "DEFERRABLE INITIALLY DEFERRED"])
def test_what_the_application_holds_stays_and_is_counted_and_the_others_go(engine: Engine, how: str) -> None:
    with Session(engine) as session:
        ids = [ended(session, days=20 - each) for each in range(8)]
        child = ended(session, parent_id=ids[5], parent_key="a")
        hold(session, ids[2], child, how=how)
    policy(engine)
    first = batch(engine, limit=4)
    assert first == Batch(roots=3, deleted=3, refused=1, seen=ids[3], is_last=False)
    make_due(engine)
    assert batch(engine) == Batch(roots=3, deleted=3, refused=1, seen=child, is_last=True)
    assert left(engine) == {ids[2], ids[5], child}
    assert (row_of(engine, "all").deleted, row_of(engine, "all").refused) == (6, 2)
    with Session(engine) as session:
        session.execute(text("DELETE FROM invoice"))
        session.execute(update(Retention).values(due_at=None))
        session.commit()
    assert everything(engine) == 3
    assert row_of(engine, "all").refused == 0, "of the last walk"


def test_two_workers_share_the_policies_and_wait_for_nothing(engine: Engine) -> None:
    with Session(engine) as session:
        ids = [ended(session, days=20 - each) for each in range(4)]
        other = ended(session, name="other")
        (pending,) = races.enqueue(session)
    policy(engine)
    policy(engine, "other", workflow="other")
    with engine.begin() as first, engine.begin() as second, Session(engine) as third:
        taken = retention.take_due(first)
        assert taken is not None
        assert prune(first, taken, limit=2).deleted == 2
        rest = retention.take_due(second)
        assert rest is not None
        assert {taken.name, rest.name} == {"all", "other"}
        assert prune(second, rest, limit=2).deleted == (1 if rest.name == "other" else 2)
        assert retention.take_due(third) is None
        assert [each.fence.workflow_id for each in races.claim(third)] == [pending], "a claim waits for no deletion"
        third.rollback()
    assert left(engine) & {other, *ids} <= set(ids[2:])
    everything(engine)
    make_due(engine)
    everything(engine)
    assert left(engine) == {pending}


def test_what_others_lock_or_refer_to_is_left_without_a_wait(engine: Engine) -> None:
    with Session(engine) as session:
        ids = [ended(session, days=20 - each) for each in range(4)]
        child = ended(session, parent_id=ids[1], parent_key="a")
    policy(engine)
    with Session(engine) as locking, Session(engine) as referring:
        races.lock(locking, child)
        races.lock(referring, ids[2], "KEY SHARE")
        assert batch(engine) == Batch(roots=2, deleted=2, refused=0, seen=child, is_last=True)
    assert left(engine) == {ids[1], child, ids[2]}


def test_a_workflow_that_is_retried_meanwhile_stays(engine: Engine) -> None:
    """Between the search and the locks others may have committed."""
    with Session(engine) as session:
        ids = [ended(session, status="failed", token=FRONT) for _ in range(2)]
    policy(engine)
    with engine.begin() as connection, Session(engine) as operator:
        taken = retention.take_due(connection)
        assert taken is not None
        found = retention.find(connection, taken.wanted, after=None, limit=9)
        assert found.roots == sorted(ids)
        assert manage.retry(operator, ids[0]) == [ids[0]]
        operator.commit()
        assert retention.lock_trees(connection, found.roots, taken.wanted) == {ids[1]: [ids[1]]}


def test_one_that_takes_too_long_is_passed_over(engine: Engine) -> None:
    with Session(engine) as session:
        ids = [ended(session, days=20 - each) for each in range(2)]
    policy(engine)
    with engine.begin() as connection:
        assert skip_one(connection, "all") == ids[0]
        assert skip_one(connection, "gone") is None
    make_due(engine)
    assert batch(engine) == Batch(roots=1, deleted=1, refused=0, seen=ids[1], is_last=True)
    assert row_of(engine, "all").refused == 1


@pytest.mark.new_database
def test_a_batch_reads_a_bounded_part_of_many_rows_that_stay(engine: Engine) -> None:
    with Session(engine) as session:
        with forged(session):
            session.execute(
                text(
                    "INSERT INTO durable.workflow (id, name, status, finished_at, output) "
                    "SELECT CAST(lpad(to_hex(CAST(1e12 AS bigint) + n), 12, '0') || '7' || "
                    "substr(replace(CAST(gen_random_uuid() AS text), '-', ''), 14) AS uuid), "
                    "CASE WHEN n % 4000 = 3999 THEN 'rare' ELSE 'checkout' END, 'succeeded', "
                    "statement_timestamp() - interval '9 days', '1' FROM generate_series(0, 19999) AS n"
                )
            )
        session.commit()
        session.execute(text("ANALYZE durable.workflow"))
        session.commit()
    policy(engine, "rare", workflow="rare")
    with engine.connect() as connection:
        taken = retention.take_due(connection)
        assert taken is not None
        first = retention.find(connection, taken.wanted, after=None, limit=3, looked_at=5_000)
        assert (len(first.roots), first.is_last) == (1, False)
        second = retention.find(connection, taken.wanted, after=first.seen, limit=3, looked_at=20_000)
        assert (len(second.roots), second.seen, second.is_last) == (3, second.roots[-1], False)
        last = retention.find(connection, taken.wanted, after=second.seen, limit=3, looked_at=5_000)
        assert (len(last.roots), last.is_last) == (1, True)
        roots = [*first.roots, *second.roots, *last.roots]
    wanted = {"after": first.seen, "until": taken.wanted.until, "cutoff": taken.wanted.cutoff, "patterns": ["rare"]}
    wanted |= {"statuses": ["succeeded"], "policy_name": "rare", "limit": 100, "looked_at": 1_000}
    with Session(engine) as session:
        finding = [explain(session, _FIND, wanted, mode=mode) for mode in MODES]
        parameters = {"ids": f"{{{','.join(map(str, roots))}}}", "cutoff": taken.wanted.cutoff}
        locking = [explain(session, _LOCK_TREES, parameters, mode=mode) for mode in MODES]
    for plan in finding:
        assert plan.uses("workflow_pkey"), plan
        assert plan.buffers() < 200, plan
    for plan in locking:
        assert not plan.scans("workflow"), plan
        assert plan.buffers() < 100, plan


def test_policies_are_made_changed_and_dropped_in_the_callers_transaction(engine: Engine) -> None:
    with Session(engine) as session:
        made = manage.put_retention(session, "orders", workflow="check*", status="failed", keep=DAY)
        assert (made.workflow, made.statuses, made.keep, made.declared) == ("check*", ["failed"], DAY, False)
        session.rollback()
        manage.put_retention(session, "orders", keep=DAY)
        session.commit()
        session.execute(update(Retention).values(due_at=func.statement_timestamp() + DAY, position=FRONT))
        unchanged = manage.put_retention(session, "orders", keep=DAY)
        assert unchanged.due_at is not None
        changed = manage.put_retention(session, "orders", status=["failed", "cancelled"], keep=DAY)
        assert (changed.statuses, changed.due_at, changed.position) == (["cancelled", "failed"], None, None)
        assert manage.drop_retention(session, "orders")
        assert not manage.drop_retention(session, "orders")
        wrong: list[dict[str, Any]] = [{"keep": timedelta()}, {"keep": 90}, {"keep": DAY, "workflow": " "}]
        wrong += [{"keep": DAY, "status": "running"}, {"keep": DAY, "status": ()}]
        for each in wrong:
            with pytest.raises(ArgumentError):
                manage.put_retention(session, "orders", **each)


async def test_the_twins_for_async_code(async_session_factory: async_sessionmaker[AsyncSession]) -> None:
    async with async_session_factory() as session:
        assert (await aio.manage.put_retention(session, "orders", keep=DAY)).name == "orders"
        assert await aio.manage.drop_retention(session, "orders")


@pytest.mark.parametrize(
    ("constraint", "columns"),
    [
        ("name", "(name, keep) VALUES (' ', '1 day')"),
        ("workflow", "(name, keep, workflow) VALUES ('a', '1 day', '')"),
        ("keep", "(name, keep) VALUES ('a', '0')"),
        ("keep", "(name, keep) VALUES ('a', '1000000 mons -29999999 days')"),
        ("statuses", "(name, keep, statuses) VALUES ('a', '1 day', '{}')"),
        ("statuses", "(name, keep, statuses) VALUES ('a', '1 day', '{running}')"),
        ("statuses", "(name, keep, statuses) VALUES ('a', '1 day', '{failed,NULL}')"),
        ("counts", "(name, keep, refused) VALUES ('a', '1 day', -1)"),
        ("times", "(name, keep, due_at) VALUES ('a', '1 day', 'infinity')"),
    ],
)
def test_a_row_that_makes_no_policy_is_refused(engine: Engine, constraint: str, columns: str) -> None:
    with engine.begin() as connection, pytest.raises(IntegrityError, match=f"retention_{constraint}_check"):
        connection.execute(text(f"INSERT INTO durable.retention {columns}"))


def test_what_keeps_others_of_its_key_waiting_stays_as_a_child_too(engine: Engine) -> None:
    with Session(engine) as session:
        parent = ended(session)
        blocking: dict[str, Any] = {"queue": "ledger", "by": "a-1", "place": "key_failed"}
        child = ended(session, status="failed", parent_id=parent, parent_key="book", **blocking)
    policy(engine)
    everything(engine)
    assert left(engine) == {parent, child}


def test_a_detached_child_stays_whose_parent_is_retried_meanwhile(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the statement that finds it and the one that locks it."""
    with Session(engine) as session:
        parent = ended(session, status="failed", days=1)
        child = ended(session, parent_id=parent, parent_key="a", detached=True)
    find = retention.find

    def find_while_it_is_retried(*given: Any, **more: Any) -> Any:
        found = find(*given, **more)
        with Session(engine) as session, session.begin():
            assert manage.retry(session, parent) == [parent]
        return found

    monkeypatch.setattr(retention, "find", find_while_it_is_retried)
    policy(engine)
    done = batch(engine)
    assert done is not None
    assert (done.deleted, left(engine)) == (0, {parent, child})


def test_a_right_that_is_missing_refuses_one_and_not_the_others(engine: Engine) -> None:
    with Session(engine) as session:
        kept, gone = ended(session, name="kept"), ended(session)
        session.execute(
            text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE 'not yours' USING ERRCODE = '42501'; END $$"
            )
        )
        session.execute(
            text(
                "CREATE TRIGGER refuse BEFORE DELETE ON durable.workflow FOR EACH ROW "
                "WHEN (old.name = 'kept') EXECUTE FUNCTION refuse()"
            )
        )
        session.commit()
    policy(engine)
    assert everything(engine) == 1
    assert (left(engine), row_of(engine, "all").refused) == ({kept}, 1)
    assert gone not in left(engine)
