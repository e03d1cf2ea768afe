"""Reads what a server has used: commits, WAL and statements from its statistics, CPU from the operating system."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version

import psutil
from sqlalchemy import QueuePool, make_url, text

from sqla_durable.tools.bench.processes import Usage
from sqla_durable.tools.bench.report import (
    Costs,
    Machine,
)
from sqla_durable.tools.bench.schema import (
    QUERY_MARK,
    BenchSchema,
)

_HAS_FLUSH = 150_000
_READINGS = 1_000
_SETTINGS = "fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_wal_size", "wal_level"
_LOCAL_HOSTS = "", "localhost", "127.0.0.1", "::1"


@dataclass(frozen=True, slots=True)
class Reading:
    """The server's counters at one moment."""

    commits: int
    wal_bytes: int
    statements: int | None
    cpu: float | None


class Meter:
    """Reads the counters of the server that a schema is on."""

    def __init__(self, schema: BenchSchema) -> None:
        self._schema = schema
        self._version = int(schema.query("SELECT current_setting('server_version_num')")[0][0])
        self._has_statements = _has_statements(schema)
        self._postmaster = _postmaster(schema)

    def read(self) -> Reading:
        """Read all counters, after the benchmark's own connections have reported theirs."""
        if self._version >= _HAS_FLUSH:
            self._flush()
        row = self._schema.query(
            "SELECT xact_commit, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0') AS wal FROM pg_stat_database "
            "WHERE datname = current_database()"
        )[0]
        return Reading(int(row.xact_commit), int(row.wal), self._statements(), self._cpu())

    def machine(self) -> Machine:
        """Describe the machine and the server."""
        settings = self._schema.query(
            "SELECT name, current_setting(name) AS value FROM pg_settings WHERE name = ANY(:names) ORDER BY name",
            names=list(_SETTINGS),
        )
        return Machine(
            cores=os.cpu_count() or 1,
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            package=version("sqla-durable"),
            server=self._schema.query("SELECT current_setting('server_version')")[0][0],
            database=self._schema.query("SELECT current_database()")[0][0],
            is_local=self._postmaster is not None,
            settings={row.name: row.value for row in settings},
        )

    def _flush(self) -> None:
        """Let each idle connection report its counts, which would otherwise go to a later reading."""
        pool = self._schema.engine.pool
        idle = pool.checkedin() if isinstance(pool, QueuePool) else 0
        with ExitStack() as connections:
            for _ in range(max(1, idle)):
                connection = connections.enter_context(self._schema.engine.connect())
                connection.execute(text(f"{QUERY_MARK} SELECT pg_stat_force_next_flush()"))

    def _statements(self) -> int | None:
        if not self._has_statements:
            return None
        found = self._schema.query(
            "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements JOIN pg_database ON pg_database.oid = dbid "
            "WHERE datname = current_database() AND query LIKE :ours AND query NOT LIKE :mark",
            ours=f"%{self._schema.name}.%",
            mark=f"{QUERY_MARK}%",
        )
        return int(found[0][0])

    def _cpu(self) -> float | None:
        """Return the CPU seconds of the server's processes, including those that have ended."""
        if self._postmaster is None:
            return None
        with suppress(psutil.Error):
            # A backend that ends in between would be counted twice or not at all: then all are read again.
            for _ in range(_READINGS):
                before = _ended(self._postmaster)
                living = sum(map(_seconds, [self._postmaster, *self._postmaster.children()]))
                if _ended(self._postmaster) == before:
                    return before + living
        return None


def costs_between(before: Reading, after: Reading, usages: Iterable[Usage], *, units: float) -> Costs:
    """Return what each of `units` workflows or steps cost between two readings."""
    used = list(usages)
    statements = _difference(before.statements, after.statements)
    cpu = _difference(before.cpu, after.cpu)
    return Costs(
        commits=(after.commits - before.commits) / units,
        statements=None if statements is None else statements / units,
        wal_bytes=(after.wal_bytes - before.wal_bytes) / units,
        worker_ms=1_000 * sum(each.cpu for each in used) / units,
        server_ms=None if cpu is None else 1_000 * cpu / units,
        worker_peak_mb=max(each.peak for each in used) / 1e6,
    )


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _has_statements(schema: BenchSchema) -> bool:
    """Return whether the extension is in this database and the server collects for it."""
    return bool(
        schema.query(
            "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_stat_statements') "
            "AND EXISTS (SELECT FROM pg_settings WHERE name = 'pg_stat_statements.track' AND setting <> 'none')"
        )[0][0]
    )


def _postmaster(schema: BenchSchema) -> psutil.Process | None:
    """Return the server's first process, the parent of each backend, if it is on this machine."""
    url = make_url(schema.url)
    host = str(url.query.get("host", url.host or ""))
    if host not in _LOCAL_HOSTS and not host.startswith("/"):
        return None
    with schema.engine.connect() as connection, suppress(psutil.Error):
        backend = psutil.Process(connection.scalar(text("SELECT pg_backend_pid()")))
        if "postgres" in backend.name():  # else the port leads into a container, whose process ids are its own
            return backend.parent()
    return None


def _ended(postmaster: psutil.Process) -> float:
    """Return the CPU seconds of its children that have ended."""
    times = postmaster.cpu_times()
    return float(times.children_user + times.children_system)


def _seconds(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0
