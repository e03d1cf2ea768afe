"""PostgreSQL servers of a test's own, on TCP: stopped, killed, promoted, demoted; not that of the test run."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import socket
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from sqlalchemy import URL, NullPool, create_engine, text

from sqla_durable import models
from sqla_durable.embedded import programs as _programs
from tests.support import domain
from tests.support.databases import migrate

StopMode = Literal["fast", "immediate"]

_HOST = "127.0.0.1"
_PASSWORD = secrets.token_hex(16)
"""Of this run's superusers: every user of the machine can reach a port."""

_SETTINGS = {
    "listen_addresses": _HOST,
    "unix_socket_directories": "",
    "fsync": "off",  # processes die here, not the machine
    "full_page_writes": "off",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "wal_keep_size": "256MB",
    "timezone": "UTC",
    "log_line_prefix": "%m [%p] %a ",
}


class Cluster:
    """A PostgreSQL server with a data directory and a TCP port of its own; it keeps both over every stop and start.

    Attributes:
        port: where it listens on 127.0.0.1 while it runs.
    """

    def __init__(self, root: Path, name: str, *, binaries: Path | None = None) -> None:
        self.name = name
        self.port = free_port()
        self._root = root
        self._data = root / name
        self._user = _programs.server_user(self._data)
        self._binaries = binaries or _programs.find(self._data, user=self._user, copies=root / "programs")

    def url(self, database: str = "postgres") -> URL:
        """Return the URL of a database, with psycopg."""
        return URL.create("postgresql+psycopg", "postgres", _PASSWORD, host=_HOST, port=self.port, database=database)

    @property
    def text(self) -> str:
        """The same URL of the database `postgres` as text, for another process."""
        return self.url().render_as_string(hide_password=False)

    def create(self) -> None:
        """Make its data directory and start it, with our tables and the domain's in the database `postgres`."""
        password = ["-A", "scram-sha-256", "--pwfile", str(self._private("password", _PASSWORD))]
        self._run("initdb", "-D", str(self._data), "-U", "postgres", *password, "--no-locale", "-E", "UTF8", "-N")
        self._configure()
        self.start()
        engine = create_engine(self.url(), poolclass=NullPool)
        with engine.begin() as connection:
            migrate(connection, models.SCHEMA)
            domain.Base.metadata.create_all(connection)

    def copy(self, other: Cluster) -> None:
        """Make its data directory as another one's that is stopped, and start it: no initdb, no migration."""
        done = _programs.execute(Path("/bin/cp"), "-a", str(other._data), str(self._data), user=self._user)
        assert done.returncode == 0, done.stdout
        self._configure()
        self.start()

    def follow(self, primary: Cluster) -> None:
        """Make it a standby of a running primary, by pg_basebackup."""
        passwords = self._private("passwords", f"*:*:*:*:{_PASSWORD}")  # not as an argument, which all users see
        source = f"host={_HOST} port={primary.port} user=postgres application_name={self.name} passfile={passwords}"
        self._run("pg_basebackup", "-D", str(self._data), "-d", source, "-R", "-c", "fast", "-X", "stream", "-N")
        self._configure()
        self.start()

    def back_up(self, primary: Cluster) -> None:
        """Make it a backup of a running primary, to be started by `restore`."""
        passwords = self._private("passwords", f"*:*:*:*:{_PASSWORD}")
        source = f"host={_HOST} port={primary.port} user=postgres passfile={passwords}"
        self._run("pg_basebackup", "-D", str(self._data), "-d", source, "-c", "fast", "-X", "stream", "-N")

    def restore(self, primary: Cluster, point: str) -> None:
        """Start this backup as of a restore point of the primary, which is stopped, and whose log serves as archive."""
        self._configure()
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(f"restore_command = 'cp {primary._data}/pg_wal/%f \"%p\"'\n")
            file.write(f"recovery_target_name = '{point}'\nrecovery_target_action = 'promote'\n")
        signal = self._data / "recovery.signal"
        signal.touch()
        if self._user is not None:
            os.chown(signal, self._user.pw_uid, self._user.pw_gid)
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._run("pg_ctl", "start", "-D", str(self._data), "-w", "-t", "60", "-l", str(self._data / "server.log"))

    def stop(self, mode: StopMode) -> None:
        """Stop it: `fast` says goodbye to its clients, `immediate` is a crash."""
        self._run("pg_ctl", "stop", "-D", str(self._data), "-w", "-t", "60", "-m", mode)

    def promote(self) -> None:
        """Make the standby a primary; returns when it accepts writes."""
        self._run("pg_ctl", "promote", "-D", str(self._data), "-w", "-t", "60")

    def restart_as_standby(self) -> None:
        """Demote it in place, without a primary to follow: reads are answered, writes refused with 25006."""
        self.stop("fast")
        (self._data / "standby.signal").touch()
        self.start()

    def set(self, name: str, value: str) -> None:
        """Change a parameter that takes effect at a reload."""
        engine = create_engine(self.url(), poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"ALTER SYSTEM SET {name} = '{value}'"))
            connection.execute(text("SELECT pg_reload_conf()"))

    def destroy(self) -> None:
        """Stop it if it runs; nothing of it is needed any more."""
        if (self._data / "postmaster.pid").exists():
            _programs.execute(
                self._binaries / "pg_ctl", "stop", "-D", str(self._data), "-w", "-m", "immediate", user=self._user
            )

    def _private(self, name: str, text: str) -> Path:
        """Write a file that the server's user alone can read."""
        path = self._root / name
        path.touch(mode=0o600)
        path.write_text(f"{text}\n")
        if self._user is not None:
            os.chown(path, self._user.pw_uid, self._user.pw_gid)
        return path

    def _configure(self) -> None:
        settings = {**_SETTINGS, "port": str(self.port)}
        with (self._data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def _run(self, program: str, *arguments: str) -> None:
        done = _programs.execute(self._binaries / program, *arguments, user=self._user)
        if done.returncode != 0:
            log = self._data / "server.log"
            end = log.read_text(errors="replace")[-2_000:] if log.exists() else ""
            raise RuntimeError(f"{self.name}: {program} {arguments[0]} failed: {done.stdout}\n{end}")


class Clusters:
    """Makes the clusters of one test, and does away with them."""

    def __init__(self, root: Path, *, binaries: Path | None = None, pristine: Cluster | None = None) -> None:
        self._root = root
        self._binaries = binaries
        self._pristine = pristine
        self._made: list[Cluster] = []

    def primary(self) -> Cluster:
        """Make a server with our tables in it."""
        made = self._new("primary")
        if self._pristine is None:
            made.create()
        else:
            made.copy(self._pristine)
        return made

    def backup_of(self, primary: Cluster) -> Cluster:
        """Make a backup of a running primary."""
        made = self._new("backup")
        made.back_up(primary)
        return made

    def standby_of(self, primary: Cluster) -> Cluster:
        """Make a standby that follows a primary, asynchronously until the primary is set otherwise."""
        made = self._new("standby")
        made.follow(primary)
        return made

    def _new(self, name: str) -> Cluster:
        made = Cluster(self._root, f"{name}{len(self._made)}", binaries=self._binaries)
        self._made.append(made)
        return made

    def destroy(self) -> None:
        """Do away with all of them."""
        for each in self._made:
            each.destroy()


@contextmanager
def clusters(binaries: Path | None = None, *, pristine: Cluster | None = None) -> Generator[Clusters]:
    """Yield the maker of a test's clusters; the directory is one that the server's user, who is not root, may enter.

    Args:
        pristine: a cluster that is stopped, whose copies they are; None means that each is made from scratch.
    """
    root = Path(tempfile.mkdtemp(prefix="sqla-durable-cluster-")).resolve()
    user = _programs.server_user(root / "nothing")
    root.chmod(0o755)
    if user is not None:
        os.chown(root, user.pw_uid, user.pw_gid)
    made = Clusters(root, binaries=binaries, pristine=pristine)
    try:
        yield made
    finally:
        made.destroy()
        shutil.rmtree(root, ignore_errors=True)


def free_port() -> int:
    """Return a port on which nobody listens, below those that the kernel assigns to clients.

    A server that is down must find its port free when it comes back.
    """
    low = 15_000 + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw") or 0) % 15_000
    while True:
        port = random.randrange(low, low + 500)
        with socket.socket() as probe:
            if probe.connect_ex((_HOST, port)) != 0:
                return port
