"""The commands that change workflows: what they change, refuse and ask, and what they write into the log."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable import Durable, Executor, Step, Workflow, WorkflowStatus, wait_signal, wait_update
from sqla_durable.errors import DecodingError
from sqla_durable.models import Audit
from sqla_durable.tools.cli import choosing
from tests.cli.invoking import CommandLine, log
from tests.manage.test_verbs import in_every_state, statuses
from tests.store import races
from tests.support.retained import ended, left

CANCELLED, PENDING = WorkflowStatus.CANCELLED, WorkflowStatus.PENDING


@pytest.fixture
def run(database_url: str) -> CommandLine:
    return CommandLine(database_url)


def enqueued(engine: Engine, count: int) -> list[UUID]:
    with Session(engine) as session:
        return races.enqueue(session, count)


def test_each_verb_changes_what_it_applies_to_and_is_in_the_log(run: CommandLine, engine: Engine) -> None:
    found = in_every_state(engine)
    with Session(engine) as session:
        session.add(Step(workflow_id=found["succeeded"], key="charge", name="charge", position=1, status="succeeded",
                         output=1, attempt=1, started_at=func.statement_timestamp()))  # fmt: skip
        session.commit()
    done = run("cancel", found["pending"], found["running"], "--yes", "--reason", "a storm", "--as", "ada")
    assert (done.code, done.out, done.err) == (0, "2 workflows cancelled.\n", "")
    assert run("resume", found["stopped"], "--quiet").out.split() == [str(found["stopped"])]
    (retried,) = run("retry", "--status", "failed", "--name", "checkout", "--yes", "--json").rows
    assert retried == {"verb": "retry", "id": str(found["failed"]), "name": "checkout"}
    assert run("change", found["delayed"], "--delay", "0", "--priority", "-3", "--to-queue", "mail").code == 0
    made = UUID(run("fork", found["succeeded"], "--from-step", "charge", "--input", '{"a": 1}', "-q").out.strip())
    assert run("rewind", "--all", "--to-step", "charge", "--yes").out == "1 workflow rewound.\n"
    assert run("delete", "--status", "cancelled", "--yes").out == "3 workflows deleted.\n"

    deleted = sorted([found["pending"], found["running"], found["cancelled"]])
    assert [each[:2] for each in log(engine)] == [
        (verb, "checkout")
        for verb in ("cancel", "cancel", "resume", "retry", "change", "fork", "rewind", "delete", "delete", "delete")
    ]
    assert [each[2] for each in log(engine)][2:7] == [
        found["stopped"], found["failed"], found["delayed"], made, found["succeeded"]
    ]  # fmt: skip
    assert sorted(each[2] for each in log(engine)[7:]) == deleted
    assert [each[3] for each in log(engine)][3:8] == [
        {"filters": {"status": ["failed"], "name": ["checkout"]}},
        {"to_queue": "mail", "priority": -3, "delay": "0"},
        {"from_step": "charge", "input": ["a"]},
        {"to_step": "charge"},
        {"filters": {"status": ["cancelled"]}},
    ]
    with Session(engine) as session:
        first, *_, last = session.scalars(select(Audit).order_by(Audit.id))
        assert (first.who, first.reason, last.reason) == ("ada", "a storm", None)
        assert last.who not in ("", "ada")
        assert session.get_one(Workflow, made).forked_from == found["succeeded"]
        changed = session.get_one(Workflow, found["delayed"])
        assert (changed.queue, changed.priority, changed.status) == ("mail", -3, PENDING)


def test_what_a_verb_does_not_apply_to_is_named_with_the_reason(run: CommandLine, engine: Engine) -> None:
    found, unknown = in_every_state(engine), uuid7()
    done = run("cancel", found["succeeded"], unknown, found["pending"], "--yes")
    assert (done.code, done.out) == (1, "1 workflow cancelled.\n")
    assert done.err.splitlines() == [
        f"{found['succeeded']} was not cancelled: workflow 'checkout' has succeeded already.",
        f"no workflow {unknown} is visible here: it was not cancelled.",
    ]
    reasons = {
        ("resume", found["failed"]): "has failed with an error of its own: retry it.",
        ("resume", found["running"]): "is running: resume is for what was cancelled, or stopped for crashes or a",
        ("retry", found["stopped"]): "was stopped for its crashes or its deadline: resume it.",
        ("retry", found["running"]): "is running: retry is for what has failed.",
        ("rewind", found["running"], "--to-step", "charge"): "has no record of a step 'charge': it has none.",
        ("fork", found["running"], "--from-step", "charge"): "has no record of a step 'charge': it has none.",
        ("change", found["running"], "--priority", "1"): "is running: only what is pending or suspended can be",
        ("change", found["suspended"], "--delay", "5m"): "has started: --delay and --at are for what has not.",
        ("delete", found["running"]): "is running: cancel it first.",
    }
    for arguments, reason in reasons.items():
        done = run(*arguments, *(() if arguments[0] in ("resume", "change", "fork") else ["--yes"]))
        assert (done.code, reason in done.err) == (1, True), (arguments, done)
    assert len(log(engine)) == 1


def test_fork_with_a_key_is_made_once(run: CommandLine, engine: Engine) -> None:
    (one,) = enqueued(engine, 1)
    keyed = "fork", one, "--new-key", "again", "--to-queue", "mail"
    shown = run(*keyed).out
    made = UUID(shown.split()[2])
    assert shown == f"{one} → {made}\n1 workflow forked.\n"
    again = run(*keyed)
    assert (again.code, "has been forked with this key already." in again.err) == (1, True)
    assert log(engine) == [("fork", "checkout", made, {"to_queue": "mail", "new_key": "again"})]
    with Session(engine) as session:
        forked = session.get_one(Workflow, made)
        assert (forked.key, forked.queue, forked.forked_from) == ("again", "mail", one)


def test_nothing_is_done_that_was_not_said_clearly(run: CommandLine, engine: Engine) -> None:
    (one,) = enqueued(engine, 1)
    refused = {
        ("cancel", "--yes"): "no workflows are chosen: name them by their ids, choose them by options such as",
        ("cancel", one, "--name", "checkout"): "by options, or use --all: only one of them.",
        ("cancel", one): "1 workflow will be cancelled with any children. Continue? There is no terminal",
        ("change", "--all", "--priority", "1"): "1 workflow will be changed. Continue? There is no terminal",
        ("cancel", "7"): "'7' is not the id of a workflow",
        ("cancel", one, "--as", " "): "--as ' ' is blank.",
        ("cancel", "--tag", "tenant", "--yes"): "--tag 'tenant' is not NAME=VALUE",
        ("fork", one, "--input", "[1]"): "--input is no JSON object",
        ("fork", "--all", "--new-key", "k"): "--new-key is the key of one workflow",
        ("change", one): "nothing is to be changed: add --to-queue",
        ("change", one, "--delay", "soon"): "--delay 'soon' is no duration",
        ("start", "checkout", "--input", "{"): "--input is not JSON",
        ("signal", one, "go", "yes"): "the payload is not JSON",
    }
    for arguments, message in refused.items():
        done = run(*arguments)
        assert (done.code, message in done.err) == (2, True), (arguments, done)
    counted = run("cancel", "--all", "--dry-run")
    assert (counted.code, counted.out) == (0, "1 workflow would be cancelled with any children.\n")
    assert run("delete", "--all", "--yes").out == "0 workflows deleted.\n"
    assert (statuses(engine), log(engine)) == ([PENDING], [])


def test_each_portion_is_committed_with_its_rows_of_the_log_or_not_at_all(run: CommandLine, engine: Engine) -> None:
    """What refuses the second portion does so at its commit, when its rows of the log are inserted."""
    ids = enqueued(engine, 5)
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE durable.workflow SET status = 'cancelled', finished_at = statement_timestamp()")
        )
        connection.execute(
            text("CREATE TABLE bill (workflow_id uuid REFERENCES durable.workflow DEFERRABLE INITIALLY DEFERRED)")
        )
        connection.execute(text("INSERT INTO bill VALUES (:id)"), {"id": sorted(ids)[1]})
    done = run("delete", "--all", "--yes", "--batch", "2", "--quiet")
    newest = sorted(ids, reverse=True)[:2]
    assert (done.code, sorted(map(UUID, done.out.split()), reverse=True)) == (1, newest)
    assert "2 workflows had been deleted before this, and still are." in done.err
    assert len(statuses(engine)) == 3
    assert sorted((each[2] for each in log(engine)), reverse=True) == newest


def test_workflow_is_started_by_name_once_for_a_key(run: CommandLine, engine: Engine) -> None:
    options = "--key", "k", "--queue", "mail", "--by", "ada", "--tag", "tenant=7", "--priority", "2", "--delay", "1h"
    first = run("start", "checkout", "--input", "-", *options, stdin='{"order_id": 1}')
    (again,) = run("start", "checkout", "--key", "k", "--json").rows
    assert again == {"verb": "start", "id": first.out.strip(), "name": "checkout", "is_new": False}
    assert "nothing was started" in run("start", "checkout", "--key", "k").err
    with Session(engine) as session:
        (made,) = session.scalars(select(Workflow))
        assert (str(made.id), made.input, made.queue, made.by) == (first.out.strip(), {"order_id": 1}, "mail", "ada")
        assert (made.tags, made.priority, made.status) == ({"tenant": "7"}, 2, WorkflowStatus.SUSPENDED)
    details = {"key": "k", "queue": "mail", "by": "ada", "tags": {"tenant": "7"}, "delay": "1h"}
    assert log(engine) == [("start", "checkout", made.id, details)]
    assert run("start", "checkout").err == "Started in queue 'default': without --app that of the code is not known.\n"
    assert "NUL" in run("start", "checkout", "--input", '{"a": "\\u0000"}').err


def test_code_checks_what_is_started_with_it(
    run: CommandLine, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "verbs_shop.py").write_text(
        "from datetime import date\n"
        "from sqla_durable import Durable\n"
        "durable = Durable(version='v1')\n"
        "@durable.workflow(queue='mail')\n"
        "def remind(day: date) -> None: ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    app = "--app", "verbs_shop:durable"
    wrong = run("start", "remind", "--input", '{"day": "soon"}', *app)
    assert (wrong.code, "--input does not fit workflow 'remind'" in wrong.err) == (2, True), wrong
    assert "stored" not in wrong.err
    assert "did you mean 'remind'?" in run("start", "remimd", *app).err
    assert run("start", "remind", "--input", '{"day": "2026-11-30"}', *app).code == 0
    with Session(engine) as session:
        row = session.execute(select(Workflow.input, Workflow.queue, Workflow.version)).one()
        assert tuple(row) == ({"day": "2026-11-30"}, "mail", "v1")


durable = Durable()


@durable.workflow
def cart() -> str:
    name = wait_signal("name", str)
    request = wait_update("add", int)
    request.reply(request.payload + 1)
    return name


def test_signal_and_update_reach_a_workflow(
    run: CommandLine, engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    workflow_id = run("start", "cart").out.strip()
    assert run("signal", workflow_id, "name", '"ada"', "--key", "k").out == "Signal 'name' was sent.\n"
    assert run("signal", workflow_id, "name", '"bob"', "--key", "k", "--json").rows[0]["is_new"] is False
    late = run("update", workflow_id, "add", "1", "--key", "u", "--wait", "0.01s")
    assert (late.code, "has not answered update" in late.err) == (1, True)
    with session_factory() as session:
        assert Executor(session).execute(cart, UUID(workflow_id)) == "ada"
    answered = run("update", workflow_id, "add", "1", "--key", "u", "--wait", "5s", "--json")
    assert json.loads(answered.out)["reply"] == 2
    assert [each[0] for each in log(engine)] == ["start", "signal", "update"]
    with session_factory() as session:
        waiting = cart.start(session)
        session.commit()
        Executor(session).execute_until_waiting(cart, waiting)
        warned = run("signal", str(waiting.id), "nmae")
    assert warned.err == "It does not wait for 'nmae' now, but for 'name': the signal is kept until it does.\n"
    ended = run("signal", workflow_id, "name")
    assert (ended.code, "has succeeded. Nothing was sent." in ended.err) == (1, True)


def test_tables_that_are_missing_are_named(empty_database_url: str) -> None:
    for command in (["cancel", "--all"], ["start", "checkout"], ["queue", "pause", "mail"], ["export"]):
        done = CommandLine(empty_database_url)(*command)
        assert (done.code, "the durable tables are not in" in done.err) == (1, True), done


def test_what_is_started_while_somebody_thinks_is_not_meant(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(number: int) -> None:
        with Session(engine) as session, session.begin():
            session.add_all(Workflow(name="reminder", input={}) for _ in range(number))

    def confirm(_question: str, *, yes: bool) -> None:
        assert not yes
        start(3)

    monkeypatch.setattr(choosing, "confirm", confirm)
    start(1)
    assert CommandLine(database_url)("cancel", "--name", "reminder").out == "1 workflow cancelled.\n"


def test_what_begins_to_fit_after_the_count_is_left(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = choosing.counted_rows

    def count_before(session: Session, meant: Any) -> int:
        found = count(session, meant)
        with Session(engine) as other:
            ended(other)
        return found

    monkeypatch.setattr(choosing, "counted_rows", count_before)
    assert CommandLine(database_url)("delete", "--all").out == "0 workflows deleted.\n"
    assert len(left(engine)) == 1


def test_a_fork_is_not_forked_again_whatever_the_clock_of_the_operator_says(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session(engine) as session, session.begin():
        session.add_all(Workflow(name="reminder", input={}) for _ in range(3))
    early = iter(range(1, 100))
    monkeypatch.setattr("sqla_durable.manage.forks.uuid7", lambda: UUID(int=next(early)))
    CommandLine(database_url)("fork", "--all", "--batch", "1", "--yes")
    assert len(left(engine)) == 6


def test_a_signal_of_a_wrong_type_is_mended_by_a_fork_from_its_wait(
    run: CommandLine, session_factory: sessionmaker[Session]
) -> None:
    durable = Durable()

    @durable.workflow
    def counting() -> int:
        return wait_signal("go", int)

    with session_factory() as session:
        made = counting.start(session).id
        session.commit()
        assert run("signal", made, "go", '"many"').code == 0
        with pytest.raises(DecodingError, match="signal 'go'"):
            Executor(session).execute(counting, made)
        session.commit()
        fork = UUID(run("fork", made, "--from-step", "signal:go", "-q").out.strip())
        assert run("signal", fork, "go", "3").code == 0
        assert Executor(session).execute(counting, fork) == 3


def test_a_server_that_does_not_answer_is_said_to_be_out_of_reach() -> None:
    refused = CommandLine("postgresql://nobody@127.0.0.1:1/none")("list")
    assert (refused.code, refused.err.startswith("sqla-durable: the database cannot be reached: ")) == (1, True)
