"""The message to the user when a worker process of the benchmark has ended by itself."""

from __future__ import annotations

import pytest

from sqla_durable.tools.bench.processes import without_frames

TRACEBACK = """\
worker: claims one_step from default
Traceback (most recent call last):
  File "worker.py", line 1, in main
    connect()
OperationalError: too many clients already
\tIs the server running?
"""


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        (TRACEBACK, "OperationalError: too many clients already\n\tIs the server running?"),
        ("a line\nanother", "a line\nanother"),
        ("", ""),
    ],
)
def test_error_is_shown_without_the_frames_of_its_traceback(printed: str, shown: str) -> None:
    assert without_frames(printed) == shown
