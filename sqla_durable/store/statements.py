"""How statements are built and executed: tables, literals, batches as tables, fences of many attempts, subsets.

What goes in and comes out are `records`. A statement over many workflows finds them by itself; when the row of one of
them makes it fail, it is executed for subsets of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from operator import attrgetter
from types import NoneType
from typing import Any, Generic, TypeAlias, TypeVar, get_args, get_type_hints
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSON, JSONB, Insert, insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, make_transient_to_detached
from sqlalchemy.types import TypeEngine

from sqla_durable.definitions.database_errors import mark_engine_error
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models import SCHEMA, Base, Workflow
from sqla_durable.models.base import StepStatus, Text, WorkflowStatus
from sqla_durable.store.records import Fence

WORKFLOW = Base.metadata.tables[f"{SCHEMA}.workflow"]
STEP = Base.metadata.tables[f"{SCHEMA}.step"]
SIGNAL = Base.metadata.tables[f"{SCHEMA}.signal"]
EVENT = Base.metadata.tables[f"{SCHEMA}.event"]
STREAM_ITEM = Base.metadata.tables[f"{SCHEMA}.stream_item"]
QUEUE = Base.metadata.tables[f"{SCHEMA}.queue"]
QUEUE_KEY = Base.metadata.tables[f"{SCHEMA}.queue_key"]
QUEUE_USE = Base.metadata.tables[f"{SCHEMA}.queue_use"]
SCHEDULE = Base.metadata.tables[f"{SCHEMA}.schedule"]
WORKER = Base.metadata.tables[f"{SCHEMA}.worker"]
ORDER_IN_QUEUE = WORKFLOW.c.priority, WORKFLOW.c.enqueued_at, WORKFLOW.c.id  # in which a claim takes what waits
_ANY_WRITE = sa.update(WORKFLOW)

pg = sa.func.pg_catalog
"""PostgreSQL's own functions: a name without a schema could be another role's function in the search path.

`func` is left for what the grammar knows without a look-up: COALESCE, GREATEST, LEAST, EXTRACT, ANY, ALL, and UNNEST
of several arrays.
"""

R = TypeVar("R")

Connectable: TypeAlias = Session | sa.Connection
"""Where a statement is executed: a caller's session, or a connection of the engine."""

Condition: TypeAlias = sa.ColumnElement[bool]
Expression: TypeAlias = sa.ColumnElement[Any]
Columns: TypeAlias = Mapping[str, TypeEngine[Any]]

BEGINNING = "-infinity"
"""The time before all times: a statement that takes `since` skips nothing."""

MOST_ATTEMPTS = 2_147_483_647
"""The largest number in the column of attempts."""

SUSPECT_CRASHES = 2
"""From this many crashes in a row, a workflow is suspected of killing its workers."""

FENCE: Columns = {"id": sa.UUID(), "token": sa.UUID()}
"""The columns of an attempt in a batch."""

_KINDS: Mapping[Any, TypeEngine[Any]] = {
    UUID: sa.UUID(),
    int: sa.Integer(),
    float: sa.Float(),
    bool: sa.Boolean(),
    datetime: sa.DateTime(timezone=True),
}
_PATHS: Mapping[Any, str] = {UUID: ".hex", WorkflowStatus: ".value", StepStatus: ".value"}
_IDLE_TIMEOUT = "idle_in_transaction_session_timeout"
_IDLE_LIMIT = "5s"


class Shape(Generic[R]):
    """How a record becomes a row of a batch: its columns are those of its fence and its other fields.

    A dictionary is a JSON object, and whatever a field has as text is JSON text; a status is text; a duration is
    seconds; an id has hexadecimal digits, which cost less to write than its usual form.
    """

    def __init__(self, record: type[R], *, without: Collection[str] = (), **kinds: TypeEngine[Any]) -> None:
        wanted = {name: hint for name, hint in get_type_hints(record).items() if name not in without}
        fence: Columns = FENCE if wanted.pop("fence", None) else {}
        self.columns: Columns = {**fence, **{name: kinds.get(name) or _kind_of(hint) for name, hint in wanted.items()}}
        paths = ["fence.workflow_id.hex", "fence.token.hex"] if fence else []
        paths += [name + _PATHS.get(hint, "") for name, hint in wanted.items()]
        self._values = attrgetter(*paths)

    def row(self, record: R) -> dict[str, Any]:
        """Return a record as a row of `columns`."""
        return dict(zip(self.columns, self._values(record), strict=True))


