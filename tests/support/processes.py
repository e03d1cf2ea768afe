"""Processes that need not import everything: a server that has done so forks them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["tests.support.preload"])


def run_python(
    *arguments: str, directory: Path, environment: Mapping[str, str], timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE …`, or `python -W error FILE`, to its end, in a process that has the package imported.

    Importing it would take a second of a processor, which is more than most of these commands need.
    """
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


def _run(arguments: Sequence[str], directory: Path, environment: dict[str, str], out: Path, err: Path) -> None:
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
            case ["-W", "error", script, *rest]:
                warnings.simplefilter("error")
                sys.argv[:] = [script, *rest]
                sys.path[:0] = [str(Path(script).parent), *on_path]
                runpy.run_path(script, run_name="__main__")
            case _:
                raise ValueError(arguments)
    finally:
        atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage] (a forked process ends without them)
