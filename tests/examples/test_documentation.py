"""docs/shop.md shows the example as it is, and docs/cli.md the command as it is."""

from __future__ import annotations

import re

import pytest

from tests.examples.conftest import EXAMPLES
from tests.support.processes import run_python

DOCS = EXAMPLES.parent / "docs"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "shop.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_block_is_part_of_the_example(block: str) -> None:
    assert any(block in path.read_text() for path in (EXAMPLES / "shop").glob("*.py"))


def test_modules_of_the_table_exist() -> None:
    table = (DOCS / "shop.md").read_text().split("## The parts")[1].split("##")[0]
    first_columns = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for column in first_columns for name in re.findall(r"`([^`]+)`", column)]
    assert len(names) > 10
    assert all((EXAMPLES / "shop" / name).exists() for name in names)


def test_options_of_the_worker_are_documented() -> None:
    help_of_it = run_python("-m", "sqla_durable", "worker", "--help", directory=DOCS, environment={"COLUMNS": "200"})
    shown = help_of_it.stdout
    options = set(re.findall(r"^ +(--[a-z-]+)", shown, re.MULTILINE)) - {"--help"}
    section = (DOCS / "cli.md").read_text().partition("## `worker`\n")[2].partition("\n## ")[0]
    assert options == set(re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE))
