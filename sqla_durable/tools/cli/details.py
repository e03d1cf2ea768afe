"""What `show` reads of one workflow: its row, what it has done, what it waits for, and what was done to it.

Every query is by the workflow's id, which an index finds. How it is printed is in `showing`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Executable, cast, func, select
from sqlalchemy import case as sql_case
from sqlalchemy.orm import Session

from sqla_durable import RunningStep, Workflow, WorkflowStatus, manage, running_steps
from sqla_durable.definitions.checks import unescape_key
from sqla_durable.definitions.revealing import MARKED, revealed_row
from sqla_durable.definitions.texts import duration_text
from sqla_durable.models import Audit, Event, Signal, Step, Worker
from sqla_durable.models.base import StepStatus, Text
from sqla_durable.store import workflows
from sqla_durable.store.callbacks import NAME as CREATE_CALLBACK
from sqla_durable.store.inbox import CALLBACK, UPDATE
from sqla_durable.store.statements import SUSPECT_CRASHES
from sqla_durable.tools.cli.output import shown

MOST_CHARACTERS = 500
"""How much of a value is shown unless all of it is asked for."""

MOST_STEPS, MOST_CHILDREN, DEEPEST, MOST_OTHERS = 200, 50, 3, 20
"""How many of them are shown, unless all are asked for; and how many levels of children."""

Row = Mapping[str, Any]

_OPEN = (StepStatus.WAITING, StepStatus.RETRYING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """One workflow as it was at one time.

    Attributes:
        workflow: the columns of its row.
        read_at: when that was read, on the database's clock.
        worker: what executes it, with its lease; None if it does not run, or no row of a worker is there.
        steps: those that were recorded, in order; `steps_before` is how many earlier ones are not among them.
        waits: what it waits for, in words.
        running: the steps that are being executed, as the worker's last heartbeat has them.
        reasons: why it does not start, if it is pending.
        children: each with its `depth`, those of one workflow together; `has_more_children` if some are left out.
        events, signals, audit: the latest value of each event, what was sent and is not taken, what operators did.
    """

    workflow: Row
    read_at: datetime
    worker: Row | None
    steps: Sequence[Row]
    steps_before: int
    waits: Sequence[str]
    running: Sequence[RunningStep]
    reasons: Sequence[str]
    children: Sequence[Row]
    has_more_children: bool
    events: Sequence[Row]
    signals: Sequence[Row]
    audit: Sequence[Row]


def read(session: Session, workflow_id: UUID, *, whole: bool) -> Details:
    """Return what is known of a workflow, its values and lists whole or cut.

    Raises:
        NotFoundError: there is no such workflow.
    """
    found = session.execute(_workflow(workflow_id, whole=whole)).mappings().one_or_none()
    if found is None:
        raise workflows.not_found(session, workflow_id)
    row = revealed_row(dict(found), "input", "output", as_text=not whole)
    read_at: datetime = row.pop("read_at")
    steps, before = _steps(session, workflow_id, whole=whole)
    children, has_more = _children(session, workflow_id, whole=whole)
    status: WorkflowStatus = row["status"]
    return Details(
        workflow=row,
        read_at=read_at,
        worker=_worker(session, row["worker_id"]) if status is WorkflowStatus.RUNNING else None,
        steps=steps,
        steps_before=before,
        waits=[] if status.finished else _waits(session, row, read_at),
        running=running_steps(session, workflow_id) if status is WorkflowStatus.RUNNING else [],
        reasons=manage.explain_pending(session, workflow_id) if status is WorkflowStatus.PENDING else [],
        children=children,
        has_more_children=has_more,
        events=_revealed(session, _events(workflow_id, whole=whole), "value", whole=whole),
        signals=_revealed(session, _signals(workflow_id, whole=whole), "payload", whole=whole),
        audit=_rows(session, _audit(workflow_id, whole=whole)),
    )


def _rows(session: Session, query: Executable) -> list[Row]:
    return [dict(each) for each in session.execute(query).mappings()]


def _revealed(session: Session, query: Executable, name: str, *, whole: bool) -> list[Row]:
    return [revealed_row(each, name, as_text=not whole) for each in _rows(session, query)]


def _value(column: Any, *, whole: bool) -> ColumnElement[Any]:
    """Return a column of JSON, or the beginning of its text with one character more than is shown.

    What payload codecs have encoded comes whole: a part of it cannot be decoded.
    """
    if whole:
        return column.label(column.key)  # type: ignore[no-any-return]
    whole_text = cast(column, Text)
    beginning = func.pg_catalog.left(whole_text, MOST_CHARACTERS + 1)
    is_encoded = func.pg_catalog.strpos(whole_text, MARKED) > 0
    return sql_case((is_encoded, whole_text), else_=beginning).label(column.key)


def _error(column: Any, *, whole: bool) -> ColumnElement[Any]:
    """Return an error, without its traceback and arguments unless it is to be whole."""
    if whole:
        return column.label("error")  # type: ignore[no-any-return]
    parts = (column["type"].astext, func.pg_catalog.left(column["message"].astext, MOST_CHARACTERS + 1))
    made = func.pg_catalog.jsonb_build_object("type", parts[0], "message", parts[1], type_=column.type)
    return func.nullif(
        made, func.pg_catalog.jsonb_build_object("type", None, "message", None, type_=column.type)
    ).label("error")


def _workflow(workflow_id: UUID, *, whole: bool) -> Any:
    apart = {
        "input": _value(Workflow.input, whole=whole),
        "output": _value(Workflow.output, whole=whole),
        "error": _error(Workflow.error, whole=whole),
    }
    columns = [apart.get(each.key, each) for each in Workflow.__table__.columns if each.key != "token"]
    now = func.pg_catalog.statement_timestamp().label("read_at")
    return select(*columns, now).where(Workflow.id == workflow_id)


def _worker(session: Session, worker_id: UUID) -> Row | None:
    wanted = select(
        Worker.name,
        Worker.heartbeat_at,
        Worker.lease_expires_at,
        (Worker.lease_expires_at > func.pg_catalog.statement_timestamp()).label("is_alive"),
    )
    found = session.execute(wanted.where(Worker.id == worker_id)).mappings().one_or_none()
    return None if found is None else dict(found)


def _steps(session: Session, workflow_id: UUID, *, whole: bool) -> tuple[list[Row], int]:
    """Return the last steps, or all of them, and how many come before. The engine's own marks are not among them."""
    of_workflow = Step.workflow_id == workflow_id, ~Step.key.startswith("#")
    wanted = select(
        Step.position,
        Step.key,
        Step.name,
        Step.status,
        Step.attempt,
        Step.tries,
        Step.started_at,
        Step.finished_at,
        Step.wake_at,
        _error(Step.error, whole=whole),
        _value(Step.output, whole=whole),
        _value(Step.details, whole=whole),
    )
    ordered = wanted.where(*of_workflow).order_by(Step.position.desc(), Step.key.desc())
    found = _rows(session, ordered if whole else ordered.limit(MOST_STEPS))[::-1]
    count = session.scalar(select(func.pg_catalog.count(Step.key)).where(*of_workflow)) or 0
    return [_without_secrets(each, as_text=not whole) for each in found], max(count - len(found), 0)


