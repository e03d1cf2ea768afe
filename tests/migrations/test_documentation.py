"""docs/migrations.md shows what the applications here do."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

from tests.migrations.application import APPLICATIONS

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(python|ini)\n(.*?)```", (ROOT / "docs" / "migrations.md").read_text(), re.DOTALL)
SKETCHES = ("context.configure(...", "with engine.begin() as guard")


@pytest.mark.parametrize("block", [block for _, block in BLOCKS if not block.startswith(SKETCHES)])
def test_block_is_part_of_an_application_that_is_tested(block: str) -> None:
    assert any(block in path.read_text() for path in APPLICATIONS.rglob("*") if path.suffix in (".py", ".ini"))


@pytest.mark.parametrize("block", [block for _, block in BLOCKS if block.startswith(SKETCHES)])
def test_sketch_is_python(block: str) -> None:
    ast.parse(textwrap.dedent(block))


def test_every_sketch_is_there() -> None:
    assert all(any(block.startswith(sketch) for _, block in BLOCKS) for sketch in SKETCHES)
