"""mypy and pyright, strict, accept right calls and refuse wrong ones; the files beside this one say which."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAMES = ["steps", "workflows", "publishing", "callbacks", "verbs", "updates", "waiting", "telemetry"]
FILES = [str(HERE / f"{name}.py") for name in NAMES]
CHECKERS = {
    "mypy": ["mypy", "--strict", "--warn-unused-ignores", "--no-error-summary"],
    "pyright": ["pyright", "--pythonpath", sys.executable],
}


@pytest.mark.timeout(300)
@pytest.mark.thorough
@pytest.mark.parametrize("checker", CHECKERS)
def test_right_calls_pass_and_wrong_calls_fail(checker: str, tmp_path: Path) -> None:
    """The files prove something only if a checker refuses one without its comments, which is checked with them.

    By default neither is: `.ci/run` calls both on everything, which is what their caches are for, and then this test.
    """
    source = Path(FILES[0]).read_text()
    bare = tmp_path / "bare.py"
    bare.write_text("\n".join(line.partition("  # type: ignore")[0] for line in source.splitlines()))
    command = [sys.executable, "-m", *CHECKERS[checker], *FILES, str(bare)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    errors = [line for line in done.stdout.splitlines() if re.search(r"(:| -) error: ", line)]
    assert [line for line in errors if "bare.py:" not in line] == [], said
    wrong = [number for number, line in enumerate(source.splitlines(), 1) if "  # type: ignore" in line]
    assert [number for number in wrong if not any(f"bare.py:{number}:" in line for line in errors)] == []
