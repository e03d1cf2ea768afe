"""What must be true of the bank, each as one query for whatever contradicts it.

Plain SQL over the tables, and none of the package's own statements: they are what is being tested.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqla_durable.tools.torture.database import BankDatabase

_LIMIT = 20
"""How many contradictions of one invariant are shown at most."""

ALWAYS: Mapping[str, str] = {
    "money is neither made nor lost": """
        SELECT NULL::uuid AS workflow_id,
               format('account %s opened with %s, moved %s, holds %s', id, opened, moved, account.cents) AS what
        FROM torture_bank.account LEFT JOIN (
            SELECT account AS id, sum(cents) AS moved FROM torture_bank.entry
            WHERE kind IN ('debit', 'credit') GROUP BY account
        ) AS moves USING (id)
        WHERE account.cents <> opened + coalesce(moved, 0)""",
    "nothing is applied twice": """
        SELECT (array_agg(workflow_id))[1] AS workflow_id,
               format('transfer %s has %s entries of %s', transfer_id, count(*), kind) AS what
        FROM torture_bank.entry GROUP BY transfer_id, kind HAVING count(*) > 1""",
    "only the worker that owns a workflow writes for it": """
        SELECT workflow_id, what FROM torture_bank.foreign_write""",
    "nothing fails": """
        SELECT id AS workflow_id, format('%s %s: %s', name, status, error) AS what
        FROM durable.workflow WHERE status IN ('failed', 'cancelled')""",
    "every call of one step has one key, and no other step has it": """
        SELECT (array_agg(workflow_id))[1] AS workflow_id,
               format('steps %s called with keys %s', array_agg(DISTINCT step), array_agg(DISTINCT key)) AS what
        FROM torture_bank.call GROUP BY transfer_id HAVING count(DISTINCT key) <> 1 OR count(DISTINCT step) <> 1
        UNION ALL
        SELECT (array_agg(workflow_id))[1], format('key %s is of transfers %s', key, array_agg(DISTINCT transfer_id))
        FROM torture_bank.call GROUP BY key HAVING count(DISTINCT transfer_id) <> 1""",
}
"""Must be true at every moment, also while transfers are executed."""

AT_THE_END: Mapping[str, str] = {
    "everything is finished": """
        SELECT id AS workflow_id, format('%s is %s in attempt %s', name, status, attempt) AS what
        FROM durable.workflow WHERE status <> 'succeeded'""",
    "the sum of all accounts is what it was": """
        SELECT NULL::uuid AS workflow_id, format('opened with %s, now %s', sum(opened), sum(cents)) AS what
        FROM torture_bank.account HAVING sum(opened) <> sum(cents)""",
    "every transfer is applied once, and its amounts agree": """
        SELECT transfer.workflow_id, format(
            'transfer %s of %s from %s to %s: entries %s', transfer.id, transfer.cents, source, target,
            coalesce(jsonb_agg(jsonb_build_array(kind, account, entry.cents)) FILTER (WHERE kind IS NOT NULL), '[]')
        ) AS what
        FROM torture_bank.transfer LEFT JOIN torture_bank.entry ON transfer_id = transfer.id
            AND entry.workflow_id = transfer.workflow_id
        GROUP BY transfer.id
        HAVING count(*) <> 3
            OR count(*) FILTER (WHERE kind = 'debit' AND account = source AND entry.cents = -transfer.cents) <> 1
            OR count(*) FILTER (WHERE kind = 'credit' AND account = target AND entry.cents = transfer.cents) <> 1
            OR count(*) FILTER (WHERE kind = 'journal' AND account = source AND entry.cents = transfer.cents) <> 1""",
    "every movement is counted once": """
        SELECT NULL::uuid AS workflow_id, format('account %s counts %s of %s', account.id, movements, count) AS what
        FROM torture_bank.account CROSS JOIN LATERAL (
            SELECT count(*) FROM torture_bank.transfer WHERE account.id IN (source, target)
        ) AS journaled
        WHERE movements <> count""",
    "every entry has its checkpoint": """
        SELECT entry.workflow_id, format('%s of transfer %s by %s', entry.step, transfer_id, worker) AS what
        FROM torture_bank.entry LEFT JOIN durable.step ON step.workflow_id = entry.workflow_id AND key = entry.step
            AND step.status = 'succeeded' AND step.attempt = entry.attempt
        WHERE key IS NULL""",
    "every checkpoint has its entry or its call": """
        SELECT step.workflow_id, format('%s at position %s, attempt %s', key, position, attempt) AS what
        FROM durable.step
        WHERE NOT EXISTS (
            SELECT FROM torture_bank.entry WHERE entry.workflow_id = step.workflow_id AND entry.step = step.key
        ) AND NOT EXISTS (
            SELECT FROM torture_bank.call WHERE call.workflow_id = step.workflow_id AND call.step = step.key
        )""",
    "every history is complete": """
        SELECT workflow.id AS workflow_id,
               format('%s has %s', workflow.name, jsonb_agg(step.key ORDER BY position)) AS what
        FROM durable.workflow LEFT JOIN durable.step ON step.workflow_id = workflow.id AND step.status = 'succeeded'
        GROUP BY workflow.id
        HAVING jsonb_agg(jsonb_build_array(position, step.key) ORDER BY position) <> CASE workflow.name
            WHEN 'transfer' THEN '[[1, "debit"], [2, "call"], [3, "credit"], [4, "journal"]]'::jsonb
            ELSE '[[1, "async_debit"], [2, "async_call"], [3, "async_credit"], [4, "async_journal"]]' END""",
    "every result is the one of its transfer": """
        SELECT workflow.id AS workflow_id, format('transfer %s of %s gave %s', transfer.id, cents, output) AS what
        FROM torture_bank.transfer JOIN durable.workflow ON workflow.id = workflow_id
        WHERE output IS DISTINCT FROM to_jsonb(cents)""",
    "a transfer and its workflow are started together": """
        SELECT workflow.id AS workflow_id, format('workflow of transfer %s alone', input #>> '{order,transfer}') AS what
        FROM durable.workflow LEFT JOIN torture_bank.transfer ON workflow_id = workflow.id
        WHERE transfer.id IS NULL OR input #>> '{order,transfer}' <> transfer.id::text""",
}
"""Must be true when all transfers are finished."""