class Statement:
    """A statement that is made when it is first executed: to make all takes half the time of importing SQLAlchemy.

    So it may be made of names that its module defines below it.
    """

    def __init__(self, make: Callable[[], sa.Executable]) -> None:
        self._make = make

    @cached_property
    def made(self) -> sa.Executable:
        """The statement itself."""
        return self._make()


S = TypeVar("S", bound=Statement)

Restriction: TypeAlias = Callable[[sa.ColumnElement[UUID]], Condition]
"""Makes the condition that a workflow with this id belongs to the subset."""


@dataclass(frozen=True, slots=True)
class Subset:
    """A restriction of a statement to some of the workflows that it finds.

    Attributes:
        only: these; None means all of them.
        excluded: not these.
    """

    only: Sequence[UUID] | None = None
    excluded: Sequence[UUID] = ()

    @property
    def is_whole(self) -> bool:
        """Whether it is not restricted."""
        return self.only is None and not self.excluded

    def form_of(self, whole: S, part: S) -> S:
        """Return the form of a statement to be executed."""
        return whole if self.is_whole else part

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that this form has more."""
        return {} if self.is_whole else self._ids

    @property
    def _ids(self) -> dict[str, Any]:
        return {"only_ids": None if self.only is None else list(self.only), "excluded_ids": list(self.excluded)}

    def find_ids(self, connectable: Connectable, statement: Statement, parameters: Mapping[str, Any]) -> list[UUID]:
        """Return the ids of those that a statement would change. Takes the same locks as that."""
        return list(dict.fromkeys(scalars(connectable, statement, {**parameters, **self._ids})))


ALL = Subset()
"""All that a statement finds."""


def parameter(name: str, kind: TypeEngine[Any]) -> Expression:
    """Return a parameter of a type that PostgreSQL knows also where the driver does not say it."""
    return sa.cast(sa.bindparam(name, type_=kind), kind)


def json_parameter(name: str) -> Expression:
    """Return a parameter of JSON text as JSONB."""
    return sa.cast(parameter(name, Text()), JSONB)


def text_literal(value: str) -> sa.ColumnElement[str]:
    """Return a text as a literal of that type; PostgreSQL gives an untyped one the type of the other operand."""
    return sa.literal_column(f"text '{value}'", type_=Text())


def integer(value: int) -> sa.ColumnElement[int]:
    """Return a number as a literal."""
    return sa.literal_column(str(value), type_=sa.Integer())


def is_among(column: Expression, ids: Sequence[UUID] | None = None) -> Condition:
    """Compare with one array, however many they are: a statement has 65,535 parameters at most.

    Args:
        column: a column of ids.
        ids: what it is compared with; None means the parameter `ids`.
    """
    array = ARRAY(sa.UUID())
    return column == sa.func.any(parameter("ids", array) if ids is None else sa.literal(list(ids), array))


def insert_select(table: sa.Table, columns: Iterable[str], source: sa.SelectBase) -> Insert:
    """Insert into columns what a select returns, without Python's defaults for the other columns."""
    return insert(table).from_select(list(columns), source, include_defaults=False)


def bind_arguments() -> dict[str, Any]:
    """Return the arguments with which a session's `get_bind` finds our tables for writing."""
    return {"mapper": Workflow.__mapper__, "clause": _ANY_WRITE}


def connection_of(session: Session) -> sa.Connection:
    """Return the session's connection to where our tables are written, in its transaction."""
    return session.connection(bind_arguments=bind_arguments())


def merge_record(session: Session, row: sa.RowMapping, more: Mapping[str, Any] | None = None) -> Workflow:
    """Return the record of a row with columns of a workflow; one that the session knows has the row's values.

    What is in neither the row nor `more` is loaded when it is asked for. Not loaded by a query of the session, which
    its `get_bind` or its events could lead elsewhere.
    """
    record = Workflow(**{**(more or {}), **row})
    make_transient_to_detached(record)
    return session.merge(record, load=False)


