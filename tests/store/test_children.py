"""Children under races: what is given up is cancelled to the last one, by whoever owns the parent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.errors import KeyNotVisibleError, KeyTakenError
from sqla_durable.models import Workflow
from sqla_durable.models.base import StepStatus, WorkflowStatus
from sqla_durable.store import Fence, KeyRule, NewWorkflow, children, steps
from sqla_durable.unwinding import AttemptLost
from tests.store import races


def parent_and_child(engine: Engine) -> tuple[Fence, Fence]:
    """Two attempts that are running: at a workflow, and at its child."""
    parent, child = races.claimed_fences(engine, 2)
    with Session(engine) as session, session.begin():
        of_parent = {"parent_id": parent.workflow_id, "parent_key": "start"}
        session.execute(update(Workflow).where(Workflow.id == child.workflow_id).values(of_parent))
    return parent, child


def give_up(session: Session, parent: Fence, child: Fence) -> int:
    return children.cancel_rest(session, races.checkpoint(parent, "map"), ids=[child.workflow_id])


def test_what_a_child_starts_while_it_is_cancelled_is_cancelled_with_it(engine: Engine) -> None:
    parent, child = parent_and_child(engine)
    of_child: dict[str, Any] = {"parent_id": child.workflow_id, "parent_key": "start:refund"}
    grandchild = NewWorkflow(id=uuid7(), name="refund", input="{}", queue="default", **of_child)
    with races.transaction(engine) as starting, races.transaction(engine) as giving_up:
        children.start(starting.session, races.checkpoint(child, "start:refund"), [grandchild], active=1)
        cancelling = giving_up.begin_blocked(lambda session: give_up(session, parent, child))
        starting.session.commit()
        assert cancelling.result() == 2
        giving_up.session.commit()
    assert races.status_of(engine, child.workflow_id) is WorkflowStatus.CANCELLED
    assert races.status_of(engine, grandchild.id) is WorkflowStatus.CANCELLED


def test_one_key_under_two_names_is_two_children(engine: Engine) -> None:
    (parent,) = races.claimed_fences(engine)

    def start(session: Session, step: str, *names: str) -> list[str]:
        of_parent: dict[str, Any] = {"input": "{}", "queue": "default", "key": "k", "parent_id": parent.workflow_id}
        batch = [NewWorkflow(id=uuid7(), name=name, parent_key=step, **of_parent) for name in names]
        found: list[str] = json.loads(children.start(session, races.checkpoint(parent, step), batch, active=9))
        return found

    with Session(engine) as session:
        one, other = start(session, "first", "charge", "refund")
        assert start(session, "second", "charge", "refund") == [one, other]
        assert start(session, "third", "refund", "charge") == [other, one]
        assert one != other


def test_an_attempt_that_has_lost_its_workflow_cancels_none_of_its_children(engine: Engine) -> None:
    """It was frozen after its look; since then an operator may have put right what had failed."""
    parent, child = parent_and_child(engine)
    with Session(engine) as session, session.begin():
        stolen = parent._replace(token=uuid7())
        session.execute(update(Workflow).where(Workflow.id == parent.workflow_id).values(token=stolen.token))
        with pytest.raises(AttemptLost):
            give_up(session, parent, child)
        assert races.status_in(session, child.workflow_id) is WorkflowStatus.RUNNING
        assert give_up(session, stolen, child) == 1


# behaviour: A1
def test_a_start_that_reaches_the_server_after_its_call_was_cancelled_starts_nothing(engine: Engine) -> None:
    (parent,) = races.claimed_fences(engine)
    checkpoint = races.checkpoint(parent, "start:refund")
    child = NewWorkflow(
        id=uuid7(), name="refund", input="{}", queue="default", parent_id=parent.workflow_id, parent_key="start:refund"
    )
    with Session(engine) as session:
        failed = checkpoint._replace(status=StepStatus.FAILED, output=None, error='{"type": "cancelled"}')
        steps.settle(session, failed)
        session.commit()
        with pytest.raises(KeyNotVisibleError):  # nobody waits for it any more
            children.start(session, checkpoint, [child], active=1)
        assert session.get(Workflow, child.id) is None


def test_a_start_that_waits_behind_the_cancel_of_its_call_starts_nothing(engine: Engine) -> None:
    """The statement began before the cancel was recorded, and so does not see it."""
    (parent,) = races.claimed_fences(engine)
    checkpoint = races.checkpoint(parent, "start:refund")
    failed = checkpoint._replace(status=StepStatus.FAILED, output=None, error='{"type": "cancelled"}')
    child = NewWorkflow(
        id=uuid7(), name="refund", input="{}", queue="default", parent_id=parent.workflow_id, parent_key="start:refund"
    )
    with races.transaction(engine) as settling, races.transaction(engine) as late:
        assert steps.settle(settling.session, failed).status is StepStatus.FAILED
        starting = late.begin_blocked(lambda session: children.start(session, checkpoint, [child], active=1))
        settling.session.commit()
        with pytest.raises(KeyNotVisibleError):
            starting.result()
        late.session.commit()
    with Session(engine) as session:
        assert session.get(Workflow, child.id) is None


# With a rule for the key


RULES = {
    "unfinished": KeyRule("existing", "unfinished"),
    "refuse": KeyRule("refuse", "forever"),
    "replace": KeyRule("replace", "unstarted"),
    "cancel_running": KeyRule("cancel_running", "unfinished"),
}


def ruled(parent: Fence, cents: int = 1, key: str = "k") -> NewWorkflow:
    of_parent: dict[str, Any] = {"parent_id": parent.workflow_id, "parent_key": "start:refund", "key": key}
    return NewWorkflow(id=uuid7(), name="refund", input=f'{{"cents": {cents}}}', queue="default", **of_parent)


def inputs(engine: Engine) -> list[tuple[str, int]]:
    with Session(engine) as session:
        found = session.scalars(select(Workflow).where(Workflow.name == "refund").order_by(Workflow.id))
        return [(str(each.status), each.input["cents"]) for each in found]


# behaviour: D6
@pytest.mark.parametrize("rule", RULES)
def test_a_start_with_a_rule_that_is_carried_out_twice_has_one_effect(engine: Engine, rule: str) -> None:
    """Its acknowledgement was lost, and meanwhile others have gone on: the first outcome stands."""
    (parent,) = races.claimed_fences(engine)
    checkpoint = races.checkpoint(parent, "start:refund")
    child = ruled(parent)
    with Session(engine) as session, session.begin():
        first = children.start_ruled(session, checkpoint, child, RULES[rule])
        assert json.loads(first) == [str(child.id)]
    with Session(engine) as session, session.begin():
        session.execute(update(Workflow).where(Workflow.id == child.id).values(input={"cents": 5}))
    with Session(engine) as session, session.begin():
        assert children.start_ruled(session, checkpoint, child, RULES[rule]) == first
    assert inputs(engine) == [("pending", 5)]


# behaviour: D6
@pytest.mark.parametrize("rule", ["replace", "cancel_running"])
def test_a_start_with_a_rule_that_dies_before_its_commit_has_no_effect(engine: Engine, rule: str) -> None:
    first, second = races.claimed_fences(engine, 2)
    with Session(engine) as session, session.begin():
        children.start_ruled(session, races.checkpoint(first, "start:refund"), ruled(first), RULES[rule])
    checkpoint, child = races.checkpoint(second, "start:refund"), ruled(second, 2)
    with races.transaction(engine) as dying:
        children.start_ruled(dying.session, checkpoint, child, RULES[rule])
        dying.session.rollback()
    assert (inputs(engine), races.history_of(engine, second.workflow_id)) == ([("pending", 1)], [])
    with Session(engine) as session, session.begin():
        children.start_ruled(session, checkpoint, child, RULES[rule])
    done = [("pending", 2)] if rule == "replace" else [("cancelled", 1), ("pending", 2)]
    assert (inputs(engine), races.history_of(engine, second.workflow_id)) == (done, ["start:refund"])


@pytest.mark.parametrize("rule", RULES)
def test_an_attempt_that_has_lost_its_workflow_replaces_and_cancels_nothing(engine: Engine, rule: str) -> None:
    first, second = races.claimed_fences(engine, 2)
    with Session(engine) as session, session.begin():
        children.start_ruled(session, races.checkpoint(first, "start:refund"), ruled(first), RULES[rule])
        session.execute(update(Workflow).where(Workflow.id == second.workflow_id).values(token=uuid7()))
    with Session(engine) as session, session.begin(), pytest.raises(AttemptLost):
        children.start_ruled(session, races.checkpoint(second, "start:refund"), ruled(second, 2), RULES[rule])
    assert inputs(engine) == [("pending", 1)]


# behaviour: A1
@pytest.mark.parametrize("rule", RULES)
def test_a_start_with_a_rule_that_waits_behind_the_cancel_of_its_call_does_nothing(engine: Engine, rule: str) -> None:
    first, second = races.claimed_fences(engine, 2)
    with Session(engine) as session, session.begin():
        children.start_ruled(session, races.checkpoint(first, "start:refund"), ruled(first), RULES[rule])
    checkpoint = races.checkpoint(second, "start:refund")
    failed = checkpoint._replace(status=StepStatus.FAILED, output=None, error='{"type": "cancelled"}')

    def start(session: Session) -> str:
        return children.start_ruled(session, checkpoint, ruled(second, 2), RULES[rule])

    with races.transaction(engine) as settling, races.transaction(engine) as late:
        assert steps.settle(settling.session, failed).status is StepStatus.FAILED
        starting = late.begin_blocked(start)
        settling.session.commit()
        with pytest.raises(KeyNotVisibleError):
            starting.result()
        late.session.commit()
    assert inputs(engine) == [("pending", 1)]


@pytest.mark.parametrize("rule", RULES)
def test_two_parents_that_start_one_key_at_the_same_time(engine: Engine, rule: str) -> None:
    first, second = races.claimed_fences(engine, 2)
    mine, other = ruled(first), ruled(second, 2)
    with races.transaction(engine) as one, races.transaction(engine) as late:
        children.start_ruled(one.session, races.checkpoint(first, "start:refund"), mine, RULES[rule])
        checkpoint = races.checkpoint(second, "start:refund")
        starting = late.begin_blocked(lambda session: children.start_ruled(session, checkpoint, other, RULES[rule]))
        one.session.commit()
        if rule == "refuse":
            with pytest.raises(KeyTakenError):
                starting.result()
            return
        (found,) = json.loads(starting.result())
        late.session.commit()
    assert found == str(other.id if rule == "cancel_running" else mine.id)
    assert inputs(engine)[-1] == ("pending", 1 if rule == "unfinished" else 2)
