"""The log of what operators have done: its rows are inserted in the transaction of what they are about."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models import SCHEMA, Base
from sqla_durable.models.base import Text
from sqla_durable.store.statements import (
    WORKFLOW,
    Statement,
    batch_parameter,
    batch_table,
    execute,
    insert_select,
    json_parameter,
    parameter,
)

_AUDIT = Base.metadata.tables[f"{SCHEMA}.audit"]


@dataclass(frozen=True, slots=True)
class Note:
    """What rows of the log have in common.

    Attributes:
        verb: the command.
        who: who has given it; None for the user of the database.
        reason: why, if that was said.
        details: what else the command was given.
    """

    verb: str
    who: str | None
    reason: str | None
    details: Mapping[str, Any] | None


class Noted(NamedTuple):
    """A row of the log: the workflow and its name, or the name of a queue or a schedule."""

    workflow_id: UUID | None
    subject: str | None


def note_workflows(
    session: Session, ids: Sequence[UUID], note: Note, *, names: Mapping[UUID, str] | None = None
) -> list[Noted]:
    """Insert a row for each workflow, by one statement; `names` has those of workflows that were deleted."""
    known = names or {}
    return _insert(session, [{"id": each.hex, "name": known.get(each)} for each in ids], note)


def note_subject(session: Session, subject: str | None, note: Note) -> list[Noted]:
    """Insert a row for a queue or a schedule, or for something that has no name."""
    return _insert(session, [{"id": None, "name": subject}], note)


def _insert(session: Session, rows: Iterable[Mapping[str, Any]], note: Note) -> list[Noted]:
    parameters = {
        "who": note.who,
        "verb": note.verb,
        "reason": note.reason,
        "details": None if note.details is None else json.dumps(note.details, default=str),
        **batch_parameter("noted", list(rows)),
    }
    return [Noted(row.workflow_id, row.subject) for row in execute(session, _INSERT, parameters)]


def _insert_statement() -> Any:
    noted = batch_table("noted", {"id": sa.UUID(), "name": Text()})
    columns: dict[str, Any] = {
        "who": sa.func.coalesce(
            parameter("who", Text()), sa.literal_column("CAST(session_user AS text)", type_=Text())
        ),
        "verb": parameter("verb", Text()),
        "workflow_id": noted.c.id,
        "subject": sa.func.coalesce(noted.c.name, WORKFLOW.c.name),
        "reason": parameter("reason", Text()),
        "details": json_parameter("details"),
    }
    source = sa.select(*columns.values()).select_from(noted.outerjoin(WORKFLOW, WORKFLOW.c.id == noted.c.id))
    return insert_select(_AUDIT, columns, source).returning(_AUDIT.c.workflow_id, _AUDIT.c.subject)


_INSERT = Statement(_insert_statement)
