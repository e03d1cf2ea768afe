"""Starts whose key has a rule beside other transactions: callers with the same key, claims, ends, operators."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from sqla_durable import Durable, Workflow, WorkflowStatus, manage, start_many
from sqla_durable.api.workflows import WorkflowFunction
from sqla_durable.errors import KeyTakenError
from sqla_durable.store import Claimed, timers, workers
from tests.store import races

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
PENDING, RUNNING = WorkflowStatus.PENDING, WorkflowStatus.RUNNING
durable = Durable()


@durable.workflow
def checkout(cents: int) -> int:
    return cents


KEYED = checkout.options(key="k")
RULES = {
    "unfinished": KEYED.options(unique="unfinished"),
    "unstarted": KEYED.options(unique="unstarted"),
    "throttle": KEYED.options(throttle=HOUR),
    "refuse": KEYED.options(on_conflict="refuse"),
    "replace": KEYED.options(on_conflict="replace"),
    "debounce": KEYED.options(debounce=MINUTE, longest_wait=HOUR),
    "cancel_running": KEYED.options(on_conflict="cancel_running"),
}
Outcome = tuple[str, list[tuple[str, int]]]


def starts(workflow: WorkflowFunction[..., Any], cents: int) -> Callable[[Session], UUID]:
    return lambda session: workflow.start(session, cents).id


def committed(engine: Engine, workflow: WorkflowFunction[..., Any] = KEYED, cents: int = 1) -> UUID:
    with Session(engine) as session, session.begin():
        return workflow.start(session, cents).id


def rows(engine: Engine) -> list[tuple[str, str | None, int]]:
    """Return status, key and input of all workflows, in the order of their starts."""
    with Session(engine) as session:
        found = session.scalars(select(Workflow).order_by(Workflow.id))
        return [(str(each.status), each.key, each.input["cents"]) for each in found]


def finish(session: Session, claimed: Claimed) -> None:
    assert races.end(session, [races.success(claimed.fence)])


def finished(engine: Engine, workflow: WorkflowFunction[..., Any] = KEYED) -> UUID:
    """Start, execute and finish a workflow."""
    found = committed(engine, workflow)
    with Session(engine) as session, session.begin():
        (claimed,) = races.claim(session)
        finish(session, claimed)
    return found


def failed(engine: Engine) -> UUID:
    found = finished(engine)
    with engine.begin() as connection:
        failure = "status = 'failed', output = NULL, error = '{\"type\": \"builtins:ValueError\"}'"
        connection.execute(text(f"UPDATE durable.workflow SET {failure} WHERE id = :id"), {"id": found})
    return found


# Two callers


AFTER_COMMIT = {
    "unfinished": [("pending", "k", 1)],
    "unstarted": [("pending", "k", 1)],
    "throttle": [("pending", "k", 1)],
    "refuse": [("pending", "k", 1)],
    "replace": [("pending", "k", 2)],
    "debounce": [("suspended", "k", 2)],
    "cancel_running": [("cancelled", None, 1), ("pending", "k", 2)],
}


@pytest.mark.parametrize("rule", RULES)
def test_the_second_of_two_callers_waits_and_finds_what_the_first_has_committed(engine: Engine, rule: str) -> None:
    # behaviour: T9 Q6 D6
    with races.transaction(engine) as one, races.transaction(engine) as other:
        first = RULES[rule].start(one.session, 1).id
        starting = other.begin_blocked(starts(RULES[rule], 2))
        one.session.commit()
        if rule == "refuse":
            with pytest.raises(KeyTakenError) as caught:
                starting.result()
            assert caught.value.workflow_id == first
        else:
            assert (starting.result() == first) is (rule != "cancel_running")
        assert other.session.scalar(select(func.count()).select_from(Workflow)) is not None  # it is usable
        other.session.commit()
    assert rows(engine) == AFTER_COMMIT[rule]


@pytest.mark.parametrize("rule", RULES)
def test_the_second_of_two_callers_starts_its_own_where_the_first_rolls_back(engine: Engine, rule: str) -> None:
    # behaviour: T9
    with races.transaction(engine) as one, races.transaction(engine) as other:
        RULES[rule].start(one.session, 1)
        starting = other.begin_blocked(starts(RULES[rule], 2))
        one.session.rollback()
        found = starting.result()
        other.session.commit()
    assert [(key, cents) for _, key, cents in rows(engine)] == [("k", 2)]
    with Session(engine) as session:
        assert session.get_one(Workflow, found).former_key is None


@pytest.mark.parametrize("ending", ["commit", "rollback"])
@pytest.mark.parametrize("rule", ["unfinished", "unstarted", "replace", "debounce", "cancel_running"])
def test_of_two_that_start_after_an_end_one_has_the_key(engine: Engine, rule: str, ending: str) -> None:
    """Both have seen that it has ended, and both would take the key from it."""
    finished(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        first = RULES[rule].start(one.session, 2).id
        starting = other.begin_blocked(starts(RULES[rule], 3))
        getattr(one.session, ending)()
        second = starting.result()
        other.session.commit()
    same = ending == "commit" and rule != "cancel_running"
    assert (second == first) is same
    found = rows(engine)
    assert found[0] == ("succeeded", None, 1)
    assert [key for _, key, _ in found].count("k") == 1
    assert len(found) == (3 if (ending, rule) == ("commit", "cancel_running") else 2)
    if rule in ("replace", "debounce"):
        assert found[-1][2] == 3


@pytest.mark.parametrize("rule", ["replace", "debounce"])
def test_of_two_replacements_the_last_commit_wins_and_inputs_are_not_mixed(engine: Engine, rule: str) -> None:
    """The second waits for the row, so the order of commits is that of the calls; headers and queue come with it."""
    first = committed(engine, RULES[rule])
    with races.transaction(engine) as one, races.transaction(engine) as other:
        RULES[rule].options(queue="two", priority=2).start(one.session, 2)
        starting = other.begin_blocked(starts(RULES[rule].options(queue="three", priority=3), 3))
        one.session.commit()
        assert starting.result() == first
        other.session.commit()
    with Session(engine) as session:
        record = session.get_one(Workflow, first)
        assert (record.input["cents"], record.queue, record.priority) == (3, "three", 3)


@pytest.mark.parametrize("rule", ["unfinished", "debounce", "cancel_running"])
def test_many_callers_at_the_same_time(engine: Engine, rule: str, thorough: bool) -> None:
    """Ten threads, again and again: one has the key, and with debounce the last committed input counts."""
    # behaviour: D6 Q6
    rounds = 10 if thorough else 3
    barrier, last = threading.Barrier(10), threading.Lock()
    order: list[int] = []

    def call(number: int) -> None:
        for each in range(rounds):
            barrier.wait(races.PATIENCE)
            cents = number * rounds + each
            with Session(engine) as session:
                RULES[rule].start(session, cents)
                with last:  # callers of one key come here one after the other: the row is locked until the commit
                    order.append(cents)
                    session.commit()

    for each in [races.Concurrent(partial(call, number)) for number in range(10)]:
        each.result()
    found = rows(engine)
    assert [key for _, key, _ in found].count("k") == 1
    unfinished = [each for each in found if each[0] in ("pending", "suspended")]
    assert len(unfinished) == 1
    if rule == "unfinished":
        assert len(found) == 1
    else:
        assert unfinished[0][2] == order[-1]
    if rule == "cancel_running":
        assert len(found) == 10 * rounds


# Beside a claim


@pytest.mark.parametrize("rule", ["replace", "debounce"])
def test_a_replacement_that_meets_a_claim_starts_another(engine: Engine, rule: str) -> None:
    """Never answered with the record whose old input is executed."""
    # behaviour: D6
    first = committed(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        (claimed,) = races.claim(one.session)
        assert claimed.input == '{"cents": 1}'
        starting = other.begin_blocked(starts(RULES[rule], 2))
        one.session.commit()
        assert starting.result() != first
        other.session.commit()
    assert [(key, cents) for _, key, cents in rows(engine)] == [(None, 1), ("k", 2)]
    with Session(engine) as session:
        finish(session, claimed)  # what was claimed is not disturbed


@pytest.mark.parametrize("rule", ["replace", "debounce"])
def test_a_replacement_of_what_a_claim_releases_replaces_it(engine: Engine, rule: str) -> None:
    first = committed(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        assert races.claim(one.session)
        starting = other.begin_blocked(starts(RULES[rule], 2))
        one.session.rollback()
        assert starting.result() == first
        other.session.commit()
    assert [cents for _, _, cents in rows(engine)] == [2]


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_a_claim_passes_what_is_being_replaced_and_takes_the_others(engine: Engine, ending: str) -> None:
    """A caller's transaction may stay open for as long as it likes."""
    # behaviour: D6
    first = committed(engine)
    second = committed(engine, checkout.options(key="other"), 7)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        RULES["replace"].start(one.session, 2)
        (claimed,) = other.begin(lambda session: races.claim(session, 10)).result()
        assert claimed.fence.workflow_id == second
        assert other.begin(starts(checkout.options(key="third", debounce=MINUTE, longest_wait=HOUR), 3)).result()
        other.session.commit()
        getattr(one.session, ending)()
    with Session(engine) as session:
        (claimed,) = races.claim(session)
        assert (claimed.fence.workflow_id, claimed.input) == (first, f'{{"cents": {2 if ending == "commit" else 1}}}')


