"""The declarative base of the models: the schema, the types of columns, and the checks that several tables have."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, DateTime, Interval, MetaData, inspect
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase

from sqla_durable.models.column_types import StatusText, Text
from sqla_durable.models.status import StepStatus, WorkflowStatus

SCHEMA = "durable"
REVISION = "durable_0001"
"""The migration that these models correspond to; kept as the comment of the workflow table."""

NAMING_CONVENTION = {
    "pk": "%(table_name)s_pkey",
    "fk": "%(table_name)s_%(column_0_name)s_fkey",
    "ck": "%(table_name)s_%(constraint_name)s_check",
}

OPTIONAL_JSON = JSONB().with_variant(JSONB(none_as_null=True), "postgresql")
"""JSON that is left out of an INSERT where it has no value, and NULL where it is None."""

LONGEST_KEY = 2_500
"""How many bytes the key of a step may have, which branches make longer: what fits into an index beside an id."""


class Base(AsyncAttrs, DeclarativeBase):
    """The declarative base of this package; its metadata is `sqla_durable.metadata`."""

    metadata = MetaData(schema=SCHEMA, naming_convention=NAMING_CONVENTION)
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy declares it as an instance attribute)
        datetime: DateTime(timezone=True),
        timedelta: Interval(native=True),
        dict[str, Any]: JSONB,
        str: Text,
        UUID: PG_UUID(as_uuid=True),
        list[str]: ARRAY(Text),
        WorkflowStatus: StatusText(WorkflowStatus),
        StepStatus: StatusText(StepStatus),
    }


metadata = Base.metadata  # for `target_metadata = [Base.metadata, sqla_durable.metadata]` in Alembic


def name_check(column: str, *, longest: int = 1_000) -> CheckConstraint:
    """Refuse a blank name, and one that is too long for an index or a line of a log."""
    condition = f"{column} ~ '[^[:space:]]' AND pg_catalog.octet_length({column}) <= {longest}"
    return CheckConstraint(condition, name=column.removesuffix("_key"))


def times_check(*columns: str, more: str = "") -> CheckConstraint:
    """Refuse times that no driver can read in every time zone, infinity among them."""
    every = ", ".join(columns)
    earliest, latest = "timestamptz '0001-01-02 00:00:00Z'", "timestamptz '9999-12-30 00:00:00Z'"
    return CheckConstraint(f"{more}least({every}) >= {earliest} AND greatest({every}) <= {latest}", name="times")


def shown(record: Base, *attributes: str) -> str:
    """Show what is loaded, and the primary key of what has expired: a repr must not go to the database."""
    state = inspect(record)
    values = {name: state.dict[name] for name in attributes if state.dict.get(name) is not None}
    loaded = [repr(value) if name in ("name", "key") else str(value) for name, value in values.items()]
    return f"<{type(record).__name__} {' '.join(loaded or map(str, state.identity or ()))}>"
