"""Workers that claim what some versions of the code have started, and no version is left waiting in silence."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow, WorkflowFunction, WorkflowStatus, start_many
from sqla_durable.errors import DefinitionError
from tests.acceptance.shells import PATIENCE, POLL
from tests.store.races import wait_until

Sessions = sessionmaker[Session]


class Deploy:
    """A version of the application; its workflow says which one executes it."""

    def __init__(self, version: str | None) -> None:
        self.durable = Durable(version=version)
        self.version = version

        def hello() -> str | None:
            return self.version

        self.hello: WorkflowFunction[[], str | None] = self.durable.workflow(hello)

    def worker(self, maker: Sessions, *versions: str, **options: Any) -> Worker:
        return Worker(self.durable, sessionmaker=maker, poll_interval=POLL, versions=list(versions) or None, **options)

    def started(self, maker: Sessions) -> UUID:
        with maker.begin() as session:
            record = self.hello.start(session)
            session.flush()
            return record.id

    def result(self, maker: Sessions, workflow_id: UUID) -> str | None:
        return self.hello.handle(maker, workflow_id).result(timeout=PATIENCE)


OLD, NEW, UNVERSIONED = Deploy("2026-11-01"), Deploy("2026-11-21"), Deploy(None)


def test_every_way_to_start_records_the_version(session_factory: Sessions) -> None:
    with session_factory.begin() as session:
        OLD.hello.start(session)
        OLD.hello.options(key="k").start(session)
        start_many(session, [OLD.hello.bind(), OLD.hello.options(key="m").bind(), UNVERSIONED.hello.bind()])
        session.flush()
        versions = [each.version for each in session.query(Workflow)]
    assert sorted(versions, key=str) == ["2026-11-01"] * 4 + [None]


# behaviour: X6
def test_each_worker_claims_its_own_version_and_what_has_none(session_factory: Sessions) -> None:
    ids = {deploy: [deploy.started(session_factory) for _ in range(5)] for deploy in (OLD, NEW, UNVERSIONED)}
    with OLD.worker(session_factory, "2026-11-01"), NEW.worker(session_factory, "2026-11-21"):
        for deploy in (OLD, NEW):
            assert {deploy.result(session_factory, each) for each in ids[deploy]} == {deploy.version}
        by = {UNVERSIONED.result(session_factory, each) for each in ids[UNVERSIONED]}
    assert by <= {OLD.version, NEW.version}


def test_without_versions_a_worker_claims_all(session_factory: Sessions) -> None:
    workflow_id = OLD.started(session_factory)
    with NEW.worker(session_factory):
        assert NEW.result(session_factory, workflow_id) == NEW.version


def test_several_versions_are_claimed(session_factory: Sessions) -> None:
    ids = [OLD.started(session_factory), NEW.started(session_factory)]
    with NEW.worker(session_factory, "2026-11-01", "2026-11-21"):
        assert [NEW.result(session_factory, each) for each in ids] == [NEW.version] * 2


@pytest.mark.parametrize("busy", [False, True])
def test_version_that_waits_is_named_in_the_log_of_a_busy_worker_too(
    session_factory: Sessions, caplog: pytest.LogCaptureFixture, busy: bool
) -> None:
    workflow_id = OLD.started(session_factory)
    others = [NEW.started(session_factory) for _ in range(50 * busy)]
    with NEW.worker(session_factory, "2026-11-21", concurrency=1):
        wait_until(lambda: "2026-11-01" in caplog.text, what="the warning")
        for each in others:
            NEW.result(session_factory, each)
    assert (
        "workflows of the versions '2026-11-01' wait in the queues 'default', and this worker claims '2026-11-21' only"
    ) in caplog.text
    with session_factory() as session:
        assert session.get_one(Workflow, workflow_id).status is WorkflowStatus.PENDING


def test_another_version_can_be_given_by_its_column(session_factory: Sessions) -> None:
    workflow_id = OLD.started(session_factory)
    with NEW.worker(session_factory, "2026-11-21"):
        with session_factory.begin() as session:
            session.get_one(Workflow, workflow_id).version = "2026-11-21"
        assert NEW.result(session_factory, workflow_id) == NEW.version


@pytest.mark.parametrize("versions", [[], "", " ", ["1", " "]])
def test_blank_versions_are_refused(session_factory: Sessions, versions: list[str] | str) -> None:
    with pytest.raises(ValueError, match="names no version: give at least one, or leave it out to claim all"):
        Worker(Durable(), sessionmaker=session_factory, versions=versions)


@pytest.mark.parametrize("version", ["", "  ", "\0", 7])
def test_version_that_cannot_be_stored_is_refused(version: str) -> None:
    with pytest.raises(DefinitionError, match="pass a text that is not blank, or leave it out"):
        Durable(version=version)
