"""The counters of the server: complete when they are read."""

from __future__ import annotations

from contextlib import ExitStack

from sqlalchemy import text

from sqla_durable.tools.bench.meter import Meter
from sqla_durable.tools.bench.schema import BenchSchema

CONNECTIONS, COMMITS = 3, 50


def test_reading_holds_the_commits_of_all_idle_connections_of_the_bench(schema: BenchSchema) -> None:
    meter = Meter(schema)
    commit_on_several_connections(schema)
    before = meter.read()
    commit_on_several_connections(schema)
    after = meter.read()
    others = after.commits - before.commits - CONNECTIONS * COMMITS
    # A connection that is taken and returned counts a little too, and so does autovacuum, for each table it visits.
    assert 0 <= others < COMMITS


def commit_on_several_connections(schema: BenchSchema) -> None:
    with ExitStack() as connections:
        autocommit = schema.engine.execution_options(isolation_level="AUTOCOMMIT")
        for connection in [connections.enter_context(autocommit.connect()) for _ in range(CONNECTIONS)]:
            for _ in range(COMMITS):
                connection.execute(text(f"SELECT FROM {schema.name}.workflow"))
