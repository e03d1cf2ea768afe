"""The checks of our tables: whether all is there that this package makes, and as it makes it.

The catalogue is compared with the models by names, types and kinds, and not by the text of expressions, which the
server writes in its own way.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Column, Index, MetaData, Row, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import AddConstraint, Constraint, CreateColumn, CreateIndex, CreateTable, ExecutableDDLElement

from sqla_durable.definitions.texts import time_text
from sqla_durable.models import REVISION, metadata, storage
from sqla_durable.models.base import NAMING_CONVENTION
from sqla_durable.models.views import VIEWS
from sqla_durable.store import catalogue, rights
from sqla_durable.tools.doctor.findings import Code, Examined, Finding, error, note, warning

Rows = Sequence[Row[Any]]

MANY_DEAD = 10_000
"""From how many dead rows on a table is reported, if they are also half as many as the live ones."""

_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy has left it without types
_UPGRADE = (
    f"alembic upgrade heads, with a revision that calls sqla_durable.migrations.upgrade({REVISION!r}); "
    "without Alembic, sqla-durable migrate"
)
_WORKER_NEEDS = {table: tuple(each.lower() for each in needed) for table, needed in rights.SETS["worker"].items()}
"""The rights that a worker needs, each on the table or on some of its columns."""


@cache
def expected(schema: str) -> Mapping[str, Table]:
    """Return our tables as this package makes them in a schema, by their names."""
    copies = MetaData(naming_convention=NAMING_CONVENTION)
    for table in metadata.sorted_tables:
        table.to_metadata(copies, schema=schema)
    return {table.name: table for table in copies.sorted_tables}


def check_revision(examined: Examined) -> Iterator[Finding]:
    """Find tables that are missing as a whole, or of another package; whatever else is checked needs them."""
    found = {row.relname: row for row in catalogue.relations(examined.session, examined.schema)}
    if "workflow" not in found:
        yield error(
            Code.SCHEMA_MISSING,
            f"there are no durable tables in the schema {examined.schema!r}.",
            f"{_UPGRADE}; or name another schema with --schema.",
            schema=examined.schema,
        )
        return
    comment = found["workflow"].comment or ""
    named = re.findall(r"durable_\d+", comment)
    values = {"comment": comment, "needed": REVISION}
    where = f"the tables in the schema {examined.schema!r} are at {comment!r}"
    if not named or named[-1] < REVISION:
        yield error(Code.SCHEMA_OLDER, f"{where}, and this package needs {REVISION!r}.", f"{_UPGRADE}.", **values)
    elif named[0] > REVISION:
        newer = f"{where}, newer than this package, which knows {REVISION!r}."
        yield error(Code.SCHEMA_NEWER, newer, "Upgrade sqla-durable where this command and the workers run.", **values)


def check_alembic(examined: Examined) -> Iterator[Finding]:
    """Find a table of Alembic's that says another revision than the tables themselves."""
    named = catalogue.alembic_revisions(examined.session)
    found = {row.relname: row.comment or "" for row in catalogue.relations(examined.session, examined.schema)}
    at = re.findall(r"durable_\d+", found["workflow"])[-1]
    if named and at not in named:
        yield warning(
            Code.ALEMBIC_DIFFERS,
            f"Alembic's table of versions has {', '.join(sorted(named))}, and the comment of the table workflow {at}: "
            "the next upgrade begins in the wrong place.",
            f"Find out which of them is true, and write it: alembic stamp {at}, or COMMENT ON TABLE.",
            alembic=sorted(named),
            comment=at,
        )


def check_tables(examined: Examined) -> Iterator[Finding]:
    """Find tables that are missing, or that a crash of the server would empty."""
    found = {row.relname: row for row in catalogue.relations(examined.session, examined.schema)}
    for name, table in expected(examined.schema).items():
        if name not in found:
            indexes = sorted(table.indexes, key=lambda each: str(each.name))
            todo = "; ".join([_sql(CreateTable(table)), *(_sql(CreateIndex(each)) for each in indexes)])
            yield error(Code.MISSING_TABLE, f"the table {table} is missing.", todo, table=name)
        elif found[name].persistence == "u":
            yield error(
                Code.TABLE_UNLOGGED,
                f"the table {table} is unlogged: a crash of the server empties it.",
                f"ALTER TABLE {_quoted(table)} SET LOGGED",
                table=name,
            )


