"""What the figures are compared with: the same work as plain SQL by pgbench, and as naive ORM code.

The SQL leaves out what makes the work safe (fences, histories, codecs) and what makes it Python. Variables of a script
are `client_id`, which pgbench sets, and `n`, the number of transactions that the client has made.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from psycopg.conninfo import make_conninfo
from sqlalchemy import URL, make_url, select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import (
    Step,
    StepStatus,
    Workflow,
    WorkflowStatus,
    embedded,
)
from sqla_durable.errors import UsageError
from sqla_durable.tools.bench import application
from sqla_durable.tools.bench.report import (
    BenchError,
    Reference,
)
from sqla_durable.tools.bench.schema import (
    BenchSchema,
    insert_pending,
)

NO_PGBENCH = "SQL: no pgbench here"


class Pgbench:
    """Measures scripts by pgbench, PostgreSQL's own load generator.

    Args:
        schema: where; its workflows are deleted before each script.
        transactions: about how many transactions a script makes.
        program: pgbench; None measures nothing.
    """

    def __init__(self, schema: BenchSchema, *, transactions: int, program: Path | None) -> None:
        self._schema = schema
        self._transactions = transactions
        self._program = program

    def measure(self, *scripts: PgbenchScript) -> tuple[Reference, ...]:
        """Measure each script, in workflows or steps per second.

        Raises:
            BenchError: pgbench failed.
        """
        if self._program is None:
            return (Reference(NO_PGBENCH, None),)
        return tuple(Reference(each.what, self._rate(self._program, each)) for each in scripts)

    def _rate(self, program: Path, script: PgbenchScript) -> float:
        transactions = max(1, round(self._transactions * script.relative_transactions / script.clients))
        self._schema.clear()
        # Enough of them that no client finds only rows which the other clients have locked.
        insert_pending(self._schema, (transactions + 1) * script.clients * script.claims + script.pending)
        statements = script.text.replace("{schema}", self._schema.name)
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
            file.write(statements)
            file.flush()
            options = ["-n", "-M", "prepared", "-D", "n=0", "-f", file.name, "-t", str(transactions)]
            printed = self._execute(program, *options, "-c", str(script.clients), "-j", str(min(script.clients, 2)))
        found = re.search(r"^tps = ([\d.]+)", printed, re.MULTILINE)
        if found is None:
            raise BenchError(f"pgbench printed no rate for {script.what!r}: {printed[-500:]}")
        return float(found[1]) * script.units

    def _execute(self, program: Path, *options: str) -> str:
        url = make_url(self._schema.url)
        password = {"PGPASSWORD": url.password} if url.password else {}
        done = subprocess.run(  # noqa: S603 (no shell)
            [program, *options, conninfo(url)],
            check=False,
            env={**os.environ, **password},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if done.returncode != 0:
            raise BenchError(f"pgbench failed: {done.stdout[-1_000:]}")
        return done.stdout


def conninfo(url: URL) -> str:
    """Return the URL as libpq reads it, without the password, which all users of the machine would see."""
    given = url.translate_connect_args(username="user", database="dbname")
    given.pop("password", None)
    several = {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    return make_conninfo(**{**given, **several})


def find_pgbench() -> Path | None:
    """Return the path of pgbench: that of the embedded server, else one on PATH; None if there is none."""
    try:
        return embedded.program("pgbench")
    except UsageError:
        found = shutil.which("pgbench")
        return None if found is None else Path(found)


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
class PgbenchScript:
    """The same work as a workload's, as a script for pgbench.

    Attributes:
        what: its name in the report.
        clients: how many connections execute it.
        text: the statements of one transaction.
        units: how many workflows or steps one transaction executes.
        claims: how many pending workflows one transaction claims.
        pending: how many pending workflows it needs besides those.
        relative_transactions: how many transactions to make, relative to other scripts; fewer where they are slow.
    """

    what: str
    clients: int
    text: str
    units: int = 1
    claims: int = 0
    pending: int = 0
    relative_transactions: float = 1.0


def one_step(*, batch: int, clients: int) -> PgbenchScript:
    """Return a script that claims, then checkpoints and finishes: two commits for each batch."""
    script = _CLAIM + f"WITH step AS ({_STEP})" + _FINISH + ";"
    by = "2 commits" if batch == 1 else f"batched by {batch}"
    return PgbenchScript(
        what=f"SQL, {by}, {_clients(clients)}",
        clients=clients,
        text=script.replace("{batch}", str(batch)).replace("{key}", "'increment'"),
        units=batch,
        claims=batch,
        relative_transactions=1.0 if batch == 1 else 0.1,
    )


def three_entries(*, clients: int) -> PgbenchScript:
    """Return a script that claims, and three times inserts an entry with its checkpoint: four commits."""
    steps = [f"WITH step AS ({_STEP.replace('{key}', repr(key))})" for key in ("enter", "enter#2", "enter#3")]
    last = f"{steps[2]}, entry AS ({_ENTRY}) {_FINISH};"
    script = _CLAIM + "".join(f"{each} {_ENTRY};" for each in steps[:2]) + last
    return PgbenchScript(
        what=f"SQL, 4 commits, {_clients(clients)}",
        clients=clients,
        text="\\set n :n + 1\n" + script.replace("{batch}", "1"),
        claims=1,
        relative_transactions=0.5,
    )


def checkpoint(*, clients: int) -> PgbenchScript:
    """Return a script with one checkpoint per commit, each client for a workflow of its own."""
    return PgbenchScript(
        what=f"SQL, a commit each, {_clients(clients)}",
        clients=clients,
        text=_CHECKPOINT,
        pending=clients,
        relative_transactions=0.25 if clients == 1 else 1.0,
    )


def bulk(*, rows: int) -> PgbenchScript:
    """Return a script that inserts so many pending workflows per commit, by arrays."""
    inputs = ",".join(f'"{{\\"number\\": {number}}}"' for number in range(rows))
    script = f"""\\set n :n + 1