def execute(
    connectable: Connectable, statement: sa.Executable | Statement, parameters: Mapping[str, Any] | None = None
) -> sa.Result[Any]:
    """Execute a statement; with a session, on its connection to the engine that has our tables.

    Not by `Session.execute`, so that a user's session class does not change our statements. An error is marked as
    caused by a statement of the engine: it may be raised through a step's function.
    """
    try:
        if isinstance(connectable, Session):
            connectable = connection_of(connectable)
        if isinstance(statement, Statement):
            statement = statement.made
        return connectable.execute(statement, parameters)
    except (DBAPIError, OSError) as error:  # asyncpg's connections raise the latter too
        mark_engine_error(error)
        raise


def scalars(
    connectable: Connectable, statement: sa.Executable | Statement, parameters: Mapping[str, Any] | None = None
) -> sa.ScalarResult[Any]:
    """Execute, and return the first column."""
    return execute(connectable, statement, parameters).scalars()


def scalar(
    connectable: Connectable, statement: sa.Executable | Statement, parameters: Mapping[str, Any] | None = None
) -> Any:
    """Execute, and return the first column of the first row."""
    return execute(connectable, statement, parameters).scalar()


def batch_table(name: str, columns: Columns) -> sa.TableValuedAlias:
    """Return a batch as a table, from the parameter of `batch_parameter`.

    JSON costs a third of what an array parameter for each column costs to send, and reads as one value.
    """
    rows = sa.cast(parameter(_rows_of(name), Text()), JSON)
    shape = [sa.column(each, kind) for each, kind in columns.items()]
    return pg.json_to_recordset(rows).table_valued(*shape).render_derived(name=name, with_types=True)


