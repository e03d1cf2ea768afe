"""What is read of asyncio's internals is there, on each supported Python that this machine has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sqla_durable.runtime import asyncio_internals
from tests.runtime import internals_check

MODULE = str(Path(asyncio_internals.__file__))
SUPPORTED = ("3.11", "3.12", "3.13", "3.14")
OTHERS = [
    python
    for version in SUPPORTED
    for python in sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    if Path(sys.executable).resolve() != python.resolve()
]


async def test_internals_are_there_in_this_python() -> None:
    await internals_check.check(MODULE)


@pytest.mark.parametrize("python", OTHERS, ids=lambda each: each.parts[-3])
def test_internals_are_there_in_each_other_python(python: Path) -> None:
    done = subprocess.run([python, internals_check.__file__, MODULE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
