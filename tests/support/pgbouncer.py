"""PgBouncer in transaction mode in front of a server: the one on PATH, or Debian's, downloaded and unpacked.

It listens on a socket in a directory of its user's alone: behind it is a superuser who needs no password.
"""

from __future__ import annotations

import os
import platform
import pwd
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, NullPool, create_engine, event, make_url
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.exc import OperationalError

from sqla_durable.embedded import programs as _programs
from tests.support.clusters import free_port
from tests.support.proxy import at_socket

PACKAGES = ("pgbouncer", "libc-ares2", "libevent-2.1-7")
"""What is unpacked: PgBouncer, and the libraries that a slim Debian does not have."""

_START_TIMEOUT = 10


class UnavailableError(Exception):
    """There is no PgBouncer here; the text says why."""


@dataclass(frozen=True, slots=True)
class Program:
    """PgBouncer, and where its libraries are."""

    path: Path
    libraries: Path | None = None


@dataclass(frozen=True, slots=True)
class Bouncer:
    """A PgBouncer that runs.

    Attributes:
        directory, port: where its socket is, and the number in the socket's name.
        server: the URL of the server behind it.
    """

    directory: Path
    port: int
    server: URL
    stop: Callable[[], None]

    @property
    def text(self) -> str:
        """The URL of the database `postgres` through it, as text."""
        return self.url("postgres").render_as_string(hide_password=False)

    def url(self, database: str) -> URL:
        """Return the URL of a database through it."""
        return at_socket(self.server.set(database=database), self.directory, self.port)


def start(server_url: str, **settings: str) -> Bouncer:
    """Start one in front of a server, for every database of it.

    Raises:
        UnavailableError: there is no PgBouncer, and no way to get it.
    """
    server = make_url(server_url)
    program = find()
    user = _programs.server_user(Path("/nonexistent"))  # like PostgreSQL, it refuses to run as root
    directory = Path(tempfile.mkdtemp(prefix="sqla-durable-bouncer-"))
    port = free_port()
    _configure(directory, server, port, settings)
    _give(directory, user)
    process = _launch(program, directory, user)
    bouncer = Bouncer(directory, port, server, stop=lambda: _stop(process, directory))
    try:
        _await_answer(process, bouncer, directory)
    except BaseException:
        bouncer.stop()
        raise
    return bouncer


def find() -> Program:
    """Find PgBouncer on PATH or in the cache; download it from Debian where it is in neither.

    Raises:
        UnavailableError: it is nowhere, and cannot be downloaded.
    """
    on_path = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if on_path:
        return Program(Path(on_path))
    root = _cache() / "root"
    if not root.exists():
        _download(root)
    libraries = root / "usr" / "lib" / f"{platform.machine()}-linux-gnu"
    return Program(root / "usr" / "sbin" / "pgbouncer", libraries)


def accept_transaction_pooling() -> None:
    """Make every engine of this process fit for a bouncer that knows no prepared statements, as the docs advise."""
    event.listen(Engine, "do_connect", _without_prepared_statements)


def _without_prepared_statements(dialect: Dialect, _record: Any, _args: Any, parameters: dict[str, Any]) -> None:
    parameters.update(CONNECT_ARGS[dialect.driver]())


CONNECT_ARGS: dict[str, Callable[[], dict[str, Any]]] = {
    "psycopg": lambda: {"prepare_threshold": None},
    "asyncpg": lambda: {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"__asyncpg_{uuid.uuid4()}__",
    },
}


def _cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "unknown")
    return home / "sqla-durable" / f"pgbouncer-{release}-{platform.machine()}"


def _download(root: Path) -> None:
    """Unpack Debian's packages, all or nothing: another process may be doing the same."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise UnavailableError("there is no pgbouncer on PATH, and no apt-get to download it with")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as temporary:
        _run("apt-get", "download", *PACKAGES, cwd=temporary)
        fresh = Path(temporary) / "root"
        for package in Path(temporary).glob("*.deb"):
            _run("dpkg", "-x", str(package), str(fresh), cwd=temporary)
        if not root.exists():
            fresh.rename(root)


def _run(*command: str, cwd: str) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        raise UnavailableError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")


def _configure(directory: Path, server: URL, port: int, settings: dict[str, str]) -> None:
    host, backend = server.query.get("host", server.host), server.port or 5432
    chosen = {
        "listen_addr": "",
        "listen_port": str(port),
        "unix_socket_dir": str(directory),
        "auth_type": "trust",
        "auth_file": str(directory / "users.txt"),
        "pool_mode": "transaction",
        "max_client_conn": "1000",
        "default_pool_size": "10",
        "server_idle_timeout": "5",
        "logfile": str(directory / "pgbouncer.log"),
        **settings,
    }
    lines = ["[databases]", f"* = host={host} port={backend} user={server.username}", "[pgbouncer]"]
    lines += [f"{name} = {value}" for name, value in chosen.items()]
    (directory / "users.txt").write_text(f'"{server.username}" ""\n')
    (directory / "pgbouncer.ini").write_text("\n".join(lines) + "\n")


def _give(directory: Path, user: pwd.struct_passwd | None) -> None:
    if user is not None:
        for path in (directory, *directory.iterdir()):
            os.chown(path, user.pw_uid, user.pw_gid)


def _launch(program: Program, directory: Path, user: pwd.struct_passwd | None) -> subprocess.Popen[bytes]:
    """Start it; as root it becomes another user by itself, which need not be able to enter root's cache."""
    environment = {"PATH": os.defpath}
    if program.libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(program.libraries)
    become = ["-u", user.pw_name] if user else []
    return subprocess.Popen(
        [program.path, *become, str(directory / "pgbouncer.ini")],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _await_answer(process: subprocess.Popen[bytes], bouncer: Bouncer, directory: Path) -> None:
    engine = create_engine(bouncer.url("postgres"), poolclass=NullPool, connect_args=CONNECT_ARGS["psycopg"]())
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        try:
            engine.connect().close()
        except OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                log = directory / "pgbouncer.log"
                end = log.read_text()[-2_000:] if log.exists() else ""
                raise UnavailableError(f"pgbouncer does not answer: {error}\n{end}") from error
            time.sleep(0.02)
        else:
            return


def _stop(process: subprocess.Popen[bytes], directory: Path) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(directory, ignore_errors=True)
