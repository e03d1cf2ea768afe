"""What a run of the tests leaves out by default, and `pytest --all` does not.

Two ways, and no others: a case is marked (`pytest.mark.thorough`, or `thorough_cases` in `parametrize`), or a test
takes the fixture `thorough` and does less where it is false. The sample is the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast
from zlib import crc32

import pytest
from _pytest.mark import ParameterSet


def number_of(text: str) -> int:
    """Return a number that is spread evenly over names, and the same in every process."""
    return crc32(text.encode())


def thorough_cases(cases: Iterable[object]) -> list[ParameterSet]:
    """Return cases for `parametrize` that are executed with `--all` only."""
    several = [cast("tuple[object, ...]", each) if isinstance(each, tuple) else (each,) for each in cases]
    return [pytest.param(*each, marks=pytest.mark.thorough) for each in several]


def deselect(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked as thorough, unless that is asked for."""
    if config.getoption("--all"):
        return
    left = [each for each in items if each.get_closest_marker("thorough")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [each for each in items if not each.get_closest_marker("thorough")]
