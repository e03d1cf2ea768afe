"""The figures of docs/performance.md are those of the JSON beside it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_table_of_the_page_is_that_of_the_json() -> None:
    plots = runpy.run_path(str(DOCS / "plots.py"))
    page = (DOCS / "performance.md").read_text()
    written = page.split(plots["BEGIN"])[1].split(plots["END"])[0]
    assert written.strip() == plots["table"](json.loads((DOCS / "performance.json").read_text())).strip()


def test_picture_is_there() -> None:
    assert (DOCS / "performance.svg").read_text().rstrip().endswith("</svg>")
