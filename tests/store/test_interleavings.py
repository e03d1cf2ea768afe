"""Every operation beside every other at one workflow, in both orders, committed and rolled back.

The first has executed and holds its locks while the second begins; then the first commits or rolls back. Who waits, who
passes over the row and what becomes of it is asked of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import chain
from uuid import UUID

import pytest
from _pytest.mark import ParameterSet
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.models.base import StepStatus
from sqla_durable.store import Fence
from tests.store import races
from tests.store.model import Model, Operation, WouldBlock, compare
from tests.store.model_keepers import (
    Abandon,
    Beat,
    Cancel,
    Expire,
    MakeDue,
    Reclaim,
    ReclaimOne,
    Resume,
    WakeDue,
)
from tests.store.model_operations import (
    Claim,
    ClaimOne,
    Finish,
    FinishUnlocked,
    RecordBatch,
    RecordOne,
    Release,
    ReleaseUnlocked,
    Start,
    SuspendOne,
    Write,
)
from tests.support.databases import Databases


@dataclass(frozen=True)
class Scene:
    """One workflow, the attempt that has or had it, its worker and another one."""

    id: UUID
    fence: Fence
    worker: UUID
    other: UUID


DONE = StepStatus.SUCCEEDED
Script = Callable[[Scene], list[Operation]]


def scene() -> Scene:
    workflow_id = uuid7()
    return Scene(workflow_id, Fence(workflow_id, uuid7()), uuid7(), uuid7())


def write(at: Scene, key: str, status: StepStatus = DONE) -> Write:
    return Write(at.fence, key, status, attempt=1)


def lost(at: Scene) -> Fence:
    """Return an attempt that has lost the workflow before."""
    return Fence(at.id, at.other)


ENQUEUED: Script = lambda at: [Beat(at.worker), Start(at.id)]  # noqa: E731
CLAIMED: Script = lambda at: [*ENQUEUED(at), Claim(at.worker, at.fence.token)]  # noqa: E731

STATES: dict[str, Script] = {
    "pending": ENQUEUED,
    "running": CLAIMED,
    "orphaned": lambda at: [*CLAIMED(at), Expire(at.worker)],
    "due": lambda at: [*CLAIMED(at), RecordOne(write(at, "early")), SuspendOne(at.fence), MakeDue(at.id)],
    "cancelled": lambda at: [*CLAIMED(at), RecordOne(write(at, "early")), Cancel(frozenset({at.id}))],
}

OPERATIONS: dict[str, Script] = {
    "checkpoint": lambda at: [RecordOne(write(at, "charge"))],
    "batched-checkpoint": lambda at: [RecordBatch((write(at, "charge"),))],
    "batch-of-two-attempts": lambda at: [RecordBatch((Write(lost(at), "lost", DONE, 1), write(at, "charge")))],
    "try": lambda at: [RecordBatch((write(at, "charge", StepStatus.RETRYING),))],
    "finish": lambda at: [Finish(at.fence)],
    "batched-finish": lambda at: [FinishUnlocked(at.fence)],
    "heartbeat": lambda at: [Beat(at.worker)],
    "suspend": lambda at: [SuspendOne(at.fence)],
    "wake": lambda at: [WakeDue()],
    "cancel": lambda at: [Cancel(frozenset({at.id}))],
    "bulk-cancel": lambda at: [Cancel(queue="default")],
    "resume": lambda at: [Resume(frozenset({at.id}))],
    "reclaim": lambda at: [Reclaim()],
    "reclaim-one": lambda at: [ReclaimOne(at.id)],
    "reclaim-and-claim": lambda at: [Reclaim(), Beat(at.other), Claim(at.other, uuid7())],
    "abandon": lambda at: [Abandon(at.fence)],
    "release": lambda at: [Release(at.fence)],
    "batched-release": lambda at: [ReleaseUnlocked(at.fence)],
    "claim": lambda at: [Claim(at.other, uuid7())],
    "claim-one": lambda at: [ClaimOne(at.id, at.other, uuid7())],
}
SINGLE = [name for name in OPERATIONS if name != "reclaim-and-claim"]

FENCED = [
    "checkpoint",
    "batched-checkpoint",
    "batch-of-two-attempts",
    "try",
    "finish",
    "batched-finish",
    "suspend",
    "abandon",
    "release",
]
RECLAIMS = ["reclaim", "reclaim-one", "reclaim-and-claim"]
OF_ATTEMPT = [*FENCED, "batched-release", "heartbeat", "cancel", "bulk-cancel"]
EFFECTIVE = {
    "pending": ["claim", "claim-one", "cancel", "bulk-cancel", "heartbeat"],
    "running": OF_ATTEMPT,
    "orphaned": [*OF_ATTEMPT, *RECLAIMS],
    "due": ["wake", "cancel", "bulk-cancel"],
    "cancelled": ["resume"],
}
"""The operations that change something in a state: what the others do beside them is the question."""

PAIRS = [
    (state, first, second)
    for state, effective in EFFECTIVE.items()
    for first in effective
    for second in SINGLE
    # Without a live lease the attempt's own operations meet each other no differently.
    if state != "orphaned" or first in RECLAIMS or second in RECLAIMS
]

RECORDS = ("checkpoint", "batched-checkpoint", "batch-of-two-attempts")


@pytest.fixture(scope="module")
def one_engine(databases: Databases) -> Generator[Engine]:
    """One database for all the pairs."""
    with databases.migrated("durable") as url:
        engine = create_engine(url)
        yield engine
        engine.dispose()


@pytest.fixture
def tables(one_engine: Engine) -> Engine:
    """Empty tables."""
    with one_engine.begin() as connection:
        connection.execute(text("DELETE FROM durable.workflow"))
        connection.execute(text("DELETE FROM durable.worker"))
    return one_engine


class Stage:
    """The tables and their model, in which the same happens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.model = Model()

    def prepare(self, operations: list[Operation]) -> None:
        """Execute and commit."""
        with Session(self.engine) as session:
            self.execute(session, operations)
            session.commit()
        self.model.commit(session)

    def execute(self, session: Session, operations: list[Operation]) -> None:
        """Execute what does not wait."""
        for each in operations:
            assert each.perform(session) == self.model.execute(session, each), each

    def end(self, session: Session, ending: str) -> None:
        """Commit or roll back."""
        getattr(session, ending)()
        getattr(self.model, ending)(session)

    def compare(self) -> None:
        """Prove that both are the same."""
        with Session(self.engine) as session:
            compare(self.model, session)


