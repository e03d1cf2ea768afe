"""Processes that need not import everything: a server that has done so forks them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["tests.support.preload"])


class Started:
    """A command that runs in a forked process, with the methods of `subprocess.Popen`.

    Importing the package would take a second of a processor, which is more than most commands need.

    Attributes:
        stderr: what it writes to the standard error, as it comes.
    """

    def __init__(self, *arguments: str, directory: Path, environment: Mapping[str, str]) -> None:
        self._arguments = arguments
        self._written = tempfile.TemporaryDirectory()
        self._out, err = (Path(self._written.name, each) for each in ("out", "err"))
        os.mkfifo(err)
        self._process = forked.Process(target=_run, args=(arguments, directory, dict(environment), self._out, err))
        self._process.start()
        self.stderr = err.open()  # when the process has opened it

    @property
    def returncode(self) -> int | None:
        """Its exit code, if it has ended."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it runs."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return its exit code."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._arguments, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, and return what it has written and was not read."""
        if self.stderr.closed:
            return "", ""
        err = self.stderr.read()
        self.wait(timeout)
        self.stderr.close()
        out = self._out.read_text()
        self._written.cleanup()
        return out, err


def run_python(
    *arguments: str, directory: Path, environment: Mapping[str, str], timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE …`, or `python -W error FILE`, to its end, in a process that has the package imported."""
    with tempfile.TemporaryDirectory() as written:
        out, err = (Path(written, each) for each in ("out", "err"))
        process = forked.Process(target=_run, args=(arguments, directory, dict(environment), out, err))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout, out.read_text(), err.read_text())
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def inheriting(*, target: Callable[..., None], args: tuple[object, ...], name: str) -> BaseProcess:
    """Make a process that has the environment of this one, as if it were its child, and everything imported."""
    return forked.Process(target=_call, args=(dict(os.environ), target, args), name=name)


def _call(environment: Mapping[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


def _run(arguments: Sequence[str], directory: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
    for stream, path in (1, out), (2, err):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    on_path = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each]
    try:
        match arguments:
            case ["-m", module, *rest]:
                sys.argv[:] = ["-m", *rest]
                sys.path[:0] = ["", *on_path]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case ["-c", code, *rest]:
                sys.argv[:] = ["-c", *rest]
                sys.path[:0] = ["", *on_path]
                sys.modules["__main__"] = main = ModuleType("__main__")
                exec(code, vars(main))
            case ["-W", "error", script, *rest]:
                warnings.simplefilter("error")
                sys.argv[:] = [script, *rest]
                sys.path[:0] = [str(Path(script).parent), *on_path]
                runpy.run_path(script, run_name="__main__")
            case _:
                raise ValueError(arguments)
    finally:
        atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage] (a forked process ends without them)
