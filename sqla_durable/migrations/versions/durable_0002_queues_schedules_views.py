"""Add limits of queues, schedules, retention, blobs, and what operators need: tags, views, and a log of their acts."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

from sqla_durable.migrations import blobs
from sqla_durable.migrations import schema as schemas

revision = "durable_0002"
down_revision = "durable_0001"
branch_labels = None
depends_on = None

_COMMENT_BEFORE = "sqla-durable durable_0001"
_COMMENT = "sqla-durable for durable_0001 and later, at durable_0002"  # a package that knows 0001 only reads the first
_NOW = sa.text("pg_catalog.statement_timestamp()")
_NO_TEXTS = sa.text("'{}'::text[]")
_LONGEST = "interval '36500 days'"
_TIMES = "created_at, starts_at, ends_at, paused_at, next_at, due_at, last_at, queued_at, ended_at"

_CHANGED = "queue", "worker", "workflow"
_STORAGE = {"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0, "autovacuum_vacuum_threshold": 100}
_CHECKS_OF_QUEUES = {
    "limits": "least(concurrency, per_worker, per_key) >= 1 AND greatest(concurrency, per_worker, per_key) <= 1000000",
    "rates": "least(rate, key_rate) >= 1 AND greatest(rate, key_rate) <= 100000",
    "rate_periods": "(rate IS NULL) = (rate_period IS NULL) AND (key_rate IS NULL) = (key_rate_period IS NULL)",
    "periods": "least(rate_period, key_rate_period, aging) >= interval '1 millisecond' "
    "AND greatest(rate_period, key_rate_period, aging) <= interval '366 days'",
    "while_suspended": "while_suspended = 'release' OR (while_suspended = 'hold' AND fifo IS NULL "
    "AND pg_catalog.num_nonnulls(concurrency, per_key) > 0)",
    "fifo": "fifo IS NULL OR (fifo IN ('skip', 'block') AND coalesce(per_key, 1) = 1)",
}
_FINISHED = (
    "pg_catalog.cardinality(statuses) > 0 AND pg_catalog.array_position(statuses, NULL) IS NULL "
    "AND pg_catalog.cardinality(pg_catalog.array_remove(pg_catalog.array_remove(pg_catalog.array_remove("
    "statuses, text 'succeeded'), text 'failed'), text 'cancelled')) = 0"
)
_TAGS = "pg_catalog.jsonb_typeof(tags) = 'object'"
_CHECKS_OF_WORKFLOWS = {
    "tags": _TAGS,
    "by": "by ~ '[^[:space:]]' AND pg_catalog.octet_length(by) <= 1000",
    "place": "place IN ('running', 'finished', 'key', 'key_failed')",
}
_INDEXES = {
    "workflow_by_idx": (
        ["queue", "priority", "by", "enqueued_at", "id"],
        "status = 'pending' AND by IS NOT NULL",
    ),
    "workflow_place_idx": (
        ["queue", "status", "by"],
        "(status = 'pending' AND place IS NOT NULL) OR (status = 'suspended' AND place <> 'running') "
        "OR (status = 'failed' AND place = 'key_failed')",
    ),
    "workflow_going_on_idx": (["queue", "priority", "enqueued_at", "id"], "status = 'pending' AND place IS NOT NULL"),
}

# As this revision makes them, whatever `models.views` says later; a test compares the two as long as it is the newest.
_VIEWS = {
    "workflow_overview": """
SELECT w.id, w.name, w.status, w.queue, w.priority, w.by, w.key, w.tags, w.schedule, w.parent_id, w.forked_from,
  w.version, w.attempt, w.crashes, w.cancellation,
  w.created_at, w.started_at, w.finished_at, w.wake_at, w.deadline_at,
  coalesce(w.started_at, w.finished_at, pg_catalog.statement_timestamp()) - w.created_at AS waited,
  coalesce(w.finished_at, pg_catalog.statement_timestamp()) - w.started_at AS took,
  l.name AS worker, w.error ->> text 'type' AS error_type, w.error ->> text 'message' AS error_message
FROM {schema}.workflow AS w LEFT JOIN {schema}.worker AS l ON l.id = w.worker_id AND w.status = 'running'""",
    "queue_depth": """
