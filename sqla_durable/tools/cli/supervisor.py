"""`worker --processes N`: how many processes that is, the supervisor of them, and their link to it.

`Supervisor` starts worker processes and replaces those that end; it knows neither workflows nor the database. A socket
connects it with the `Link` of each process: that sends a byte when its worker serves, and every few seconds while its
event loop answers; and it lets the worker stop in good order when it receives one, or when the socket is closed because
the supervisor was killed.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from sqla_durable.definitions.log import Log
from sqla_durable.tools.cli.errors import FAILED, WRONG_COMMAND, CommandError

log = Log("sqla_durable.supervisor")

Command = Callable[[int, int], list[str]]
"""Returns the command of a worker process, for the file descriptor of its link and its number."""

MOST_PROCESSES = 1_000
FIRST_PAUSE = 0.5
_MOST_FAILURES = 10  # in a row
_LONGEST_PAUSE = 60.0
_STEADY = 60.0  # seconds after which the end of a process is the first failure again
_STAGGER = 0.1  # seconds between two starts
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_SERVES, _WAITS, _STOP = b"r", b"w", b"s"  # what the two ends send
_BETWEEN_REPORTS = 5.0
_LONGEST_SILENCE = 15.0  # seconds


def process_count(wanted: str) -> int:
    """Return how many processes an option means: its number, or for `auto` one for each core.

    Raises:
        CommandError: it is neither `auto` nor a number from 1 to 1,000.
    """
    if wanted == "auto":
        return min(available_cores(), MOST_PROCESSES)
    if wanted.isascii() and wanted.isdigit() and 1 <= int(wanted) <= MOST_PROCESSES:
        return int(wanted)
    raise CommandError(f"--processes must be a number from 1 to {MOST_PROCESSES:,}, or auto, got {wanted!r}.")


def available_cores() -> int:
    """Return how many cores this process may use, by its affinity and the CPU quota of its container or service."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, _quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")) or cores))


def _quota(membership: Path, root: Path) -> int | None:
    """Return the CPU quota of the control group (version 2) in whole cores; None if there is none."""
    with suppress(OSError, ValueError):
        own = next(line[3:] for line in membership.read_text().splitlines() if line.startswith("0::"))
        limit, period = (root / own.lstrip("/") / "cpu.max").read_text().split()
        return None if limit == "max" else max(1, int(limit) // int(period))
    return None


def worker_command(link: int, number: int) -> list[str]:
    """Return the command of this process, by the same interpreter with the same options, for a worker process of it."""
    given = sys.argv[1:]
    if sys.orig_argv[-len(given) :] == given:
        program = [sys.executable, *sys.orig_argv[1 : -len(given)]]
    else:  # called by a program that has set sys.argv
        program = [sys.executable, "-m", "sqla_durable"]
    place = given.index("worker") + 1
    return [*program, *given[:place], "--supervised", f"{link}:{number}", *given[place:]]


class Link:
    """A worker process's connection to its supervisor.

    Args:
        given: the file descriptor and the number, as in the command.

    Attributes:
        number: the number of this worker process, from 1.
        stop: called once, in a thread and with the reason, when the supervisor asks for a stop or has ended; by
            default it sends a SIGTERM to this process.
    """

    def __init__(self, given: str) -> None:
        descriptor, number = map(int, given.split(":"))
        self.number = number
        self.stop: Callable[[str], object] = lambda _reason: os.kill(os.getpid(), signal.SIGTERM)
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)
        signal.signal(signal.SIGHUP, _ignore)  # where it is sent to all processes, it concerns the supervisor
        threading.Thread(target=self._wait, name="sqla-durable link", daemon=True).start()

    def report(self, *, serves: bool = True) -> None:
        """Report to the supervisor that the worker of this process answers, and whether it serves."""
        with suppress(OSError):  # it has ended
            self._socket.send(_SERVES if serves else _WAITS)

    def keep_reporting(self, *, answers: Callable[[], bool], serves: Callable[[], bool]) -> None:
        """Report every few seconds from now on, in a thread, as long as the worker answers."""

        def report() -> None:
            while True:
                time.sleep(_BETWEEN_REPORTS)
                if answers():
                    self.report(serves=serves())

        threading.Thread(target=report, name="sqla-durable reports", daemon=True).start()

    def _wait(self) -> None:
        received = b""
        with suppress(OSError):
            received = self._socket.recv(1)
        self.stop("as the supervisor asks" if received else "the supervisor has ended")