def _without_secrets(step: Row, *, as_text: bool) -> Row:
    """Return a step without the token of a callback; its key is as it is stored, which is what `rewind` takes."""
    is_callback = step["name"] == CREATE_CALLBACK and step["output"] is not None
    return {**step, "output": "(a token)"} if is_callback else revealed_row(step, "output", "details", as_text=as_text)


def _children(session: Session, workflow_id: UUID, *, whole: bool) -> tuple[list[Row], bool]:
    """Return the tree under a workflow, level by level and then in order, and whether some of it is left out."""
    found: dict[UUID, list[Row]] = {}
    seen = {workflow_id}  # of rows that somebody has written, parents may lead in a circle
    level, left, has_more = [workflow_id], MOST_CHILDREN * (20 if whole else 1), False
    for _ in range(DEEPEST):
        rows = _rows(session, _children_of(level).limit(left + 1)) if level else []
        has_more, rows = has_more or len(rows) > left, [each for each in rows[:left] if each["id"] not in seen]
        seen |= {each["id"] for each in rows}
        for each in rows:
            found.setdefault(each["parent_id"], []).append(each)
        level, left = [each["id"] for each in rows], left - len(rows)
    if level and not has_more:
        has_more = session.execute(_children_of(level).limit(1)).first() is not None
    return list(_in_order(found, workflow_id, 1)), has_more


