"""`crash_everywhere` on workflows that survive every crash, and on some that do not."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Workflow, WorkflowStatus, models
from sqla_durable.testing import (
    CrashDifference,
    CrashReport,
    CrashTestError,
    CrashTimeoutError,
    Moment,
    crash_everywhere,
    forking,
)
from tests.store import races
from tests.support import processes
from tests.support.domain import Entry
from tests.support.forged import forged
from tests.support.sampling import thorough_cases
from tests.testing import application

ROOT = Path(__file__).parents[2]
SHORT = timedelta(seconds=8)


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork servers are forked, and need not import everything; those of the page and of the plugin are spawned."""
    monkeypatch.setattr(forking, "NEW_PROCESS", processes.inheriting)


@pytest.fixture(autouse=True)
def outside_world(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRASH_URL", database_url)


def starting(workflow: Any) -> Callable[[Session], Workflow]:
    numbers = itertools.count(1)

    def start(session: Session) -> Workflow:
        started: Workflow = workflow.start(session, f"account {workflow.name}/{next(numbers)}.")
        return started

    return start


def entries(session: Session, workflow: Workflow) -> list[tuple[int, str]]:
    rows = session.scalars(select(Entry).where(Entry.account == workflow.input["account"]))
    return sorted((each.cents, (each.note or "").removeprefix(f"{workflow.id}/")) for each in rows)


def crash(workflow: Any, url: str, make_worker: Any = application.make_worker, **options: Any) -> CrashReport:
    settings: dict[str, Any] = {"start": starting(workflow), "end_state": entries, **options}
    return crash_everywhere(make_worker, url, **settings)


def require_nothing_left(engine: Engine) -> None:
    assert [each for each in multiprocessing.active_children() if "sqla-durable" in each.name] == []
    races.wait_until(lambda: others(engine) == 0, what="the end of the workers' connections")
    with Session(engine) as session:
        assert session.scalars(select(models.Worker)).all() == []


def others(engine: Engine) -> int:
    """How many other backends there are in this database."""
    statement = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend'"
    )
    with engine.connect() as connection:
        return int(connection.execute(statement).scalar_one())


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("workflow", "make_worker"),
    [
        (application.transfer, application.make_worker_sync),
        *thorough_cases([(application.transfer_async, application.make_worker_asyncpg)]),
    ],
    ids=["sync psycopg", "async asyncpg"],  # and async psycopg in tests/crash/test_everywhere.py
)
def test_a_sound_workflow_is_killed_at_every_point_and_ends_the_same(
    database_url: str, engine: Engine, workflow: Any, make_worker: Any, thorough: bool
) -> None:
    """At every moment with `--all`, and in tests/crash/test_everywhere.py."""
    moments = list(Moment) if thorough else [Moment.INSIDE]
    report = crash(workflow, database_url, make_worker, moments=moments)
    commits = max(each.commit for each in report.killed)
    assert commits >= 4, "a claim, two steps with a session and a plain one; the outcome may go with the last"
    assert {(each.commit, each.moment) for each in report.killed} >= {
        (commit, moment) for commit in range(1, commits) for moment in moments
    }
    written = " ".join(each.writes for each in report.killed)
    for each in ("claim", "rows of entry", "checkpoint of step 'call'", "outcome: succeeded"):
        assert each in written
    assert report.executions >= report.points + 2 + len(moments)
    assert str(report).count("\n") == report.points
    assert report.end_state.domain == [(0, "call"), (1, ""), (2, "")]
    require_nothing_left(engine)
    with engine.connect() as connection:
        queues = connection.execute(text("SELECT DISTINCT queue, status FROM durable.workflow")).all()
        attempts = connection.execute(text("SELECT max(attempt) FROM durable.workflow")).scalar_one()
    assert [tuple(each) for each in queues] == [("default", "succeeded")]
    assert attempts == 2


def test_a_sound_workflow_over_asyncpg_is_killed_inside_its_commits_and_ends_the_same(
    database_url: str, engine: Engine
) -> None:
    """Where the drivers differ: a COMMIT is sent and its answer not awaited."""
    report = crash(application.brief_async, database_url, application.make_worker_asyncpg, moments=[Moment.INSIDE])
    assert report.points >= 2, "a claim and a step with a session"
    assert report.end_state.domain == [(1, "")]
    require_nothing_left(engine)