def batch_parameter(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return rows as the parameter of the `batch_table` of that name."""
    return {_rows_of(name): json.dumps(rows, default=str)}


def as_uuid(value: Any) -> UUID:
    """Return an id that the driver read, as a UUID or as its text."""
    return value if isinstance(value, UUID) else UUID(value)


def fence_row(fence: Fence) -> dict[str, Any]:
    """Return the columns of an attempt in a batch; hexadecimal digits cost less to write than a UUID's usual form."""
    return {"id": fence.workflow_id.hex, "token": fence.token.hex}


def status_literal(value: WorkflowStatus | StepStatus) -> sa.ColumnElement[str]:
    """Return a status as a literal: bound as a parameter, a generic plan cannot use a partial index."""
    kind = WORKFLOW.c.status.type if isinstance(value, WorkflowStatus) else STEP.c.status.type
    return sa.literal_column(f"'{value}'", type_=kind)


def has_status(table: sa.FromClause, value: WorkflowStatus) -> Condition:
    """Compare the status of rows that are found otherwise, such as by their ids.

    As an expression that fits no index: the partial index of a status is small and would be read whole, although a
    snapshot that is open elsewhere may keep dead entries in it.
    """
    return pg.concat(table.c.status) == text_literal(value)


def scan_start(name: str = "since") -> sa.ColumnElement[datetime]:
    """Return the parameter of the time at which a scan begins; as text, because a driver cannot send `-infinity`."""
    return sa.cast(parameter(name, Text()), sa.DateTime(timezone=True))


def is_open_step() -> Condition:
    """Return whether a step's record has no outcome yet: it runs, waits or is being tried again."""
    return sa.or_(*(STEP.c.status == status_literal(each) for each in StepStatus if not each.finished))


def next_attempt(attempt: sa.ColumnElement[int] = WORKFLOW.c.attempt) -> sa.ColumnElement[int]:
    """Return the number of the attempt after this one; the largest one that the column can have stays."""
    return sa.func.least(attempt, integer(MOST_ATTEMPTS - 1)) + ONE


def must_compensate() -> Condition:
    """Return whether a workflow compensates, or is to do so."""
    return sa.func.coalesce(WORKFLOW.c.cancellation.in_([REQUESTED, OVERDUE]), sa.false())


def reset_cancellation() -> Expression:
    """Return `cancellation` for a workflow that starts over: it has a saga or not, and nothing to compensate now."""
    return sa.case((WORKFLOW.c.cancellation.is_not(None), COMPENSATES))


def error_object(kind: str, message: Expression) -> Expression:
    """Return an error as the column `error` has it.

    Args:
        kind: the module and the name of its class.
        message: its text.
    """
    return pg.jsonb_build_object(
        text_literal("type"), text_literal(kind), text_literal("message"), message, type_=JSONB
    )


def end_or_compensate(
    compensates: Condition, end: WorkflowStatus, *, reason: Expression, now: Expression
) -> dict[str, Expression]:
    """Return the values of a workflow that is to end from outside; one with a saga is enqueued, to compensate first.

    Args:
        compensates: whether it has a saga.
        end: the status of those that have none.
        reason: what `cancellation` says of the others.
        now: the time, which the CTE that locks the rows has read.
    """
    return {
        "status": sa.case((compensates, WorkflowStatus.PENDING.value), else_=end.value),
        "finished_at": sa.case((compensates, sa.null()), else_=now),
        "cancellation": sa.case((compensates, reason)),
        "attempt": sa.case((compensates, next_attempt()), else_=WORKFLOW.c.attempt),
        "enqueued_at": sa.case((compensates, now), else_=WORKFLOW.c.enqueued_at),
        "worker_id": sa.case((compensates, sa.null()), else_=WORKFLOW.c.worker_id),
        "token": sa.case((compensates, sa.null()), else_=WORKFLOW.c.token),
        "wake_at": sa.null(),
        "awaits": sa.null(),
    }


def interval(seconds: Expression) -> Expression:
    """Make an interval of seconds; NULL stays NULL."""
    return pg.make_interval(*[ZERO] * 6, seconds)


def text_columns(table: sa.FromClause, names: Iterable[str]) -> list[Expression]:
    """Return columns of a table, those of JSON as text."""
    columns = [table.c[each] for each in names]
    return [sa.cast(each, Text).label(each.name) if isinstance(each.type, JSONB) else each for each in columns]


def count_rows() -> sa.ColumnElement[int]:
    """Return `count(*)`."""
    return pg.count(sa.literal_column("*"), type_=sa.BigInteger())


def refresh_loaded(session: Session, ids: Iterable[UUID]) -> None:
    """Refresh the records that the session has loaded, after statements on the table have changed their rows."""
    known = [each for each in ids if session.identity_key(Workflow, each) in session.identity_map]
    if known:
        for row in execute(session, sa.select(*WORKFLOW.c).where(is_among(WORKFLOW.c.id, known))).mappings():
            _renew(session, row)


def current_record(session: Session, workflow_id: UUID) -> Workflow:
    """Return the record of a workflow as it is now."""
    return _renew(
        session, execute(session, sa.select(*WORKFLOW.c).where(WORKFLOW.c.id == workflow_id)).mappings().one()
    )


def lock_owned(fences: sa.FromClause, *, skip_locked: bool) -> sa.CTE:
    """Lock the workflows that these attempts (`id`, `token`) still own, in the order of their ids.

    Join with `is_same_attempt`: a batch may hold rows of two attempts at one workflow.

    With the lock, a cancel or a reclaim waits for this one commit and sees what it wrote; without it, either could
    commit between this check and the commit.
    """
    if skip_locked:
        return _lock_owned_unlocked(fences)
    theirs = sa.tuple_(WORKFLOW.c.id, WORKFLOW.c.token).in_(sa.select(fences.c.id, fences.c.token))
    return materialized(
        sa.select(WORKFLOW.c.id, WORKFLOW.c.token)
        .where(theirs, WORKFLOW.c.status == status_literal(WorkflowStatus.RUNNING))
        .order_by(WORKFLOW.c.id)
        .with_for_update(key_share=True, of=WORKFLOW),
        "owned",
    )


def limit_idle_time() -> sa.ColumnElement[str]:
    """Limit how long the transaction may be idle after this statement; evaluated once.

    For statements that only the COMMIT, or others of the engine, can follow: without it, a worker that is frozen or cut
    off between the two would lock the row for as long as the server keeps the connection. A shorter limit of the
    application stays. Source: PostgreSQL manual, Client Connection Defaults,
    idle_in_transaction_session_timeout.
    """
    name, most = text_literal(_IDLE_TIMEOUT), text_literal(_IDLE_LIMIT)
    today = pg.current_setting(name, type_=Text())
    shorter = sa.cast(today, sa.Interval).between(
        sa.text("interval '1 millisecond'"), sa.text(f"interval '{_IDLE_LIMIT}'")
    )
    limit = pg.set_config(name, sa.case((shorter, today), else_=most), sa.true())
    return sa.select(limit).scalar_subquery().label("idle_limit")


def is_same_attempt(batch: sa.FromClause, mine: sa.CTE) -> Condition:
    """Join a batch with `lock_owned`: by token too, so that no row of another attempt slips in."""
    return sa.and_(mine.c.id == batch.c.id, mine.c.token == batch.c.token)


def materialized(statement: sa.SelectBase, name: str) -> sa.CTE:
    """Make a CTE that is executed once, whatever the planner would prefer."""
    return statement.cte(name).prefix_with("MATERIALIZED")


def row_version(table: sa.FromClause) -> Expression:
    """Return what is another value whenever a row was changed; source: PostgreSQL manual, System Columns, xmin."""
    xmin: sa.ColumnClause[Any] = sa.column("xmin", _selectable=table)
    return xmin.label("row_version")


def subset_forms(
    kind: Callable[[Callable[[], Any]], S], build: Callable[[Restriction], tuple[Any, Any]]
) -> tuple[S, S, Statement]:
    """Return the three forms of a statement: for all, for a subset, and the select of ids.

    Args:
        kind: the class of the statements for all and for a subset.
        build: makes the statement and the select, with a condition on the column of ids.
    """
    return (
        kind(lambda: build(lambda _: sa.true())[0]),
        kind(lambda: build(_is_in_subset)[0]),
        Statement(lambda: build(_is_in_subset)[1]),
    )


def _kind_of(hint: Any) -> TypeEngine[Any]:
    found = next(each for each in (*get_args(hint), hint) if each is not NoneType)
    return _KINDS.get(found) or Text()


def _rows_of(name: str) -> str:
    return f"{name}_rows"


def _renew(session: Session, row: sa.RowMapping) -> Workflow:
    record = merge_record(session, row)
    session.expire(record, sa.inspect(Workflow).relationships.keys())
    return record


def _lock_owned_unlocked(fences: sa.FromClause) -> sa.CTE:
    """Lock row by row, by the primary key.

    Any other plan reads more rows than those of the batch: the table while it is small, or the index of running
    workflows, which is small too until an open transaction elsewhere keeps its dead entries. LIMIT keeps the planner
    from using the status.
    """
    ordered = materialized(sa.select(fences.c.id, fences.c.token).order_by(fences.c.id), "ordered")
    locked = (
        sa.select(WORKFLOW.c.status)
        .where(WORKFLOW.c.id == ordered.c.id, WORKFLOW.c.token == ordered.c.token)
        .limit(ONE)
        .with_for_update(key_share=True, skip_locked=True, of=WORKFLOW)
        .lateral("locked")
    )
    running = locked.c.status == status_literal(WorkflowStatus.RUNNING)
    return materialized(sa.select(ordered.c.id, ordered.c.token).join(locked, running), "owned")


def _is_in_subset(column: sa.ColumnElement[UUID]) -> Condition:
    only = parameter("only_ids", ARRAY(sa.UUID()))
    excluded = parameter("excluded_ids", ARRAY(sa.UUID()))
    return sa.and_(sa.or_(only.is_(None), column == sa.func.any(only)), column != sa.func.all(excluded))


ZERO, ONE = integer(0), integer(1)
LIMIT = parameter("limit", sa.Integer())
WANTED_ID = parameter("wanted_id", sa.UUID())
IS_WANTED: Condition = WORKFLOW.c.id == WANTED_ID

COMPENSATES, REQUESTED, OVERDUE = map(text_literal, ("compensates", "requested", "overdue"))
"""The values of `cancellation`: the workflow has a saga; it is to compensate, for a request or for a deadline."""
