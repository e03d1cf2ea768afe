"""The examination as a whole: its checks in their order, each in a transaction that cannot hurt anybody."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import sqla_durable.tools.doctor.server as server
import sqla_durable.tools.doctor.structure as structure
import sqla_durable.tools.doctor.work as work
from sqla_durable.definitions.redaction import driver_message, message_of
from sqla_durable.models import SCHEMA
from sqla_durable.store import catalogue
from sqla_durable.tools.doctor.findings import Code, Examined, Finding, Severity, note

PATIENCE = timedelta(minutes=5)
"""From how long on something that waits is a finding."""

_MILLISECONDS = 5_000
"""How long a statement of a check may take; a lock is waited for a fifth of that."""

Check = Callable[[Examined], Iterator[Finding]]

OF_SERVER: Sequence[Check] = (
    server.check_server,
    server.check_settings,
    server.check_sessions,
    server.check_prepared,
    server.check_replication,
)
OF_TABLES: Sequence[Check] = (
    structure.check_alembic,
    structure.check_rights,
    structure.check_tables,
    structure.check_columns,
    structure.check_constraints,
    structure.check_indexes,
    structure.check_triggers,
    structure.check_views,
    structure.check_storage,
    structure.check_dead_rows,
    work.check_workers,
    work.check_backlog,
    work.check_timers,
    work.check_deadlines,
    work.check_signals,
    work.check_waits,
    work.check_pauses,
    work.check_blocked,
    work.check_schedules,
)
"""What needs tables that fit this package."""

_ORDER = {each: number for number, each in enumerate(Severity)}


def examine(engine: Engine, *, patience: timedelta = PATIENCE) -> list[Finding]:
    """Return what is wrong with our tables and their server, the worst first. Reads only.

    Args:
        engine: of psycopg; its `schema_translate_map` says where our tables are.
        patience: from how long on something that waits is a finding.

    Raises:
        DBAPIError: the database cannot be reached, or the connection is lost.
    """
    with engine.connect() as connection:
        found = list(_Examination(connection, patience).findings())
    return sorted(found, key=lambda each: _ORDER[each.severity])


class _Examination:
    """Carries out checks, and notes those that fail."""

    def __init__(self, connection: Connection, patience: timedelta) -> None:
        self._connection = connection
        names: Mapping[str, str] = connection.get_execution_options().get("schema_translate_map") or {}
        self._schema = names.get(SCHEMA) or SCHEMA
        self._patience = patience
        self._failed: dict[str, list[str]] = defaultdict(list)

    def findings(self) -> Iterator[Finding]:
        for check in OF_SERVER:
            yield from self._carry_out(check)
        unfit = self._carry_out(structure.check_revision)
        yield from unfit
        for check in () if unfit else OF_TABLES:
            yield from self._carry_out(check)
        for reason, names in self._failed.items():
            yield note(
                Code.NOT_CHECKED,
                f"{', '.join(names)} could not be carried out: {reason}.",
                "Use a role that may read the tables and has pg_monitor; what is among the other findings may be why.",
                checks=names,
            )

    def _carry_out(self, check: Check) -> list[Finding]:
        """Carry out a check in a transaction of its own, which is rolled back.

        Whatever is raised is a finding, too: of a database that is ill in one way, the others are to be found.
        """
        try:
            with Session(self._connection) as session:
                catalogue.limit_reading(session, _MILLISECONDS)
                return list(check(Examined(session, self._schema, self._patience)))
        except Exception as error:
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                raise
            self._failed[_reason(error)].append(check.__name__.removeprefix("check_"))
            return []


def _reason(error: Exception) -> str:
    if isinstance(error, DBAPIError) and error.orig is not None:
        return driver_message(error.orig)
    return f"{type(error).__name__}: {message_of(error)}"
