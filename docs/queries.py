"""Queries of dashboards and retention, and the views, and what they read of a million finished workflows.

`python docs/queries.py [ROWS]` starts a server, fills its tables, and prints what each query and view costs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, Select, TextClause, create_engine, func, select, text
from sqlalchemy.schema import CreateSchema

from sqla_durable import Workflow, WorkflowStatus, embedded, manage, metadata

_FILL = """
INSERT INTO durable.workflow
    (id, name, status, input, output, error, token, worker_id,
    created_at, enqueued_at, started_at, finished_at, wake_at)
SELECT CAST(lpad(to_hex(CAST(floor(extract(epoch FROM began) * 1000) AS bigint)), 12, '0') || '7'
    || substr(md5(number::text), 14) AS uuid),
    'checkout', status, jsonb_build_object('order_id', number),
    CASE WHEN status = 'succeeded' THEN to_jsonb(number) END,
    CASE WHEN status = 'failed' THEN jsonb_build_object('type', 'builtins:ValueError', 'message', 'no') END,
    CASE WHEN status IN ('running', 'succeeded', 'failed') THEN gen_random_uuid() END,
    CASE WHEN status = 'running' THEN gen_random_uuid() END,
    began, began, began,
    CASE WHEN status IN ('succeeded', 'failed', 'cancelled') THEN began + interval '1 second' END,
    CASE WHEN status = 'suspended' AND number % 2 = 0 THEN statement_timestamp() + interval '1 day' END
FROM (
    SELECT number, statement_timestamp() - interval '100 days' * (CAST(:rows AS float) - number + 0.5) / :rows AS began,
        CASE WHEN number % 1000 = 1 THEN 'suspended' WHEN number > :rows - 20 THEN 'running'
        WHEN number > :rows - 120 THEN 'pending' WHEN number % 100 = 0 THEN 'failed' ELSE 'succeeded' END AS status
    FROM generate_series(1, :rows) AS number
) AS made
"""

_FILL_STEPS = """
INSERT INTO durable.step (workflow_id, key, name, position, status, output, error, attempt, started_at, finished_at)
SELECT id, name, name, number, CASE WHEN failed THEN 'failed' ELSE 'succeeded' END,
    CASE WHEN NOT failed THEN '"done"'::jsonb END, CASE WHEN failed THEN error END,
    1, started_at, started_at + interval '0.4 second'