INSERT INTO {{schema}}.workflow (id, name, input)
SELECT ('0191' || lpad(to_hex(:n::bigint * {rows} + number), 28, '0'))::uuid, 'one_step', input::jsonb
FROM unnest('{{{inputs}}}'::text[]) WITH ORDINALITY AS new(input, number);
"""  # noqa: S608 (all of it is written here)
    return PgbenchScript(
        what=f"SQL, INSERT of {rows:,} rows, 1 client", clients=1, text=script, units=rows, relative_transactions=0.005
    )


def _clients(count: int) -> str:
    return f"{count} client{'s' if count > 1 else ''}"


NAIVE = "naive: one at a time, 3 commits"


def measure_naive(schema: BenchSchema, count: int) -> Reference:
    """Measure plain ORM code that executes one workflow at a time and commits each change, in workflows per second."""
    schema.clear()
    schema.start(application.one_step.bind(number) for number in range(count))
    with schema.sessions(expire_on_commit=False) as session:
        began = time.perf_counter()
        for _ in range(count):
            _execute_next(session)
        return Reference(NAIVE, count / (time.perf_counter() - began))


def _execute_next(session: Session) -> None:
    workflow = _claim(session)
    session.commit()
    output = workflow.input["number"] + 1
    session.add(_checkpoint(workflow, output))
    session.commit()
    workflow.status, workflow.output, workflow.finished_at = WorkflowStatus.SUCCEEDED, output, workflow.started_at
    session.commit()


def _claim(session: Session) -> Workflow:
    pending = select(Workflow).where(Workflow.status == WorkflowStatus.PENDING, Workflow.queue == "default")
    oldest = pending.order_by(Workflow.priority, Workflow.enqueued_at, Workflow.id).limit(1)
    workflow = session.scalars(oldest.with_for_update(skip_locked=True)).one()
    workflow.status = WorkflowStatus.RUNNING
    workflow.token = workflow.worker_id = uuid7()
    workflow.started_at = workflow.enqueued_at
    return workflow


def _checkpoint(workflow: Workflow, output: int) -> Step:
    return Step(
        workflow_id=workflow.id,
        key="increment",
        name="increment",
        position=1,
        status=StepStatus.SUCCEEDED,
        output=output,
        attempt=1,
        started_at=workflow.enqueued_at,
    )
