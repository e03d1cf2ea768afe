"""Rules that can be read off the SQL itself, without executing it."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator

import pytest
from sqlalchemy import Executable
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql import ClauseElement

import sqla_durable.store as store

_MODULES = [
    importlib.import_module(f"{store.__name__}.{each.name}")
    for each in pkgutil.iter_modules(store.__path__)
    if not each.name.startswith("_")
]
_BATCHES = {"_WRITE", "_APPEND_MANY", "_FINISH", "_RELEASE", "_RELEASE_UNLOCKED", "_RECLAIM"}


def _statements() -> Iterator[tuple[str, str]]:
    for module in _MODULES:
        for name, value in vars(module).items():
            if isinstance(value, Executable) and isinstance(value, ClauseElement):
                yield f"{module.__name__.rpartition('.')[2]}.{name}", str(value.compile(dialect=postgresql.dialect()))


STATEMENTS = dict(_statements())
everyone = pytest.mark.parametrize("sql", STATEMENTS.values(), ids=STATEMENTS)


def test_the_statements_are_found() -> None:
    assert {"queues._CLAIM", "steps._RECORD", "crashes._RECLAIM", "batches._WRITE"} <= STATEMENTS.keys()


@everyone
def test_the_only_clock_is_that_of_the_statement(sql: str) -> None:
    """`now()` stands still in a transaction; `clock_timestamp()` is volatile and bounds no index scan."""
    assert not re.search(r"\b(now|clock_timestamp|current_timestamp|transaction_timestamp)\b", sql, re.IGNORECASE)


@everyone
def test_no_volatile_function_is_in_an_update(sql: str) -> None:
    """A sharded engine refuses it."""
    assert not re.search(r"\b(gen_random_uuid|random|uuidv?7|nextval)\s*\(", sql, re.IGNORECASE)


@everyone
def test_a_status_that_is_compared_is_a_literal(sql: str) -> None:
    """As a parameter a generic plan cannot use the partial index."""
    compared = re.findall(r"status = (\S+)", sql.partition(" SET ")[0])
    assert all(each.strip("()").startswith("'") for each in compared), compared
    assert not re.search(r"status (IN|=) ?\(?%\(", sql.partition(" SET ")[0])


@everyone
def test_a_lock_never_conflicts_with_a_foreign_keys_lock(sql: str) -> None:
    """A caller's open transaction that refers to the workflow holds KEY SHARE; FOR UPDATE would wait for it."""
    locks = re.findall(r"FOR (?:NO KEY )?(?:UPDATE|SHARE)", sql)
    assert all(each == "FOR NO KEY UPDATE" for each in locks) or "durable.worker" in sql.partition("FOR UPDATE")[0]


@pytest.mark.parametrize("name", sorted(_BATCHES))
def test_a_statement_for_many_workflows_locks_them_in_the_order_of_their_ids(name: str) -> None:
    sql = next(text for key, text in STATEMENTS.items() if key.endswith(f".{name}"))
    rows = r"ORDER BY (?:durable\.workflow|batch|fences)\.id\b[\s\S]*FOR NO KEY UPDATE OF"
    assert re.search(rf"MATERIALIZED[\s\S]*{rows}", sql)


@pytest.mark.parametrize("name", ["_WRITE", "_APPEND_MANY", "_RELEASE_UNLOCKED", "_RECLAIM", "_FAIL_OVERDUE"])
def test_a_statement_for_many_workflows_waits_for_nobody(name: str) -> None:
    sql = next(text for key, text in STATEMENTS.items() if key.endswith(f".{name}"))
    assert "SKIP LOCKED" in sql


@pytest.mark.parametrize("name", ["_CLAIM", "_CLAIM_ONE", "_RECLAIM", "_WAKE_DUE", "_FAIL_OVERDUE"])
def test_a_limited_update_reads_its_candidates_once(name: str) -> None:
    """As a sub-select the planner may execute it again, and more rows than the limit are taken."""
    sql = next(text for key, text in STATEMENTS.items() if key.endswith(f".{name}"))
    assert sql.startswith("WITH")
    assert "MATERIALIZED" in sql
    assert " IN (SELECT" not in sql.partition("UPDATE")[2]