SELECT coalesce(n.queue, q.name) AS queue, coalesce(n.pending, 0) AS pending, n.pending_since,
  coalesce(n.running, 0) AS running, coalesce(n.delayed, 0) AS delayed, coalesce(n.suspended, 0) AS suspended,
  q.paused_at, q.concurrency, q.per_worker, q.per_key
FROM (
  SELECT queue, CAST(sum(pending) AS bigint) AS pending, min(since) AS pending_since,
    CAST(sum(running) AS bigint) AS running, CAST(sum(delayed) AS bigint) AS delayed,
    CAST(sum(suspended) AS bigint) AS suspended
  FROM (
    SELECT queue, count(*) AS pending, min(enqueued_at) AS since, 0 AS running, 0 AS delayed, 0 AS suspended
    FROM {schema}.workflow WHERE status = 'pending' GROUP BY queue
    UNION ALL
    SELECT queue, 0, NULL, count(*), 0, 0 FROM {schema}.workflow WHERE status = 'running' GROUP BY queue
    UNION ALL
    SELECT queue, 0, NULL, 0, count(*) FILTER (WHERE started_at IS NULL),
      count(*) FILTER (WHERE started_at IS NOT NULL)
    FROM {schema}.workflow WHERE status = 'suspended' GROUP BY queue
  ) AS counted GROUP BY queue
) AS n FULL JOIN {schema}.queue AS q ON q.name = n.queue""",
    "step_latency": """
SELECT w.name AS workflow, s.name AS step, pg_catalog.date_trunc('hour', s.finished_at, 'UTC') AS hour,
  count(*) AS calls, count(*) FILTER (WHERE s.status = 'failed') AS failed, CAST(sum(s.tries) AS bigint) AS tries,
  percentile_cont(CAST(0.5 AS double precision)) WITHIN GROUP (ORDER BY s.finished_at - s.started_at) AS p50,
  percentile_cont(CAST(0.95 AS double precision)) WITHIN GROUP (ORDER BY s.finished_at - s.started_at) AS p95,
  max(s.finished_at - s.started_at) AS longest
FROM {schema}.step AS s JOIN {schema}.workflow AS w ON w.id = s.workflow_id
WHERE s.status IN ('succeeded', 'failed') AND NOT pg_catalog.starts_with(s.key, '#')
  AND s.error -> text 'cancelled' IS NULL AND (w.forked_from IS NULL OR s.finished_at >= w.created_at)
GROUP BY w.name, s.name, pg_catalog.date_trunc('hour', s.finished_at, 'UTC')""",
    "failure_groups": """
SELECT g.workflow, g.step, g.error_type, g.workflows, g.first_at, g.last_at, g.last_id,
  l.error ->> text 'message' AS last_message
FROM (
  SELECT w.name AS workflow, f.name AS step, w.error ->> text 'type' AS error_type, count(*) AS workflows,
    min(w.finished_at) AS first_at, max(w.finished_at) AS last_at,
    (pg_catalog.array_agg(w.id ORDER BY w.finished_at DESC, w.id DESC))[1] AS last_id
  FROM {schema}.workflow AS w LEFT JOIN LATERAL (
    SELECT s.name FROM {schema}.step AS s
    WHERE s.workflow_id = w.id AND s.status = 'failed' AND (
      (s.error ->> text 'type' = w.error ->> text 'type'
        AND s.error ->> text 'message' IS NOT DISTINCT FROM w.error ->> text 'message')
      OR pg_catalog.strpos(w.error ->> text 'traceback', nullif(s.error ->> text 'message', text '')) > 0
    )
    ORDER BY s.position DESC LIMIT 1
  ) AS f ON true
  WHERE w.status = 'failed' GROUP BY w.name, f.name, w.error ->> text 'type'
) AS g JOIN {schema}.workflow AS l ON l.id = g.last_id""",
    "waiting_for": """
SELECT w.id AS workflow_id, w.name AS workflow, w.queue, e.kind,
  pg_catalog.replace(pg_catalog.replace(pg_catalog.replace(e.what, '%23', '#'), '%2F', '/'), '%25', '%') AS what,
  e.step, e.child_id, e.since, e.until
