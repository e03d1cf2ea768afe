"""Schedules that change while workers run, or from one start of a worker to the next."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine

from sqla_durable import Durable, Interceptor, Worker, manage
from tests.acceptance.shells import POLL
from tests.store import races
from tests.support.schedules import HOUR, insert, insert_due, make_due, row_of, started_by
from tests.worker.ticking import (
    Application,
    Sessions,
    until_finished,
    until_planned,
    until_polled,
    until_started,
)


def test_a_change_counts_from_the_next_tick_on_in_a_running_worker(engine: Engine, session_factory: Sessions) -> None:
    # behaviour: D5
    application = Application()
    with session_factory.begin() as session:
        manage.put_schedule(session, "ticking", application.checkout.bind(1), every=HOUR)
    with application.worker(session_factory):
        hourly = until_planned(engine)
        make_due(engine)
        until_finished(engine, 1)
        with session_factory.begin() as session:
            manage.put_schedule(session, "ticking", application.checkout.bind(2), cron="0 0 1 1 *")
        yearly = until_planned(engine)
        make_due(engine)
        until_finished(engine, 2)
    assert application.given == [1, 2]
    assert (hourly.minute, (yearly.month, yearly.day)) == (0, (1, 1))


def test_a_paused_one_passes_its_ticks_and_goes_on_with_the_next(engine: Engine, session_factory: Sessions) -> None:
    application = Application()
    insert_due(engine, ago=3 * HOUR, missed="run_all")
    with session_factory.begin() as session:
        manage.pause_schedule(session, "ticking", reason="too many mails")
    with application.worker(session_factory):
        until_polled(engine)
        assert row_of(engine).last_at is None
        with session_factory.begin() as session:
            manage.resume_schedule(session, "ticking")
        assert until_planned(engine) > datetime.now(UTC)
        assert started_by(engine) == []
        make_due(engine)
        until_finished(engine, 1)


def declaring(*names: str) -> Application:
    application = Application()
    for each in names:
        application.durable.schedule(every=HOUR, name=each)(application.checkout)
    return application


@pytest.mark.parametrize("others", [(), ("other",)], ids=["the last", "one of two"])
@pytest.mark.parametrize("is_paused", [False, True], ids=["", "paused by an operator"])
def test_what_is_gone_from_the_code_is_paused_and_comes_back_with_it(
    engine: Engine, session_factory: Sessions, others: tuple[str], is_paused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # behaviour: D1
    caplog.set_level(logging.INFO, "sqla_durable.worker")
    insert(engine, "by hand")
    with declaring("ticking", *others).worker(session_factory):
        until_planned(engine)
    if is_paused:
        with session_factory.begin() as session:
            manage.pause_schedule(session, "ticking")
    caplog.clear()
    with declaring(*others).worker(session_factory):
        row = row_of(engine)
        assert row.paused_at is not None
        assert row.pause_reason == (None if is_paused else "the code no longer declares it")
        assert ("schedule 'ticking' is paused: the code no longer declares it" in caplog.text) is not is_paused
        assert not [each for each in ("by hand", *others) if row_of(engine, each).paused_at]
        make_due(engine)
        until_polled(engine)
    assert started_by(engine) == []
    with declaring("ticking", *others).worker(session_factory):
        if is_paused:
            assert row_of(engine).paused_at is not None
        else:
            assert until_planned(engine) > datetime.now(UTC)


def test_a_worker_that_does_not_know_the_workflow_leaves_its_schedules_alone(
    engine: Engine, session_factory: Sessions
) -> None:
    with declaring("ticking").worker(session_factory):
        pass
    durable = Durable()

    @durable.schedule(every=HOUR)
    @durable.workflow
    def report() -> None: ...

    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        assert row_of(engine).paused_at is None


class Tracing(Interceptor):
    """Has another header for each start, as tracing has."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = iter(range(1_000))

    def start(self, workflow: str, headers: dict[str, str]) -> None:
        headers["trace"] = str(next(self._numbers))


def test_a_worker_that_starts_again_changes_no_plan(
    engine: Engine, session_factory: Sessions, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sqla_durable.worker")
    application = declaring("ticking")
    application.durable.intercept(Tracing())
    with application.worker(session_factory):
        until_planned(engine)
    make_due(engine)
    planned = row_of(engine).next_at
    caplog.clear()
    with application.worker(session_factory):
        (record,) = until_started(engine, 1)
    assert record.key == f"schedule ticking {planned:%Y-%m-%dT%H:%M:%S.%f}+00:00"
    assert "schedule 'ticking'" not in caplog.text


def test_a_worker_starts_while_a_caller_has_a_schedule_locked(engine: Engine, session_factory: Sessions) -> None:
    with declaring("ticking").worker(session_factory):
        pass
    with races.transaction(engine) as caller:
        manage.pause_schedule(caller.session, "ticking")
        with declaring("ticking").worker(session_factory):
            until_polled(engine)
