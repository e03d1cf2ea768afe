"""Add limits of queues, and schedules; and let a key pass from a workflow to a newer one."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

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
_CHECKS_OF_WORKFLOWS = {
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


def downgrade(schema: str | None = None) -> None:
    with schemas.resolved(schema) as found:
        name = sa.quoted_name(found, quote=True)  # Alembic splits another one at its dots
        schemas.lock_tables(found, *_CHANGED)
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
    op.add_column("workflow", sa.Column("by", sa.Text()), schema=schema)
    op.add_column("workflow", sa.Column("place", sa.Text()), schema=schema)
    for name, condition in _CHECKS_OF_WORKFLOWS.items():
        op.create_check_constraint(op.f(f"workflow_{name}_check"), "workflow", condition, schema=schema)
    for name, (columns, condition) in _INDEXES.items():
        op.create_index(op.f(name), "workflow", columns, schema=schema, postgresql_where=sa.text(condition))


def _drop_limits(schema: sa.quoted_name) -> None:
    for name in _INDEXES:
        op.drop_index(op.f(name), "workflow", schema=schema)
    for each in ("place", "by"):
        op.drop_column("workflow", each, schema=schema)
    for each in ("versions", "names"):
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