_EXISTING = """
SELECT id FROM torture_bank.transfer WHERE id = ANY(:numbers)
UNION SELECT transfer_id FROM torture_bank.entry WHERE transfer_id = ANY(:numbers)
UNION SELECT transfer_id FROM torture_bank.call WHERE transfer_id = ANY(:numbers)
UNION SELECT (input #>> '{order,transfer}')::bigint FROM durable.workflow
    WHERE (input #>> '{order,transfer}')::bigint = ANY(:numbers)
"""
_ROWS = """
SELECT jsonb_build_object(
    'workflow', to_jsonb(workflow),
    'steps', (SELECT jsonb_agg(to_jsonb(step) ORDER BY position) FROM durable.step WHERE workflow_id = workflow.id),
    'entries', (SELECT jsonb_agg(to_jsonb(entry)) FROM torture_bank.entry WHERE workflow_id = workflow.id),
    'calls', (SELECT jsonb_agg(to_jsonb(call)) FROM torture_bank.call WHERE workflow_id = workflow.id)
) FROM durable.workflow WHERE id = :id
"""


@dataclass(frozen=True, slots=True)
class Violation:
    """A contradiction: of which invariant, what it is, and the rows of the workflow, if it concerns one."""

    invariant: str
    what: str
    workflow_id: UUID | None = None
    rows: Mapping[str, Any] | None = None


def contradictions(database: BankDatabase, invariants: Mapping[str, str]) -> list[Violation]:
    """Return what contradicts these invariants, at most 20 violations for each."""
    return [
        Violation(name, row.what, row.workflow_id, _rows(database, row.workflow_id))
        for name, query in invariants.items()
        for row in database.query(f"{query}\nLIMIT {_LIMIT}")
    ]


def lost(database: BankDatabase, committed: Collection[int]) -> list[Violation]:
    """Return a violation for each transfer whose start was acknowledged and that is not in the tables."""
    known = {row[0] for row in database.query("SELECT id FROM torture_bank.transfer")}
    missing = sorted(set(committed) - known)
    return [Violation("an acknowledged start is not lost", f"transfer {each} is lost") for each in missing]


def reappeared(database: BankDatabase, rolled_back: Collection[int]) -> list[Violation]:
    """Return a violation for each transfer whose start was rolled back and that is in the tables."""
    found = sorted(row[0] for row in database.query(_EXISTING, numbers=list(rolled_back)))
    return [Violation("a rolled-back start leaves nothing", f"transfer {each} exists") for each in found]


def _rows(database: BankDatabase, workflow_id: UUID | None) -> Mapping[str, Any] | None:
    rows = database.query(_ROWS, id=workflow_id) if workflow_id is not None else []
    return rows[0][0] if rows else None
