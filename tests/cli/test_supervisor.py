"""The supervisor as a process, with small programs in place of workers: what it starts, replaces, stops and reports."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from sqla_durable.tools.cli import supervisor
from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.cli.supervisor import Supervisor, process_count, worker_command
from tests.support.processes import forked

# It calls the test, and does what the test says. `serve` ends it when its supervisor asks for it.
PROGRAM = """
import os, socket, sys
link, number, port = map(int, sys.argv[1:])
link = socket.socket(fileno=link)
test = socket.create_connection(("127.0.0.1", port))
test.sendall(f"{number} {os.getpid()}\\n".encode())
for line in test.makefile():
    word, *given = line.split()
    if word == "exit":
        os._exit(int(given[0]))
    if word == "orphan":
        open_while_it_runs, kept = os.pipe()
        if not os.fork():
            if not os.fork():
                test.sendall(f"{os.getpid()}\\n".encode())
            os._exit(0)
        os.close(kept)
        os.wait()
        os.read(open_while_it_runs, 1)
    if word in ("serve", "stay"):
        link.send(b"r")
    if word == "report":
        link.send(given[0].encode())
    if word == "serve":
        link.recv(1)
        os._exit(0)
"""
SUBREAPER = 36  # prctl(2)


def supervise(
    count: int, port: int, program: str, stop_within: float, pause: float, silence: float, sent: Connection
) -> None:
    """Be the supervisor, like process 1 of a container; send the log, and end with the exit code."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    handler = logging.Handler()
    handler.emit = lambda record: sent.send(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sqla_durable.supervisor")
    logger.addHandler(handler)
    logger.setLevel("INFO")

    def command(link: int, number: int) -> list[str]:
        return [program, "-S", "-E", "-c", PROGRAM, str(link), str(number), str(port)]

    made = Supervisor(
        command,
        count,
        stop_within=stop_within,
        pause=pause,
        longest_silence=silence,
        on_ready=lambda: sent.send("ready: it is said"),
    )
    threading.Thread(target=report_changes, args=(made, sent), daemon=True).start()
    sys.exit(made.run())


def report_changes(made: Supervisor, sent: Connection) -> None:
    """Send what probes would answer, each time that it changes."""
    before = None
    while True:
        if (found := (made.all_answer, made.all_serve)) != before:
            sent.send(f"live: {found[0]}, ready: {found[1]}")
            before = found
        time.sleep(0.01)


@dataclass
class Program:
    """One of the processes that the supervisor has started."""

    number: int
    pid: int
    connection: socket.socket

    def do(self, what: str) -> None:
        self.connection.sendall(f"{what}\n".encode())

    def runs(self) -> bool:
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        finally:
            self.connection.settimeout(30)

    def wait(self) -> None:
        """Wait until it has ended."""
        with suppress(ConnectionResetError):
            assert self.connection.recv(1) == b""


class Running:
    """A supervisor, and the programs that call from under it."""

    def __init__(
        self, count: int, calls: socket.socket, program: str, stop_within: float, pause: float, silence: float
    ) -> None:
        self.calls = calls
        self.programs: list[Program] = []
        self._log, sent = forked.Pipe(duplex=False)
        port = calls.getsockname()[1]
        self.process = forked.Process(target=supervise, args=(count, port, program, stop_within, pause, silence, sent))
        self.process.start()
        sent.close()

    def accept(self) -> Program:
        """Return the next program that calls."""
        connection, _ = self.calls.accept()
        connection.settimeout(30)
        number, pid = connection.makefile().readline().split()
        self.programs.append(Program(int(number), int(pid), connection))
        return self.programs[-1]

    def serving(self, count: int) -> list[Program]:
        """Return this many programs, which all serve."""
        found = [self.accept()]
        found[0].do("serve")
        found += [self.accept() for _ in range(count - 1)]
        for each in found[1:]:
            each.do("serve")
        for _ in found:
            self.logged("serves")
        return sorted(found, key=lambda each: each.number)

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def logged(self, text: str) -> str:
        """Wait for a line of the log with this text, and return it."""
        while True:
            assert self._log.poll(30), f"nothing is logged with {text!r}"
            if text in (line := self._log.recv()):
                return str(line)

    def exit_code(self) -> int | None:
        self.process.join(30)
        return self.process.exitcode

    def nobody_calls(self) -> bool:
        """Return whether no other program was started, once the supervisor has ended."""
        self.calls.setblocking(False)
        with suppress(BlockingIOError):
            self.calls.accept()
            return False
        return True

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        for each in self.programs:
            each.connection.close()
        self._log.close()


class Start:
    def __init__(self, calls: socket.socket) -> None:
        self.calls = calls
        self.all: list[Running] = []

    def __call__(
        self,
        count: int = 2,
        *,
        program: str = sys.executable,
        stop_within: float = 30,
        pause: float = 0.01,
        silence: float = 60,
    ) -> Running:
        self.all.append(Running(count, self.calls, program, stop_within, pause, silence))
        return self.all[-1]


@pytest.fixture
def start(calls: socket.socket) -> Generator[Start]:
    start = Start(calls)
    yield start
    for each in start.all:
        each.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_all_in_good_order(start: Start, number: signal.Signals) -> None:
    running = start(3)
    programs = running.serving(3)
    assert [each.number for each in programs] == [1, 2, 3]
    assert all(os.getsid(each.pid) == each.pid for each in programs)  # Ctrl-C reaches the supervisor alone
    running.send(number)
    assert running.exit_code() == 0
    assert not any(each.runs() for each in programs)


def test_probes_answer_what_the_processes_report(start: Start) -> None:
    running = start(1)
    program = running.accept()
    program.do("stay")
    running.logged("live: True, ready: True")
    program.do("report w")
    running.logged("live: True, ready: False")
    program.do("report r")
    running.logged("live: True, ready: True")


def test_supervisor_is_ready_once_all_are_whoever_was_first(start: Start) -> None:
    running = start(2)
    first = running.accept()
    first.do("stay")
    second = running.accept()
    first.do("report w")
    second.do("stay")
    for _ in range(2):
        running.logged("serves")
    first.do("report r")
    running.logged("ready: it is said")


def test_a_process_that_reports_nothing_for_too_long_does_not_answer(start: Start) -> None:
    running = start(1, silence=0)
    running.accept().do("stay")
    running.logged("live: False, ready: False")


@pytest.mark.parametrize("code", [1, 2])
def test_first_that_cannot_start_ends_the_supervisor_with_its_code(start: Start, code: int) -> None:
    running = start(3)
    running.accept().do(f"exit {code}")
    assert running.exit_code() == code
    assert running.nobody_calls()


def test_wrong_configuration_that_is_met_later_leaves_those_that_serve_alone(start: Start) -> None:
    """Such as modules that are being replaced while one process is killed."""
    running = start(pause=0.0001)
    first = running.accept()
    first.do("serve")
    for _ in range(11):
        running.accept().do("exit 2")
    assert "ended with exit code 2" in running.logged("starting another one in")
    running.accept().do("serve")
    assert first.runs()


@pytest.mark.parametrize("ending", ["exit 0", "exit 1", "SIGKILL"])
def test_what_ends_by_itself_is_replaced(start: Start, ending: str) -> None:
    running = start()
    kept = running.accept()
    kept.do("serve")
    lost = running.accept()
    lost.do("stay")
    lost.do(ending) if ending != "SIGKILL" else os.kill(lost.pid, signal.SIGKILL)
    assert ending.replace("exit", "exit code") in running.logged("starting another one in 0.01 s")
    other = running.accept()
    assert (other.number, kept.runs()) == (lost.number, True)
    other.do("serve")
    running.logged(str(other.pid))
    running.send(signal.SIGTERM)
    assert running.exit_code() == 0


def test_what_ends_at_once_is_replaced_with_growing_pauses_and_not_without_a_limit(start: Start) -> None:
    running = start(3, pause=0.001)
    for _ in range(10):
        running.accept().do("exit 3")
    pauses = [running.logged("starting another one").split()[-2] for _ in range(9)]
    assert [float(each) for each in pauses] == [0.001 * 2**doubled for doubled in range(9)]
    assert "ended with exit code 3" in running.logged("10 times in a row: stopping")
    assert running.exit_code() == 1
    assert running.nobody_calls()  # before the first serves, it is alone


def test_sighup_replaces_one_after_the_other_and_as_many_serve_as_before(start: Start) -> None:
    running = start()
    old = running.serving(2)
    running.send(signal.SIGHUP)
    for each in old:
        new = running.accept()
        assert new.number == each.number
        assert sum(program.runs() for program in running.programs if program is not new) == 2
        new.do("serve")
        each.wait()
    running.logged("all worker processes have been replaced")
    assert [each.runs() for each in running.programs] == [False, False, True, True]
    running.send(signal.SIGTERM)
    assert running.exit_code() == 0
    assert running.nobody_calls()


def test_second_sighup_replaces_also_what_the_first_has_started(start: Start) -> None:
    running = start(1)
    running.serving(1)
    running.send(signal.SIGHUP)
    new = running.accept()
    running.send(signal.SIGHUP)
    running.logged("SIGHUP")
    running.logged("SIGHUP")
    new.do("serve")
    newer = running.accept()
    newer.do("serve")
    new.wait()
    running.logged("all worker processes have been replaced")
    assert newer.runs()


def test_restart_that_fails_leaves_those_that_serve(start: Start) -> None:
    running = start()
    old = running.serving(2)
    running.send(signal.SIGHUP)
    running.accept().do("exit 2")
    assert "exit code 2 before it served" in running.logged("the processes that serve are not replaced")
    assert all(each.runs() for each in old)
    running.send(signal.SIGTERM)
    assert running.exit_code() == 0
    assert running.nobody_calls()


def test_successor_fills_the_place_of_what_was_killed_meanwhile(start: Start) -> None:
    running = start(1)
    (old,) = running.serving(1)
    running.send(signal.SIGHUP)
    new = running.accept()
    os.kill(old.pid, signal.SIGKILL)
    running.logged("was ended by SIGKILL")
    new.do("serve")
    running.logged(f"({new.pid}) serves")
    running.send(signal.SIGTERM)
    assert running.exit_code() == 0
    assert running.nobody_calls()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_all_at_once(start: Start, number: signal.Signals) -> None:
    running = start(1)
    program = running.accept()
    program.do("stay")
    running.logged("serves")
    running.send(number)
    running.logged("stopping")
    running.send(number)
    assert running.exit_code() == 128 + number
    program.wait()


def test_what_does_not_stop_in_time_is_killed(start: Start) -> None:
    running = start(stop_within=0.1)
    first = running.accept()
    first.do("serve")
    running.accept().do("stay")
    for _ in range(2):
        running.logged("serves")
    running.send(signal.SIGTERM)
    running.logged("does not stop: ending it")
    assert running.exit_code() == 128 + signal.SIGKILL


def test_killed_before_it_served_is_no_fault_of_a_stop(start: Start) -> None:
    running = start(1)
    program = running.accept()
    running.send(signal.SIGTERM)
    running.logged("stopping")
    os.kill(program.pid, signal.SIGTERM)  # as where a service sends it to all of its processes
    assert running.exit_code() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="it is an orphan's parent only as process 1, or on Linux")
