"""The counters of the server: complete when they are read."""

from __future__ import annotations

from contextlib import ExitStack

from sqlalchemy import text

from sqla_durable.tools.bench.meter import Meter
from sqla_durable.tools.bench.place import Place

CONNECTIONS, COMMITS = 3, 50


def test_reading_holds_the_commits_of_all_idle_connections_of_the_bench(ground: Place) -> None:
    meter = Meter(ground)
    commit_on_several_connections(ground)
    before = meter.read()
    commit_on_several_connections(ground)
    after = meter.read()
    others = after.commits - before.commits - CONNECTIONS * COMMITS
    assert 0 <= others <= 4 * CONNECTIONS  # a connection that is taken and given back counts a little too


def commit_on_several_connections(ground: Place) -> None:
    with ExitStack() as held:
        autocommit = ground.engine.execution_options(isolation_level="AUTOCOMMIT")
        for connection in [held.enter_context(autocommit.connect()) for _ in range(CONNECTIONS)]:
            for _ in range(COMMITS):
                connection.execute(text(f"SELECT FROM {ground.schema}.workflow"))
