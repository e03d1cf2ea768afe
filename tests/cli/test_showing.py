"""The command `show`: what a workflow has done, what it waits for, and why it does not start."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import tenacity
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from sqla_durable import (
    Durable,
    Encryption,
    Executor,
    create_callback,
    manage,
    models,
    parallel,
    send_signal,
    set_event,
    sleep,
    start_child,
    wait_signal,
    wait_update,
)
from sqla_durable.definitions.failure import Failure
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import Completion, attempts, workers
from tests.cli.commands import Called, Commands
from tests.manage import histories
from tests.store import races

HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\x9b2J"
durable = Durable()


@durable.step
def reserve(order_id: int) -> dict[str, int]:
    return {"order": order_id}


@durable.step(wait=tenacity.wait_fixed(3_600), stop=tenacity.stop_after_attempt(5))
def charge(order_id: int) -> None:
    raise ConnectionError(f"no route to {ESCAPE}")


@durable.workflow
def refund(order_id: int) -> str:
    return wait_signal("never", str)


@durable.workflow
def approval(order_id: int, note: str) -> str:
    reserve(order_id)
    set_event("progress", {"step": "reserved"})
    child = start_child(refund, order_id)
    done = parallel(
        lambda: wait_signal("approved", str, timeout=HOUR),
        lambda: wait_signal("a", str, step_key="own key"),
        lambda: sleep(HOUR),
        lambda: wait_update("price", int),
        lambda: create_callback(str).result(),
        lambda: child.result(),
        lambda: charge(order_id),
    )
    return str(done)


@pytest.fixture
def session(engine: Engine) -> Any:
    with Session(engine) as session:
        yield session


# behaviour: M5
def test_suspended_workflow_is_shown_with_its_steps_and_all_that_it_waits_for(
    session: Session, command: Commands
) -> None:
    record = Executor(session).run_until_waiting(approval, 7, "x" * 600)
    workflow_id, child_id = record.id, record.children[0].id
    send_signal(session, workflow_id, "unasked", {"by": ESCAPE}, key="s-1")
    session.add(models.Audit(who="ada", verb="resume", workflow_id=workflow_id, reason="tried\nit"))
    session.commit()

    shown = command("show", workflow_id)
    for awaited in (
        "for signal 'approved', for ",
        "for signal 'a' in step 'own key', for ",
        "for a timer, for ",
        "for update 'price', for ",
        "callback",
        "for try 2 of step 'lambda#7/charge', until ",
        f"for child refund {child_id} (pending), started ",
    ):
        assert sum(awaited in line for line in section(shown, "Waits")) == 1, awaited
    assert len(section(shown, "Waits")) == 7
    steps = {line.split()[1]: line for line in section(shown, "Steps")}
    assert "succeeded  1" in steps["reserve"]
    assert steps["reserve"].endswith('s  {"order": 7}')
    assert "waiting" in steps["lambda/signal:approved"]
    assert "(a token)" in steps["lambda#5/create_callback"]
    assert steps["lambda#7/charge"].endswith(r"ConnectionError: no route to \x1b]0;owned\x07\x1b[2J\u202e\x9b2J")
    assert section(shown, "Children") == [f"refund {child_id} pending"]
    assert section(shown, "Events")[1].startswith('progress  {"step": "reserved"}')
    assert "unasked  s-1" in section(shown, "Sent and not taken")[1]
    assert r"ada  resume  tried\nit" in section(shown, "What operators did")[1]
    assert f"{'x' * 480}" in shown.out
    assert f"{'x' * 600}" not in shown.out
    assert "--full shows all" in shown.out
    assert printable(shown.out)

    whole = command("show", workflow_id, "--full")
    assert f"{'x' * 600}" in whole.out
    assert printable(whole.out)
    as_json = command("show", workflow_id, "--json")
    assert printable(as_json.out)
    (found,) = map(json.loads, as_json.lines)
    assert found["id"] == str(workflow_id)
    assert found["input"] == {"order_id": 7, "note": "x" * 600}
    assert [each["key"] for each in found["steps"]][:3] == ["reserve", "set_event(progress)", "start:refund"]
    assert found["signals"][0]["payload"] == {"by": ESCAPE}
    assert found["children"][0]["id"] == str(child_id)
    assert found["audit"][0]["who"] == "ada"
    assert len(found["waits"]) == 7


def section(called: Called, title: str) -> list[str]:
    """Return the lines of one part of what was printed."""
    _, _, rest = called.out.partition(f"\n{title}\n")
    assert rest, title
    return [line.strip() for line in rest.partition("\n\n")[0].splitlines()]


def printable(text: str) -> bool:
    return text.replace("\n", "").isprintable()


def test_pending_running_and_dead_are_explained(session: Session, command: Commands, engine: Engine) -> None:
    """And a delayed start, a backoff after crashes, an executor, and deferred children."""
    fence = histories.claimed(session)
    running = command("show", fence.workflow_id)
    assert section(running, "Runs now") == ["in an executor, or on a worker whose row is gone"]
    workers.beat(
        session,
        worker_id=races.WORKER,
        name="ada",
        queues=["default"],
        lease=MINUTE,
        doing=json.dumps({str(fence.workflow_id): {"charge": [2, 5.0]}}),
    )
    session.commit()
    (worker, step) = section(command("show", fence.workflow_id), "Runs now")
    assert worker.startswith("on worker 'ada', last heartbeat ")
    assert step.startswith("step 'charge', try 2, running for 5")
    races.expire_leases(engine)
    (dead, *_) = section(command("show", fence.workflow_id), "Runs now")
    assert "whose lease expired 1m ago" in dead

    manage.pause_queue(session, "default")
    (paused,) = races.enqueue(session, priority=7, by="tenant", key="k", tags={"a": "b"})
    pending = command("show", paused)
    assert "queue 'default' has been paused since " in section(pending, "Does not start, because")[0]
    for fact in (
        "priority   7",
        "by         tenant",
        "key        k",
        'tags       {"a": "b"}',
        "status     pending for",
    ):
        assert f"  {fact}" in pending.out

    def waits(**columns: Any) -> str:
        (workflow_id,) = races.enqueue(session, status=WorkflowStatus.SUSPENDED, **columns)
        (line,) = section(command("show", workflow_id), "Waits")
        return line

    due = datetime(2999, 1, 1, tzinfo=UTC)
    assert re.fullmatch(r"for its start, for .* so far, until 2999-01-01 00:00:00Z", waits(wake_at=due))
    crashed = waits(wake_at=due, crashes=2, attempt=3, started_at=datetime.now(UTC))
    assert crashed.startswith("for its next attempt, after 2 crashes in a row, until ")
    crashed_once = waits(wake_at=due, crashes=1, attempt=2, started_at=datetime.now(UTC))
    assert crashed_once.startswith("for what is not recorded as a step, until ")
    assert "its parent starts it when others of the children have ended" in waits(parent_id=paused)
    assert waits(started_at=datetime.now(UTC), wake_at=due).startswith("for what is not recorded as a step, until ")


def test_failed_workflow_has_its_error_and_with_full_the_traceback(session: Session, command: Commands) -> None:
    parent = histories.claimed(session, key="parent")
    histories.record(session, [histories.step(parent, "charge", 1, histories.FAILED)])
    for number in range(60):
        races.enqueue(session, parent_id=parent.workflow_id, parent_key=f"start:{number}")
    error = Failure.of(ValueError(f"no {ESCAPE} money"))
    ended = Completion(
        parent, WorkflowStatus.FAILED, error=json.dumps({**json.loads(error.to_json()), "traceback": "a\nb\x1b[2J"})
    )
    assert attempts.finish(session, ended)
    session.commit()

    failed = command("show", parent.workflow_id)
    assert r"  error      ValueError: no \x1b]0;owned" in failed.out
    assert "status     failed " in failed.out
    assert section(failed, "Steps")[-1].endswith("ConnectionError: refused")
    children = section(failed, "Children")
    assert len(children) == 51
    assert children[-1].startswith("and more: `list --parent ")
    assert "Waits" not in failed.out
    whole = command("show", parent.workflow_id, "--full")
    assert "    a\n    b\\x1b[2J\n" in whole.out
    assert len(section(whole, "Children")) == 60


def test_unknown_id_and_text_that_is_none_are_refused(command: Commands) -> None:
    unknown = UUID(int=7)
    assert f"{unknown}" in command("show", unknown, code=1).err
    assert "'seven' is not the id of a workflow" in command("show", "seven", code=2).err


def test_schema_that_is_missing_or_newer_is_named(command: Commands, engine: Engine) -> None:
    assert "the durable tables are not in" in command("list", "--schema", "elsewhere", code=1).err
    with engine.begin() as connection:
        connection.execute(text("COMMENT ON TABLE durable.workflow IS 'sqla-durable for durable_0009 and later'"))
    for name in ("list", "queues", "workers", "schedules", "top", "tail"):
        assert "newer than this package" in command(name, code=1).err


def test_encoded_values_are_shown_to_who_has_the_key(command: Commands, session: Session) -> None:
    keyed = Durable(payloads=[Encryption({"2026": "k" * 32})])

    @keyed.step
    def repeat(card: str) -> str:
        return card

    @keyed.workflow(name="keyed")
    def checkout(card: str) -> list[str]:
        set_event("card", card)
        return [repeat(card), wait_signal("card", str), start_child(child, card).result()]

    @keyed.workflow
    def child(card: str) -> str:
        return card

    row = checkout.start(session, "4929")
    session.commit()
    send_signal(session, row, "card", "4929")
    send_signal(session, row, "later", "4929" * 300)
    session.commit()
    Executor(session).execute_until_waiting(checkout, row)
    (started,) = row.children
    Executor(session).execute(child, started)
    Executor(session).execute(checkout, row)
    shown = command("show", str(row.id)).out
    assert shown.count("4929") > 7
    assert "aes-siv" not in shown
    keyed.options.payloads.codecs = ()  # as in a process without the key
    for described in (command("show", str(row.id)).out, command("show", str(row.id), "--full").out):
        assert "4929" not in described
        assert described.count("(aes-siv:2026, ") > 6
