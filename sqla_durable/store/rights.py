"""Which rights on the tables each task needs, and the statements that grant them to roles.

A *set of rights* is what one task needs: the tables, and of those that hold payloads or tokens the columns. A role has
one or more sets. Sequences need no right, because they belong to identity columns, and neither does the trigger's
function. Tables and views are named one by one: in the same schema may be those of an application.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.base import PGIdentifierPreparer
from sqlalchemy.orm import Session

from sqla_durable.errors import ArgumentError
from sqla_durable.models import SCHEMA, Base
from sqla_durable.models.base import Text
from sqla_durable.models.views import VIEWS
from sqla_durable.store.statements import scalars

Rights: TypeAlias = Mapping[str, Mapping[str, str]]
"""By table, and then by privilege, the columns; none means the whole table."""

_TABLES = " ".join(table.name for table in Base.metadata.tables.values())
_VIEWS = " ".join(VIEWS)
_EVERYTHING = [*_TABLES.split(), *_VIEWS.split()]
_OF_WORKERS = (
    "workflow step signal event stream_item queue queue_key queue_use schedule retention worker blob blob_chunk"
)

_NEW = "id name input key queue by tags priority status wake_at timeout deadline_at version headers"
_NEW_OF_SCHEDULE = "id name input key queue by tags priority timeout version headers schedule"
_ADOPTED = {"SELECT": "id workflow_id expires_at stored_at", "UPDATE": "workflow_id expires_at"}
_FOUND = "id name key queue priority status attempt crashes detached created_at enqueued_at wake_at deadline_at"


def _on(tables: str, privileges: str) -> Rights:
    return {table: dict.fromkeys(privileges.split(), "") for table in tables.split()}


def _all_of(*every: Rights) -> Rights:
    """Return the union of rights; the whole of a table contains its columns."""
    union: dict[str, dict[str, str]] = {}
    for rights in every:
        for table, privileges in rights.items():
            known = union.setdefault(table, {})
            for privilege, columns in privileges.items():
                both = f"{known.get(privilege, '')} {columns}".split()
                whole = not columns or known.get(privilege) == ""
                known[privilege] = "" if whole else " ".join(dict.fromkeys(both))
    return union


SETS: Mapping[str, Rights] = {
    # start, start_many, with keys, delays, deadlines and tags
    "starter": {"workflow": {"INSERT": _NEW, "SELECT": _FOUND}, "blob": _ADOPTED},
    # the same with unique, throttle, debounce and on_conflict; with those of canceller, "cancel_running"
    "replacer": {
        "workflow": {
            "INSERT": _NEW,
            "SELECT": f"{_FOUND} started_at finished_at awaits",
            "UPDATE": "key former_key input queue by tags priority status wake_at awaits enqueued_at timeout "
            "deadline_at version headers",
        },
        "blob": _ADOPTED,
    },
    # create_blob, outside a workflow
    "uploader": {
        "blob": {
            "INSERT": "id media_type codecs url expires_at",
            "SELECT": "id workflow_id expires_at",
            "UPDATE": "size sha256 stored_at expires_at",
        },
        "blob_chunk": {"INSERT": "", "SELECT": "blob_id"},
    },
    # handle.result(), get_event, open_blob
    "caller": {
        "workflow": {"SELECT": "id name status output error"},
        "event": {"SELECT": "workflow_id key id value"},
        "blob": {"SELECT": "id codecs url stored_at"},
        "blob_chunk": {"SELECT": ""},
    },
    # send_signal; with those of starter, start_with_signal
    "signaller": {
        "workflow": {"SELECT": "id name status"},
        "signal": {"INSERT": "workflow_id name key payload", "SELECT": "workflow_id id name key"},
        "blob": _ADOPTED,
    },
    # send_update, and its answer; with those of starter, start_with_update
    "updater": {
        "workflow": {"SELECT": "id name status"},
        "signal": {"INSERT": "workflow_id name key payload is_update", "SELECT": "workflow_id id name key consumed_by"},
        "event": {"SELECT": "workflow_id key id value"},
        "step": {"SELECT": "workflow_id key output"},
        "blob": _ADOPTED,
    },
    # complete_callback, fail_callback, heartbeat_callback. PostgreSQL asks for a right to UPDATE to lock a row
    "answerer": {
        "workflow": {"SELECT": "id name status", "UPDATE": "created_at"},
        "step": {"SELECT": "workflow_id key name output started_at finished_at", "UPDATE": "finished_at"},
        "signal": {"INSERT": "workflow_id name key payload is_answer", "SELECT": "workflow_id id name key payload"},
        "blob": _ADOPTED,
    },
    # manage.cancel, by ids
    "canceller": {
        "workflow": {
            "SELECT": "id parent_id detached status attempt worker_id started_at wake_at awaits finished_at "
            "cancellation",
            "UPDATE": "status attempt token worker_id enqueued_at wake_at awaits finished_at cancellation",
        },
        "signal": {
            "INSERT": "workflow_id name is_notice",
            "SELECT": "workflow_id id name consumed_by",
            "DELETE": "",
        },
    },
    # make, change, pause, resume, run, backfill and delete schedules; with those of canceller, "cancel_running"
    "scheduler": {
        **_on("schedule", "SELECT INSERT UPDATE DELETE"),
        "workflow": {"INSERT": _NEW_OF_SCHEDULE, "SELECT": "id name key schedule finished_at"},
    },
    # Worker, Executor, AsyncExecutor
    "worker": _all_of(
        _on(_OF_WORKERS, "SELECT"),
        _on("workflow signal", "UPDATE DELETE"),
        _on("step event stream_item worker", "INSERT UPDATE DELETE"),
        _on("schedule queue queue_key", "INSERT UPDATE"),
        _on("queue_use", "INSERT DELETE"),
        _on("retention blob blob_chunk", "INSERT UPDATE DELETE"),
        {
            "workflow": {"INSERT": f"{_NEW} parent_id parent_key detached schedule"},
            "signal": {"INSERT": "workflow_id name key payload delivered_at is_answer is_update is_notice"},
        },
    ),
    # what is in manage, with a line in the audit for each
    "operator": _all_of(
        _on(f"{_TABLES} {_VIEWS}", "SELECT"),
        _on("workflow signal", "DELETE"),
        _on("step event stream_item", "INSERT DELETE"),
        _on("queue queue_key schedule retention", "INSERT UPDATE DELETE"),
        {
            "workflow": {
                "INSERT": "id name input key queue by tags priority attempt started_at timeout deadline_at version "
                "headers forked_from cancellation continued_at schedule",
                "UPDATE": "status queue priority place attempt crashes token worker_id output error enqueued_at "
                "wake_at awaits deadline_at finished_at cancellation",
            },
            "signal": {"INSERT": "workflow_id name is_notice", "UPDATE": "consumed_by"},
            "blob": {"UPDATE": _ADOPTED["UPDATE"]},
            "audit": {"INSERT": "who verb workflow_id subject reason details"},
        },
    ),
    # everything, and changes nothing
    "reader": _on(f"{_TABLES} {_VIEWS}", "SELECT"),
}
"""The rights that each task needs. What a statement writes or reads for the first time belongs here too."""

OWNER = "migrate"
"""The role that owns the tables, so that it may change them, and may make others in the schema."""

ROLES: Mapping[str, tuple[str, ...]] = {
    "start": ("starter", "signaller", "uploader"),
    "work": ("worker",),
    "operate": ("operator",),
    "read": ("reader",),
    OWNER: (),
}
"""The roles that most need, with their sets of rights. A set alone is a role too: `sets_of`."""

_LONGEST_NAME = 63  # bytes; PostgreSQL cuts off what is longer
_WIDTH = 110
_PRIVILEGES = "SELECT", "INSERT", "UPDATE", "DELETE"
_RESERVED: Collection[str] = PGIdentifierPreparer.reserved_words


def sets_of(role: str) -> tuple[str, ...]:
    """Return the sets of rights that a role has.

    Raises:
        ArgumentError: there is no such role, and no such set.
    """
    if role not in ROLES and role not in SETS:
        raise ArgumentError(f"there is no role {role!r}: choose among {', '.join([*ROLES, *SETS])}.")
    return ROLES.get(role, (role,))


def names_of(roles: Iterable[str], *, prefix: str) -> dict[str, str]:
    """Return the roles with their names in the database.

    Raises:
        ArgumentError: there is no such role, or PostgreSQL would refuse or shorten its name.
    """
    names = {role: f"{prefix}{role}" for role in roles}
    for role, name in names.items():
        sets_of(role)
        _require_name(name, "role")
        if name.startswith("pg_"):
            raise ArgumentError(f"the role would be named {name!r}, and PostgreSQL keeps pg_ for itself: take another.")
    return names


def statements(roles: Iterable[str], *, schema: str = SCHEMA, prefix: str = "") -> list[str]:
    """Return the statements that create roles where they are missing, and set what they may do with our tables.

    They are for one transaction, and can be executed again: afterwards the roles have these rights on our tables and
    views, and no others that were granted to them by name.

    Raises:
        ArgumentError: there is no such role, or a name is not one of PostgreSQL's.
    """
    _require_name(schema, "schema")
    names = names_of(roles, prefix=prefix)
    users = [name for role, name in names.items() if role != OWNER]
    return [
        _create(names.values()),
        *([_own(schema, names[OWNER])] if OWNER in names else []),
        *(_reset(schema, users) if users else []),
        *(each for role, name in names.items() for each in _grants(schema, role, name)),
        *_defaults(schema, names),
    ]


def grant(session: Session, made: Sequence[str]) -> None:
    """Execute what `statements` has returned, in the session's transaction."""
    connection = session.connection()
    for each in made:
        # As it is: the name of a role may contain what is a parameter elsewhere.
        connection.exec_driver_sql(each, execution_options={"no_parameters": True})