def check_columns(examined: Examined) -> Iterator[Finding]:
    """Find columns that are missing, differ, or must be given and are none of ours."""
    found = _by_table(catalogue.columns(examined.session, examined.schema))
    for name, table in _present(examined.schema, found):
        theirs = {row.attname: row for row in found[name]}
        for column in table.columns:
            if column.name not in theirs:
                todo = f"ALTER TABLE {_quoted(table)} ADD COLUMN {_sql(CreateColumn(column))}"
                yield error(Code.MISSING_COLUMN, f"the column {column} is missing.", todo, column=str(column))
            else:
                yield from _column_differs(table, column, theirs.pop(column.name))
        for other in theirs.values():
            if other.not_null and not other.has_default:
                yield error(
                    Code.COLUMN_REQUIRED,
                    f"the column {table}.{other.attname} is none of this package's, NOT NULL and without a default: "
                    "every INSERT fails.",
                    f"ALTER TABLE {_quoted(table)} ALTER COLUMN {_name(other.attname)} DROP NOT NULL",
                    column=f"{table}.{other.attname}",
                )


def _column_differs(table: Table, column: Column[Any], row: Row[Any]) -> Iterator[Finding]:
    wanted = column.type.compile(_DIALECT).lower()
    alter = f"ALTER TABLE {_quoted(table)} ALTER COLUMN {_name(column.name)}"
    differences: list[tuple[str, str]] = []
    if row.type != wanted:
        differences.append((f"has the type {row.type}, not {wanted}", f"{alter} TYPE {wanted}"))
    if row.not_null == column.nullable:
        may, verb = ("may not", "DROP") if row.not_null else ("may", "SET")
        differences.append((f"{may} be NULL", f"{alter} {verb} NOT NULL"))
    if (column.server_default or column.identity) and not row.has_default:
        differences.append(("has no default", f"Make it as in: {_sql(CreateColumn(column))}"))
    for found, todo in differences:
        yield error(Code.COLUMN_DIFFERS, f"the column {column} {found}.", todo, column=str(column))


def check_constraints(examined: Examined) -> Iterator[Finding]:
    """Find constraints that are missing, or that old rows or new ones need not satisfy."""
    found = _by_table(catalogue.constraints(examined.session, examined.schema))
    for name, table in _present(examined.schema, found):
        theirs = {row.conname: row for row in found[name]}
        for constraint in sorted(table.constraints, key=_constraint_name):
            wanted = _constraint_name(constraint)
            if wanted not in theirs:
                yield error(
                    Code.MISSING_CONSTRAINT,
                    f"the constraint {wanted} of {table} is missing.",
                    _sql(AddConstraint(constraint)),
                    constraint=wanted,
                )
            elif not (theirs[wanted].is_validated and theirs[wanted].is_enforced):
                yield warning(
                    Code.CONSTRAINT_UNCHECKED,
                    f"the constraint {wanted} of {table} is not validated or not enforced: rows may contradict it.",
                    f"ALTER TABLE {_quoted(table)} VALIDATE CONSTRAINT {_name(wanted)}",
                    constraint=wanted,
                )


def check_indexes(examined: Examined) -> Iterator[Finding]:
    """Find indexes that are missing, differ, or were left invalid by a failed CREATE INDEX CONCURRENTLY."""
    found = _by_table(catalogue.indexes(examined.session, examined.schema))
    for name, table in _present(examined.schema, found):
        theirs = {row.name: row for row in found[name]}
        for row in theirs.values():
            if not row.is_valid and not row.is_building:
                yield _invalid(table, row)
        for index in sorted(table.indexes, key=lambda each: str(each.name)):
            if str(index.name) not in theirs:
                yield _missing_index(table, index)
            elif _form(index) != _form_of(theirs[str(index.name)]):
                yield warning(
                    Code.INDEX_DIFFERS,
                    f"the index {index.name} of {table} is another one than this package makes.",
                    f"DROP INDEX {_of_schema(table, index.name)}; {_concurrently(index)}",
                    index=str(index.name),
                )


