"""Create the tables workflow, step, signal, event, stream_item, queue and worker."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

from sqla_durable.migrations import schema as schemas

revision = "durable_0001"
down_revision = None
branch_labels = ("sqla_durable",)
depends_on = None

_NEW_ID = sa.text(
    "CAST(pg_catalog.lpad(pg_catalog.to_hex(CAST(pg_catalog.floor("
    "extract(epoch FROM pg_catalog.statement_timestamp()) * 1000.0) AS bigint)), 12, '0') || '7' || "
    "pg_catalog.substr(pg_catalog.replace(CAST(pg_catalog.gen_random_uuid() AS text), '-', ''), 14) AS uuid)"
)
_NOW = sa.text("pg_catalog.statement_timestamp()")

_LONGEST_KEY = 2_500
_UNREADABLE_WAIT = (
    '$[*] ? (@.type() <> "object" || @.signal.type() <> "string" || @.children.type() <> "array" || '
    '@.open.type() <> "number" || @.open < 0 || @.open > 1000000 || @.open.floor() <> @.open || '
    'exists(@.children[*] ? (@.type() <> "string")) || '
    'exists(@.children[*] ? (!(@ like_regex "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"))))'
)


def upgrade(schema: str | None = None) -> None:
    with schemas.resolved(schema) as name:
        schemas.create(name)
        _create_workflow(name)
        _create_step(name)
        _create_signal(name)
        _create_event(name)
        _create_stream_item(name)
        _create_queue(name)
        _create_worker(name)
        _set_storage(name)
        _check_new_workflows(name)


def downgrade(schema: str | None = None) -> None:
    with schemas.resolved(schema) as name:
        for table in ("worker", "queue", "stream_item", "event", "signal", "step", "workflow"):
            op.drop_table(table, schema=name)
        schemas.execute(name, "DROP FUNCTION IF EXISTS {schema}.check_new_workflow()")
        schemas.drop(name)


def _create_workflow(schema: str) -> None:
    op.create_table(
        "workflow",
        *_workflow_columns(),
        sa.PrimaryKeyConstraint("id", name=op.f("workflow_pkey")),
        sa.ForeignKeyConstraint(
            ["parent_id"], [f"{schema}.workflow.id"], name=op.f("workflow_parent_id_fkey"), ondelete="SET NULL"
        ),
        *_checks_of_state(),
        *_checks_of_values(),
        schema=schema,
        comment="sqla-durable durable_0001",
    )
    _index(schema, "workflow_name_key_key", ["name", "key"], where="key IS NOT NULL", unique=True)
    _index(
        schema,
        "workflow_pending_idx",
        ["queue", "priority", "enqueued_at", "id"],
        where="status = 'pending'",
    )
    _index(schema, "workflow_running_idx", ["worker_id"], where="status = 'running'")
    _index(schema, "workflow_suspended_idx", ["wake_at", "id"], where="status = 'suspended'")
    _index(schema, "workflow_failed_idx", ["finished_at"], where="status = 'failed'")
    _index(schema, "workflow_deadline_idx", ["deadline_at"], where="finished_at IS NULL AND deadline_at IS NOT NULL")
    _index(schema, "workflow_parent_idx", ["parent_id", "id"], where="parent_id IS NOT NULL")


def _workflow_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("id", pg.UUID(), server_default=_NEW_ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("key", sa.Text()),
        sa.Column("queue", sa.Text(), server_default="default", nullable=False),
        sa.Column("priority", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("status", sa.Text(), server_default="pending", nullable=False),
        sa.Column("input", pg.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
        sa.Column("output", pg.JSONB()),
        sa.Column("error", pg.JSONB()),
        sa.Column("attempt", sa.Integer(), server_default="1", nullable=False),
        sa.Column("crashes", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("token", pg.UUID()),
        sa.Column("worker_id", pg.UUID()),
        sa.Column("created_at", _timestamp(), server_default=_NOW, nullable=False),
        sa.Column("enqueued_at", _timestamp(), server_default=_NOW, nullable=False),
        sa.Column("wake_at", _timestamp()),
        sa.Column("started_at", _timestamp()),
        sa.Column("finished_at", _timestamp()),
        sa.Column("awaits", pg.JSONB()),
        sa.Column("deadline_at", _timestamp()),
        sa.Column("timeout", pg.INTERVAL()),
        sa.Column("parent_id", pg.UUID()),
        sa.Column("parent_key", sa.Text()),
        sa.Column("detached", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("forked_from", pg.UUID()),
        sa.Column("version", sa.Text()),
        sa.Column("cancellation", sa.Text()),
        sa.Column("continued_at", _timestamp()),
        sa.Column("headers", pg.JSONB()),
    ]


def _checks_of_state() -> list[sa.CheckConstraint]:
    """Return the constraints on how columns go together with the status."""
    return [
        _check("workflow", "attempt", "attempt >= 1 AND crashes BETWEEN 0 AND attempt"),
        _check("workflow", "running", "status <> 'running' OR (worker_id IS NOT NULL AND started_at IS NOT NULL)"),
        _check("workflow", "finished", "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)"),
        _check("workflow", "output", "(status = 'succeeded') = (output IS NOT NULL)"),
        _check("workflow", "wake", "wake_at IS NULL OR status = 'suspended'"),
        _check("workflow", "cancellation", "cancellation IN ('compensates', 'requested', 'overdue')"),
        _check(
            "workflow",
            "status",
            "status IN ('pending', 'running', 'suspended', 'succeeded', 'failed', 'cancelled')",
        ),
        _check(
            "workflow",
            "token",
            "CASE status WHEN 'running' THEN token IS NOT NULL "
            "WHEN 'pending' THEN token IS NULL WHEN 'suspended' THEN token IS NULL ELSE true END",
        ),
        _check(
            "workflow",
            "error",
            "CASE WHEN error IS NULL THEN status <> 'failed' ELSE status IN ('failed', 'cancelled') "
            "AND pg_catalog.jsonb_typeof(error -> text 'type') IS NOT DISTINCT FROM 'string' END",
        ),
        _check(
            "workflow",
            "awaits",
            "awaits IS NULL OR (status = 'suspended' AND pg_catalog.jsonb_typeof(awaits) = 'array' "
            f"AND NOT pg_catalog.jsonb_path_exists(awaits, '{_UNREADABLE_WAIT}'))",
        ),
    ]


def _checks_of_values() -> list[sa.CheckConstraint]:
    """Return the constraints on single columns, and on times."""
    return [
        _name("workflow", "name"),
        _name("workflow", "key"),
        _name("workflow", "queue"),
        _check("workflow", "input", "pg_catalog.jsonb_typeof(input) = 'object'"),
        _name("workflow", "parent_key", longest=_LONGEST_KEY),
        _check("workflow", "parent_id", "parent_id <> id"),
        _name("workflow", "version"),
        _check(
            "workflow",
            "headers",
            "pg_catalog.jsonb_typeof(headers) = 'object' "
            """AND NOT pg_catalog.jsonb_path_exists(headers, '$.* ? (@.type() <> "string")')""",
        ),
        _times(
            "workflow",
            "created_at",
            "enqueued_at",
            "wake_at",
            "started_at",
            "finished_at",
            "deadline_at",
            "continued_at",
        ),
        _check(
            "workflow",
            "timeout",
            "timeout BETWEEN interval '0' AND interval '36500 days' "
            "AND extract(year FROM timeout) BETWEEN 0.0 AND 100.0 "
            "AND extract(day FROM timeout) BETWEEN 0.0 AND 36500.0",
        ),
    ]


def _create_step(schema: str) -> None:
    op.create_table(
        "step",
        sa.Column("workflow_id", pg.UUID(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("output", pg.JSONB()),
        sa.Column("error", pg.JSONB()),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("tries", sa.Integer(), server_default="1", nullable=False),
        sa.Column("started_at", _timestamp(), nullable=False),
        sa.Column("finished_at", _timestamp(), server_default=_NOW, nullable=False),
        sa.Column("wake_at", _timestamp()),
        sa.Column("details", pg.JSONB()),
        sa.PrimaryKeyConstraint("workflow_id", "key", name=op.f("step_pkey")),
        _of_workflow(schema, "step"),
        _name("step", "key", longest=_LONGEST_KEY),
        _name("step", "name", longest=_LONGEST_KEY),
        _check("step", "status", "status IN ('running', 'retrying', 'waiting', 'succeeded', 'failed')"),
        _check("step", "output", "(status = 'succeeded') = (output IS NOT NULL)"),
        _check(
            "step",
            "error",
            "CASE WHEN error IS NULL THEN status <> 'failed' "
            "ELSE status IN ('running', 'retrying', 'failed') "
            "AND pg_catalog.jsonb_typeof(error -> text 'type') IS NOT DISTINCT FROM 'string' END",
        ),
        _check(
            "step",
            "wake",
            "CASE status WHEN 'retrying' THEN wake_at IS NOT NULL WHEN 'waiting' THEN true ELSE wake_at IS NULL END",
        ),
        _check("step", "counts", "position >= 1 AND attempt >= 1 AND tries >= 1"),
        _times("step", "started_at", "finished_at", "wake_at", more="finished_at >= started_at AND "),
        schema=schema,
    )


def _create_signal(schema: str) -> None:
    op.create_table(
        "signal",
        sa.Column("workflow_id", pg.UUID(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("key", sa.Text()),
        sa.Column("payload", pg.JSONB(), server_default=sa.text("'null'::jsonb"), nullable=False),
        sa.Column("created_at", _timestamp(), server_default=_NOW, nullable=False),
        sa.Column("delivered_at", _timestamp()),
        sa.Column("consumed_by", sa.Text()),
        sa.Column("is_answer", sa.Boolean()),
        sa.Column("is_update", sa.Boolean()),
        sa.Column("is_notice", sa.Boolean()),
        sa.PrimaryKeyConstraint("workflow_id", "id", name=op.f("signal_pkey")),
        _of_workflow(schema, "signal"),
        _name("signal", "name", longest=_LONGEST_KEY),
        _name("signal", "key"),
        _check("signal", "consumed_by", f"pg_catalog.octet_length(consumed_by) <= {_LONGEST_KEY}"),
        _times("signal", "created_at", "delivered_at"),
        _check(
            "signal",
            "engine",
            "(is_answer IS NOT NULL) = pg_catalog.starts_with(name, '#callback:') "
            "AND (is_update IS NOT NULL) = pg_catalog.starts_with(name, '#update:') "
            "AND (is_notice IS NOT NULL) = "
            "(pg_catalog.starts_with(name, '#') AND is_answer IS NULL AND is_update IS NULL)",
        ),
        schema=schema,
    )
    _index(
        schema,
        "signal_workflow_id_name_key_key",
        ["workflow_id", "name", "key"],
        table="signal",
        where="key IS NOT NULL",
        unique=True,
    )
    _index(schema, "signal_new_idx", ["created_at"], table="signal", where="delivered_at IS NULL")
    untaken = ["workflow_id", "name", "id"]
    _index(schema, "signal_untaken_idx", untaken, table="signal", where="consumed_by IS NULL")


def _create_event(schema: str) -> None:
    op.create_table(
        "event",
        sa.Column("workflow_id", pg.UUID(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("value", pg.JSONB(), nullable=False),
        sa.Column("step_key", sa.Text()),
        sa.Column("created_at", _timestamp(), server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("workflow_id", "key", "id", name=op.f("event_pkey")),
        _of_workflow(schema, "event"),
        _name("event", "key", longest=_LONGEST_KEY),
        _check("event", "step_key", f"pg_catalog.octet_length(step_key) <= {_LONGEST_KEY}"),
        _times("event", "created_at"),
        schema=schema,
    )


def _create_stream_item(schema: str) -> None:
    op.create_table(
        "stream_item",
        sa.Column("workflow_id", pg.UUID(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("value", pg.JSONB()),
        sa.Column("closed", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("step_key", sa.Text()),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("try_number", sa.Integer()),
        sa.Column("created_at", _timestamp(), server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("workflow_id", "name", "number", name=op.f("stream_item_pkey")),
        _of_workflow(schema, "stream_item"),
        _name("stream_item", "name", longest=_LONGEST_KEY),
        _check("stream_item", "step_key", f"pg_catalog.octet_length(step_key) <= {_LONGEST_KEY}"),
        _times("stream_item", "created_at"),
        _check("stream_item", "counts", "number >= 0 AND attempt >= 1 AND try_number >= 1"),
        _check("stream_item", "closed", "closed = (value IS NULL)"),
        schema=schema,
    )


def _create_queue(schema: str) -> None:
    op.create_table(
        "queue",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("paused_at", _timestamp()),
        sa.Column("created_at", _timestamp(), server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("queue_pkey")),
        _name("queue", "name"),
        _times("queue", "created_at", "paused_at"),
        schema=schema,
    )


def _create_worker(schema: str) -> None:
    op.create_table(
        "worker",
        sa.Column("id", pg.UUID(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("queues", pg.ARRAY(sa.Text()), nullable=False),
        sa.Column("started_at", _timestamp(), server_default=_NOW, nullable=False),
        sa.Column("heartbeat_at", _timestamp(), server_default=_NOW, nullable=False),
        sa.Column("lease_expires_at", _timestamp(), nullable=False),
        sa.Column("doing", pg.JSONB()),
        sa.PrimaryKeyConstraint("id", name=op.f("worker_pkey")),
        _check("worker", "name", "pg_catalog.octet_length(name) <= 1000"),
        _check("worker", "lease", "lease_expires_at > heartbeat_at"),
        _check("worker", "doing", "pg_catalog.jsonb_typeof(doing) = 'object'"),
        _times("worker", "started_at", "heartbeat_at", "lease_expires_at"),
        schema=schema,
    )


def _set_storage(schema: str) -> None:
    # Vacuum after a fixed number of changes and without pauses: claims walk over what it has not yet removed.
    schemas.set_storage(
        schema,
        "workflow",
        {
            "fillfactor": 70,
            "autovacuum_vacuum_scale_factor": 0.01,
            "autovacuum_vacuum_threshold": 1000,
            "autovacuum_vacuum_cost_delay": 0,
            "autovacuum_analyze_scale_factor": 0.02,
            "autovacuum_analyze_threshold": 1000,
        },
    )
    schemas.set_storage(
        schema,
        "worker",
        {"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0, "autovacuum_vacuum_threshold": 100},
    )


def _check_new_workflows(schema: str) -> None:
    # Nothing is called for a row that passes: each condition costs every INSERT.
    schemas.execute(
        schema,
        """CREATE OR REPLACE FUNCTION {schema}.check_new_workflow() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = 'check_violation', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, CONSTRAINT = TG_NAME,
        MESSAGE = 'a new workflow is pending, or suspended until wake_at: insert it without token and finished_at, '
            || 'got status ' || pg_catalog.quote_nullable(NEW.status),
        HINT = 'To load rows from elsewhere, the owner of the table disables this trigger meanwhile.';
