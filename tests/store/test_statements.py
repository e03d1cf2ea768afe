"""Rules that can be read off the SQL itself, without executing it."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Executable
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable
from sqlalchemy.sql import ClauseElement

import sqla_durable.store as store
from sqla_durable.models import metadata, storage
from tests.test_architecture import SOURCES

_MODULES = [
    importlib.import_module(f"{store.__name__}.{each.name}")
    for each in pkgutil.iter_modules(store.__path__)
    if not each.name.startswith("_")
]
_BATCHES = {"_WRITE_BATCH", "_APPEND_MANY", "_FINISH", "_RELEASE", "_RELEASE_UNLOCKED", "_RECLAIM"}


def statements() -> Iterator[tuple[str, ClauseElement]]:
    """Return what the modules of the store keep, by name: statements, and a few parts of them."""
    for module in _MODULES:
        for name, value in vars(module).items():
            if isinstance(value, Executable) and isinstance(value, ClauseElement):
                yield f"{module.__name__.rpartition('.')[2]}.{name}", value


STATEMENTS = {name: str(each.compile(dialect=postgresql.dialect())) for name, each in statements()}


def _breaking(breaks: Callable[[str], object]) -> list[str]:
    """Return the names of the statements that break a rule."""
    return [name for name, sql in STATEMENTS.items() if breaks(sql)]


def test_the_statements_are_found() -> None:
    assert {"claims._CLAIM", "steps._RECORD", "workers._RECLAIM", "attempts._WRITE_BATCH"} <= STATEMENTS.keys()


def test_the_only_clock_is_that_of_the_statement() -> None:
    """`now()` stands still in a transaction; `clock_timestamp()` is volatile and bounds no index scan."""
    other = re.compile(r"\b(now|clock_timestamp|current_timestamp|transaction_timestamp)\b", re.IGNORECASE)
    assert _breaking(other.search) == []


def test_no_volatile_function_is_in_an_update() -> None:
    """A sharded engine refuses it."""
    volatile = re.compile(r"\b(gen_random_uuid|random|uuidv?7|nextval)\s*\(", re.IGNORECASE)
    assert _breaking(volatile.search) == []


def test_a_status_that_is_compared_is_a_literal() -> None:
    """As a parameter a generic plan cannot use the partial index."""

    def breaks(sql: str) -> bool:
        before = sql.partition(" SET ")[0]
        compared = re.findall(r"status = (\S+)", before)
        parameter = re.search(r"status (IN|=) ?\(?%\(", before)
        return parameter is not None or not all(each.strip("()").startswith("'") for each in compared)

    assert _breaking(breaks) == []


def test_a_lock_never_conflicts_with_a_foreign_keys_lock() -> None:
    """A caller's open transaction that refers to the workflow holds KEY SHARE; FOR UPDATE would wait for it."""

    def breaks(sql: str) -> bool:
        locks = re.findall(r"FOR (?:NO KEY )?(?:UPDATE|SHARE)", sql)
        return bool(set(locks) - {"FOR NO KEY UPDATE"}) and "durable.worker" not in sql.partition("FOR UPDATE")[0]

    assert _breaking(breaks) == []


@pytest.mark.parametrize("name", sorted(_BATCHES))
def test_a_statement_for_many_workflows_locks_them_in_the_order_of_their_ids(name: str) -> None:
    sql = next(text for key, text in STATEMENTS.items() if key.endswith(f".{name}"))
    rows = r"ORDER BY (?:durable\.workflow|batch|fences)\.id\b[\s\S]*FOR NO KEY UPDATE OF"
    assert re.search(rf"MATERIALIZED[\s\S]*{rows}", sql)


@pytest.mark.parametrize("name", ["_WRITE_BATCH", "_APPEND_MANY", "_RELEASE_UNLOCKED", "_RECLAIM", "_FAIL_OVERDUE"])
def test_a_statement_for_many_workflows_waits_for_no_lock(name: str) -> None:
    sql = next(text for key, text in STATEMENTS.items() if key.endswith(f".{name}"))
    assert "SKIP LOCKED" in sql


