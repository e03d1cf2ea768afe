"""The schema of the bench: made, dropped whatever happens, and no other one touched."""

from __future__ import annotations

from collections.abc import Generator

import psutil
import pytest
from sqlalchemy import Engine, create_engine, inspect, text

from sqla_durable.tools.bench.report import BenchError, Status
from sqla_durable.tools.bench.schema import COMMENT, bench_schema
from sqla_durable.tools.bench.workloads import measure
from tests.bench.conftest import TINY


@pytest.fixture
def outside(empty_database_url: str) -> Generator[Engine]:
    engine = create_engine(empty_database_url, isolation_level="AUTOCOMMIT")
    yield engine
    engine.dispose()


def schemas(outside: Engine) -> set[str]:
    return set(inspect(outside).get_schema_names()) - {"information_schema", "public"}


def test_schema_is_gone_afterwards(outside: Engine, empty_database_url: str) -> None:
    with bench_schema(empty_database_url, "bench_here"):
        assert schemas(outside) == {"bench_here"}
    assert schemas(outside) == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, BenchError])
def test_what_was_measured_before_an_interrupt_or_an_error_is_kept_and_nothing_left_behind(
    outside: Engine, empty_database_url: str, error: type[KeyboardInterrupt | BenchError]
) -> None:
    def fail(status: Status) -> None:
        if status.workload == "sequential" and status.total:
            raise error

    outcome = measure(["bulk", "sequential"], settings=TINY, url=empty_database_url, on_progress=fail)
    assert isinstance(outcome.ended_by, error)
    assert outcome.machine.database in empty_database_url
    assert schemas(outside) == set()
    assert not [each for each in psutil.Process().children() if "sqla_durable.tools.bench.processes" in each.cmdline()]


def test_schema_that_no_bench_made_is_refused_and_left_as_it_is(outside: Engine, empty_database_url: str) -> None:
    with outside.connect() as connection:
        connection.execute(text("CREATE SCHEMA precious CREATE TABLE kept (id int)"))
    with (
        pytest.raises(BenchError, match=r"'precious' exists and was not created by a benchmark.*--schema"),
        bench_schema(empty_database_url, "precious"),
    ):
        pass
    assert inspect(outside).has_table("kept", "precious")


def test_schema_that_a_killed_bench_has_left_is_created_again(outside: Engine, empty_database_url: str) -> None:
    with outside.connect() as connection:
        connection.execute(text(f"CREATE SCHEMA left_over; COMMENT ON SCHEMA left_over IS '{COMMENT}'"))
        connection.execute(text("CREATE TABLE left_over.workflow (id int)"))
    with bench_schema(empty_database_url, "left_over") as made:
        assert made.count_unfinished() == 0
    assert schemas(outside) == set()


def test_schema_of_another_bench_at_work_is_refused(outside: Engine, empty_database_url: str) -> None:
    with bench_schema(empty_database_url, "shared") as first:
        with pytest.raises(BenchError, match="another benchmark is using the schema 'shared'"):
            bench_schema(empty_database_url, "shared").__enter__()
        assert first.count_unfinished() == 0


@pytest.mark.parametrize("name", ["", "Durable", "a b", 'x"y', "a;b", "x" * 64])
def test_name_that_would_need_quotes_is_refused(empty_database_url: str, name: str) -> None:
    with pytest.raises(BenchError, match="is no name for the schema"):
        bench_schema(empty_database_url, name).__enter__()
