"""The commands that operate queues and schedules."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from sqla_durable import Durable, Queue, Schedule, Workflow, manage
from sqla_durable.models import QueueKey
from tests.cli.invoking import CommandLine, log
from tests.store import races

durable = Durable()


@durable.workflow
def report(day: str) -> str:
    return day


@pytest.fixture
def run(database_url: str) -> CommandLine:
    return CommandLine(database_url)


def test_queue_is_set_and_says_what_it_was(run: CommandLine, engine: Engine) -> None:
    made = run("queue", "set", "mail", "--concurrency", "10", "--rate", "100/1m", "--fair", "--weight", "ada=3")
    assert made.out == (
        "Queue 'mail': concurrency none → 10, rate none → 100/1m, fair no → yes, weight of ada 1 → 3.\n"
    )
    assert made.err == "Nobody claims from a queue 'mail', and nothing waits in it: is that its name?\n"
    changed = run("queue", "set", "mail", "--concurrency", "5", "--rate", "none", "--key-rate", "5/s", "--json")
    assert changed.rows[0]["changes"] == {
        "concurrency": {"from": 10, "to": 5},
        "rate": {"from": "100/1m", "to": None},
        "key_rate": {"from": None, "to": "5/1s"},
    }
    assert run("queue", "set", "mail", "--concurrency", "5").out == "Queue 'mail' is unchanged.\n"
    for option, value, message in (
        ("--rate", "5", "--rate '5' is not N/PERIOD"),
        ("--concurrency", "many", "'many' is no number; none removes the limit."),
        ("--weight", "ada", "--weight 'ada' is not KEY=N"),
        ("--weight", "ada=0", "--weight 'ada=0' has no number of 1 or more after the key"),
        ("--fifo", "maybe", "--fifo 'maybe' is none of skip, block; none removes it."),
        ("--while-suspended", "keep", "--while-suspended 'keep' is none of release, hold; none removes it."),
    ):
        assert message in run("queue", "set", "mail", option, value).err
    wrong: tuple[tuple[str, str, str | None], ...] = (
        ("--concurrency", "0", "--concurrency 0 is not an integer from 1 to "),
        ("--rate", "0/1m", "--rate 0 is not an integer from 1 to "),
        ("--while-suspended", "hold", None),
        ("--weight", "ada=x", "--weight 'ada=x' has no number of 1 or more after the key"),
    )
    for option, value, words in wrong:
        refused = run("queue", "set", "mail", option, value)
        assert (refused.code, words is None or words in refused.err) == (2 if words else 0, True), refused.err
    run("queue", "set", "mail", "--while-suspended", "release")
    with Session(engine) as session:
        row = session.get_one(Queue, "mail")
        assert (row.concurrency, row.rate, row.key_rate_period, row.fair) == (5, None, timedelta(seconds=1), True)
        assert session.get_one(QueueKey, ("mail", "ada")).weight == 3
    assert run("queue", "set", "mail", "--weight", "ada=5").out == "Queue 'mail': weight of ada 3 → 5.\n"
    assert [each[:3] for each in log(engine)] == [("queue set", "mail", None)] * 5


def test_queue_and_key_are_paused_once_and_resumed(run: CommandLine, engine: Engine) -> None:
    run("queue", "set", "mail", "--fair")
    assert run("queue", "pause", "mail").out == "Queue 'mail' is paused.\n"
    assert run("queue", "pause", "mail").out == "Queue 'mail' was already paused.\n"
    assert run("queue", "resume", "mail", "-q").out == "mail\n"
    again = run("queue", "resume", "mail")
    unknown = "Nobody claims from a queue 'mail', and nothing waits in it: is that its name?\n"
    assert (again.out, again.err) == ("Queue 'mail' was not paused.\n", unknown)
    assert run("queue", "drain", "mail").err == unknown
    assert "`sqla-durable schedules` lists" in run("schedule", "pause", "nigthly").err
    paused = run("queue", "pause", "mail", "--by", "ada")
    assert (paused.out, paused.err) == ("Key 'ada' of queue 'mail' is paused.\n", unknown)
    assert run("queue", "resume", "mail", "--by", "ada", "--json").rows[0]["changed"] is True
    assert [(each[0], each[3]) for each in log(engine)[1:]] == [
        ("queue pause", None),
        ("queue resume", None),
        ("queue pause", {"by": "ada"}),
        ("queue resume", {"by": "ada"}),
    ]


def test_drain_waits_for_what_is_claimed_yet(run: CommandLine, engine: Engine) -> None:
    assert run("queue", "drain", "default").code == 0
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        races.enqueue(session)
        busy = run("queue", "drain", "default", "--timeout", "0")
        assert (busy.code, busy.err) == (1, "After 0 1 workflow of queue 'default' is pending, and 1 running.\n")
        races.end(session, [races.success(fence)])
        session.commit()
        assert run("queue", "drain", "default", "--timeout", "0").code == 1
        manage.pause_queue(session, "default")
        session.commit()
    drained = run("queue", "drain", "default", "--timeout", "0")
    assert (drained.code, drained.err) == (0, "Queue 'default' is paused, and 1 workflow is pending in it.\n")
    assert log(engine) == []


def test_schedule_is_paused_resumed_run_and_backfilled(run: CommandLine, engine: Engine) -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    with Session(engine) as session:
        manage.put_schedule(session, "nightly", report.bind("x"), cron="0 3 * * *")
        session.commit()
    assert run("schedule", "pause", "nightly", "--reason", "holiday").out == "Schedule 'nightly' is paused.\n"
    assert run("schedule", "pause", "nightly", "--reason", "holiday").out == "Schedule 'nightly' was already paused.\n"
    with Session(engine) as session:
        assert session.get_one(Schedule, "nightly").pause_reason == "holiday"
    assert run("schedule", "run", "nightly").out == "Schedule 'nightly' has started its workflow.\n"
    assert "has started nothing now" in run("schedule", "run", "nightly").out
    assert run("schedule", "resume", "nightly", "--quiet").out == "nightly\n"
    period = "--since", begin.isoformat(), "--until", (begin + timedelta(days=3)).isoformat()
    assert len(run("schedule", "backfill", "nightly", *period, "--quiet").out.split()) == 3
    assert run("schedule", "backfill", "nightly", *period).out == "Schedule 'nightly': 0 workflows started.\n"
    unknown = run("schedule", "resume", "weekly")
    assert (unknown.code, "there is no schedule 'weekly'" in unknown.err) == (1, True)
    assert [each[:2] for each in log(engine)] == [
        (f"schedule {verb}", "nightly") for verb in ("pause", "run", "resume", "backfill")
    ]
    with Session(engine) as session:
        assert len(session.scalars(select(Workflow.id)).all()) == 4


def test_nothing_is_done_that_the_log_refuses(run: CommandLine, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE durable.audit ADD CHECK (verb <> 'queue pause')"))
    refused = run("queue", "pause", "mail")
    assert (refused.code, "the database refused" in refused.err) == (1, True)
    with Session(engine) as session:
        assert session.get(Queue, "mail") is None


def test_a_blank_key_is_refused_and_means_no_queue(run: CommandLine, engine: Engine) -> None:
    run("queue", "set", "mail", "--fair")
    for verb in ("pause", "resume"):
        assert "--by '' is blank: name a key" in run("queue", verb, "mail", "--by", "").err
    with Session(engine) as session:
        assert session.get_one(Queue, "mail").paused_at is None
