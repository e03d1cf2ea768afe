"""mypy and pyright, strict, accept right calls and refuse wrong ones; the files beside this one say which."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FILES = [
    str(HERE / name) for name in ("steps.py", "workflows.py", "publishing.py", "callbacks.py", "verbs.py", "updates.py")
]
CHECKERS = {
    "mypy": ["mypy", "--strict", "--warn-unused-ignores", "--no-error-summary"],
    "pyright": ["pyright", "--pythonpath", sys.executable],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("checker", CHECKERS)
def test_right_calls_pass_and_wrong_calls_fail(checker: str) -> None:
    command = [sys.executable, "-m", *CHECKERS[checker], *FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_checker_notices_a_wrong_call(checker: str, tmp_path: Path) -> None:
    """The files above prove something only if a checker refuses them without their comments."""
    source = Path(FILES[0]).read_text()
    bare = tmp_path / "bare.py"
    bare.write_text("\n".join(line.partition("  # type: ignore")[0] for line in source.splitlines()))
    command = [sys.executable, "-m", *CHECKERS[checker], str(bare)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    wrong = [number for number, line in enumerate(source.splitlines(), 1) if "  # type: ignore" in line]
    assert [number for number in wrong if f"bare.py:{number}:" not in done.stdout] == []