FROM (
    SELECT id, error, started_at, number, 'step_' || number AS name, status = 'failed' AND number = 2 AS failed
    FROM durable.workflow, generate_series(1, 2) AS number WHERE finished_at IS NOT NULL
    UNION ALL
    SELECT id, NULL, started_at, 1, 'step_1', false FROM durable.workflow WHERE finished_at IS NULL
) AS made
"""
_FILL_WAITS = """
WITH waits AS (
    INSERT INTO durable.step (workflow_id, key, name, position, status, attempt, started_at)
    SELECT id, 'signal:approved', 'signal:approved', 2, 'waiting', 1, started_at
    FROM durable.workflow WHERE status = 'suspended'
)
UPDATE durable.workflow SET awaits = '[{"signal": "approved"}]' WHERE status = 'suspended'
"""

_VIEWS = {
    "`queue_depth`": "SELECT * FROM durable.queue_depth",
    "`waiting_for`": "SELECT * FROM durable.waiting_for",
    "`worker_load`": "SELECT * FROM durable.worker_load",
    "`workflow_overview`, the newest 50": "SELECT * FROM durable.workflow_overview ORDER BY id DESC LIMIT 50",
    "`workflow_overview`, by status": "SELECT status, count(*) FROM durable.workflow_overview GROUP BY status",
    "`failure_groups`": "SELECT * FROM durable.failure_groups",
    "`step_latency`": "SELECT * FROM durable.step_latency",
}
"""What is asked of the views of docs/sql.md."""


def count_of(status: WorkflowStatus) -> Any:
    """Count by the index of that status; a condition on several of them reads the whole table."""
    return select(func.count()).where(Workflow.status == status).scalar_subquery().label(status.value)


def queries(now: datetime) -> Mapping[str, Select[Any]]:
    """Make the queries that the documentation shows."""
    yesterday, cutoff = now - timedelta(days=1), now - timedelta(days=90)
    return {
        "unfinished by status": select(
            *map(count_of, (WorkflowStatus.PENDING, WorkflowStatus.RUNNING, WorkflowStatus.SUSPENDED))
        ),
        "waiting by queue, and since when": select(Workflow.queue, func.count(), func.min(Workflow.enqueued_at))
        .where(Workflow.status == WorkflowStatus.PENDING)
        .group_by(Workflow.queue),
        "failures of the last day": select(Workflow)
        .where(Workflow.status == WorkflowStatus.FAILED, Workflow.finished_at > yesterday)
        .order_by(Workflow.finished_at.desc()),
        "started in the last day, by status": select(Workflow.status, func.count())
        .where(Workflow.id >= manage.id_at(yesterday))
        .group_by(Workflow.status),
        "the newest 50": select(Workflow).order_by(Workflow.id.desc()).limit(50),
        "the next 1,000 to delete after 90 days": select(Workflow.id)
        .where(Workflow.id > UUID(int=0), Workflow.id < manage.id_at(cutoff), Workflow.finished_at < cutoff)
        .order_by(Workflow.id)
        .limit(1_000),
        "for comparison: by status, all of them": select(Workflow.status, func.count()).group_by(Workflow.status),
        "for comparison: the newest 50 by created_at": select(Workflow).order_by(Workflow.created_at.desc()).limit(50),
    }


def fill(engine: Engine, rows: int) -> None:
    """Insert workflows of the last hundred days, nearly all of them finished."""
    check = "TRIGGER workflow_new_check"  # of a new workflow, which is not finished yet
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE durable.workflow DISABLE {check}"))
        connection.execute(text(_FILL), {"rows": rows})
        connection.execute(text(f"ALTER TABLE durable.workflow ENABLE {check}"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM (ANALYZE) durable.workflow"))


def fill_steps(engine: Engine) -> None:
    """Insert two steps of each workflow, and some workers; what is suspended waits for a signal."""
    with engine.begin() as connection:
        for each in (_FILL_STEPS, _FILL_WAITS):
            connection.execute(text(each))
        connection.execute(
            text(
                "INSERT INTO durable.worker (id, name, queues, slots, lease_expires_at) "
                "SELECT worker_id, 'worker', ARRAY['default'], 10, statement_timestamp() + interval '1 hour' "
                "FROM durable.workflow WHERE status = 'running'"
            )
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM (ANALYZE) durable.workflow, durable.step, durable.worker"))


def explained(engine: Engine, query: Select[Any] | TextClause) -> tuple[int, float, list[str]]:
    """Execute a query; give the pages that it touches, its milliseconds, and what it scans."""
    with engine.connect() as connection:
        compiled = query.compile(connection)
        sql = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {compiled}"
        (plan,) = connection.exec_driver_sql(sql, dict(compiled.params)).scalar_one()
    scans: list[str] = []
    _collect(plan["Plan"], scans)
    root = plan["Plan"]
    return root["Shared Hit Blocks"] + root["Shared Read Blocks"], plan["Execution Time"], scans


def _collect(node: dict[str, Any], scans: list[str]) -> None:
    if "Index Name" in node:
        scans.append(node["Index Name"])
    elif node["Node Type"] == "Seq Scan":
        scans.append(f"all of {node['Relation Name']}")
    for each in node.get("Plans", []):
        _collect(each, scans)


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with embedded.server() as server:
        engine = create_engine(server.url)
        with engine.begin() as connection:
            connection.execute(CreateSchema("durable"))
            metadata.create_all(connection)
        fill(engine, rows)
        print("| query | by | pages | ms |\n| --- | --- | ---: | ---: |")
        for name, query in queries(datetime.now(UTC)).items():
            _print_cost(engine, name, query)
        with engine.connect() as connection:
            sizes = "SELECT relname, pg_size_pretty(pg_relation_size(oid)) FROM pg_class WHERE relname ~ '^workflow'"
            for name, size in connection.execute(text(f"{sizes} ORDER BY relname")):
                print(f"{name}: {size}")
        fill_steps(engine)
        print("| view | by | pages | ms |\n| --- | --- | ---: | ---: |")
        for name, view in _VIEWS.items():
            _print_cost(engine, name, text(view))
        engine.dispose()


def _print_cost(engine: Engine, name: str, query: Select[Any] | TextClause) -> None:
    pages, _, scans = explained(engine, query)
    milliseconds = min(explained(engine, query)[1] for _ in range(5))
    shown = ", ".join(f"`{each}`" for each in dict.fromkeys(scans))
    print(f"| {name} | {shown} | {pages:,} | {milliseconds:.2f} |")


if __name__ == "__main__":
    main()