def _children_of(parents: Sequence[UUID]) -> Any:
    columns = Workflow.parent_id, Workflow.id, Workflow.name, Workflow.status, Workflow.detached, Workflow.parent_key
    times = Workflow.created_at, Workflow.started_at, Workflow.finished_at, _error(Workflow.error, whole=False)
    return select(*columns, *times).where(Workflow.parent_id.in_(parents)).order_by(Workflow.parent_id, Workflow.id)


def _in_order(found: Mapping[UUID, Sequence[Row]], parent: UUID, depth: int) -> Iterator[Row]:
    for each in found.get(parent, ()):
        yield {**each, "depth": depth}
        yield from _in_order(found, each["id"], depth + 1)


def _events(workflow_id: UUID, *, whole: bool) -> Any:
    """Return the query for the latest value of each event; answers to updates are no events of the workflow's."""
    mine = Event.workflow_id == workflow_id, ~Event.key.startswith("#")
    latest = select(func.pg_catalog.max(Event.id)).where(*mine).group_by(Event.key)
    wanted = select(Event.key, _value(Event.value, whole=whole), Event.created_at)
    ordered = wanted.where(*mine, Event.id.in_(latest)).order_by(Event.key)
    return ordered if whole else ordered.limit(MOST_OTHERS + 1)


def _signals(workflow_id: UUID, *, whole: bool) -> Any:
    """Return the query for what was sent and is not taken, without the engine's notices."""
    wanted = select(Signal.name, Signal.key, _value(Signal.payload, whole=whole), Signal.created_at)
    untaken = Signal.workflow_id == workflow_id, Signal.consumed_by.is_(None), Signal.is_notice.is_(None)
    mine = wanted.where(*untaken).order_by(Signal.id)
    return mine if whole else mine.limit(MOST_OTHERS + 1)


def _audit(workflow_id: UUID, *, whole: bool) -> Any:
    wanted = select(Audit.at, Audit.who, Audit.verb, Audit.reason, Audit.details)
    mine = wanted.where(Audit.workflow_id == workflow_id).order_by(Audit.id)
    return mine if whole else mine.limit(MOST_OTHERS + 1)


def _waits(session: Session, row: Row, now: datetime) -> list[str]:
    """Return in words what an unfinished workflow waits for, as its open steps and `awaits` have it."""
    awaits: list[dict[str, Any]] = row["awaits"] or []
    signals = [each["signal"] for each in awaits if "signal" in each]
    children = _unfinished(session, [UUID(each) for one in awaits for each in one.get("children", ())])
    wanted = select(Step.key, Step.name, Step.status, Step.tries, Step.started_at, Step.wake_at)
    open_steps = wanted.where(Step.workflow_id == row["id"], Step.status.in_(_OPEN), ~Step.key.startswith("#"))
    steps = session.execute(open_steps.order_by(Step.position).limit(MOST_STEPS)).mappings().all()
    waits = [_Wait.of(dict(each), {one["name"] for one in children}) for each in steps]
    found = [each.in_words(now) for each in waits if not each.is_for_children]
    found += map(_signal_in_words, _unrecorded(signals, waits))
    found += [_child_in_words(each, now) for each in children[:MOST_OTHERS]]
    if len(children) > MOST_OTHERS:
        found.append("for other children, too")
    if row["status"] is WorkflowStatus.SUSPENDED:
        found += _start_in_words(row, now, is_explained=bool(found))
    return found


