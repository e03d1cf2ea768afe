"""The commands `tail` and `top`: what starts, finishes and fails, found by indexes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import WorkflowStatus, manage
from sqla_durable.tools.cli import recent
from sqla_durable.tools.cli.recent import picture
from tests.cli.commands import Commands
from tests.manage import histories
from tests.store import races

ESCAPE = "no\x1b[2J"


@pytest.fixture
def session(engine: Engine) -> Any:
    with Session(engine) as session:
        yield session


@pytest.fixture
def acting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let something happen in each pause of a command, and Ctrl-C be pressed in the last one."""

    def act(*actions: Callable[[], object]) -> None:
        left = list(actions)

        def pause(_seconds: float) -> None:
            if not left:
                raise KeyboardInterrupt
            left.pop(0)()

        monkeypatch.setattr("time.sleep", pause)

    return act


def test_tail_prints_each_start_and_each_end_once(
    session: Session, command: Commands, acting: Callable[..., None]
) -> None:
    """Of what was unfinished before as well, and of what has started and ended between two polls."""
    before, other = histories.claimed(session), histories.claimed(session)
    races.enqueue(session)
    made: dict[str, UUID] = {}

    def first() -> None:
        histories.succeed(session, before)
        (made["new"],) = races.enqueue(session, name=f"evil{ESCAPE}", key="k-1")

    def second() -> None:
        histories.fail(session, other, ValueError(f"{ESCAPE} money"))
        made["short"] = histories.claimed(session, queue="default", priority=-1).workflow_id
        manage.cancel(session, made["short"])
        session.commit()

    acting(first, second, lambda: None)
    called = command("tail")
    assert called.out.replace("\n", "").isprintable()
    seen = [(line.split()[2], next(each for each in line.split() if len(each) == 36)) for line in called.lines]
    assert sorted(seen) == sorted(
        [
            ("started", str(made["new"])),
            ("started", str(made["short"])),
            ("succeeded", str(before.workflow_id)),
            ("failed", str(other.workflow_id)),
            ("cancelled", str(made["short"])),
        ]
    )
    (started,) = (line for line in called.lines if "evil" in line)
    assert started.endswith(rf"evilno\x1b[2J {made['new']} in queue default, key k-1")
    (failed,) = (line for line in called.lines if " failed " in line)
    assert failed.endswith(r"s: ValueError: no\x1b[2J money")


def test_tail_filters_and_ends_by_itself(session: Session, command: Commands, acting: Callable[..., None]) -> None:
    fences = [histories.claimed(session), histories.claimed(session)]

    def act() -> None:
        histories.fail(session, fences.pop())
        races.enqueue(session, name="refund", queue="mail")
        races.enqueue(session, name="refund")

    acting(act)
    called = command("tail", "--for", 0, "--name", "refund", "--queue", "mail", "--json")
    assert [json.loads(line)["queue"] for line in called.lines] == ["mail"]
    acting(act)
    (failed,) = command("tail", "--for", 0, "--status", "failed").lines
    assert " failed " in failed
    assert "'pending' is none of started, succeeded" in command("tail", "--status", "pending", code=2).err


def test_tail_warns_when_too_many_are_unfinished_to_follow_them_all(
    session: Session, command: Commands, acting: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "MOST_WATCHED", 2)
    fences = [histories.claimed(session) for _ in range(4)]

    def act() -> None:
        for each in fences:
            histories.fail(session, each)

    acting(lambda: None, act)
    called = command("tail")
    assert "More than 2 workflows are unfinished" in called.err
    assert len(called.lines) == 4  # failures are found all the same


def test_top_counts_what_has_finished_by_queue_worker_and_name(session: Session, command: Commands) -> None:
    now = datetime.now(UTC)

    def finished(seconds: float, *, ago: float = 1.0, **columns: Any) -> None:
        ended = now - timedelta(seconds=ago)
        begun: dict[str, Any] = {"started_at": ended - timedelta(seconds=seconds), "finished_at": ended}
        id_ = UUID(int=manage.id_at(ended - timedelta(seconds=seconds)).int + len(columns) + int(seconds * 1000))
        given: dict[str, Any] = {
            "status": WorkflowStatus.SUCCEEDED,
            "output": 1,
            "token": uuid7(),
            "worker_id": races.WORKER,
        }
        races.enqueue(session, id=id_, **given, **begun, **columns)

    for seconds in (1.0, 2.0, 3.0):
        finished(seconds, name="pay", queue="bank")
    finished(9.0, ago=120, name="pay", queue="bank")
    failed: dict[str, Any] = {
        "status": WorkflowStatus.FAILED,
        "error": {"type": "a:E"},
        "finished_at": now,
        "token": uuid7(),
    }
    races.enqueue(session, id=UUID(int=manage.id_at(now - timedelta(days=3)).int), name="old", queue="bank", **failed)
    histories.claimed(session)
    races.enqueue(session, 2, name="pay", queue="bank")

    found = picture(session, window=timedelta(seconds=60), started_within=timedelta(minutes=10))
    rates = {each["queue"]: each["rates"] for each in found.queues}
    assert rates["bank"][:2] == (4, 1)
    assert rates["default"] == (0, 0, None, None)
    by_name = {each["name"]: each for each in found.names}
    assert by_name["pay"]["rates"][:3] == (3, 0, timedelta(seconds=2))
    assert timedelta(seconds=2.8) < by_name["pay"]["rates"].p95 < timedelta(seconds=3)
    assert by_name["pay"]["pending"] == 2
    assert by_name["old"]["rates"][:2] == (1, 1)

    called = command("top")
    tables = {part.splitlines()[0]: part.splitlines()[1:] for part in called.out.strip().split("\n\n")}
    assert [each.split(",")[0] for each in tables] == ["Queues", "Workers", "Workflows"]
    (bank,) = (line.split() for line in tables["Queues, the last 1m"] if line.startswith("bank"))
    assert (bank[1], bank[-4:-2]) == ("2", ["0.0667", "1"])
    assert "\x1b" not in called.out
