"""The floors: pgbench carries out the work whose shape each of them has."""

from __future__ import annotations

import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import make_url

from sqla_durable.tools.bench import baselines
from sqla_durable.tools.bench.baselines import Pgbench, PgbenchScript, conninfo, find_pgbench
from sqla_durable.tools.bench.report import BenchError
from sqla_durable.tools.bench.schema import BenchSchema

pytestmark = pytest.mark.skipif(find_pgbench() is None, reason="there is no pgbench here")


def counted(schema: BenchSchema, table: str, condition: str = "true") -> int:
    return int(schema.query(f"SELECT count(*) FROM {{schema}}.{table} WHERE {condition}")[0][0])


def test_one_step_is_claimed_checkpointed_and_finished(schema: BenchSchema, pgbench: Pgbench) -> None:
    (floor,) = pgbench.measure(baselines.one_step(batch=1, clients=4))
    assert floor.what == "SQL, 2 commits, 4 clients"
    assert (floor.value or 0) > 0
    assert counted(schema, "step") == counted(schema, "workflow", "status = 'succeeded'") == 64
    assert counted(schema, "workflow", "status = 'running'") == 0


def test_batches_carry_out_all_of_their_workflows(schema: BenchSchema, pgbench: Pgbench) -> None:
    pgbench.measure(baselines.one_step(batch=5, clients=2))
    assert counted(schema, "step") == counted(schema, "workflow", "status = 'succeeded'") == 2 * 3 * 5


def test_three_entries_have_three_checkpoints(schema: BenchSchema, pgbench: Pgbench) -> None:
    pgbench.measure(baselines.three_entries(clients=4))
    assert counted(schema, "workflow", "status = 'succeeded'") == 32
    assert counted(schema, "step") == counted(schema, "bench_entry") == 3 * 32


@pytest.mark.parametrize(("clients", "steps"), [(1, 16), (4, 64)])
def test_checkpoints_are_a_commit_each(schema: BenchSchema, pgbench: Pgbench, clients: int, steps: int) -> None:
    pgbench.measure(baselines.checkpoint(clients=clients))
    assert counted(schema, "step") == steps
    assert len(schema.query("SELECT DISTINCT xmin FROM {schema}.step")) == steps


def test_bulk_inserts_pending_workflows(schema: BenchSchema, pgbench: Pgbench) -> None:
    pgbench.measure(baselines.bulk(rows=100))
    assert counted(schema, "workflow", "status = 'pending' AND input ? 'number'") == 100


def test_failure_of_pgbench_is_reported_in_its_words(pgbench: Pgbench) -> None:
    with pytest.raises(BenchError, match=r"(?s)pgbench failed.*no_such_table"):
        pgbench.measure(PgbenchScript(what="wrong", clients=1, text="SELECT * FROM no_such_table;"))


def test_password_is_not_on_the_command_line_of_pgbench() -> None:
    url = make_url("postgresql+psycopg://ada:secret@host:6432/name?sslmode=require")
    assert conninfo_to_dict(conninfo(url)) == {
        "user": "ada",
        "host": "host",
        "port": "6432",
        "dbname": "name",
        "sslmode": "require",
    }
