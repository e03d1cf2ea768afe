"""The command `prune`, in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session
from typer.testing import CliRunner, Result

from sqla_durable import manage
from sqla_durable.models import Audit
from sqla_durable.tools.cli.application import app
from sqla_durable.tools.cli.errors import CommandError
from tests.store import races
from tests.support.retained import DAY, ended, hold, left


def invoke(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["prune", "--url", url, *arguments])


def printed(url: str, *arguments: str) -> list[Any]:
    result = invoke(url, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_what_is_old_enough_is_counted_and_deleted_and_the_log_says_so(engine: Engine, database_url: str) -> None:
    with Session(engine) as session:
        ids = [ended(session, days=20 - each, name="mail.in") for each in range(3)]
        child = ended(session, parent_id=ids[0], parent_key="a")
        failed = ended(session, name="mail.out", status="failed")
        stays = {ended(session), ended(session, days=1, name="mail.in"), *races.enqueue(session)}
    options = "--keep", "5d", "--name", "mail.*", "--status", "succeeded"
    assert printed(database_url, *options, "--dry-run") == [{"policy": None, "would_delete": 4}]
    assert printed(database_url, *options, "--limit", "1", "--dry-run") == [{"policy": None, "would_delete": 2}]
    assert left(engine) == {*ids, child, failed, *stays}
    assert printed(database_url, *options, "--limit", "1", "--yes") == [{"policy": None, "deleted": 2, "refused": 0}]
    assert left(engine) == {*ids[1:], failed, *stays}
    result = invoke(database_url, *options, "--yes")
    assert result.stdout == "2 deleted, 0 refused\n"
    assert left(engine) == {failed, *stays}
    with Session(engine) as session:
        (first, _) = session.scalars(select(Audit).order_by(Audit.id))
        assert (first.verb, first.workflow_id) == ("prune", None)
        assert first.details == {"keep": "5d", "name": ["mail.*"], "status": ["succeeded"], "limit": 1}


def test_a_limit_is_for_all_policies_together(engine: Engine, database_url: str) -> None:
    with Session(engine) as session:
        for name in ("a", "b"):
            for _ in range(2):
                ended(session, name=name)
            manage.put_retention(session, name, workflow=name, keep=5 * DAY)
        session.commit()
    assert [each["would_delete"] for each in printed(database_url, "--limit", "3", "--dry-run")] == [2, 1]
    assert [each["deleted"] for each in printed(database_url, "--limit", "3", "--yes")] == [2, 1]
    assert len(left(engine)) == 1


@pytest.mark.new_database
def test_without_a_time_the_policies_decide(engine: Engine, database_url: str) -> None:
    with pytest.raises(CommandError, match="no policy of retention"):
        raise invoke(database_url, "--yes").exception or AssertionError
    with Session(engine) as session:
        gone, refused, kept = ended(session), ended(session), ended(session, name="pay")
        hold(session, refused)
        manage.put_retention(session, "all", keep=5 * DAY)
        manage.put_retention(session, "pay", workflow="pay", keep=50 * DAY)
        session.commit()
    assert gone not in (refused, kept)
    assert invoke(database_url, "--dry-run").stdout == "all: 2 would be deleted\npay: 0 would be deleted\n"
    assert invoke(database_url, "--yes").stdout == "all: 1 deleted, 1 refused\npay: 0 deleted, 0 refused\n"
    assert left(engine) == {refused, kept}


def test_nothing_is_deleted_unasked_or_by_a_wrong_command(engine: Engine, database_url: str) -> None:
    with Session(engine) as session:
        there = {ended(session)}
    for arguments, message in {
        (
            "--keep",
            "1d",
        ): "1 workflow will be deleted, with histories. Continue? There is no terminal to ask at: add --yes",
        ("--keep", "tomorrow"): "--keep 'tomorrow' is no duration: write ",
        ("--keep", "99999999999d"): "is no duration",
        ("--keep", "0s"): "less than a second",
        ("--keep", "90d", "--status", "running"): "status='running' is none of",
        ("--name", "checkout"): "add --keep, such as --keep 90d",
    }.items():
        error = invoke(database_url, *arguments).exception
        assert isinstance(error, CommandError), arguments
        assert message in str(error)
    assert left(engine) == there
