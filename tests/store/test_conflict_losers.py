"""A start whose key others have taken again and again before it came to its turn."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

from tests.store.test_conflicts import RULES, committed, rows, starts

LOSSES = 12


def test_a_start_that_others_forestall_again_and_again_is_the_last_one(engine: Engine) -> None:
    """Each time that it has read who has its key, another one has cancelled that and has the key itself."""
    rule = RULES["cancel_running"]
    committed(engine, rule, 0)
    lost: list[int] = []
    is_other = False

    def forestall(*given: Any) -> None:
        nonlocal is_other
        if "AS is_over" in given[2] and not is_other and len(lost) < LOSSES:
            is_other = True
            lost.append(len(lost) + 1)
            committed(engine, rule, lost[-1])
            is_other = False

    event.listen(engine, "after_cursor_execute", forestall)
    try:
        with Session(engine) as session, session.begin():
            starts(rule, 99)(session)
    finally:
        event.remove(engine, "after_cursor_execute", forestall)
    cancelled = [("cancelled", None, number) for number in range(LOSSES + 1)]
    assert sorted(rows(engine), key=lambda row: row[2]) == [*cancelled, ("pending", "k", 99)]
