"""Log records say where they were logged: those of this package, and with a filter those of anybody."""

from __future__ import annotations

import logging

import pytest
import tenacity
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, WorkflowLogFilter
from tests.acceptance.shells import PATIENCE, POLL

theirs = logging.getLogger("tests.shop")


class Kept(logging.Handler):
    """Keeps the records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.addFilter(WorkflowLogFilter())

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def places(self, logger: str) -> list[tuple[object, ...]]:
        names = ("workflow_id", "workflow", "attempt", "step", "worker")
        found = [vars(each) for each in self.records if each.name == logger and " " in each.getMessage()]
        return [tuple(each[name] for name in names) for each in found]


def test_records_have_the_workflow_the_step_and_the_worker(session_factory: sessionmaker[Session]) -> None:
    durable = Durable()

    @durable.step(retry=tenacity.retry_if_exception_type(ValueError), stop=tenacity.stop_after_attempt(1))
    def charge() -> None:
        theirs.warning("in a step", extra={"worker": "mine"})
        raise ValueError("no money")

    @durable.workflow
    def pay() -> None:
        theirs.warning("in a workflow")
        charge()

    kept = Kept()
    for name in ("tests.shop", "sqla_durable"):
        logging.getLogger(name).addHandler(kept)
    try:
        theirs.warning("outside of one")
        with session_factory.begin() as session:
            workflow_id = pay.start(session).id
        worker = Worker(durable, sessionmaker=session_factory, poll_interval=POLL, name="till-1")
        with worker, pytest.raises(ValueError, match="no money"):
            pay.handle(session_factory, workflow_id).result(timeout=PATIENCE)
    finally:
        for name in ("tests.shop", "sqla_durable"):
            logging.getLogger(name).removeHandler(kept)
    assert kept.places("tests.shop") == [
        (None, None, None, None, "-"),
        (workflow_id, "pay", 1, None, "till-1"),
        (workflow_id, "pay", 1, "charge", "mine"),
    ]
    ours = [each for each in kept.places("sqla_durable.worker") if each[0] is not None]
    assert ours == [(workflow_id, "pay", 1, None, "till-1")]  # that it has failed, of the worker itself