# behaviour: R7
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("workflow", "moments", "least", "domain"),
    [
        # a claim, a beginning and a step with a session; a claim, three beginnings and two such steps
        (application.brief_in_time, [Moment.AFTER], 3, [(1, "")]),
        *thorough_cases([(application.transfer_in_time, [Moment.BEFORE, Moment.AFTER], 6, [(1, ""), (2, "")])]),
    ],
    ids=["one step", "three steps"],
)
def test_steps_with_a_total_timeout_are_killed_at_every_point_their_beginnings_included(
    database_url: str, engine: Engine, workflow: Any, moments: list[Moment], least: int, domain: object
) -> None:
    report = crash(workflow, database_url, moments=moments)
    assert max(each.commit for each in report.killed) >= least
    assert report.end_state.domain == domain
    require_nothing_left(engine)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("workflow", "points"),
    [
        (application.brief, ["claim", "rows of entry, checkpoint of step 'credit'"]),
        *thorough_cases(
            [
                (
                    application.transfer,
                    [
                        "claim",
                        "rows of entry, checkpoint of step 'credit'",
                        "checkpoint of step 'call'",  # its first try
                        "rows of entry",
                    ],
                )
            ]
        ),
    ],
    ids=["one step", "three steps"],
)
def test_executions_in_parallel_find_the_same_points(
    database_url: str, engine: Engine, workflow: Any, points: list[str]
) -> None:
    """Each worker finds what the dead ones of others have left, and takes it over at some time; that is no point."""
    start_one = starting(workflow)

    def start(session: Session) -> Workflow:
        with forged(session):
            session.execute(
                text(
                    "INSERT INTO durable.workflow (name, queue, status, token, worker_id, started_at) "
                    "VALUES ('left', 'elsewhere', 'running', gen_random_uuid(), gen_random_uuid(), "
                    "statement_timestamp())"
                )
            )
        return start_one(session)

    report = crash(
        workflow,
        database_url,
        application.make_worker_sync,
        processes=2,
        moments=[Moment.AFTER],
        start=start,
    )
    assert [each.commit for each in report.killed] == list(range(1, report.points + 1))
    assert [each.writes for each in report.killed[: len(points)]] == points
    require_nothing_left(engine)


@pytest.mark.parametrize("durable_schema", ["tenant_7"], indirect=True)
def test_tables_may_be_in_a_schema_of_another_name(database_url: str, engine: Engine) -> None:
    report = crash(
        application.brief,
        database_url,
        application.make_worker_translated,
        sessionmaker=sessionmaker(engine),
        moments=["before"],
    )
    assert report.points >= 2, "a claim and a step with a session"


def test_heartbeats_are_no_points(database_url: str) -> None:
    report = crash(application.brief, database_url, application.make_worker_with_short_lease, moments=[Moment.BEFORE])
    assert all(each.writes for each in report.killed)
    assert report.points <= 4, "a heartbeat every 20 ms would make many more"


def test_a_workflow_may_be_meant_to_fail(database_url: str) -> None:
    report = crash(application.failing, database_url, status=WorkflowStatus.FAILED, moments=[Moment.BEFORE])
    assert report.end_state.error == "builtins:LookupError"
    assert report.end_state.steps == {
        "credit": "succeeded",
        "credit#2": "succeeded",
        "refuse": "failed builtins:LookupError",
    }


# What it must find


@pytest.mark.parametrize("processes", [*thorough_cases([1]), 2])
def test_an_effect_that_comes_twice_is_found(database_url: str, engine: Engine, processes: int) -> None:
    with pytest.raises(CrashDifference) as caught:
        crash(application.careless, database_url, processes=processes, moments=[Moment.BEFORE])
    point = caught.value.point
    assert point is not None
    assert point.moment is Moment.BEFORE
    assert "checkpoint of step 'careless_call'" in point.writes
    assert caught.value.expected.domain == [(0, "call"), (1, "")]
    assert caught.value.found.domain == [(0, "call"), (0, "call"), (1, "")]
    message = str(caught.value)
    assert message.startswith(f"killed before commit {point.commit} (checkpoint of step 'careless_call'")
    assert "+{'end_state': [(0, 'call'), (0, 'call'), (1, '')]" in message
    assert f"workflow 'careless' {caught.value.workflow_id}: succeeded, attempt 2" in message
    assert "2. careless_call: succeeded" in message
    require_nothing_left(engine)


def test_a_step_that_commits_on_a_second_connection_is_found(database_url: str) -> None:
    with pytest.raises(CrashDifference, match="the other half") as caught:
        crash(application.torn_apart, database_url, moments=[Moment.BEFORE])
    assert caught.value.point is not None
    assert "checkpoint of step 'torn'" in caught.value.point.writes