@pytest.mark.parametrize("rule", RULES)
def test_an_unfinished_one_is_found_without_waiting_for_its_attempt(engine: Engine, rule: str) -> None:
    """It locks the row while it records something; only what would change the row waits for that."""
    first = committed(engine)
    with races.transaction(engine) as attempt, races.transaction(engine) as caller:
        races.lock(attempt.session, first)
        if rule in ("replace", "debounce", "cancel_running"):
            starting = caller.begin_blocked(starts(RULES[rule], 2))
            attempt.session.commit()
            starting.result()
        elif rule == "refuse":
            with pytest.raises(KeyTakenError):
                caller.begin(starts(RULES[rule], 2)).result()
        else:
            assert caller.begin(starts(RULES[rule], 2)).result() == first


def test_a_start_waits_for_no_foreign_key_of_the_application(engine: Engine) -> None:
    """A caller's row that refers to the workflow locks it as a key: it can be replaced and lose its key meanwhile."""
    first = committed(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        races.lock(one.session, first, "KEY SHARE")
        assert other.begin(starts(RULES["replace"], 2)).result() == first
        other.session.commit()
        with Session(engine) as session, session.begin():
            (claimed,) = races.claim(session)
            finish(session, claimed)
        assert other.begin(starts(RULES["unfinished"], 3)).result() != first


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_a_cancel_that_meets_the_end_of_the_older(engine: Engine, ending: str) -> None:
    first = committed(engine)
    with Session(engine) as session, session.begin():
        (claimed,) = races.claim(session)
    with races.transaction(engine) as attempt, races.transaction(engine) as caller:
        finish(attempt.session, claimed)
        starting = caller.begin_blocked(starts(RULES["cancel_running"], 2))
        getattr(attempt.session, ending)()
        assert starting.result() != first
        caller.session.commit()
    status = "succeeded" if ending == "commit" else "cancelled"
    assert rows(engine) == [(status, None, 1), ("pending", "k", 2)]


def test_a_cancelled_attempt_writes_nothing_more(engine: Engine) -> None:
    """In a lost worker too: its fence is gone from the commit of the newer start on."""
    committed(engine)
    with Session(engine) as session, session.begin():
        (claimed,) = races.claim(session)
    committed(engine, RULES["cancel_running"], 2)
    with Session(engine) as session:
        assert not races.record(session, [races.checkpoint(claimed.fence)])
        assert not races.end(session, [races.success(claimed.fence)])


def test_what_a_dead_worker_has_left_still_has_its_key_and_so_has_its_next_attempt(engine: Engine) -> None:
    # behaviour: Q6 R4
    (fence,) = races.claimed_fences(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE durable.workflow SET key = 'k'"))
    races.expire_leases(engine)
    assert committed(engine, RULES["unfinished"], 2) == fence.workflow_id
    with Session(engine) as session, session.begin():
        assert [each.workflow_id for each in workers.reclaim(session, max_attempts=10, limit=100)] == [
            fence.workflow_id
        ]
    assert committed(engine, RULES["unfinished"], 2) == fence.workflow_id
    with Session(engine) as session, session.begin():
        (again,) = races.claim(session)
        assert (again.fence.workflow_id, again.attempt) == (fence.workflow_id, 2)
    assert committed(engine, RULES["unfinished"], 2) == fence.workflow_id


def test_a_replacement_that_meets_the_wake_of_a_delay_replaces_what_is_pending_then(engine: Engine) -> None:
    # behaviour: D6 Q7
    first = committed(engine, RULES["debounce"])
    with engine.begin() as connection:
        connection.execute(text("UPDATE durable.workflow SET wake_at = statement_timestamp()"))
    with races.transaction(engine) as worker, races.transaction(engine) as caller:
        assert timers.wake_due(worker.session, limit=10) == 1
        starting = caller.begin_blocked(starts(RULES["debounce"], 2))
        worker.session.commit()
        assert starting.result() == first
        caller.session.commit()
    assert rows(engine) == [("suspended", "k", 2)]


def test_a_deferred_child_is_replaced_and_stays_deferred(engine: Engine) -> None:
    with Session(engine) as session:
        (parent,) = races.enqueue(session, name="parent", input={"cents": 0})
        (first,) = races.enqueue(
            session, key="k", status=WorkflowStatus.SUSPENDED, parent_id=parent, input={"cents": 1}
        )
    for rule in ("replace", "debounce"):
        assert committed(engine, RULES[rule], 2) == first
    assert rows(engine)[1] == ("suspended", "k", 2)
    with Session(engine) as session:
        record = session.get_one(Workflow, first)
        assert (record.wake_at, record.parent_id) == (None, parent)


# Beside operators


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_a_start_that_meets_a_retry_of_the_older(engine: Engine, ending: str) -> None:
    """The retry was first, and makes it unfinished; or it is undone, and the older one has ended."""
    first = failed(engine)
    with races.transaction(engine) as operator, races.transaction(engine) as caller:
        assert manage.retry(operator.session, first) == [first]
        starting = caller.begin_blocked(starts(RULES["unfinished"], 2))
        getattr(operator.session, ending)()
        assert (starting.result() == first) is (ending == "commit")
        caller.session.commit()
    last = rows(engine)[-1]
    assert last == (("pending", "k", 1) if ending == "commit" else ("pending", "k", 2))


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_a_retry_that_meets_a_newer_start_leaves_the_older_alone_and_the_others_go_on(
    engine: Engine, ending: str
) -> None:
    # behaviour: Q6
    with Session(engine) as session:
        others = races.enqueue(session, 2, input={"cents": 9}, status=WorkflowStatus.FAILED, error={"type": "a:B"},
                               finished_at=func.now())  # fmt: skip
    first = failed(engine)
    wanted = [others[0], first, others[1]]
    with races.transaction(engine) as caller, races.transaction(engine) as operator:
        RULES["unfinished"].start(caller.session, 2)
        retrying = operator.begin_blocked(lambda session: manage.retry(session, wanted))
        getattr(caller.session, ending)()
        assert set(retrying.result()) == ({*others} if ending == "commit" else {*wanted})
        operator.session.commit()


@pytest.mark.parametrize("verb", ["retry", "resume", "rewind"])
def test_what_a_newer_one_has_the_key_of_is_left_alone_by_what_would_enqueue_it(engine: Engine, verb: str) -> None:
    # behaviour: Q6
    other = committed(engine, checkout.options(key="other"))
    first = committed(engine)
    with Session(engine) as session, session.begin():
        for each in races.claim(session, 2):
            races.record(session, [races.checkpoint(each.fence)])
        manage.cancel(session, [first, other])
        if verb == "retry":
            session.execute(text("UPDATE durable.workflow SET status = 'failed', error = '{\"type\": \"a:B\"}'"))
    verbs: dict[str, Callable[[Session, Sequence[UUID]], list[UUID]]] = {
        "retry": manage.retry,
        "resume": manage.resume,
        "rewind": partial(manage.rewind, to_step="charge"),
    }
    newer = committed(engine, RULES["unfinished"], 2)
    with Session(engine) as session, session.begin():
        assert verbs[verb](session, [first, other]) == [other]
        fork = manage.fork(session, first)
        assert (fork.key, fork.former_key) == (None, None)
    with Session(engine) as session:
        assert session.get_one(Workflow, newer).status is PENDING
        assert session.get_one(Workflow, first).former_key == "k"


def test_one_that_runs_beside_its_successor_can_be_rewound(engine: Engine) -> None:
    first = committed(engine)
    with Session(engine) as session, session.begin():
        (claimed,) = races.claim(session)
        races.record(session, [races.checkpoint(claimed.fence)])
    committed(engine, RULES["replace"], 2)
    with Session(engine) as session, session.begin():
        assert manage.rewind(session, first, to_step="charge") == [first]


# Many, in opposite orders


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_callers_of_many_keys_in_opposite_orders_do_not_wait_for_each_other(
    engine: Engine, rule: str, known: bool, thorough: bool
) -> None:
    # behaviour: T9
    keys = [f"k{number}" for number in range(40)]
    barrier = threading.Barrier(2)

    def bound(keys: Sequence[str], cents: int) -> list[Any]:
        return [RULES[rule].options(key=each).bind(cents) for each in keys]

    if known:
        with Session(engine) as session, session.begin():
            start_many(session, bound(keys[::2], 0))

    def call(keys: Sequence[str], cents: int) -> None:
        for _ in range(10 if thorough else 3):
            barrier.wait(races.PATIENCE)
            with Session(engine) as session, session.begin():
                try:
                    start_many(session, bound(keys, cents))
                except KeyTakenError:
                    assert rule == "refuse"

    for each in [races.Concurrent(partial(call, *pair)) for pair in ((keys, 1), (keys[::-1], 2))]:
        each.result()