@dataclass(slots=True, eq=False)
class _Process:
    """A worker process, from its start until it was reaped."""

    place: _Place
    process: subprocess.Popen[bytes]
    link: socket.socket
    started_at: float = field(default_factory=time.monotonic)
    reported_at: float | None = None  # the last time, once it has served
    is_ready: bool = False  # as it said then
    kill_at: float | None = None  # once it was asked to stop

    def __str__(self) -> str:
        return f"worker process {self.place.number} ({self.process.pid})"

    @property
    def serves(self) -> bool:
        """Whether it has ever served."""
        return self.reported_at is not None

    def stop(self, seconds: float) -> None:
        """Ask it to stop, once, and give it this time."""
        if self.kill_at is None:
            self.kill_at = time.monotonic() + seconds
            with suppress(OSError):  # it is ending
                self.link.send(_STOP)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)  # not by Popen, which may reap it; until then the pid is its own


@dataclass(slots=True, eq=False)
class _Place:
    """One of the N places: the process in it, and its successor while that is being started."""

    number: int
    current: _Process | None = None
    successor: _Process | None = None
    failures: int = 0
    start_at: float = 0


class Supervisor:
    """Keeps worker processes running until SIGTERM or SIGINT; a SIGHUP replaces them, one after the other.

    The process is the supervisor's: it handles its signals, and reaps all of its children.

    Args:
        command: returns the command of a worker process.
        count: how many there are.
        stop_within: how many seconds a process that is stopped may take, before it is killed.
        pause: seconds before a process that has ended is replaced; doubled each time it ends soon again.
        longest_silence: for how many seconds a process that answers may report nothing.
        on_ready: called when all of them serve for the first time.
    """

    def __init__(
        self,
        command: Command,
        count: int,
        *,
        stop_within: float,
        pause: float = FIRST_PAUSE,
        longest_silence: float = _LONGEST_SILENCE,
        on_ready: Callable[[], object] = lambda: None,
    ) -> None:
        self._command = command
        self._places = [_Place(number + 1) for number in range(count)]
        self._time_to_stop = stop_within
        self._first_pause = pause
        self._longest_silence = longest_silence
        self._on_ready: Callable[[], object] | None = on_ready
        self._processes: dict[int, _Process] = {}
        self._selector = selectors.DefaultSelector()
        self._signals, self._wakeup = socket.socketpair()
        self._has_terminal = os.isatty(0)
        self._has_served = False
        self._next_start = 0.0
        self._restart_before = 0.0  # what was started before this time is to be replaced
        self._code: int | None = None  # once it stops
        self._was_signalled = False  # by SIGTERM or SIGINT

    def run(self) -> int:
        """Supervise, and return the exit code once all processes have ended.

        0: stopped, and all ended in good order. 2, or 1 while none has served: the exit code of a worker process that
        another start would not help. 1: one has ended again and again. Otherwise that of the first process which did
        not end in good order; 128 and its number for a signal.
        """
        self._handle_signals()
        log.info("process %d supervises %d worker processes", os.getpid(), len(self._places))
        while True:
            self._start_what_is_due()
            if self._code is not None and not self._processes:
                log.info("all worker processes have ended")
                return self._code
            self._wait()
            self._reap()
            self._kill_overdue()

    def _handle_signals(self) -> None:
        for each in (self._signals, self._wakeup):
            each.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in _HANDLED:
            signal.signal(number, _ignore)
        self._selector.register(self._signals, selectors.EVENT_READ)

    def _wait(self) -> None:
        """Wait for a signal, a message or the next time at which something is due."""
        due = min(self._due_times(), default=None)
        for key, _ in self._selector.select(None if due is None else max(0, due - time.monotonic())):
            if key.data is not None:
                self._on_message(key.data)
                continue
            for number in self._signals.recv(1_000):
                self._on_signal(number)

    def _due_times(self) -> Iterator[float]:
        yield from (each.kill_at for each in self._processes.values() if each.kill_at is not None)
        if self._code is None:
            yield from (max(each.start_at, self._next_start) for each in self._vacant())
            if self._next_outdated() is not None:
                yield self._next_start

    def _vacant(self) -> list[_Place]:
        """Return the places to fill: only the first until one has served, because all might fail by the same."""
        return [each for each in self._places[: None if self._has_served else 1] if each.current is None]

    def _start_what_is_due(self) -> None:
        for each in self._vacant():
            if self._code is None and max(each.start_at, self._next_start) <= time.monotonic():
                try:
                    each.current = self._start(each)
                except OSError as error:
                    self._count_failure(each, f"worker process {each.number} cannot be started: {error}")
        place = self._next_outdated()
        if self._code is None and place is not None and self._next_start <= time.monotonic():
            try:
                place.successor = self._start(place)
            except OSError as error:
                self._abandon_restart(f"worker process {place.number} cannot be started: {error}")

    def _next_outdated(self) -> _Place | None:
        """Return the place whose process is to be replaced next; None while another one is being replaced."""
        stopping = any(each.kill_at is not None for each in self._processes.values())
        if stopping or any(each.successor for each in self._places):
            return None
        return next((each for each in self._places if self._is_outdated(each)), None)

    def _is_outdated(self, place: _Place) -> bool:
        return place.current is not None and place.current.started_at < self._restart_before

    def _start(self, place: _Place) -> _Process:
        self._next_start = time.monotonic() + _STAGGER
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(  # noqa: S603 (the command of this process)
                self._command(theirs.fileno(), place.number),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        started = _Process(place, process, ours)
        self._processes[process.pid] = started
        self._selector.register(ours, selectors.EVENT_READ, started)
        return started

    def _on_message(self, process: _Process) -> None:
        message = b""
        with suppress(OSError):
            message = process.link.recv(1_000)
        if not message:  # it is ending
            self._selector.unregister(process.link)
            return
        served_before, process.reported_at = process.serves, time.monotonic()
        process.is_ready = message.endswith(_SERVES)
        if not served_before:
            self._on_serving(process)
        if self._on_ready is not None and self.all_serve:
            self._on_ready()
            self._on_ready = None

    def _on_serving(self, process: _Process) -> None:
        self._has_served = True
        place = process.place
        log.info("%s serves", process)
        if place.successor is process:
            self._promote(place)

    def _promote(self, place: _Place) -> None:
        """Let the successor take the place, and stop the process that it replaces."""
        if place.current is not None:
            place.current.stop(self._time_to_stop)
        place.current, place.successor = place.successor, None

    def _on_signal(self, number: int) -> None:
        match number:
            case signal.SIGCHLD:
                pass  # reaped below
            case signal.SIGHUP:
                self._on_hangup()
            case signal.SIGTERM | signal.SIGINT if self._was_signalled:
                log.warning("%s again: ending the worker processes at once", signal.Signals(number).name)
                self._code = 128 + number
                for each in self._processes.values():
                    each.kill()
            case _:
                log.info("%s: stopping the worker processes", signal.Signals(number).name)
                self._was_signalled = True
                self._stop(self._code or 0)

    def _on_hangup(self) -> None:
        if self._code is not None:
            return
        if self._has_terminal and not os.isatty(0):
            log.info("SIGHUP, and the terminal is gone: stopping the worker processes")
            self._stop(0)
            return
        log.info("SIGHUP: replacing the worker processes, one after the other")
        self._restart_before = time.monotonic()

    def _stop(self, code: int) -> None:
        self._code = code
        for each in self._processes.values():
            each.stop(self._time_to_stop)

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for each in self._processes.values():
            if each.kill_at is not None and each.kill_at <= now:
                log.error("%s does not stop: ending it", each)
                each.kill_at = now + self._time_to_stop
                each.kill()

    def _reap(self) -> None:
        """Reap what has ended: worker processes, and as process 1 of a container whatever was left behind there."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if (process := self._processes.pop(pid, None)) is not None:
                    process.process.returncode = os.waitstatus_to_exitcode(status)
                    self._on_exit(process, process.process.returncode)

    def _on_exit(self, process: _Process, code: int) -> None:
        with suppress(KeyError):
            self._selector.unregister(process.link)
        process.link.close()
        place = process.place
        if process.kill_at is not None:
            self._on_stopped(process, code)
        elif place.successor is process:
            place.successor = None
            self._abandon_restart(f"{process} {_described(code)} before it served")
        else:
            place.current = None
            self._on_lost(place, process, code)

    def _abandon_restart(self, reason: str) -> None:
        self._restart_before = 0
        log.error("%s: the processes that serve are not replaced", reason)

    def _on_stopped(self, process: _Process, code: int) -> None:
        if code == -signal.SIGTERM and not process.serves:  # sent to all of a service: there was nothing to release
            code = 0
        if code:
            log.warning("%s %s", process, _described(code))
        if self._code is not None:
            self._code = self._code or (code if code >= 0 else 128 - code)
        elif self._restart_before and not any(map(self._is_outdated, self._places)):
            self._restart_before = 0
            log.info("all worker processes have been replaced")

    def _on_lost(self, place: _Place, process: _Process, code: int) -> None:
        """Replace a process that nobody asked to stop; where that would not help and no other one serves, stop."""
        if not self._serves and (code == WRONG_COMMAND or (code == FAILED and not self._has_served)):
            log.error("%s %s, and so would another one: stopping", process, _described(code))
            self._stop(code)
            return
        if time.monotonic() - process.started_at >= _STEADY:
            place.failures = 0
        self._count_failure(place, f"{process} {_described(code)}")
        if place.successor is not None:
            self._promote(place)

    @property
    def all_serve(self) -> bool:
        """Whether a process answers and serves in each place, and nothing is stopped. Callable from any thread."""
        serves = (each.current is not None and each.current.is_ready for each in self._places)
        return self._code is None and self.all_answer and all(serves)

    @property
    def all_answer(self) -> bool:
        """Whether all that have served report that their event loops answer. Callable from any thread."""
        earliest = time.monotonic() - self._longest_silence
        known = [each for each in [*self._processes.values()] if each.kill_at is None]
        return not any(each.reported_at is not None and each.reported_at < earliest for each in known)

    @property
    def _serves(self) -> bool:
        """Whether a worker process serves."""
        return any(each.serves for each in self._processes.values())

    def _count_failure(self, place: _Place, what: str) -> None:
        place.failures += 1
        if place.failures >= _MOST_FAILURES and not self._serves:
            log.error("%s, %d times in a row: stopping", what, place.failures)
            self._stop(FAILED)
            return
        pause = min(self._first_pause * 2 ** (place.failures - 1), _LONGEST_PAUSE)
        place.start_at = time.monotonic() + pause
        log.warning("%s: starting another one in %s s", what, pause)


def _described(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    known = -code in {*signal.Signals}  # not every real-time signal has a name
    return f"was ended by {signal.Signals(-code).name if known else f'signal {-code}'}"


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing. SIG_IGN instead would be inherited by child processes, and would not wake the supervisor."""