def test_a_result_that_depends_on_the_attempt_is_found(database_url: str) -> None:
    with pytest.raises(CrashDifference) as caught:
        crash(application.attempted, database_url, moments=[Moment.AFTER])
    assert caught.value.expected.values["output"] == 1
    assert caught.value.found.values["output"] == 2


# Bad input


@pytest.mark.parametrize(
    ("make_worker", "message"),
    [
        (application.unimportable(), "define it at the top level of a module"),
        (application.make_worker_that_fails, "(?s)no worker today.*this is what it printed"),
        (application.make_nothing, "let it return a sqla_durable.Worker"),
        (application.make_worker_that_exits, "(?s)ended by itself, with exit code 3.*workflow 'transfer'"),
        (application.make_worker_of_one_queue, r"is in queue 'default', and the worker claims from \['mail'\] only"),
    ],
)
def test_a_worker_that_cannot_work_is_an_error_that_says_why(
    database_url: str, engine: Engine, make_worker: Any, message: str
) -> None:
    with pytest.raises(CrashTestError, match=message):
        crash(application.transfer, database_url, make_worker)
    require_nothing_left(engine)


def test_a_worker_that_does_not_know_the_workflow_is_an_error(database_url: str) -> None:
    with pytest.raises(CrashTestError, match=r"does not know workflow 'transfer_async', only \['brief', 'transfer'\]"):
        crash(application.transfer_async, database_url, application.make_worker_sync)


def test_a_workflow_that_hangs_is_an_error_in_time(database_url: str, engine: Engine) -> None:
    with pytest.raises(CrashTimeoutError, match=r"(?s)within 0:00:08.*'stuck' .*: running.*stuck for account"):
        crash(application.stuck, database_url, timeout=SHORT)
    require_nothing_left(engine)


def test_a_workflow_that_fails_undisturbed_is_an_error_unless_it_is_meant_to(database_url: str) -> None:
    with pytest.raises(CrashTestError, match=r"(?s)pass status=WorkflowStatus.FAILED .*LookupError"):
        crash(application.failing, database_url)


def _same(session: Session) -> Workflow:
    return application.transfer.options(key="one").start(session, "one")


def _nothing(_session: Session) -> None: ...


def _id(_session: Session, workflow: Workflow) -> object:
    return workflow.id


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"start": _nothing}, CrashTestError, "let it return the Workflow"),
        ({"start": _same}, CrashTestError, "which is not new"),
        ({"end_state": _id}, CrashTestError, "Leave out of end_state"),
        ({"moments": []}, ValueError, "name at least one"),
        ({"processes": 0}, ValueError, "at least 1"),
        ({"timeout": 3}, Exception, "timeout"),
    ],
    ids=["no workflow", "same key", "an id in the end state", "no moments", "no processes", "a number of seconds"],
)
def test_bad_arguments_are_refused(
    database_url: str, engine: Engine, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        crash(application.transfer, database_url, application.make_worker_sync, **options)
    require_nothing_left(engine)


# No leftovers


@pytest.mark.parametrize("processes", [*thorough_cases([1]), 2])
def test_an_interrupt_leaves_nothing_behind(database_url: str, engine: Engine, processes: int) -> None:
    calls = itertools.count(1)

    def interrupted(_session: Session, _workflow: Workflow) -> int:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return 0

    with pytest.raises(KeyboardInterrupt):
        crash(application.transfer, database_url, processes=processes, end_state=interrupted)
    require_nothing_left(engine)


@pytest.mark.parametrize("kill", [*thorough_cases([signal.SIGINT]), signal.SIGKILL])
def test_the_death_of_the_test_is_that_of_its_workers(
    database_url: str, engine: Engine, kill: signal.Signals, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from sqla_durable.testing import crash_everywhere\n"
        "from tests.testing import application\n"
        "if __name__ == '__main__':\n"
        # What a shell starts in the background ignores it, and so does all that this starts.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    start = lambda session: application.stuck.start(session, 'a')\n"
        "    url = os.environ['CRASH_URL']\n"
        "    crash_everywhere(application.make_worker, url, start=start, end_state=lambda *_: 0)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        races.wait_until(lambda: _runs(engine), what="the workflow's claim", seconds=30)
        os.killpg(process.pid, kill) if kill is signal.SIGINT else process.send_signal(kill)
        assert process.wait(30) != 0
        races.wait_until(lambda: others(engine) == 0, what="the end of the worker's connections")
    finally:
        process.kill()
        process.wait()


def _runs(engine: Engine) -> bool:
    with Session(engine) as session:
        return session.scalar(select(Workflow.id).where(Workflow.status == WorkflowStatus.RUNNING)) is not None