def test_orphans_are_reaped(start: Start) -> None:
    running = start(1)
    program = running.accept()
    program.do("orphan")
    orphan = int(program.connection.makefile().readline())
    program.do("exit 3")  # it ends after the orphan
    running.accept()
    assert not Path(f"/proc/{orphan}").exists()


def test_programs_end_with_a_supervisor_that_was_killed(start: Start) -> None:
    running = start()
    programs = running.serving(2)
    running.send(signal.SIGKILL)
    for each in programs:
        each.wait()


def test_program_that_is_not_there_is_tried_again_with_pauses(start: Start) -> None:
    running = start(program="/nowhere", pause=0.0001)
    assert "worker process 1 cannot be started: [Errno 2]" in running.logged("starting another one in 0.0001 s")
    running.logged("10 times in a row: stopping")
    assert running.exit_code() == 1


def test_restart_for_which_there_is_no_program_leaves_those_that_serve(start: Start, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.symlink_to(sys.executable)
    running = start(program=str(program))
    old = running.serving(2)
    program.unlink()
    running.send(signal.SIGHUP)
    assert "cannot be started" in running.logged("the processes that serve are not replaced")
    assert all(each.runs() for each in old)


@pytest.mark.parametrize("wanted", ["0", "-1", "1001", "1.5", "two", "", "²", "AUTO"])
def test_number_of_processes_is_refused(wanted: str) -> None:
    with pytest.raises(CommandError, match="--processes must be a number from 1 to 1,000, or auto, got"):
        process_count(wanted)


def test_number_of_processes_is_what_was_given() -> None:
    assert (process_count("1"), process_count("1000")) == (1, 1_000)
    assert 1 <= process_count("auto") <= (os.cpu_count() or 1)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no affinity")
def test_auto_means_the_cores_that_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert process_count("auto") == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", None), ("250000 100000", 2), ("50000 100000", 1), ("", None)]
)
def test_quota_of_a_container_counts(tmp_path: Path, quota: str, cores: int | None) -> None:
    (tmp_path / "shop.service").mkdir()
    (tmp_path / "shop.service" / "cpu.max").write_text(f"{quota}\n")
    (tmp_path / "cgroup").write_text("1:name=systemd:/other\n0::/shop.service\n")
    assert supervisor._quota(tmp_path / "cgroup", tmp_path) == cores  # pyright: ignore[reportPrivateUsage]
    assert supervisor._quota(tmp_path / "none", tmp_path) is None  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("original", "program"),
    [
        (["python", "-P", "/bin/sqla-durable"], ["-P", "/bin/sqla-durable"]),
        (["python", "-X", "dev", "-m", "sqla_durable"], ["-X", "dev", "-m", "sqla_durable"]),
        (None, ["-m", "sqla_durable"]),
    ],
)
def test_worker_processes_are_started_like_their_supervisor(
    monkeypatch: pytest.MonkeyPatch, original: list[str] | None, program: list[str]
) -> None:
    given = ["worker", "shop:durable", "--processes", "2", "--name", "worker"]
    monkeypatch.setattr(sys, "argv", ["sqla-durable", *given])
    monkeypatch.setattr(sys, "orig_argv", [*original, *given] if original else ["python", "other.py"])
    rest = ["worker", "--supervised", "5:1", *given[1:]]
    assert worker_command(5, 1) == [sys.executable, *program, *rest]