FROM {schema}.workflow AS w CROSS JOIN LATERAL (
  SELECT
    CASE WHEN s.status = 'retrying' THEN 'retry' WHEN s.name = 'sleep' THEN 'timer'
      WHEN pg_catalog.starts_with(s.name, 'signal:') THEN 'signal'
      WHEN pg_catalog.starts_with(s.name, 'update:') THEN 'update'
      WHEN pg_catalog.starts_with(s.name, 'wait_event(') THEN 'event' ELSE 'children' END AS kind,
    CASE WHEN s.status = 'retrying' THEN s.name
      WHEN pg_catalog.starts_with(s.name, 'wait_event(')
        THEN pg_catalog.substr(s.name, 12, pg_catalog.length(s.name) - 12)
      WHEN pg_catalog.strpos(s.name, ':') > 0 THEN pg_catalog.substr(s.name, pg_catalog.strpos(s.name, ':') + 1)
      END AS what,
    s.key AS step, CAST(NULL AS uuid) AS child_id,
    CASE s.status WHEN 'retrying' THEN s.finished_at ELSE s.started_at END AS since, s.wake_at AS until
  FROM {schema}.step AS s WHERE s.workflow_id = w.id AND s.status IN ('waiting', 'retrying')
  UNION ALL
  SELECT 'child', c.name, NULL, c.id, c.created_at, NULL
  FROM pg_catalog.jsonb_array_elements(w.awaits) AS a
    CROSS JOIN LATERAL pg_catalog.jsonb_array_elements_text(a.value -> text 'children') AS k
    CROSS JOIN LATERAL (
      SELECT o.id, o.name, o.created_at FROM {schema}.workflow AS o
      WHERE o.id = CAST(k.value AS uuid) AND o.finished_at IS NULL OFFSET 0
    ) AS c
  UNION ALL
  SELECT 'callback', s.key, s.key, NULL, s.started_at,
    CASE WHEN 'number' IN (pg_catalog.jsonb_typeof(s.output -> text 'timeout'),
      pg_catalog.jsonb_typeof(s.output -> text 'heartbeat')) THEN w.wake_at END
  FROM pg_catalog.jsonb_array_elements(w.awaits) AS a
    JOIN {schema}.step AS s ON s.workflow_id = w.id AND s.name = 'create_callback'
      AND s.output ->> text 'signal' = a.value ->> text 'signal'
  UNION ALL
  SELECT
    CASE WHEN w.started_at IS NULL THEN CASE WHEN w.wake_at IS NULL THEN 'deferred' ELSE 'delay' END
      WHEN w.crashes > 1 THEN 'crash' ELSE 'timer' END,
    NULL, NULL, NULL, CASE WHEN w.started_at IS NULL THEN w.created_at END, w.wake_at
  WHERE w.awaits IS NULL AND (w.started_at IS NULL OR NOT EXISTS (
    SELECT FROM {schema}.step AS s WHERE s.workflow_id = w.id AND s.status IN ('waiting', 'retrying')
  ))
) AS e
WHERE w.status = 'suspended'""",
    "worker_load": """
SELECT l.id, l.name, l.queues, l.versions, l.slots, l.started_at, l.heartbeat_at, l.lease_expires_at,
  l.lease_expires_at > pg_catalog.statement_timestamp() AS is_alive, r.executing, r.oldest_started_at
