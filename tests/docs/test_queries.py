"""The queries that the documentation shows for dashboards and retention, and what they read."""

from __future__ import annotations

import runpy
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, func, select, text
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Workflow, errors, manage
from tests.support.databases import Databases

QUERIES: Any = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "queries.py"))
ROWS = 20_000
MOST_PAGES = 120


@pytest.fixture(scope="module")
def filled(databases: Databases) -> Generator[Engine]:
    with databases.migrated("durable") as url:
        engine = create_engine(url)
        QUERIES["fill"](engine, ROWS)
        yield engine
        engine.dispose()


def test_none_of_them_reads_the_table_from_end_to_end(filled: Engine) -> None:
    # behaviour: M4 G1
    found = {name: QUERIES["explained"](filled, query) for name, query in QUERIES["queries"](datetime.now(UTC)).items()}
    for name, (pages, _, scans) in found.items():
        is_whole = name.startswith("for comparison")
        assert is_whole == ("all of workflow" in scans) == (pages > MOST_PAGES), (name, found)


def test_retention_in_portions_passes_over_what_it_cannot_delete_once(filled: Engine) -> None:
    """By the code of the documentation: of 2,000 that are older than 90 days, two wait and stay."""
    # behaviour: M1 G1
    with filled.begin() as connection:
        old = connection.execute(text("SELECT count(*) FROM durable.workflow WHERE id < :id"), {"id": cut()}).scalar()
    portions = [len(each) for each in deleted_in_portions(sessionmaker(filled), limit=500)]
    assert sum(portions) == (old or 0) - 2
    assert max(portions) == 500
    with Session(filled) as session:
        assert session.scalar(select(func.count()).where(Workflow.id < cut())) == 2


def cut() -> Any:
    return manage.id_at(datetime.now(UTC) - timedelta(days=90))


def deleted_in_portions(sessions: sessionmaker[Session], *, limit: int) -> Generator[list[Any]]:
    now, last = datetime.now(UTC), manage.id_at(datetime(1970, 1, 1, tzinfo=UTC))
    portion = QUERIES["queries"](now)["the next 1,000 to delete after 90 days"].limit(limit)
    while True:
        with sessions.begin() as session:
            found = session.scalars(portion.where(Workflow.id > last)).all()
            if not found:
                return
            yield manage.delete(session, found)
            last = found[-1]


@pytest.mark.parametrize("moment", [datetime(2026, 1, 1), datetime(1969, 12, 31, tzinfo=UTC)])
def test_a_time_that_has_no_id_is_refused(moment: datetime) -> None:
    with pytest.raises(errors.ArgumentError, match="with a time zone, 1970 or later"):
        manage.id_at(moment)
