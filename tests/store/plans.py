"""How PostgreSQL executes a statement: EXPLAIN (ANALYZE, BUFFERS), read as a tree."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sqlalchemy import text
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from sqla_durable.store.statements import Statement
from tests.support.forged import forged


class Plan:
    """An executed plan."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root

    def __repr__(self) -> str:
        return json.dumps(self._root, indent=1, default=str)

    def uses(self, index: str) -> bool:
        """Return whether an index is scanned."""
        return any(each.get("Index Name") == index for each in _nodes(self._root))

    def cost(self) -> float:
        """Return what the planner expects."""
        return float(self._root["Total Cost"])

    def loops(self, index: str) -> int:
        """Return how many times an index is scanned."""
        return sum(int(each["Actual Loops"]) for each in _nodes(self._root) if each.get("Index Name") == index)

    def scans(self, table: str) -> bool:
        """Return whether a table is read from its beginning to its end."""
        return any(
            each["Node Type"] == "Seq Scan" and each.get("Relation Name") == table for each in _nodes(self._root)
        )

    def buffers(self, subplan: str | None = None) -> int:
        """Return how many pages a CTE touches, or the whole statement."""
        found = self._root if subplan is None else self._subplan(subplan)
        return int(found["Shared Hit Blocks"]) + int(found["Shared Read Blocks"])

    def rows(self, subplan: str) -> int:
        """Return how many rows a CTE gave."""
        return int(self._subplan(subplan)["Actual Rows"])

    def _subplan(self, name: str) -> dict[str, Any]:
        (found,) = [each for each in _nodes(self._root) if each.get("Subplan Name") == name]
        return found


MODES = ("force_custom_plan", "force_generic_plan")
"""How the server plans a prepared statement. A test tries both on the same rows: making these takes longer."""


def explain(session: Session, statement: Statement, parameters: Mapping[str, Any], *, mode: str) -> Plan:
    """Execute a statement as a prepared one with custom or generic plans, roll it back, and give its plan."""
    explained: Any = statement.made
    compiled: Any = explained.compile(dialect=postgresql.dialect(paramstyle="named"))
    sql = str(compiled)
    names: list[str] = sorted(compiled.params, key=len, reverse=True)
    for number, name in enumerate(names, start=1):
        sql = sql.replace(f":{name}", f"${number}")
    assert set(parameters) <= set(names), "some of these would not reach the statement"
    values: dict[str, Any] = {**compiled.params, **parameters}
    assert None not in values.values(), "the statement has others, which would be NULL"
    session.execute(text(f"SET LOCAL plan_cache_mode = {mode}"))
    types = ", ".join(_type(compiled.binds[each].type) for each in names)
    connection = session.connection()
    connection.exec_driver_sql(f"PREPARE explained ({types}) AS {sql}".replace("%", "%%"))
    arguments = ", ".join(_literal(values[each]) for each in names)
    (plan,) = connection.exec_driver_sql(
        f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE explained ({arguments})"
    ).scalar_one()
    connection.exec_driver_sql("DEALLOCATE explained")
    session.rollback()
    return Plan(plan["Plan"])


def pages(session: Session, call: Callable[[], object]) -> int:
    """Call what executes statements in the session's transaction; return how many pages of our tables it touches."""
    before = _fetched(session)
    call()
    return _fetched(session) - before


def _fetched(session: Session) -> int:
    counted = session.execute(
        text(
            "SELECT sum(pg_stat_get_xact_blocks_fetched(pg_class.oid)) FROM pg_class "
            "WHERE relnamespace = 'durable'::regnamespace AND relkind IN ('r', 'i')"
        )
    )
    return int(counted.scalar_one())


def fill(session: Session, pending: int = 20_000) -> None:
    """Many rows in every status, with the statistics that autovacuum would have made."""
    with forged(session):
        session.execute(
            text(
                "INSERT INTO durable.workflow (name, status, token, worker_id, started_at, finished_at, output, "
                "wake_at) "
                "SELECT 'checkout', status, CASE status WHEN 'running' THEN gen_random_uuid() END, "
                "CASE status WHEN 'running' THEN gen_random_uuid() END, statement_timestamp(), "
                "CASE status WHEN 'succeeded' THEN statement_timestamp() END, "
                "CASE status WHEN 'succeeded' THEN '1'::jsonb END, "
                "CASE status WHEN 'suspended' THEN statement_timestamp() + (n - 500) * interval '1 second' END "
                "FROM (SELECT n, (ARRAY['pending', 'pending', 'succeeded', 'suspended', 'running'])[n % 5 + 1] "
                "AS status "
                "FROM generate_series(0, :count) AS n WHERE n % 5 <> 4 OR n % 100 = 4) AS rows"
            ),
            {"count": pending},
        )
    session.commit()
    session.execute(text("ANALYZE durable.workflow"))
    session.commit()


def _type(kind: Any) -> str:
    return str(kind.compile(dialect=postgresql.dialect()))


def _literals(values: list[Any]) -> list[str]:
    return [_literal(each) for each in values]


def _literal(value: Any) -> str:
    items: Any = value
    if isinstance(value, list):
        return "ARRAY[" + ", ".join(_literals(items)) + "]" if items else "'{}'"
    if isinstance(value, int):
        return str(value)
    return "NULL" if value is None else "'" + str(value).replace("'", "''") + "'"


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for each in node.get("Plans", []):
        yield from _nodes(each)
