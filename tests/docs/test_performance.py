"""The figures of docs/performance.md and of the README are those of docs/performance.json."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PLOTS = runpy.run_path(str(DOCS / "plots.py"))
OUTCOME = json.loads((DOCS / "performance.json").read_text())


def test_table_of_the_page_is_that_of_the_json() -> None:
    assert _written(DOCS / "performance.md") == PLOTS["table"](OUTCOME).strip()


def test_table_of_the_readme_is_that_of_the_json_and_says_all_that_it_should() -> None:
    assert _written(DOCS.parent / "README.md") == PLOTS["summary"](OUTCOME).strip()
    assert all(words in PLOTS["summary"](OUTCOME) for words in PLOTS["SUMMARY"].values())


def _written(page: Path) -> str:
    return page.read_text().split(PLOTS["BEGIN"])[1].split(PLOTS["END"])[0].strip()


def test_picture_is_there() -> None:
    assert (DOCS / "performance.svg").read_text().rstrip().endswith("</svg>")