def existing(session: Session, names: Iterable[str]) -> list[str]:
    """Return those of the names that are roles of the server."""
    role = sa.cast(sa.column("rolname"), Text)
    known = sa.table("pg_roles", sa.column("rolname"), schema="pg_catalog")
    return list(scalars(session, sa.select(role).select_from(known).where(role.in_(list(names)))))


def _create(names: Iterable[str]) -> str:
    """Asked first: CREATE ROLE needs a right even where the role is there."""
    listed = _wrapped(_separated(map(_literal, names)), indent=8)
    return "-- the roles; who logs in becomes a member of one of them\n" + _do(
        f"""
DECLARE wanted text;
BEGIN
    FOREACH wanted IN ARRAY CAST(ARRAY[
        {listed}
    ] AS text[]) LOOP
        IF pg_catalog.to_regrole(pg_catalog.quote_ident(wanted)) IS NULL THEN
            EXECUTE pg_catalog.format('CREATE ROLE %I NOLOGIN', wanted);
        END IF;
    END LOOP;
END"""
    )


def _own(schema: str, name: str) -> str:
    """Make a role the owner of the tables and views that are there, and let it make others.

    Who is no superuser becomes a member of the role, which is needed to pass on what one owns. What the role owns
    already is left alone: changing an owner locks the table.
    """
    role, quoted = _literal(_quoted(name)), _quoted(name)
    listed = _wrapped(_separated(map(_literal, _EVERYTHING)), indent=12)
    schemas = _literal(_quoted(schema))
    function = f"{_quoted(schema)}.check_new_workflow()"
    block = f"""
DECLARE
    owner oid = pg_catalog.to_regrole({role});
    theirs regclass;
BEGIN
    IF NOT pg_catalog.pg_has_role(owner, 'USAGE') THEN
        GRANT {quoted} TO CURRENT_USER;
    END IF;
    IF pg_catalog.to_regnamespace({schemas}) IS NULL THEN
        CREATE SCHEMA {_quoted(schema)} AUTHORIZATION {quoted};
    END IF;
    GRANT USAGE, CREATE ON SCHEMA {_quoted(schema)} TO {quoted};
    FOR theirs IN
        SELECT oid FROM pg_catalog.pg_class
        WHERE relnamespace = CAST(pg_catalog.to_regnamespace({schemas}) AS oid) AND relowner <> owner AND relname IN (
            {listed})
    LOOP
        EXECUTE pg_catalog.format('ALTER TABLE %s OWNER TO %I', theirs, {_literal(name)});
    END LOOP;
    IF pg_catalog.to_regprocedure({_literal(function)}) IS NOT NULL THEN
        ALTER FUNCTION {function} OWNER TO {quoted};
    END IF;
END"""  # noqa: S608 (each name is quoted)
    return f"-- {OWNER}: owns the tables, and may make others\n{_do(block)}"