@dataclass(frozen=True, slots=True)
class _Wait:
    """An open step: its key and name as users write them, and whether it waits for children, which are named beside."""

    step: Row
    key: str
    name: str
    is_for_children: bool

    @classmethod
    def of(cls, step: Row, children: Collection[str]) -> _Wait:
        """Return what an open step waits for, where these children are awaited."""
        name = unescape_key(step["name"])
        is_for_children = bool(children) and (name == "first" or name.partition(":")[2] in children)
        return cls(step, unescape_key(step["key"]), name, is_for_children)

    @property
    def kind(self) -> str:
        """What kind of operation it is, by the name that operations have."""
        return self.name.partition(":")[0]

    @property
    def rest(self) -> str:
        """What the name has after that."""
        return self.name.partition(":")[2]

    def in_words(self, now: datetime) -> str:
        """Return what it waits for, since when and until when."""
        until = "" if self.step["wake_at"] is None else f", until {shown(self.step['wake_at'])}"
        if self.step["status"] is StepStatus.RETRYING:
            return f"for try {self.step['tries'] + 1} of step {self.key!r}{until}"
        what = self._what()
        is_own_key = self.key.rpartition("/")[2].partition("#")[0] != self.name and what != repr(self.key)
        by = f" in step {self.key!r}" if is_own_key else ""
        return f"for {what}{by}, for {duration_text(now - self.step['started_at'])} so far{until}"

    def _what(self) -> str:
        if self.name == "sleep":
            return "a timer"
        if self.name.startswith("wait_event("):
            return f"event {self.name.removeprefix('wait_event(').removesuffix(')')!r} of another workflow"
        if self.kind == "result":
            return f"the answer to callback {self.rest!r}"
        return f"{self.kind} {self.rest!r}" if self.kind in ("signal", "update") and self.rest else repr(self.key)


def _unrecorded(signals: Iterable[str], waits: Sequence[_Wait]) -> list[str]:
    """Return the awaited signals that no open step is for: a short wait has no row."""
    names = {each.rest if each.kind == "signal" else f"{UPDATE}{each.rest}" for each in waits}
    has_callback = any(each.kind == "result" and not each.is_for_children for each in waits)
    return [each for each in signals if each not in names and not (has_callback and each.startswith(CALLBACK))]


def _signal_in_words(name: str) -> str:
    if name.startswith(CALLBACK):
        return "for the answer to a callback"
    return f"for update {name.removeprefix(UPDATE)!r}" if name.startswith(UPDATE) else f"for signal {name!r}"


def _unfinished(session: Session, ids: Sequence[UUID]) -> list[Row]:
    wanted = select(Workflow.id, Workflow.name, Workflow.status, Workflow.created_at)
    unfinished = wanted.where(Workflow.id.in_(ids), Workflow.finished_at.is_(None)).order_by(Workflow.id)
    return _rows(session, unfinished.limit(MOST_OTHERS + 1)) if ids else []


def _start_in_words(row: Row, now: datetime, *, is_explained: bool) -> Iterator[str]:
    until = "" if row["wake_at"] is None else f", until {shown(row['wake_at'])}"
    since = f"for {duration_text(now - row['created_at'])} so far"
    if row["started_at"] is not None and not is_explained and row["crashes"] >= SUSPECT_CRASHES:
        yield f"for its next attempt, after {row['crashes']} crashes in a row{until}"
    elif row["started_at"] is None and row["wake_at"] is not None:
        yield f"for its start, {since}{until}"
    elif row["started_at"] is None:
        yield f"for its start, {since}: its parent starts it when others of the children have ended"
    elif not is_explained:
        yield f"for what is not recorded as a step{until}"


def _child_in_words(child: Row, now: datetime) -> str:
    since = duration_text(now - child["created_at"])
    return f"for child {child['name']} {child['id']} ({child['status']}), started {since} ago"
