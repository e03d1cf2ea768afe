"""The commands `list`, `queues`, `workers` and `schedules`: filters, pages, and what reaches the terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, Select, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import WorkflowStatus, manage, models
from sqla_durable.store import workers
from sqla_durable.tools.cli.filters import Filters
from sqla_durable.tools.cli.output import print_table
from sqla_durable.tools.cli.reading import page
from sqla_durable.tools.cli.recent import finished
from tests.cli.commands import Called, Commands
from tests.store import plans, races

NOW = datetime.now(UTC)
ESCAPE = "no\x1b[2J\nmoney\u202e\x9b"


@pytest.fixture
def session(engine: Engine) -> Any:
    with Session(engine) as session:
        yield session


def failed(session: Session, **columns: Any) -> UUID:
    error = {"type": "shop:NoMoney", "message": ESCAPE}
    given: dict[str, Any] = {
        "status": WorkflowStatus.FAILED,
        "error": error,
        "started_at": NOW,
        "finished_at": NOW,
        **columns,
    }
    return races.enqueue(session, token=uuid7(), **given)[0]


def ids(called: Called) -> list[str]:
    return called.lines


# behaviour: M4
def test_filters_choose_and_all_of_them_must_fit(session: Session, command: Commands) -> None:
    old = UUID(int=manage.id_at(NOW - timedelta(days=2)).int + 1)
    schedule = models.Schedule(name="nightly", workflow="report", every=timedelta(days=1))
    session.add(schedule)
    made = {
        "old": races.enqueue(session, id=old, name="refund", queue="mail")[0],
        "paid": races.enqueue(session, key="k-1", by="ada", tags={"tenant": "7", "region": "eu"})[0],
        "other": races.enqueue(session, tags={"tenant": "8"}, input={"order": {"id": 7}, "note": "x"})[0],
        "nightly": races.enqueue(session, name="report", schedule="nightly", input={"order": {"id": 8}})[0],
        "broke": failed(session, queue="mail"),
    }
    made["child"] = races.enqueue(session, name="refund", parent_id=made["paid"], parent_key="start:refund")[0]

    def listed(**options: Any) -> set[str]:
        found = {each.id for each in session.execute(page(Filters(**options), limit=50, after=None))}
        return {name for name, each in made.items() if each in found}

    assert listed() == made.keys()
    assert listed(status=["failed"]) == {"broke"}
    assert listed(status=["failed", "pending"], queue=["mail"]) == {"broke", "old"}
    assert listed(name=["refund", "report"]) == {"old", "child", "nightly"}
    assert listed(key=["k-1"]) == listed(by=["ada"]) == {"paid"}
    assert listed(tag=["tenant=7"]) == listed(tag=["tenant=7", "region=eu"]) == {"paid"}
    assert listed(tag=["tenant=7", "region=us"]) == set()
    assert listed(schedule=["nightly"]) == {"nightly"}
    assert listed(parent=str(made["paid"])) == {"child"}
    assert listed(since="1d") == made.keys() - {"old"}
    assert listed(until="1d") == listed(until=(NOW - timedelta(hours=30)).isoformat()) == {"old"}
    assert listed(since="3d", until="36h") == {"old"}
    assert listed(error="money") == listed(error="NoMoney") == {"broke"}
    assert listed(where=["input.order.id=7"]) == {"other"}
    assert listed(where=["input.order.id=7", "input.note=y"]) == set()
    given = "--status", "pending", "--name", "refund", "--queue", "mail", "--since", "3d", "--until", "1d"
    assert command("list", "-q", *given).lines == [str(old)]
    for wrong in (("--status", "lost"), ("--since", "soon"), ("--tag", "x"), ("--where", "order=1"), ("--after", "7")):
        assert wrong[1] in command("list", *wrong, code=2).err


# behaviour: M4
def test_pages_follow_each_other_by_id_without_gaps(session: Session, command: Commands) -> None:
    made = [str(each) for each in races.enqueue(session, 5)][::-1]
    first = command("list", "-q", "--limit", 2)
    assert (first.lines, first.err) == (made[:2], f"There are more: --after {made[1]}\n")
    races.enqueue(session)
    second = command("list", "-q", "--limit", 2, "--after", made[1])
    assert (second.lines, second.err) == (made[2:4], f"There are more: --after {made[3]}\n")
    last = command("list", "-q", "--limit", 2, "--after", made[3])
    assert (last.lines, last.err) == (made[4:], "")


def test_table_has_columns_as_needed_and_escapes_what_terminals_obey(session: Session, command: Commands) -> None:
    (one,) = races.enqueue(session, name="evil\x1b[2J")
    plain = command("list")
    assert plain.lines[0].split() == ["id", "name", "status", "queue", "created", "waited", "took", "error"]
    assert r"evil\x1b[2J" in plain.out
    failed(session, by="ada", tags={"tenant": "7"}, started_at=NOW, finished_at=NOW + timedelta(seconds=90))
    called = command("list")
    assert called.lines[0].split() == [
        "id",
        "name",
        "status",
        "queue",
        "by",
        "tags",
        "created",
        "waited",
        "took",
        "error",
    ]
    assert called.lines[1].endswith(r"1m 30s  NoMoney: no\x1b[2J\nmoney\u202e\x9b")
    as_json = command("list", "--json")
    assert as_json.out.replace("\n", "").isprintable()
    row, other = map(json.loads, as_json.lines)
    assert (row["error_message"], row["took"], row["tags"]) == (ESCAPE, 90.0, {"tenant": "7"})
    assert (other["id"], other["name"], other["took"]) == (str(one), "evil\x1b[2J", None)


def test_error_is_cut_to_the_width_of_a_terminal_and_ids_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(writing, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        print_table(("id", "error"), [(UUID(int=7), "no money " * 20)], cut="error")
        print_table(("id", "error"), [("i" * 90, "no money " * 20)], cut="error")
        terminal.flush()
        monkeypatch.undo()
        printed = ""
        while printed.count("\n") < 4:
            printed += os.read(reading, 10_000).decode()
    header, row, _, long = printed.splitlines()
    os.close(reading)
    assert "\x1b[1m" in header
    assert row.startswith(f"{UUID(int=7)}  no money no money")
    assert len(row) == 100
    assert row.endswith("…")
    assert long == f"{'i' * 90}  {('no money ' * 20)[:19]}…"


def test_watch_prints_again_until_it_is_interrupted(
    session: Session, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without clearing, where the output is no terminal."""
    (first,) = races.enqueue(session)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt
        races.enqueue(session)

    monkeypatch.setattr("time.sleep", pause)
    called = command("list", "-q", "--watch", "3s")
    assert pauses == [3, 3]
    assert [called.lines[0], called.lines[2]] == [str(first)] * 2
    assert len(called.lines) == 3


