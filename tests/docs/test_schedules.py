"""The SQL and the tables of docs/schedules.md; its Python is executed with that of the other pages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from sqla_durable import Durable, Schedule, Workflow, manage
from sqla_durable.definitions.calendar import Calendar
from sqla_durable.definitions.schedules import ON_TIME, ScheduleOptions, ScheduleState, decide

PAGE = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text()
MARK = r"<!-- tested in tests/docs/test_schedules\.py -->\n"
QUERIES = re.findall(rf"{MARK}```sql\n(.*?)```", PAGE, re.S)
TABLES = re.findall(rf"{MARK}((?:\|.*\n)+)", PAGE)
BERLIN = ZoneInfo("Europe/Berlin")

durable = Durable()


@durable.workflow
def report() -> None: ...


def rows_of(table: str) -> list[list[str]]:
    """Return the cells of a table of the page, with its head and without its line of dashes."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [found[0], *found[2:]]


# What to ask the table


@pytest.fixture
def session(engine: Engine) -> Any:
    """A session of a database with a schedule of each kind."""
    with Session(engine) as session:
        for name in ("ready", "late", "unplanned", "paused", "ended"):
            manage.put_schedule(session, name, report.bind(), cron="0 3 * * *", jitter=timedelta(minutes=5))
        manage.run_schedule(session, "ready")
        manage.pause_schedule(session, "paused", reason="on holiday")
        for change in (
            "next_at = statement_timestamp() + interval '1 hour', "
            "due_at = statement_timestamp() + interval '61 minutes' WHERE name IN ('ready', 'paused')",
            "next_at = statement_timestamp() - interval '7 minutes', "
            "due_at = statement_timestamp() - interval '6 minutes' WHERE name = 'late'",
            "ended_at = statement_timestamp() WHERE name = 'ended'",
        ):
            session.execute(text(f"UPDATE durable.schedule SET {change}"))
        yield session


def asked(session: Session, number: int) -> Sequence[Any]:
    return session.execute(text(QUERIES[number])).all()


def test_what_is_due_next(session: Session) -> None:
    assert [(row.name, row.jitter) for row in asked(session, 0)] == [
        ("late", timedelta(minutes=1)),
        ("ready", timedelta(minutes=1)),
        ("unplanned", None),
    ]


def test_what_is_late_or_not_planned(session: Session) -> None:
    assert sorted(row.name for row in asked(session, 1)) == ["late", "unplanned"]
    session.execute(text("UPDATE durable.schedule SET next_at = next_at + interval '90 seconds' WHERE name = 'late'"))
    assert [row.name for row in asked(session, 1)] == ["unplanned"]


def test_what_is_paused_and_what_has_ended(session: Session) -> None:
    found = {row.name: (row.pause_reason, row.ended_at is not None) for row in asked(session, 2)}
    assert found == {"paused": ("on holiday", False), "ended": (None, True)}


def test_what_has_failed_since_yesterday(session: Session) -> None:
    assert asked(session, 3) == []
    (started,) = session.get_one(Schedule, "ready").workflows
    session.execute(
        text(
            "UPDATE durable.workflow SET status = 'failed', token = id, finished_at = statement_timestamp(), "
            """error = '{"type": "builtins:ValueError", "message": "no"}' WHERE id = :id"""
        ),
        {"id": started.id},
    )
    (row,) = asked(session, 3)
    last_at = session.get_one(Schedule, "ready").last_at
    assert (row.name, row.message, datetime.fromisoformat(row.tick)) == ("ready", "no", last_at)
    session.execute(text("UPDATE durable.workflow SET finished_at = statement_timestamp() - interval '2 days'"))
    assert asked(session, 3) == []


def test_every_query_of_the_page_is_tested() -> None:
    assert len(QUERIES) == 4
    assert PAGE.count("```sql") == 4


# Daylight saving


def ticks_on(expression: str, day: date) -> list[str]:
    calendar = Calendar((expression,), tz="Europe/Berlin")
    midnight = datetime(day.year, day.month, day.day, tzinfo=BERLIN).astimezone(UTC)
    ticks = calendar.times(midnight - timedelta(microseconds=1))
    local = (tick.astimezone(BERLIN) for tick in ticks)
    return [f"{tick:%H:%M}" for tick in takewhile(lambda tick: tick.date() == day, local)]


@pytest.mark.parametrize("row", rows_of(TABLES[0])[1:], ids=lambda row: row[0])
def test_the_table_of_daylight_saving_is_right(row: Sequence[str]) -> None:
    days = [date.fromisoformat(cell.removeprefix("ticks on ")) for cell in rows_of(TABLES[0])[0][1:]]
    for shown, day in zip(row[1:], days, strict=True):
        found = ticks_on(row[0].strip("`"), day)
        if re.match(r"\d\d:", shown):
            assert found == shown.split(", ")
        else:
            count, _, more = shown.partition(", with ")
            assert len(found) == int(count)
            if more:
                new, old = more.split(" in place of ")
                assert new in found
                assert old not in found


# Overlap and missed ticks


def started_by(overlap: Any, missed: Any) -> str:
    """Return which ticks start a workflow at 12:00, as the page shows them, after four that were missed."""
    noon = datetime(2026, 12, 1, 12, tzinfo=UTC)
    options = ScheduleOptions.of(cron="0 * * * *", overlap=overlap, missed=missed)
    made = decide(ScheduleState("hourly", options, noon + ON_TIME / 2, next_at=noon - timedelta(hours=4)))
    started = ", ".join(f"{tick.at:%H}" for tick in made.started)
    return started if made.queued_at is None else f"{started}, later {made.queued_at:%H}"


def test_the_table_of_overlap_and_missed_is_right() -> None:
    head, *rows = rows_of(TABLES[1])
    policies = [re.findall(r'"(\w+)"', cell)[0] for cell in head[1:]]
    assert len(rows) * len(policies) == 12
    for overlap, *shown in rows:
        policy = re.findall(r'"(\w+)"', overlap)[0]
        assert [started_by(policy, missed) for missed in policies] == shown, overlap


def test_key_of_a_tick_is_as_the_page_shows_it(session: Session) -> None:
    at = datetime(2026, 11, 30, 2, tzinfo=UTC)
    manage.put_schedule(session, "nightly", report.bind(), cron="0 2 * * *")
    (started,) = manage.backfill_schedule(session, "nightly", since=at, until=at).ids
    assert f"`{session.get_one(Workflow, started).key}`" in PAGE
