"""The declarative base of the models: the schema, the statuses, the types of columns, and checks of several tables.

What is compared with a text column is sent as `text`. SQLAlchemy sends a `str` as `varchar`, for which PostgreSQL has
no operators: it would prefer one of another role that fits exactly, in whatever schema of the search_path, to its own.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import CheckConstraint, DateTime, Dialect, Interval, MetaData, TypeDecorator, inspect
from sqlalchemy import Text as PlainText
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase

S = TypeVar("S", bound=StrEnum)

_ALEMBIC_NAME = "sqlalchemy.types"
"""Where an autogenerate is to look: what it writes into an application's revision is `sa.Text()`."""


SCHEMA = "durable"
REVISION = "durable_0002"
"""The migration that these models correspond to."""

REVISION_COMMENT = "sqla-durable for durable_0001 and later, at durable_0002"
"""The comment of the workflow table: which packages can work with the tables, and at which migration they are."""

NAMING_CONVENTION = {
    "pk": "%(table_name)s_pkey",
    "fk": "%(table_name)s_%(column_0_name)s_fkey",
    "ck": "%(table_name)s_%(constraint_name)s_check",
}

OPTIONAL_JSON = JSONB().with_variant(JSONB(none_as_null=True), "postgresql")
"""JSON that is left out of an INSERT where it has no value, and NULL where it is None."""

LONGEST_KEY = 2_500
"""How many bytes the key of a step may have, which branches make longer: what fits into an index beside an id."""


class Text(PlainText):
    """Text whose parameters are sent as such."""

    __module__ = _ALEMBIC_NAME
    render_bind_cast = True

    def adapt(self, cls: Any, **kw: Any) -> Any:
        """Return a copy for a dialect, and not the type that it has for every string."""
        return super().adapt(type(self), **kw)


class StatusText(TypeDecorator[S]):
    """A status as text; which texts are legal is a named CHECK constraint, not a PostgreSQL enum."""

    __module__ = _ALEMBIC_NAME
    impl = Text
    cache_ok = True

    def __init__(self, statuses: type[S]) -> None:
        super().__init__()
        self.statuses = statuses

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Return the text of a status, or of its name."""
        return None if value is None else self.statuses(value).value

    def process_result_value(self, value: Any, dialect: Dialect) -> S | None:
        """Return the status that a text is."""
        return None if value is None else self.statuses(value)

    def __repr__(self) -> str:
        return "Text()"


class WorkflowStatus(StrEnum):
    """The status of a workflow.

    ```
    pending ──claim──► running ──► succeeded | failed
       ▲                 │
       │ release,        │
       ├─── reclaim ─────┤──reclaim after max_attempts──► failed
       │                 │ suspend, reclaim after several crashes
       │                 ▼
       └──── wake ── suspended
    pending, running, suspended ──cancel──► cancelled
    cancelled, failed for its crashes ──resume──► pending
    failed by itself ──retry──► pending
    any ──rewind──► pending
    ```
    """

    PENDING = "pending"
    RUNNING = "running"
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """Whether the workflow has an outcome that will not change by itself."""
        return self in FINISHED

    @property
    def as_predicate(self) -> str:
        """How a workflow of this status came to its end, for messages: "has succeeded", "was cancelled"."""
        return f"{'was' if self is WorkflowStatus.CANCELLED else 'has'} {self}"


class StepStatus(StrEnum):
    """The status of a step. One without a row has not ended its first try.

    `running` has reported details, `retrying` waits for its next try, `waiting` is a wait that has begun.
    """

    RUNNING = "running"
    RETRYING = "retrying"
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def finished(self) -> bool:
        """Whether it is the status of an outcome."""
        return self in (StepStatus.SUCCEEDED, StepStatus.FAILED)


FINISHED = frozenset({WorkflowStatus.SUCCEEDED, WorkflowStatus.FAILED, WorkflowStatus.CANCELLED})


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


def headers_check() -> CheckConstraint:
    """Refuse headers that are no object of texts."""
    return CheckConstraint(
        "pg_catalog.jsonb_typeof(headers) = 'object' "
        """AND NOT pg_catalog.jsonb_path_exists(headers, '$.* ? (@.type() <> "string")')""",
        name="headers",
    )


def tags_check() -> CheckConstraint:
    """Refuse tags that are no object."""
    return CheckConstraint("pg_catalog.jsonb_typeof(tags) = 'object'", name="tags")


def shown(record: Base, *attributes: str) -> str:
    """Show what is loaded, and the primary key of what has expired: a repr must not go to the database."""
    state = inspect(record)
    values = {name: state.dict[name] for name in attributes if state.dict.get(name) is not None}
    loaded = [repr(value) if name in ("name", "key") else str(value) for name, value in values.items()]
    return f"<{type(record).__name__} {' '.join(loaded or map(str, state.identity or ()))}>"
