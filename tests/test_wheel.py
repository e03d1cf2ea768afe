"""What the wheel contains, and that Alembic finds our branch in it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, ROOT],
        check=True,
        capture_output=True,
    )
    (path,) = directory.glob("*.whl")
    return path


def test_wheel_contains_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sqla_durable").rglob("*.py")}
    assert modules <= names
    assert "sqla_durable/py.typed" in names
    assert "sqla_durable/migrations/versions/durable_0001_first_tables.py" in names
    assert "sqla_durable/migrations/versions/durable_0002_queues_schedules_views.py" in names
    assert {name.split("/")[0] for name in names} == {"sqla_durable"}


def test_alembic_finds_our_branch_in_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "versions").mkdir()
    (tmp_path / "alembic.ini").write_text(
        "[alembic]\n"
        "script_location = %(here)s\n"
        "path_separator = newline\n"
        "version_locations =\n"
        "    %(here)s/versions\n"
        "    sqla_durable:migrations/versions\n"
    )
    shown = subprocess.run(
        [sys.executable, "-m", "alembic", "history", "--verbose"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "Rev: durable_0002 (head)" in shown
    assert "Branch names: sqla_durable" in shown
    assert f"Path: {tmp_path / 'site'}" in shown


def test_package_alone_brings_what_importing_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    always = [line for line in lines if line.startswith("Requires-Dist: sqlalchemy") and "extra ==" not in line]
    assert always == ["Requires-Dist: sqlalchemy[asyncio]>=2.0.40"]
    needed = {
        re.split(r"[\[>=; ]", line)[1] for line in lines if line.startswith("Requires-Dist:") and "extra" not in line
    }
    assert needed.isdisjoint({"typer", "rich"})
