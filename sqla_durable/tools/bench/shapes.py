"""The shapes that the same work has in SQL at the least: scripts for pgbench, on the bench's own tables.

They leave out what makes the work safe (fences, histories, codecs) and what makes it Python. A script's variables are
`client_id`, which pgbench sets, and `n`, the transactions that a client has made.
"""

from __future__ import annotations

from dataclasses import dataclass

_CLAIM = """
WITH head AS MATERIALIZED (
    SELECT id FROM {schema}.workflow WHERE status = 'pending' AND queue = 'default'
    ORDER BY priority, enqueued_at, id LIMIT {batch} FOR NO KEY UPDATE SKIP LOCKED
), claimed AS (
    UPDATE {schema}.workflow SET status = 'running', token = workflow.id, worker_id = workflow.id,
        started_at = statement_timestamp()
    FROM head WHERE workflow.id = head.id RETURNING workflow.id
)
SELECT array_agg(id)::text AS ids FROM claimed \\gset
"""
_STEP = """
    INSERT INTO {schema}.step (workflow_id, key, name, position, status, output, attempt, started_at)
    SELECT id, {key}, 'increment', 1, 'succeeded', '1', 1, statement_timestamp() FROM unnest(:ids::uuid[]) AS id
"""
_FINISH = """
    UPDATE {schema}.workflow SET status = 'succeeded', output = '1', finished_at = statement_timestamp()
    WHERE id = ANY(:ids::uuid[]) AND status = 'running'
"""
_ENTRY = """
    INSERT INTO {schema}.bench_entry (number, note) VALUES (:n, 'entered by a step')
"""
_CHECKPOINT = """
\\set n :n + 1
INSERT INTO {schema}.step (workflow_id, key, name, position, status, output, attempt, started_at)
VALUES (('0190' || lpad(to_hex(:client_id::int + 1), 28, '0'))::uuid, 'increment#' || :n::text, 'increment', :n,
    'succeeded', '1', 1, statement_timestamp());
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One script.

    Attributes:
        what: how a figure names it.
        clients: how many connections there are.
        script: what each of them does, once for each transaction.
        each: how many workflows or steps one transaction carries out.
        claims: how many pending workflows one transaction claims.
        pending: how many must be there beside those.
        share: of the transactions that other shapes take; fewer where they are slow.
    """

    what: str
    clients: int
    script: str
    each: int = 1
    claims: int = 0
    pending: int = 0
    share: float = 1.0


def one_step(*, batch: int, clients: int) -> Shape:
    """Claim; checkpoint and finish: two commits for each batch."""
    script = _CLAIM + f"WITH step AS ({_STEP})" + _FINISH + ";"
    by = "2 commits" if batch == 1 else f"batched by {batch}"
    return Shape(
        what=f"SQL, {by}, {_clients(clients)}",
        clients=clients,
        script=script.replace("{batch}", str(batch)).replace("{key}", "'increment'"),
        each=batch,
        claims=batch,
        share=1.0 if batch == 1 else 0.1,
    )


def three_entries(*, clients: int) -> Shape:
    """Claim; three times an entry with its checkpoint, the last with the completion: four commits."""
    steps = [f"WITH step AS ({_STEP.replace('{key}', repr(key))})" for key in ("enter", "enter#2", "enter#3")]
    last = f"{steps[2]}, entry AS ({_ENTRY}) {_FINISH};"
    script = _CLAIM + "".join(f"{each} {_ENTRY};" for each in steps[:2]) + last
    return Shape(
        what=f"SQL, 4 commits, {_clients(clients)}",
        clients=clients,
        script="\\set n :n + 1\n" + script.replace("{batch}", "1"),
        claims=1,
        share=0.5,
    )


def checkpoint(*, clients: int) -> Shape:
    """One checkpoint a commit, each client for a workflow of its own."""
    return Shape(
        what=f"SQL, a commit each, {_clients(clients)}",
        clients=clients,
        script=_CHECKPOINT,
        pending=clients,
        share=0.25 if clients == 1 else 1.0,
    )


def bulk(*, rows: int) -> Shape:
    """Insert pending workflows by arrays, so many in each commit."""
    inputs = ",".join(f'"{{\\"number\\": {number}}}"' for number in range(rows))
    script = f"""\\set n :n + 1
INSERT INTO {{schema}}.workflow (id, name, input)
SELECT ('0191' || lpad(to_hex(:n::bigint * {rows} + number), 28, '0'))::uuid, 'one_step', input::jsonb
FROM unnest('{{{inputs}}}'::text[]) WITH ORDINALITY AS new(input, number);
"""  # noqa: S608 (all of it is written here)
    return Shape(what=f"SQL, INSERT of {rows:,} rows, 1 client", clients=1, script=script, each=rows, share=0.005)


def _clients(count: int) -> str:
    return f"{count} client{'s' if count > 1 else ''}"