def _invalid(table: Table, row: Row[Any]) -> Finding:
    full = _of_schema(table, row.name)
    is_ours = row.name in {index.name for index in table.indexes}
    todo = f"REINDEX INDEX CONCURRENTLY {full}" if is_ours else f"DROP INDEX CONCURRENTLY {full}"
    return error(
        Code.INVALID_INDEX,
        f"the index {row.name} of {table} is invalid, as after a failed CREATE INDEX CONCURRENTLY: no query uses it, "
        "and every write maintains it.",
        todo,
        index=row.name,
    )


def _missing_index(table: Table, index: Index) -> Finding:
    found = f"the index {index.name} of {table} is missing"
    if index.unique:
        text = f"{found}: it refuses duplicates, and statements that name it fail."
        return error(Code.MISSING_INDEX, text, _concurrently(index), index=str(index.name))
    text = f"{found}: statements read the whole table."
    return warning(Code.MISSING_INDEX, text, _concurrently(index), index=str(index.name))


def check_triggers(examined: Examined) -> Iterator[Finding]:
    """Find the check of new workflows missing or disabled."""
    found = {row.tgname: row for row in catalogue.triggers(examined.session, examined.schema)}
    name, table = "workflow_new_check", expected(examined.schema)["workflow"]
    what = f"the trigger {name} of {table}, which refuses new workflows that run or have an outcome,"
    if name not in found:
        wanted = [each for each in storage.statements(examined.schema) if "check_new_workflow" in each]
        yield warning(Code.MISSING_TRIGGER, f"{what} is missing.", "; ".join(wanted), trigger=name)
    elif not found[name].is_enabled:
        todo = f"ALTER TABLE {_quoted(table)} ENABLE TRIGGER {name}"
        yield warning(Code.TRIGGER_DISABLED, f"{what} is disabled.", todo, trigger=name)


def check_views(examined: Examined) -> Iterator[Finding]:
    """Find views that are missing, or that show each reader what their owner may see."""
    found = {row.relname: row for row in catalogue.relations(examined.session, examined.schema) if row.kind == "v"}
    for name in VIEWS:
        full = f"{_name(examined.schema)}.{_name(name)}"
        if name not in found:
            (wanted,) = (each for each in storage.statements(examined.schema) if f".{name} WITH" in each)
            yield warning(Code.MISSING_VIEW, f"the view {full} is missing.", " ".join(wanted.split()), view=name)
        elif "security_invoker=true" not in found[name].options:
            yield warning(
                Code.VIEW_OF_OWNER,
                f"the view {full} reads with the rights of its owner: whoever may read it sees all tenants.",
                f"ALTER VIEW {full} SET (security_invoker = true)",
                view=name,
            )


def check_storage(examined: Examined) -> Iterator[Finding]:
    """Find tables whose storage parameters are missing or others, and those without autovacuum."""
    found = {row.relname: row for row in catalogue.relations(examined.session, examined.schema)}
    for name, table in _present(examined.schema, found):
        theirs = dict(each.split("=", 1) for each in found[name].options)
        wanted = {key: str(value) for key, value in storage.STORAGE.get(name, {}).items()}
        missing = {key: value for key, value in wanted.items() if key not in theirs}
        other = {key: theirs[key] for key, value in wanted.items() if _differs(theirs.get(key), value)}
        if missing:
            found_text = f"the table {table} lacks the storage parameters {_assignments(missing)}: vacuum comes late."
            yield warning(Code.MISSING_STORAGE, found_text, _set_storage(table, missing), table=name, missing=missing)
        if other:
            found_text = f"the table {table} has {_assignments(other)}, and not what this package sets."
            todo = f"If that is not meant: {_set_storage(table, {key: wanted[key] for key in other})}"
            yield note(Code.MISSING_STORAGE, found_text, todo, table=name, others=other)
        if theirs.get("autovacuum_enabled") in ("false", "off", "0", "no"):
            found_text = f"autovacuum is disabled for the table {table}: dead rows stay, and claims become slower."
            todo = f"ALTER TABLE {_quoted(table)} RESET (autovacuum_enabled)"
            yield warning(Code.AUTOVACUUM_OFF, found_text, todo, table=name)