def _reset(schema: str, names: Sequence[str]) -> list[str]:
    users = _separated(_quoted(each) for each in names)
    return [
        "-- what they may do with these tables is what follows, and no more\n"
        + _statement(["REVOKE", "ALL"], ["ON", *_listed(schema, _EVERYTHING)], ["FROM", *users]),
        _statement(["GRANT", "USAGE"], ["ON", "SCHEMA", _quoted(schema)], ["TO", *users]),
    ]


def _grants(schema: str, role: str, name: str) -> list[str]:
    """Return a statement for each group of tables with the same rights."""
    rights = _all_of(*(SETS[each] for each in sets_of(role)))
    tables: dict[tuple[str, ...], list[str]] = {}
    for table, privileges in rights.items():
        words = tuple(word for each in _PRIVILEGES if each in privileges for word in _privilege(each, privileges[each]))
        tables.setdefault(words, []).append(table)
    made = [
        _statement(["GRANT", *words[:-1], words[-1].rstrip(",")], ["ON", *_listed(schema, each)], ["TO", _quoted(name)])
        for words, each in tables.items()
    ]
    if made:
        sets = "" if sets_of(role) == (role,) else f": the rights of {' and '.join(sets_of(role))}"
        made[0] = f"-- {role}{sets}\n{made[0]}"
    return made