END $$""",
    )
    schemas.execute(
        schema,
        """CREATE TRIGGER workflow_new_check BEFORE INSERT ON {schema}.workflow FOR EACH ROW
WHEN (NEW.token IS NOT NULL OR NEW.finished_at IS NOT NULL) EXECUTE FUNCTION {schema}.check_new_workflow()""",
    )


def _timestamp() -> sa.DateTime:
    return sa.DateTime(timezone=True)


def _check(table: str, name: str, condition: str) -> sa.CheckConstraint:
    # op.f: the application's naming convention must not be put on top.
    return sa.CheckConstraint(condition, name=op.f(f"{table}_{name}_check"))


def _name(table: str, column: str, *, longest: int = 1_000) -> sa.CheckConstraint:
    condition = f"{column} ~ '[^[:space:]]' AND pg_catalog.octet_length({column}) <= {longest}"
    return _check(table, column.removesuffix("_key"), condition)


def _times(table: str, *columns: str, more: str = "") -> sa.CheckConstraint:
    every = ", ".join(columns)
    earliest, latest = "timestamptz '0001-01-02 00:00:00Z'", "timestamptz '9999-12-30 00:00:00Z'"
    return _check(table, "times", f"{more}least({every}) >= {earliest} AND greatest({every}) <= {latest}")


def _of_workflow(schema: str, table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["workflow_id"], [f"{schema}.workflow.id"], name=op.f(f"{table}_workflow_id_fkey"), ondelete="CASCADE"
    )


def _index(
    schema: str, name: str, columns: list[str], *, where: str, table: str = "workflow", unique: bool = False
) -> None:
    op.create_index(op.f(name), table, columns, schema=schema, unique=unique, postgresql_where=sa.text(where))
