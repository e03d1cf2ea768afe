"""What docs/migrations.md says of an `alembic.ini` at the root of a project that takes our branch."""

from __future__ import annotations

import shutil
from configparser import DuplicateOptionError
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import create_engine, inspect

from sqla_durable import models
from tests.migrations.application import APPLICATIONS

OURS, THEIRS = models.REVISION, "app_0002"


@pytest.fixture
def ini(tmp_path: Path, empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DATABASE_URL", empty_database_url)
    ignored = shutil.ignore_patterns("__pycache__", "alembic.ini")
    shutil.copytree(APPLICATIONS / "branch", tmp_path / "alembic", ignore=ignored)
    shutil.copy(APPLICATIONS / "autogenerate" / "script.py.mako", tmp_path / "alembic")
    return Path(shutil.copy(APPLICATIONS / "branch_at_root" / "alembic.ini", tmp_path))


def heads(ini: Path) -> set[str]:
    return set(ScriptDirectory.from_config(Config(ini)).get_heads())


def test_both_histories_are_there_and_are_upgraded_by_heads(ini: Path, empty_database_url: str) -> None:
    assert heads(ini) == {OURS, THEIRS}
    with pytest.raises(CommandError, match="Multiple head revisions are present"):
        command.upgrade(Config(ini), "head")
    with pytest.raises(CommandError, match="Multiple heads are present"):
        command.revision(Config(ini), "next")
    command.upgrade(Config(ini), "heads")
    engine = create_engine(empty_database_url)
    assert "workflow" in inspect(engine).get_table_names(schema="durable")
    engine.dispose()
    assert command.revision(Config(ini), "next", head=THEIRS) is not None


def test_directory_that_does_not_exist_takes_the_own_history_away_in_silence(ini: Path) -> None:
    ini.write_text(ini.read_text().replace("%(here)s/alembic/versions", "%(here)s/versions"))
    assert heads(ini) == {OURS}


def test_second_separator_is_refused(ini: Path) -> None:
    ini.write_text(f"{ini.read_text()}path_separator = newline\n")
    with pytest.raises(DuplicateOptionError):
        heads(ini)