def _privilege(name: str, columns: str) -> list[str]:
    if not columns:
        return [f"{name},"]
    first, *others = _separated(columns.split())
    every = [f"({first}", *others]
    return [name, *every[:-1], f"{every[-1]}),"]


def _defaults(schema: str, names: Mapping[str, str]) -> list[str]:
    """Let those who read everything read what a later migration adds."""
    readers = [_quoted(name) for role, name in names.items() if {"operator", "reader"} & set(sets_of(role))]
    if OWNER not in names or not readers:
        return []
    changed = f"ALTER DEFAULT PRIVILEGES FOR ROLE {_quoted(names[OWNER])} IN SCHEMA {_quoted(schema)}"
    return [f"-- what {OWNER} adds later\n{changed}\n    GRANT SELECT ON TABLES TO {', '.join(readers)}"]


def _listed(schema: str, tables: Iterable[str]) -> list[str]:
    return _separated(f"{_quoted(schema)}.{table}" for table in tables)


def _separated(words: Iterable[str]) -> list[str]:
    *before, last = words
    return [*(f"{each}," for each in before), last]


def _statement(*clauses: Sequence[str]) -> str:
    """Return a statement in one line, or with a line or more for each of its clauses."""
    line = " ".join(word for clause in clauses for word in clause)
    return line if len(line) <= _WIDTH else "\n    ".join(map(_wrapped, clauses))


def _wrapped(words: Iterable[str], *, indent: int = 4) -> str:
    """Return words in lines of about one width. A word is left as it is: it may be a name with spaces."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > _WIDTH:
            lines.append(f"{' ' * indent}{word}")
        else:
            lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return "\n".join(lines)


def _require_name(name: str, what: str) -> None:
    if not name or "\0" in name:
        raise ArgumentError(f"{name!r} is not the name of a {what} of PostgreSQL: it is empty, or has a zero in it.")
    if (length := len(name.encode())) > _LONGEST_NAME:
        raise ArgumentError(
            f"{name!r} is {length} bytes long, and PostgreSQL would cut the name of a {what} off after "
            f"{_LONGEST_NAME}: take a shorter one."
        )


def _quoted(name: str) -> str:
    if re.fullmatch("[a-z_][a-z0-9_]*", name) and name not in _RESERVED:
        return name
    return '"' + name.replace('"', '""') + '"'


def _literal(value: str) -> str:
    doubled = value.replace("'", "''")
    return "E'" + doubled.replace("\\", "\\\\") + "'" if "\\" in value else f"'{doubled}'"


def _do(body: str) -> str:
    """Return a block that is executed as one statement, between dollars that do not occur in it."""
    tag = next(each for number in range(len(body)) if (each := f"${'_' * number}$") not in body)
    return f"DO {tag}{body}\n{tag}"