def test_queues_with_their_limits_and_pauses(session: Session, command: Commands) -> None:
    minute = timedelta(minutes=1)
    manage.put_queue(session, "mail", concurrency=2, key_rate=(5, minute), fair=True, aging=minute)
    manage.put_queue(session, "bank", fifo="block")
    manage.pause_queue(session, "bank")
    manage.pause_key(session, "mail", "ada\x1b")
    session.commit()
    races.enqueue(session, 2, queue="mail")
    races.enqueue(session, status=WorkflowStatus.SUSPENDED, wake_at=NOW + minute)
    bank, default, mail = (line.split() for line in command("queues").lines[1:])
    assert bank[:5] == ["bank", "0", "0", "0", "0"]
    assert bank[5:8] == ["fifo", "block", "since"]
    assert default == ["default", "0", "0", "1", "0"]
    assert mail[:2] == ["mail", "2"]
    assert mail[3:6] == ["0", "0", "0"]
    assert " ".join(mail[6:]) == r"concurrency 2, key_rate 5 in 1m, fair, aging 1m keys ada\x1b"
    found = [json.loads(line) for line in command("queues", "--json").lines]
    assert [each["queue"] for each in found] == ["bank", "default", "mail"]
    assert (found[2]["pending"], found[2]["concurrency"], found[2]["paused_keys"]) == (2, 2, ["ada\x1b"])