FROM {schema}.worker AS l CROSS JOIN LATERAL (
  SELECT count(*) AS executing, min(w.started_at) AS oldest_started_at
  FROM {schema}.workflow AS w WHERE w.worker_id = l.id AND w.status = 'running'
) AS r""",
}


def upgrade(schema: str | None = None) -> None:
    with schemas.resolved(schema) as found:
        name = sa.quoted_name(found, quote=True)  # Alembic splits another one at its dots
        schemas.lock_tables(found, *_CHANGED)
        op.add_column("workflow", sa.Column("schedule", sa.Text()), schema=name)
        op.create_index(
            op.f("workflow_schedule_idx"),
            "workflow",
            ["schedule"],
            schema=name,
            postgresql_where=sa.text("schedule IS NOT NULL AND finished_at IS NULL"),
        )
        op.create_table_comment("workflow", _COMMENT, existing_comment=_COMMENT_BEFORE, schema=name)
        _create_schedule(name)
        _add_limits(name)
        op.add_column("workflow", sa.Column("former_key", sa.Text()), schema=name)
        _create_audit(name)
        _create_retention(name)
        blobs.create(name)
        for view, query in _VIEWS.items():
            schemas.execute(found, f"CREATE VIEW {{schema}}.{view} WITH (security_invoker = true) AS {query}")


def downgrade(schema: str | None = None) -> None:
    with schemas.resolved(schema) as found:
        name = sa.quoted_name(found, quote=True)  # Alembic splits another one at its dots
        schemas.lock_tables(found, *_CHANGED)
        for view in _VIEWS:
            schemas.execute(found, f"DROP VIEW {{schema}}.{view}")
        blobs.drop(name)
        op.drop_table("retention", schema=name)
        op.drop_table("audit", schema=name)
        op.drop_column("workflow", "former_key", schema=name)
        _drop_limits(name)
        op.drop_table("schedule", schema=name)
        op.create_table_comment("workflow", _COMMENT_BEFORE, existing_comment=_COMMENT, schema=name)
        op.drop_index(op.f("workflow_schedule_idx"), "workflow", schema=name)
        op.drop_column("workflow", "schedule", schema=name)


def _create_schedule(schema: sa.quoted_name) -> None:
    op.create_table(
        "schedule",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("workflow", sa.Text(), nullable=False),
        sa.Column("input", pg.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
        sa.Column("queue", sa.Text(), server_default="default", nullable=False),
        sa.Column("priority", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("by", sa.Text()),
        sa.Column("timeout", pg.INTERVAL()),
        sa.Column("version", sa.Text()),
        sa.Column("tags", pg.JSONB()),
        sa.Column("headers", pg.JSONB()),
        sa.Column("cron", pg.ARRAY(sa.Text()), server_default=_NO_TEXTS, nullable=False),
        sa.Column("every", pg.INTERVAL()),
        sa.Column("tz", sa.Text(), server_default="UTC", nullable=False),
        sa.Column("excluding", pg.ARRAY(sa.Text()), server_default=_NO_TEXTS, nullable=False),
        sa.Column("starts_at", _timestamp()),
        sa.Column("ends_at", _timestamp()),
        sa.Column("jitter", pg.INTERVAL()),
        sa.Column("overlap", sa.Text(), server_default="skip", nullable=False),
        sa.Column("missed", sa.Text(), server_default="run_one", nullable=False),
        sa.Column("missed_within", pg.INTERVAL()),
        sa.Column("declared", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("paused_at", _timestamp()),
        sa.Column("pause_reason", sa.Text()),
        sa.Column("created_at", _timestamp(), server_default=_NOW, nullable=False),
        sa.Column("next_at", _timestamp()),
        sa.Column("due_at", _timestamp()),
        sa.Column("last_at", _timestamp()),
        sa.Column("queued_at", _timestamp()),
        sa.Column("ended_at", _timestamp()),
        sa.Column("skipped", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("schedule_pkey")),
        *_constraints_of_schedule(),
        schema=schema,
    )
    op.create_index(
        op.f("schedule_due_idx"),
        "schedule",
        ["due_at"],
        schema=schema,
        postgresql_where=sa.text("paused_at IS NULL AND ended_at IS NULL"),
    )


def _constraints_of_schedule() -> list[sa.Constraint]:
    return [
        *(_name("schedule", each) for each in ("name", "workflow", "queue", "by", "version", "tz")),
        _check("schedule", "input", "pg_catalog.jsonb_typeof(input) = 'object'"),
        _check(
            "schedule",
            "headers",
            "pg_catalog.jsonb_typeof(headers) = 'object' "
            """AND NOT pg_catalog.jsonb_path_exists(headers, '$.* ? (@.type() <> "string")')""",
        ),
        _check("schedule", "tags", _TAGS),
        _check("schedule", "when", "(pg_catalog.cardinality(cron) > 0) = (every IS NULL)"),
        _check(
            "schedule",
            "lists",
            "pg_catalog.cardinality(cron) <= 100 AND pg_catalog.array_position(cron, NULL) IS NULL "
            "AND pg_catalog.cardinality(excluding) <= 10000 AND pg_catalog.array_position(excluding, NULL) IS NULL",
        ),
        _check("schedule", "every", f"every BETWEEN interval '1 second' AND {_LONGEST}"),
        *(
            _check("schedule", each, f"{each} BETWEEN interval '0' AND {_LONGEST}")
            for each in ("timeout", "jitter", "missed_within")
        ),
        _check("schedule", "overlap", "overlap IN ('skip', 'queue_one', 'allow', 'cancel_running')"),
        _check("schedule", "missed", "missed IN ('skip', 'run_one', 'run_all')"),
        _check("schedule", "span", "starts_at <= ends_at"),
        _check("schedule", "skipped", "skipped >= 0"),
        _times("schedule", _TIMES),
    ]


def _add_limits(schema: sa.quoted_name) -> None:
    for column in _columns_of_queues():
        op.add_column("queue", column, schema=schema)
    for name, condition in _CHECKS_OF_QUEUES.items():
        op.create_check_constraint(op.f(f"queue_{name}_check"), "queue", condition, schema=schema)
    schemas.set_storage(schema, "queue", _STORAGE)
    _create_queue_key(schema)
    _create_queue_use(schema)
    for each in ("names", "versions"):
        op.add_column("worker", sa.Column(each, pg.ARRAY(sa.Text())), schema=schema)
    op.add_column("worker", sa.Column("slots", sa.Integer()), schema=schema)
    op.add_column("workflow", sa.Column("by", sa.Text()), schema=schema)
    op.add_column("workflow", sa.Column("place", sa.Text()), schema=schema)
    op.add_column("workflow", sa.Column("tags", pg.JSONB()), schema=schema)
    for name, condition in _CHECKS_OF_WORKFLOWS.items():
        op.create_check_constraint(op.f(f"workflow_{name}_check"), "workflow", condition, schema=schema)
    for name, (columns, condition) in _INDEXES.items():
        op.create_index(op.f(name), "workflow", columns, schema=schema, postgresql_where=sa.text(condition))
    op.create_index(
        op.f("workflow_tags_idx"),
        "workflow",
        ["tags"],
        schema=schema,
        postgresql_using="gin",
        postgresql_ops={"tags": "jsonb_path_ops"},
        postgresql_where=sa.text("tags IS NOT NULL"),
    )


def _drop_limits(schema: sa.quoted_name) -> None:
    for name in ("workflow_tags_idx", *_INDEXES):
        op.drop_index(op.f(name), "workflow", schema=schema)
    for each in ("tags", "place", "by"):
        op.drop_column("workflow", each, schema=schema)
    for each in ("slots", "versions", "names"):
        op.drop_column("worker", each, schema=schema)
    op.drop_table("queue_use", schema=schema)
    op.drop_table("queue_key", schema=schema)
    schemas.execute(schema, f"ALTER TABLE {{schema}}.queue RESET ({', '.join(_STORAGE)})")
    for name in _CHECKS_OF_QUEUES:
        op.drop_constraint(op.f(f"queue_{name}_check"), "queue", schema=schema)
    for column in _columns_of_queues():
        op.drop_column("queue", column.name, schema=schema)


def _columns_of_queues() -> list[sa.Column[Any]]:
    return [
        sa.Column("concurrency", sa.Integer()),
        sa.Column("per_worker", sa.Integer()),
        sa.Column("per_key", sa.Integer()),
        sa.Column("rate", sa.Integer()),
        sa.Column("rate_period", pg.INTERVAL()),
        sa.Column("key_rate", sa.Integer()),
        sa.Column("key_rate_period", pg.INTERVAL()),
        sa.Column("while_suspended", sa.Text(), server_default="release", nullable=False),
        sa.Column("fifo", sa.Text()),
        sa.Column("fair", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("aging", pg.INTERVAL()),
        sa.Column("claim", pg.UUID()),
        sa.Column("turn", sa.Text()),
        sa.Column("passed", sa.Text()),
        sa.Column("turn_priority", sa.SmallInteger()),
    ]


def _create_queue_key(schema: sa.quoted_name) -> None:
    op.create_table(
        "queue_key",
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("weight", sa.Integer(), server_default="1", nullable=False),
        sa.Column("paused_at", _timestamp()),
        sa.Column("created_at", _timestamp(), server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("queue", "by", name=op.f("queue_key_pkey")),
        _of_queue("queue_key", schema),
        _name("queue_key", "by"),
        _check("queue_key", "weight", "weight BETWEEN 1 AND 1000"),
        _times("queue_key", "created_at, paused_at"),
        schema=schema,
    )
    op.create_index(
        op.f("queue_key_paused_idx"),
        "queue_key",
        ["queue"],
        schema=schema,
        postgresql_where=sa.text("paused_at IS NOT NULL"),
    )


def _create_queue_use(schema: sa.quoted_name) -> None:
    op.create_table(
        "queue_use",
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("used_at", _timestamp(), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("claim", pg.UUID(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("queue", "used_at", "by", "claim", name=op.f("queue_use_pkey")),
        _of_queue("queue_use", schema),
        _check("queue_use", "number", "number >= 1"),
        schema=schema,
    )
    op.create_index(op.f("queue_use_by_idx"), "queue_use", ["queue", "by", "used_at"], schema=schema)


def _create_audit(schema: sa.quoted_name) -> None:
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("at", _timestamp(), server_default=_NOW, nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("verb", sa.Text(), nullable=False),
        sa.Column("workflow_id", pg.UUID()),
        sa.Column("subject", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("details", pg.JSONB()),
        sa.PrimaryKeyConstraint("id", name=op.f("audit_pkey")),
        _name("audit", "who"),
        _name("audit", "verb"),
        schema=schema,
    )
    op.create_index(
        op.f("audit_workflow_id_idx"),
        "audit",
        ["workflow_id"],
        schema=schema,
        postgresql_where=sa.text("workflow_id IS NOT NULL"),
    )


def _create_retention(schema: sa.quoted_name) -> None:
    op.create_table(
        "retention",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("workflow", sa.Text()),
        sa.Column("statuses", pg.ARRAY(sa.Text())),
        sa.Column("keep", pg.INTERVAL(), nullable=False),
        sa.Column("declared", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("created_at", _timestamp(), server_default=_NOW, nullable=False),
        sa.Column("due_at", _timestamp()),
        sa.Column("last_at", _timestamp()),
        sa.Column("position", pg.UUID()),
        sa.Column("deleted", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("refused", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("retention_pkey")),
        _name("retention", "name"),
        _name("retention", "workflow"),
        _check("retention", "statuses", _FINISHED),
        _check(
            "retention",
            "keep",
            f"keep BETWEEN interval '1 second' AND {_LONGEST} "
            "AND extract(year FROM keep) BETWEEN 0.0 AND 100.0 AND extract(day FROM keep) BETWEEN 0.0 AND 36500.0",
        ),
        _check("retention", "counts", "deleted >= 0 AND refused >= 0"),
        _times("retention", "created_at, due_at, last_at"),
        schema=schema,
    )
    schemas.set_storage(schema, "retention", _STORAGE)


def _of_queue(table: str, schema: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["queue"], [f"{schema}.queue.name"], name=op.f(f"{table}_queue_fkey"), ondelete="CASCADE"
    )


def _timestamp() -> sa.DateTime:
    return sa.DateTime(timezone=True)


def _check(table: str, name: str, condition: str) -> sa.CheckConstraint:
    # op.f: the application's naming convention must not be put on top.
    return sa.CheckConstraint(condition, name=op.f(f"{table}_{name}_check"))


def _name(table: str, column: str) -> sa.CheckConstraint:
    return _check(table, column, f"{column} ~ '[^[:space:]]' AND pg_catalog.octet_length({column}) <= 1000")


def _times(table: str, columns: str) -> sa.CheckConstraint:
    return _check(
        table,
        "times",
        f"least({columns}) >= timestamptz '0001-01-02 00:00:00Z' "
        f"AND greatest({columns}) <= timestamptz '9999-12-30 00:00:00Z'",
    )
