"""For each status, every combination of columns and every transition that makes no sense is refused by the database.

Which ones are legal is said here once more, in other words than the constraints, from the documentation of `models`
and `status`. All rows of a table are tried in one query, by a temporary function that takes each of them back.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from sqla_durable.models.base import StepStatus, WorkflowStatus
from tests.support.forged import NO_CHECK

VALUES: dict[str, Any] = {
    "token": "00000000-0000-0000-0000-000000000001",
    "worker_id": "00000000-0000-0000-0000-000000000002",
    "started_at": "2026-01-01T00:00:00Z",
    "finished_at": "2026-01-01T00:00:00Z",
    "output": {},
    "error": {"type": "builtins:ValueError"},
    "wake_at": "2026-01-01T00:00:00Z",
    "awaits": [{"signal": "approved"}],
}
COLUMNS = frozenset(VALUES)
ALWAYS: dict[WorkflowStatus, set[str]] = {
    WorkflowStatus.PENDING: set(),
    WorkflowStatus.RUNNING: {"token", "worker_id", "started_at"},
    WorkflowStatus.SUSPENDED: set(),
    WorkflowStatus.SUCCEEDED: {"finished_at", "output"},
    WorkflowStatus.FAILED: {"finished_at", "error"},
    WorkflowStatus.CANCELLED: {"finished_at"},
}
# Who had it last, and since when: a trace that any later status may keep.
SOMETIMES: dict[WorkflowStatus, set[str]] = {
    WorkflowStatus.PENDING: {"worker_id", "started_at"},
    WorkflowStatus.RUNNING: set(),
    WorkflowStatus.SUSPENDED: {"worker_id", "started_at", "wake_at", "awaits"},
    WorkflowStatus.SUCCEEDED: {"worker_id", "started_at", "token"},
    WorkflowStatus.FAILED: {"worker_id", "started_at", "token"},
    WorkflowStatus.CANCELLED: {"worker_id", "started_at", "token", "error"},
}
STEP_COLUMNS = ("output", "error", "wake_at")
STEP_ALWAYS: dict[StepStatus, set[str]] = {
    StepStatus.RUNNING: set(),
    StepStatus.RETRYING: {"wake_at"},
    StepStatus.WAITING: set(),
    StepStatus.SUCCEEDED: {"output"},
    StepStatus.FAILED: {"error"},
}
STEP_SOMETIMES: dict[StepStatus, set[str]] = {
    StepStatus.RUNNING: {"error"},
    StepStatus.RETRYING: {"error"},
    StepStatus.WAITING: {"wake_at"},
    StepStatus.SUCCEEDED: set(),
    StepStatus.FAILED: set(),
}


def is_legal(status: WorkflowStatus, columns: frozenset[str]) -> bool:
    """Return whether a workflow of this status may have exactly these columns."""
    return ALWAYS[status] <= columns <= ALWAYS[status] | SOMETIMES[status]


def subsets(names: Sequence[str] | frozenset[str]) -> Iterator[frozenset[str]]:
    for size in range(len(names) + 1):
        yield from map(frozenset, itertools.combinations(sorted(names), size))


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    """A connection with a function that tries statements and rolls each of them back."""
    with engine.connect() as connection:
        connection.execute(
            text("""
            CREATE FUNCTION pg_temp.refusal(statement text) RETURNS text LANGUAGE plpgsql AS $$
            DECLARE refused_by text;
            BEGIN
                BEGIN
                    EXECUTE statement;
                    RAISE EXCEPTION USING errcode = 'YY000';  -- accepted: take it back
                EXCEPTION
                    WHEN SQLSTATE 'YY000' THEN RETURN '';
                    WHEN integrity_constraint_violation THEN
                        GET STACKED DIAGNOSTICS refused_by = CONSTRAINT_NAME;
                        RETURN coalesce(nullif(refused_by, ''), SQLERRM);
                END;
            END $$
            """)
        )
        yield connection


def refusals(connection: Connection, statements: Sequence[str]) -> list[str]:
    """Return for each statement the constraint that refuses it, or an empty text."""
    query = text(
        "SELECT pg_temp.refusal(statement) "
        "FROM unnest(CAST(:statements AS text[])) WITH ORDINALITY AS each (statement, number) ORDER BY number"
    )
    return list(connection.execute(query, {"statements": list(statements)}).scalars())


def inserted(table: str, row: Mapping[str, Any]) -> str:
    columns = ", ".join(row)
    return f"INSERT INTO durable.{table} ({columns}) VALUES ({', '.join(map(literal, row.values()))})"


def literal(value: Any) -> str:
    quoted = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return "'" + quoted.replace("'", "''") + "'"


def workflow(status: WorkflowStatus, columns: frozenset[str]) -> dict[str, Any]:
    return {"name": "checkout", "status": status.value} | {name: VALUES[name] for name in sorted(columns)}


NEW = frozenset({WorkflowStatus.PENDING, WorkflowStatus.SUSPENDED})


@pytest.mark.parametrize("statuses", [NEW, frozenset(WorkflowStatus)], ids=["new", "any"])
def test_a_workflow_is_accepted_exactly_if_its_columns_fit_its_status(
    connection: Connection, statuses: frozenset[WorkflowStatus]
) -> None:
    """Of all statuses, those that a new workflow may have: the trigger and the CHECKs leave no other."""
    if statuses > NEW:
        connection.execute(text(NO_CHECK))
    tried = [(status, columns) for status in WorkflowStatus for columns in subsets(COLUMNS)]
    answers = refusals(connection, [inserted("workflow", workflow(*each)) for each in tried])
    assert len(answers) == 6 * 2**8
    wrong = [
        (str(status), sorted(columns), refusal)
        for (status, columns), refusal in zip(tried, answers, strict=True)
        if (status in statuses and is_legal(status, columns)) == bool(refusal)
    ]
    assert wrong == []
    assert all(each.startswith("workflow_") for each in answers if each)


def test_a_status_that_is_changed_alone_is_refused_unless_the_row_fits_both(connection: Connection) -> None:
    """From every legal row of every status, a naked `UPDATE ... SET status`."""
    rows = [(status, columns) for status in WorkflowStatus for columns in subsets(COLUMNS) if is_legal(status, columns)]
    tried = [(*row, to) for row in rows for to in WorkflowStatus]
    ids = made(connection, [workflow(*row) for row in rows])
    statements = [
        f"UPDATE durable.workflow SET status = '{to}' WHERE id = '{workflow_id}'"
        for workflow_id in ids
        for to in WorkflowStatus
    ]
    answers = refusals(connection, statements)
    wrong = [
        (str(status), str(to), sorted(columns), refusal)
        for (status, columns, to), refusal in zip(tried, answers, strict=True)
        if is_legal(to, columns) == bool(refusal)
    ]
    assert wrong == []


def made(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    connection.execute(text(NO_CHECK))
    return [str(connection.execute(text(f"{inserted('workflow', row)} RETURNING id")).scalar_one()) for row in rows]


# From a typical row, which other statuses a naked UPDATE can reach. A suspended workflow without a timer is pending but
# for its status, and a failed one may as well have been cancelled: no column differs.
REACHABLE: dict[WorkflowStatus, set[WorkflowStatus]] = {
    WorkflowStatus.PENDING: {WorkflowStatus.SUSPENDED},
    WorkflowStatus.RUNNING: set(),
    WorkflowStatus.SUSPENDED: set(),
    WorkflowStatus.SUCCEEDED: set(),
    WorkflowStatus.FAILED: {WorkflowStatus.CANCELLED},
    WorkflowStatus.CANCELLED: set(),
}
TYPICAL: dict[WorkflowStatus, set[str]] = {
    WorkflowStatus.PENDING: set(),
    WorkflowStatus.RUNNING: {"token", "worker_id", "started_at"},
    WorkflowStatus.SUSPENDED: {"wake_at"},
    WorkflowStatus.SUCCEEDED: {"token", "worker_id", "started_at", "finished_at", "output"},
    WorkflowStatus.FAILED: {"token", "worker_id", "started_at", "finished_at", "error"},
    WorkflowStatus.CANCELLED: {"token", "worker_id", "started_at", "finished_at"},
}


@pytest.mark.parametrize("status", WorkflowStatus)
def test_a_typical_workflow_can_reach_few_statuses_by_its_status_alone(
    connection: Connection, status: WorkflowStatus
) -> None:
    (workflow_id,) = made(connection, [workflow(status, frozenset(TYPICAL[status]))])
    others = [each for each in WorkflowStatus if each is not status]
    answers = refusals(
        connection, [f"UPDATE durable.workflow SET status = '{to}' WHERE id = '{workflow_id}'" for to in others]
    )
    reached = {to for to, refusal in zip(others, answers, strict=True) if not refusal}
    assert reached == REACHABLE[status]


def test_a_step_is_accepted_exactly_if_its_columns_fit_its_status(connection: Connection) -> None:
    (workflow_id,) = made(connection, [{"name": "checkout"}])
    tried = [(status, columns) for status in StepStatus for columns in subsets(STEP_COLUMNS)]
    answers = refusals(
        connection,
        [
            inserted("step", step(workflow_id, status) | {name: VALUES[name] for name in sorted(columns)})
            for status, columns in tried
        ],
    )
    accepted = {each for each, refusal in zip(tried, answers, strict=True) if not refusal}
    assert accepted == {
        (status, frozenset(always | more))
        for status, always in STEP_ALWAYS.items()
        for more in subsets(frozenset(STEP_SOMETIMES[status]))
    }


# From a typical row: one that is there before its outcome has few columns of its own.
STEP_REACHABLE: dict[StepStatus, set[StepStatus]] = {
    StepStatus.RUNNING: {StepStatus.WAITING},
    StepStatus.RETRYING: {StepStatus.WAITING},
    StepStatus.WAITING: {StepStatus.RUNNING},
    StepStatus.SUCCEEDED: set(),
    StepStatus.FAILED: {StepStatus.RUNNING},
}


@pytest.mark.parametrize("status", StepStatus)
def test_a_typical_step_can_reach_few_statuses_by_its_status_alone(connection: Connection, status: StepStatus) -> None:
    (workflow_id,) = made(connection, [{"name": "checkout"}])
    row = step(workflow_id, status) | {name: VALUES[name] for name in STEP_ALWAYS[status]}
    connection.execute(text(inserted("step", row)))
    others = [each for each in StepStatus if each is not status]
    answers = refusals(connection, [f"UPDATE durable.step SET status = '{each}'" for each in others])
    assert {to for to, refusal in zip(others, answers, strict=True) if not refusal} == STEP_REACHABLE[status]


def step(workflow_id: str, status: StepStatus) -> dict[str, Any]:
    return {
        "workflow_id": workflow_id,
        "key": "charge",
        "name": "charge",
        "position": 1,
        "attempt": 1,
        "status": status.value,
        "started_at": VALUES["started_at"],
    }


def test_a_lease_ends_after_it_began(connection: Connection) -> None:
    beat = "2026-01-01T00:00:00Z"
    worker = {"id": VALUES["worker_id"], "name": "a", "queues": "{default}", "heartbeat_at": beat}
    ends = ["2025-12-31T23:59:59Z", beat, "2026-01-01T00:00:01Z"]
    answers = refusals(connection, [inserted("worker", worker | {"lease_expires_at": each}) for each in ends])
    assert answers == ["worker_lease_check", "worker_lease_check", ""]