def check_dead_rows(examined: Examined) -> Iterator[Finding]:
    """Find tables with many dead rows, as the server's statistics count them."""
    since = catalogue.statistics_since(examined.session)
    for row in catalogue.relations(examined.session, examined.schema):
        if row.relname in expected(examined.schema) and row.dead > max(MANY_DEAD, row.live // 2):
            yield _dead_rows(expected(examined.schema)[row.relname], row, since)


def _dead_rows(table: Table, row: Row[Any], since: datetime | None) -> Finding:
    never = f"never since its statistics were reset at {time_text(since)}" if since else "never"
    vacuumed = f"last at {time_text(row.vacuumed_at)}" if row.vacuumed_at else never
    return warning(
        Code.DEAD_ROWS,
        f"the table {table} has {row.dead:,} dead rows beside {row.live:,} live ones, and was vacuumed {vacuumed}.",
        f"VACUUM (ANALYZE) {_quoted(table)}. If the rows stay, what holds them is among the other findings: an open "
        "transaction, a prepared one, or a replication slot.",
        table=row.relname,
        dead=row.dead,
        live=row.live,
        vacuumed_at=row.vacuumed_at,
    )


def check_rights(examined: Examined) -> Iterator[Finding]:
    """Find rights that this role lacks: those of a worker, if it may change workflows, else those of a reader."""
    found = {row.relname: row for row in catalogue.rights(examined.session, examined.schema)}
    is_worker = found["workflow"].update and "worker" in found and found["worker"].insert
    lacking: dict[str, list[str]] = {}
    for name, needed in _WORKER_NEEDS.items():
        if name in found:
            wanted = needed if is_worker else ("select",)
            lacks = [each for each in wanted if not getattr(found[name], each)]
            lacking |= {name: lacks} if lacks else {}
    role, usage = found["workflow"].role, found["workflow"].usage
    schema = _name(examined.schema)
    todo = [] if usage else [f"GRANT USAGE ON SCHEMA {schema} TO {_name(role)}"]
    todo += [
        f"GRANT {', '.join(rights).upper()} ON {schema}.{name} TO {_name(role)}" for name, rights in lacking.items()
    ]
    if todo:
        missing = [f"{', '.join(rights).upper()} on {name}" for name, rights in lacking.items()]
        missing += [] if usage else [f"USAGE on the schema {examined.schema!r}"]
        kind = "a worker" if is_worker else "a reader"
        yield warning(
            Code.MISSING_RIGHTS,
            f"the role {role!r} lacks rights of {kind}: {'; '.join(missing)}.",
            f"{'; '.join(todo)}. docs/security.md has the columns that are enough.",
            role=role,
            missing=lacking,
            usage=usage,
        )


def _by_table(rows: Iterable[Row[Any]]) -> dict[str, list[Row[Any]]]:
    found: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in rows:
        found[row.relname].append(row)
    return found


def _present(schema: str, found: Mapping[str, object]) -> Iterator[tuple[str, Table]]:
    """Yield those of our tables of which something was found; `check_tables` finds the others."""
    return ((name, table) for name, table in expected(schema).items() if name in found)


def _form(index: Index) -> tuple[bool, bool, str, list[str]]:
    options = index.dialect_options["postgresql"]
    method, where = options["using"] or "btree", options["where"]
    keys = [str(each.name) for each in index.columns]
    return bool(index.unique), where is not None, method, keys


def _form_of(row: Row[Any]) -> tuple[bool, bool, str, list[str]]:
    return row.is_unique, row.is_partial, row.method, list(row.keys)


def _constraint_name(constraint: Constraint) -> str:
    return str(constraint.name)


def _differs(found: str | None, wanted: str) -> bool:
    return found is not None and float(found) != float(wanted)


def _assignments(parameters: Mapping[str, str]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in parameters.items())


def _set_storage(table: Table, parameters: Mapping[str, str]) -> str:
    return f"ALTER TABLE {_quoted(table)} SET ({_assignments(parameters)})"


def _concurrently(index: Index) -> str:
    return _sql(CreateIndex(index)).replace("INDEX", "INDEX CONCURRENTLY", 1)


def _sql(element: ExecutableDDLElement | CreateColumn) -> str:
    return " ".join(str(element.compile(dialect=_DIALECT)).split())


def _quoted(table: Table) -> str:
    return _DIALECT.identifier_preparer.format_table(table)


def _of_schema(table: Table, name: object) -> str:
    return f"{_name(str(table.schema))}.{_name(str(name))}"


def _name(name: str) -> str:
    return _DIALECT.identifier_preparer.quote(name)
