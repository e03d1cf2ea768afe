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
from sqla_durable.store.statements import Statement
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
            made = value.made if isinstance(value, Statement) else value
            if isinstance(made, Executable) and isinstance(made, ClauseElement):
                yield f"{module.__name__.rpartition('.')[2]}.{name}", made


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


_LOCK = re.compile(r"FOR (?:NO KEY )?(?:UPDATE|SHARE)[^\n)]*")
_ONE = re.compile(r"(?:WHERE|AND) durable\.workflow\.id = CAST\(%\((?:given|wanted|owner)_id\)s\S* AS UUID\)")
_OWN_SIGNAL = re.compile(r"durable\.signal\.workflow_id = owned\.id AND durable\.signal\.id = \w+\.id\b")
_IN_ORDER = re.compile(r"ORDER BY durable\.workflow\.id\s*(?:\n LIMIT [^\n]*)?$")
_WAITING = {
    "attempts": ["_FINISH", "_LOCK", "_RELEASE"],
    "blobs": ["_BEGIN", "_COMPLETE", "_WRITE"],
    "callbacks": ["_EXPIRE", "_HOLD"],
    "children": ["_CANCEL_REST", "_INSERT", "_LOCK_PARENT", "_START", "_START_KEYED", "_TAKE_FIRST", "_TAKE_OUTCOME"],
    "claims": ["_CLAIM_ONE"],
    "conflicts": ["_REPLACE", "_TAKE_KEY"],
    "continuations": ["_CONTINUE", "_SUSPEND"],
    "deferred": ["_START_REST"],
    "events": ["_PUT", "_RECORD", "_TAKE"],
    "failures": ["_FAIL_IF_OVERDUE"],
    "signals": ["_TAKE", "_WAKE_ONE"],
    "steps": ["_BEGIN_WAIT", "_KEEP_DETAILS", "_RECORD", "_RECORD_LAST", "_REPORT"],
    "streams": ["_APPEND", "_RECORD"],
    "tags": ["_RECORD"],
    "updates": ["_PUT", "_RECORD", "_REFUSE", "_TAKE"],
    "workers": ["_LOCK_ONE", "_RECLAIM_ONE"],
}
"""The statements that wait for locks: of an attempt, an executor or an operator, which a worker's others do not."""


def _locking(sql: str) -> Iterator[tuple[str, str]]:
    """Return each select that locks rows, with its locking clause."""
    for lock in _LOCK.finditer(sql):
        depth, begin = 0, lock.start()
        while begin and depth >= 0:
            begin -= 1
            depth += {")": 1, "(": -1}.get(sql[begin], 0)
        yield sql[begin : lock.start()].lstrip("("), lock[0]


def _waits(sql: str) -> bool:
    return any("SKIP LOCKED" not in lock for _, lock in _locking(sql))


def test_only_statements_for_single_workflows_wait_for_locks() -> None:
    waiting = {name for name in _breaking(_waits) if not name.endswith("._")}
    assert waiting == {f"{module}.{each}" for module, names in _WAITING.items() for each in names}


def test_what_waits_for_locks_of_several_workflows_takes_them_in_the_order_of_their_ids() -> None:
    """Two that wait for each other's rows are a deadlock, which ends one of them."""

    def breaks(sql: str) -> bool:
        selects = [each for each, lock in _locking(sql) if "SKIP LOCKED" not in lock]
        return not all(any(form.search(each) for form in (_ONE, _OWN_SIGNAL, _IN_ORDER)) for each in selects)

    assert _breaking(breaks) == []


def test_children_with_keys_are_inserted_in_the_order_of_their_keys() -> None:
    """Two parents that start the same keys wait for each other in one direction only."""
    assert 'ORDER BY "new".name, "new".key, "new".id ON CONFLICT DO NOTHING' in STATEMENTS["children._START_KEYED"]


_READS = {"attempts._FINISHED_BY", "attempts._STILL_OWNED", "steps._OWNED", "steps._RECORDED_AMONG"}
_OWN = re.compile(
    r"(?:workflow|owner)\.token = CAST\(%\(given_token\)s\S* AS UUID\)"
    r"|\(durable\.workflow\.id, durable\.workflow\.token\) IN \(SELECT"
    r"|durable\.workflow\.token = ordered\.token"
)
_OF_OTHERS = {"children._CANCEL_REST", "deferred._START_REST"}


def _is_of_an_attempt(sql: str) -> bool:
    return "given_id" in sql or "token UUID" in sql


def _is_fenced(name: str, sql: str) -> bool:
    """Return whether a statement compares the token and the status in the select or the UPDATE that locks the row."""
    locking = [each for each, _ in _locking(sql)] or [sql.partition("UPDATE durable.workflow SET ")[2]]
    if name in _OF_OTHERS:  # children's rows are locked, and not the attempt's own
        locking = [sql]
    running = "'running'" in sql
    return running and any(_OWN.search(each) for each in locking)


def test_what_an_attempt_writes_is_fenced_in_the_statement_that_locks_its_row() -> None:
    of_attempts = {name for name, sql in STATEMENTS.items() if _is_of_an_attempt(sql)} - _READS
    parts = {each for each in of_attempts if not re.search("INSERT|UPDATE |DELETE", STATEMENTS[each])}
    assert {each for each in of_attempts - parts if not _is_fenced(each, STATEMENTS[each])} == set()
    assert len(of_attempts - parts) > 20


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


_GRAMMAR = {
    "coalesce",
    "greatest",
    "least",
    "extract",
    "any",
    "all",
    "exists",
    "unnest",
    "array",
    "nullif",
    "grouping",
    "grouping_sets",
}
"""What is no look-up: the parser knows it, ARRAY too, and leads `unnest` of several arrays to pg_catalog."""


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
    (function, trigger) = (each for each in storage.statements() if "check_new_workflow" in each)
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
