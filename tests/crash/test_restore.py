"""A backup is restored to a point in time: the application's rows and the workflows are of the same moment."""

from __future__ import annotations

from collections.abc import Generator
from datetime import timedelta

import pytest
from sqlalchemy import Engine, NullPool, create_engine, func, select, text
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Step, StepStatus, Worker, Workflow, WorkflowStatus
from tests.store import races
from tests.support.clusters import Cluster, Clusters
from tests.support.domain import Entry

STEPS, WORKFLOWS = 30, 5
SHORT = {"poll_interval": timedelta(milliseconds=50), "lease": timedelta(seconds=1)}
durable = Durable()


@durable.step
def write(session: Session, account: str, number: int) -> None:
    session.add(Entry(account=account, cents=number))


@durable.workflow
def write_all(account: str) -> None:
    for number in range(STEPS):
        write(account=account, number=number)


@pytest.fixture
def backup(made: Clusters, cluster: Cluster) -> Cluster:
    return made.backup_of(cluster)


@pytest.fixture
def restored(backup: Cluster) -> Generator[Engine]:
    engine = create_engine(backup.url(), poolclass=NullPool)
    yield engine
    engine.dispose()


def test_after_a_restore_each_row_has_its_checkpoint_and_workflows_go_on(
    own: Engine, cluster: Cluster, backup: Cluster, restored: Engine
) -> None:
    maker = sessionmaker(own)
    with maker.begin() as session:
        for number in range(WORKFLOWS):
            write_all.start(session, f"account {number}")
    with Worker(durable, sessionmaker=maker, concurrency=WORKFLOWS, **SHORT):  # type: ignore[arg-type]
        races.wait_until(lambda: entries(own) > STEPS)
        with own.begin() as connection:
            connection.execute(text("SELECT pg_create_restore_point('in the middle')"))
        races.wait_until(lambda: unfinished(own) == 0)
    assert entries(own) == STEPS * WORKFLOWS
    cluster.stop("fast")

    backup.restore(cluster, "in the middle")
    races.wait_until(lambda: not is_in_recovery(restored))
    with Session(restored) as session:
        done = session.scalar(select(func.count()).where(Step.status == StepStatus.SUCCEEDED)) or 0
    assert STEPS < entries(restored) == done < STEPS * WORKFLOWS
    assert unfinished(restored) > 0
    with Worker(durable, sessionmaker=sessionmaker(restored), **SHORT):  # type: ignore[arg-type]
        races.wait_until(lambda: unfinished(restored) == 0)
    with Session(restored) as session:
        written = [(each.account, each.cents) for each in session.scalars(select(Entry))]
        statuses = session.scalars(select(Workflow.status)).all()
    assert sorted(written) == [(f"account {each}", number) for each in range(WORKFLOWS) for number in range(STEPS)]
    assert statuses == [WorkflowStatus.SUCCEEDED] * WORKFLOWS


def is_in_recovery(engine: Engine) -> bool:
    with engine.connect() as connection:
        return bool(connection.scalar(text("SELECT pg_is_in_recovery()")))


def entries(engine: Engine) -> int:
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(Entry)) or 0


def unfinished(engine: Engine) -> int:
    with Session(engine) as session:
        return session.scalar(select(func.count()).where(Workflow.finished_at.is_(None))) or 0
