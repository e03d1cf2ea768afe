"""The trace of the stories of docs/architecture.md runs, and follows each of them through the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

STORIES = [
    "start in a transaction",
    "a worker runs a plain step",
    "a transactional step, async",
    "wait for a signal, be sent one, go on",
    "a cancel reaches a running step",
    "a child is started and awaited",
]


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_each_story_is_followed_through_the_package(database_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.stories", "--url", database_url],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(.+): (\d+) files, (\d+) functions, (\d+) arrows\n    (.+)$", done.stdout, re.M)
    assert [name for name, *_ in found] == STORIES
    for _, files, functions, arrows, listed in found:
        assert len(listed.split()) == int(files) <= int(functions)
        assert int(arrows) >= int(files) - 1
