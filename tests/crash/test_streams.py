"""SIGKILL in the middle of a plain step that writes a stream and reports how far it is."""

from __future__ import annotations

import signal

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqla_durable import Workflow, read_stream
from tests.crash import child, ledger


@pytest.mark.parametrize(("name", "point"), [("reporting", "sync report"), ("reporting_async", "async report")])
def test_stream_items_of_a_killed_try_are_marked_with_their_attempt(
    database_url: str, engine: Engine, name: str, point: str
) -> None:
    # behaviour: C5 R1
    (workflow_id,) = ledger.start(engine, [name])
    with child.worker(database_url, child.Plan(point, 2)) as process:
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    with child.worker(database_url), Session(engine) as session:
        entries = list(read_stream(session, workflow_id, "story", str))
        ledger.wait_until_finished(engine)
    written = [(each.number, each.attempt, each.try_number, each.value.partition("/")[2]) for each in entries]
    assert written == [(0, 1, 1, "0"), (1, 1, 1, "1"), (2, 2, 1, "0"), (3, 2, 1, "1"), (4, 2, 1, "2")]
    with Session(engine) as session:
        record = session.get_one(Workflow, workflow_id)
        assert record.output == 0  # the second report came within a second of the first, and died with its worker
        assert [(each.key, each.value) for each in record.events] == [("status", "reporting")]
        assert [(each.attempt, each.tries, each.details) for each in record.steps] == [(1, 1, None), (2, 1, 2)]
