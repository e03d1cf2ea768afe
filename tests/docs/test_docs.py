"""The Python of README and docs is executed, page by page, as a newcomer would: a script against a fresh database.

A block under `<!-- shown, tested in FILE -->` is not executed here; the file must exist. Blocks marked `output` hold
what the page's script prints.
"""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import pytest

import sqla_durable
import sqla_durable.asyncio
from tests.support.processes import run_python

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?P<note><!-- shown, tested in (?P<where>\S+) -->\n)?```(?P<kind>python|output)\n(?P<text>.*?)```", re.S
)


def blocks(page: Path, kind: str) -> list[str]:
    found = [each for each in BLOCK.finditer(page.read_text()) if each["kind"] == kind and not each["note"]]
    return [each["text"] for each in found]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page",
    [
        # It kills one worker after another; tests/testing/test_plugin.py has its fixtures, and a crash everywhere.
        pytest.param(each, marks=pytest.mark.thorough if each == ROOT / "docs" / "testing.md" else [])
        for each in PAGES
        if blocks(each, "python")
    ],
    ids=named,
)
def test_page_runs_as_a_script_and_prints_what_it_says(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks(page, "python")))
    makes_tables = re.search(r"^\s*metadata\.create_all|run_sync\(metadata\.create_all\)", script.read_text(), re.M)
    database_url: str = request.getfixturevalue("empty_database_url" if makes_tables else "database_url")

    done = run_python(
        "-W", "error", str(script), directory=tmp_path, environment={**os.environ, "DATABASE_URL": database_url}
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == "".join(blocks(page, "output")).split() or not blocks(page, "output")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_that_is_only_shown_names_the_test_that_runs_it(page: Path) -> None:
    for each in BLOCK.finditer(page.read_text()):
        assert each["where"] is None or (ROOT / each["where"]).exists(), each["where"]


def test_quickstart_of_the_readme_is_under_forty_lines() -> None:
    code = "\n".join(blocks(ROOT / "README.md", "python")).splitlines()
    imports_and_blanks = [line for line in code if not line.strip() or line.startswith(("import ", "from "))]
    assert len(code) - len(imports_and_blanks) < 40


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{named(page)} → {target}"


def test_reference_shows_every_public_name() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    shown = set(re.findall(r"\w+", " ".join(re.findall(r"members: \[(.*?)\]", page))))
    shown |= set(re.findall(r"^::: sqla_durable\.(\w+)", page, re.M))
    assert set(sqla_durable.__all__) - shown == {"metadata", "storage"}  # of Alembic's
    assert set(sqla_durable.asyncio.__all__) - shown == set()


def test_page_of_names_is_what_the_package_exports() -> None:
    """`python docs/names.py` writes it."""
    page = ROOT / "docs" / "names.md"
    assert page.read_text() == runpy.run_path(str(page.with_suffix(".py")))["page"]()
