"""Create the table schedule, and note in each workflow which schedule has started it."""

from __future__ import annotations

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


def upgrade(schema: str | None = None) -> None:
    with schemas.resolved(schema) as found:
        name = sa.quoted_name(found, quote=True)  # Alembic splits another one at its dots
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


def downgrade(schema: str | None = None) -> None:
    with schemas.resolved(schema) as found:
        name = sa.quoted_name(found, quote=True)  # Alembic splits another one at its dots
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
        *(_name(each) for each in ("name", "workflow", "queue", "version", "tz")),
        _check("input", "pg_catalog.jsonb_typeof(input) = 'object'"),
        _check(
            "headers",
            "pg_catalog.jsonb_typeof(headers) = 'object' "
            """AND NOT pg_catalog.jsonb_path_exists(headers, '$.* ? (@.type() <> "string")')""",
        ),
        _check("when", "(pg_catalog.cardinality(cron) > 0) = (every IS NULL)"),
        _check(
            "lists",
            "pg_catalog.cardinality(cron) <= 100 AND pg_catalog.array_position(cron, NULL) IS NULL "
            "AND pg_catalog.cardinality(excluding) <= 10000 AND pg_catalog.array_position(excluding, NULL) IS NULL",
        ),
        _check("every", f"every BETWEEN interval '1 second' AND {_LONGEST}"),
        *(
            _check(each, f"{each} BETWEEN interval '0' AND {_LONGEST}")
            for each in ("timeout", "jitter", "missed_within")
        ),
        _check("overlap", "overlap IN ('skip', 'queue_one', 'allow', 'cancel_running')"),
        _check("missed", "missed IN ('skip', 'run_one', 'run_all')"),
        _check("span", "starts_at <= ends_at"),
        _check("skipped", "skipped >= 0"),
        _check(
            "times",
            f"least({_TIMES}) >= timestamptz '0001-01-02 00:00:00Z' "
            f"AND greatest({_TIMES}) <= timestamptz '9999-12-30 00:00:00Z'",
        ),
        schema=schema,
    )
    op.create_index(
        op.f("schedule_due_idx"),
        "schedule",
        ["due_at"],
        schema=schema,
        postgresql_where=sa.text("paused_at IS NULL AND ended_at IS NULL"),
    )


def _timestamp() -> sa.DateTime:
    return sa.DateTime(timezone=True)


def _check(name: str, condition: str) -> sa.CheckConstraint:
    # op.f: the application's naming convention must not be put on top.
    return sa.CheckConstraint(condition, name=op.f(f"schedule_{name}_check"))


def _name(column: str) -> sa.CheckConstraint:
    return _check(column, f"{column} ~ '[^[:space:]]' AND pg_catalog.octet_length({column}) <= 1000")
