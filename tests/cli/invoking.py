"""The command line in this process: its exit code, and what it prints."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session
from typer import testing
from typer.main import get_command
from typer.testing import CliRunner

from sqla_durable.models import Audit
from sqla_durable.tools.cli.application import app
from sqla_durable.tools.cli.errors import fail

# What the runner asks for with each call, which makes all commands with all options: a third of a second.
testing.__dict__["_get_command"] = cache(get_command)


@dataclass(frozen=True)
class Done:
    """How a command has ended."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The JSON lines that it has printed."""
        return [json.loads(each) for each in self.out.splitlines()]


class CommandLine:
    """Runs commands on one database."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, *arguments: object, stdin: str | bytes | None = None) -> Done:
        result = CliRunner().invoke(app, [*map(str, arguments), "--url", self._url], input=stdin)
        error = result.exception
        if not isinstance(error, Exception):
            return Done(result.exit_code, result.stdout, result.stderr)
        with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as ended:
            fail(error)
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, result.stdout, result.stderr + stderr.getvalue())


def log(engine: Engine) -> list[tuple[Any, ...]]:
    """Return the rows of the log in their order: verb, subject, workflow, details."""
    with Session(engine) as session:
        rows = session.execute(select(Audit.verb, Audit.subject, Audit.workflow_id, Audit.details).order_by(Audit.id))
        return [tuple(row) for row in rows]
