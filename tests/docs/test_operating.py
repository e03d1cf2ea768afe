"""What docs/operating.md shows of commands is what they print, but for ids, times and durations."""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqla_durable import Durable, Executor, Workflow, manage, start_child, wait_signal
from sqla_durable.tools.cli.application import main

PAGE = Path(__file__).parents[2] / "docs" / "operating.md"
SHOWN = re.compile(
    r"```bash\nsqla-durable (?P<command>[^\n]*)\n```\n\n<!-- shown[^\n]*-->\n```output\n(?P<output>.*?)```", re.S
)
ID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
CHANGES = (
    (re.compile(ID), "ID"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(Z|\+00:00)"), "TIME"),
    (re.compile(r"\b[\d.e-]+m?s\b|\b\d+[dhm]( \d+[hms])?(?=\s|$|,)"), "DURATION"),
    (re.compile(r"\s+"), " "),
)
durable = Durable()


class CardRefusedError(Exception):
    """The bank says no."""


@durable.step
def reserve(order_id: int) -> str:
    return f"shelf {order_id}"


@durable.step
def charge(order_id: int) -> None:
    raise CardRefusedError(f"card of order {order_id} has expired")


@durable.workflow
def parcel(order_id: int) -> None: ...


@durable.workflow(queue="shop")
def checkout(order_id: int) -> str:
    place = reserve(order_id)
    start_child(parcel, order_id)
    if order_id == 7:
        charge(order_id)
    return f"{place}, approved by {wait_signal('approved', str, timeout=timedelta(days=1))}"


def test_page_shows_what_the_commands_print(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Session(engine) as session:
        executor = Executor(session)
        with pytest.raises(CardRefusedError):
            executor.run(checkout.options(key="order-7", tags={"tenant": "ada"}), 7)
        waiting = executor.run_until_waiting(checkout.options(key="order-8", tags={"tenant": "bob"}), 8).id
        manage.put_queue(session, "shop", concurrency=10)
        manage.pause_queue(session, "shop")
        pending = checkout.options(key="order-9").start(session, 9).id
        failed = session.query(Workflow).filter_by(key="order-7").one().id
        session.commit()
    ids = iter([failed, waiting, pending])
    commands = list(SHOWN.finditer(PAGE.read_text()))
    assert len(commands) == 6
    for each in commands:
        words = [str(next(ids)) if re.fullmatch(ID, word) else word for word in each["command"].split()]
        monkeypatch.setattr(sys, "argv", ["sqla-durable", *words, "--url", database_url])
        with pytest.raises(SystemExit):
            main()
        printed = capsys.readouterr().out
        assert changed(printed) == changed(each["output"]), printed


def changed(text: str) -> str:
    """Return a text without what is different each time."""
    for pattern, to in CHANGES:
        text = pattern.sub(to, text)
    return text.strip()