def test_workers_with_their_leases(session: Session, command: Commands, engine: Engine) -> None:
    workers.beat(session, worker_id=uuid7(), name="dead", queues=["default"], lease=races.LEASE)
    session.commit()
    races.expire_leases(engine)
    races.claimed_fences(engine, 2)
    live, dead = (line.split() for line in command("workers").lines[1:])
    assert live[0] == "w"
    assert live[3:4] == ["left"] or live[2:3] == ["left"]
    assert "default" in live
    assert dead[:4] == ["dead", "expired", "1m", "ago"]
    (row, other) = (json.loads(line) for line in command("workers", "--json").lines)
    assert (row["executing"], row["is_alive"], other["is_alive"]) == (2, True, False)


def test_schedules_with_their_next_ticks_and_why_they_are_paused(session: Session, command: Commands) -> None:
    never = {"cron": ["0 0 1 1 *"], "tz": "No/Where"}
    session.add_all(
        [
            models.Schedule(name="nightly", workflow="report", cron=["0 3 * * *", "0 4 * * *"], tz="Europe/Berlin"),
            models.Schedule(name="often", workflow="report", every=timedelta(hours=1), paused_at=NOW, pause_reason="x"),
            models.Schedule(name="wrong", workflow="report", **never),
        ]
    )
    session.commit()
    nightly, often, wrong = command("schedules", "--next", 2).lines[1:]
    assert "0 3 * * * | 0 4 * * * Europe/Berlin" in nightly
    assert nightly.count(":00:00Z") == 2
    assert "every 1h" in often
    assert often.endswith("Z: x")
    assert "never: " in wrong
    found = [json.loads(line) for line in command("schedules", "--json").lines]
    assert [len(each["next_ticks"]) for each in found[:2]] == [1, 0]


@pytest.mark.new_database
def test_pages_and_rates_of_a_large_table_are_found_by_indexes(session: Session) -> None:
    plans.fill(session)
    few = "SELECT id FROM durable.workflow WHERE status = 'running' ORDER BY id LIMIT 5"
    session.execute(text(f"DELETE FROM durable.workflow WHERE status = 'running' AND id NOT IN ({few})"))
    session.execute(text("ANALYZE durable.workflow"))
    last = session.execute(text("SELECT id FROM durable.workflow ORDER BY id LIMIT 1 OFFSET 9000")).scalar_one()
    indexes: list[tuple[Filters, str]] = [
        (Filters(), "workflow_pkey"),
        (Filters(status=["failed"]), "workflow_failed_idx"),
        (Filters(status=["running"]), "workflow_running_idx"),
        (Filters(status=["failed", "running"]), "workflow_failed_idx"),
        (Filters(parent=str(last)), "workflow_parent_idx"),
        (Filters(name=["checkout"]), "workflow_pkey"),
        (Filters(since="1s"), "workflow_pkey"),
    ]
    for given, index in indexes:
        plan = explained(session, page(given, limit=50, after=None))
        assert plan.uses(index), (given, plan)
        assert not plan.scans("workflow"), given
    later = explained(session, page(Filters(), limit=50, after=last))
    assert later.uses("workflow_pkey")
    assert later.buffers() < 80
    hour = timedelta(hours=1)  # for what comes after all of these
    of_top = explained(session, finished(finished_since=NOW + hour, started_since=NOW + hour))
    assert of_top.uses("workflow_pkey")
    assert of_top.uses("workflow_failed_idx")
    assert of_top.buffers() < 20


def explained(session: Session, query: Select[Any]) -> plans.Plan:
    compiled = query.compile(session.connection(), compile_kwargs={"literal_binds": True})
    explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {compiled}"
    (plan,) = session.connection().exec_driver_sql(explain).scalar_one()
    return plans.Plan(plan["Plan"])


def test_help_of_a_process_imports_neither_sqlalchemy_nor_a_worker() -> None:
    script = (
        "import sys; from contextlib import suppress; from sqla_durable.tools.cli.application import app\n"
        "for each in ('list', 'show', 'tail', 'top', 'queues', 'workers', 'schedules'):\n"
        "    with suppress(SystemExit):\n"
        "        app([each, '--help'])\n"
        "print([each for each in ('sqlalchemy', 'sqla_durable.execution', 'rich') if each in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