INTERLEAVINGS = [(*pair, ending) for pair in PAIRS for ending in ("commit", "rollback")]


def _cases() -> list[ParameterSet]:
    """Return every other pair, in turn with one ending of the first and the other, and the rest for `--all`."""
    by_default = [number % 4 == number // 4 % 2 for number in range(len(INTERLEAVINGS))]
    return [
        pytest.param(*each, marks=[] if chosen else pytest.mark.thorough)
        for each, chosen in zip(INTERLEAVINGS, by_default, strict=True)
    ]


@pytest.mark.parametrize(("state", "first", "second", "ending"), _cases())
def test_two_operations_at_one_workflow(tables: Engine, state: str, first: str, second: str, ending: str) -> None:
    at, stage = scene(), Stage(tables)
    stage.prepare(STATES[state](at))
    (operation,) = OPERATIONS[second](at)
    # In this order: where the test fails, the first one's locks go before the other is closed, which may wait.
    with races.transaction(tables) as other, races.transaction(tables) as one:
        stage.execute(one.session, OPERATIONS[first](at))
        try:
            expected = stage.model.execute(other.session, operation)
        except WouldBlock:
            waiting = other.begin_blocked(operation.perform)
            stage.end(one.session, ending)
            expected, answer = stage.model.execute(other.session, operation), waiting.result()
        else:
            answer = other.begin(operation.perform).result()
            stage.end(one.session, ending)
        assert answer == expected
        stage.end(other.session, "commit")
    stage.compare()
    _no_write_of_a_lost_attempt(stage, at)


def _no_write_of_a_lost_attempt(stage: Stage, at: Scene) -> None:
    """Whatever happened, the attempt can write if and only if the workflow is still its own."""
    (row,) = stage.model.rows
    late: list[Operation] = [RecordOne(write(at, "late")), RecordBatch((write(at, "later"),)), Finish(at.fence)]
    owned = row.owned_by(at.fence)
    with Session(stage.engine) as session:
        stage.execute(session, late)
        session.commit()
    stage.model.commit(session)
    stage.compare()
    (after,) = stage.model.rows
    assert ({"late", "later"} <= after.steps.keys()) is owned
    assert ({"late", "later"} & after.steps.keys() != set()) is owned


def test_every_operation_is_first_somewhere() -> None:
    assert set(chain(*EFFECTIVE.values())) == set(OPERATIONS)
