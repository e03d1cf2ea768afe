"""Which revisions `upgrade(target, since=...)` applies, and what a wrong one says."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path
from typing import Protocol

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from sqla_durable import migrations, models
from sqla_durable.errors import UsageError
from sqla_durable.migrations import history, versions
from tests.migrations import future

ROOT = Path(__file__).parents[2]


class Migrate(Protocol):
    """`migrations.upgrade` or `migrations.downgrade`."""

    def __call__(self, target: str, *, since: str | None = None) -> None: ...


@pytest.mark.parametrize(
    ("since", "target", "between"),
    [
        (None, "durable_0001", ["durable_0001"]),
        (None, "durable_0003", ["durable_0001", "durable_0002", "durable_0003"]),
        ("durable_0001", "durable_0002", ["durable_0002"]),
        ("durable_0001", "durable_0003", ["durable_0002", "durable_0003"]),
    ],
)
def test_revisions_after_since_up_to_the_target_follow_each_other(
    since: str | None, target: str, between: list[str]
) -> None:
    found = history.between(history.load(future), target, since=since)
    assert [revision.name for revision in found] == between


@pytest.mark.parametrize("since", ["durable_0002", "durable_0003"])
def test_since_that_is_not_earlier_is_refused(since: str) -> None:
    with pytest.raises(
        UsageError, match=f"nothing between since='{since}' and 'durable_0002': since must be an earlier"
    ):
        history.between(history.load(future), "durable_0002", since=since)


@pytest.mark.parametrize("target", ["head", "heads", "", "durable_9999", "durable_0001@head"])
@pytest.mark.parametrize("migrate", [migrations.upgrade, migrations.downgrade])
def test_unknown_target_is_refused_with_those_that_there_are(migrate: Migrate, target: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"there is no revision {target!r} in this version of sqla-durable")):
        migrate(target)
    with pytest.raises(
        UsageError, match=r"write one of them, such as 'durable_\d{4}', or install the version that has it"
    ):
        migrate("durable_0001", since=target)


def test_every_version_file_is_in_one_line_and_carries_our_name() -> None:
    found = [revision.name for revision in history.load(versions)]
    files = sorted(module.name for module in pkgutil.iter_modules(versions.__path__))
    assert len(found) == len(files)
    for number, (name, file) in enumerate(zip(found, files, strict=True), start=1):
        assert name == f"durable_{number:04d}"
        assert file.startswith(f"{name}_")


def test_models_name_the_newest_revision() -> None:
    assert history.load(versions)[-1].name == models.REVISION


def test_alembic_finds_the_same_history() -> None:
    script = ScriptDirectory.from_config(Config(toml_file=ROOT / "pyproject.toml"))
    found = [revision.revision for revision in script.walk_revisions()]
    assert found[::-1] == [revision.name for revision in history.load(versions)]
    assert script.get_revision(found[-1]).branch_labels == {"sqla_durable"}