@pytest.mark.parametrize("name", ["_CLAIM", "_CLAIM_ONE", "_RECLAIM", "_WAKE_DUE", "_FAIL_OVERDUE"])
def test_a_limited_update_reads_its_candidates_once(name: str) -> None:
    """As a sub-select the planner may execute it again, and more rows than the limit are taken."""
    sql = next(text for key, text in STATEMENTS.items() if key.endswith(f".{name}"))
    assert sql.startswith("WITH")
    assert "MATERIALIZED" in sql
    assert " IN (SELECT" not in sql.partition("UPDATE")[2]


@pytest.mark.parametrize("name", ["_FAIL_OVERDUE", "_FAIL_IF_OVERDUE", "_FAIL_REFUSED", "_CANCEL_REST"])
def test_an_end_from_outside_copies_what_its_lock_has_read(name: str) -> None:
    """A sharded engine refuses a function that is not immutable beside a column in SET: the CTE that locks calls it."""
    sql = next(text for key, text in STATEMENTS.items() if key.endswith(f".{name}"))
    changed = sql.partition("UPDATE durable.workflow SET ")[2].partition(" FROM ")[0]
    assert "finished_at=" in changed
    assert "pg_catalog." not in changed


_GRAMMAR = {"coalesce", "greatest", "least", "extract", "any", "all", "exists", "unnest"}
"""What is no look-up: the parser knows it, and leads `unnest` of several arrays to pg_catalog."""


def _unqualified(sql: str) -> set[str]:
    """Return the functions that are called by a name without a schema; not aliases with columns, nor keywords."""
    plain = re.sub(r"'(?:[^']|'')*'", "''", sql)
    called = re.findall(r"(?<![\w.])(?<!AS )([a-z_]\w*)\((?![\w, ]*\) AS\s*\n)", plain)
    return set(called) - _GRAMMAR


def test_every_function_is_pg_catalogs() -> None:
    """Without a schema, one that another role has made may fit the types of the arguments better."""
    assert {name: found for name, sql in STATEMENTS.items() if (found := _unqualified(sql))} == {}
    assert _unqualified("SELECT count(*), now() FROM a AS b(c) WHERE pg_catalog.lower(d) IN ('e(')") == {"count", "now"}


def test_every_function_of_the_tables_definitions_is_pg_catalogs() -> None:
    tables = {
        table.name: str(CreateTable(table).compile(dialect=postgresql.dialect())) for table in metadata.sorted_tables
    }
    assert {name: found for name, sql in tables.items() if (found := _unqualified(sql))} == {}
    assert "pg_catalog.octet_length(" in tables["workflow"]


def test_the_check_of_new_workflows_calls_pg_catalogs_functions_and_nothing_for_a_row_that_passes() -> None:
    (function, trigger) = (each for each in storage.statements() if each.startswith("CREATE"))
    assert _unqualified(function) == set()
    assert "pg_catalog.quote_nullable(" in function
    assert "SET search_path = pg_catalog, pg_temp" in function
    condition = trigger.partition("WHEN (")[2].partition(") EXECUTE")[0]
    assert condition == "NEW.token IS NOT NULL OR NEW.finished_at IS NOT NULL"


def test_no_function_is_named_without_a_schema_in_the_source() -> None:
    """What is made in a function of the store is found too: `sa.func.name(...)`, and a text in the place of one."""
    calls = [
        (module, node)
        for module in SOURCES
        for node in ast.walk(ast.parse(SOURCES[module].read_text()))
        if isinstance(node, ast.Call)
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in ("func", "sa.func")
    ]
    names = {(module, node.func.attr) for module, node in calls if isinstance(node.func, ast.Attribute)}
    assert {each for each in names if each[1] not in _GRAMMAR} == set()
    assert {len(node.args) > 1 for _, node in calls if getattr(node.func, "attr", "") == "unnest"} == {True}
