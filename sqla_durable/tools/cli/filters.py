"""Which workflows a command is about: options that several commands have, and the `select()` that they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.cli.groups import grouped
from sqla_durable.tools.cli.times import moment

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select

_CONDITION = re.compile(r"input((?:\.[^.=\s]+)+)=(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """The options by which workflows are chosen; all that are given must fit, and of one that is repeated, any."""

    status: Annotated[list[str] | None, typer.Option("--status", help="Their status; repeatable.")] = None
    name: Annotated[list[str] | None, typer.Option("--name", help="The workflow's name; repeatable.")] = None
    queue: Annotated[list[str] | None, typer.Option("--queue", help="Their queue; repeatable.")] = None
    key: Annotated[list[str] | None, typer.Option("--key", help="The key of their start; repeatable.")] = None
    by: Annotated[list[str] | None, typer.Option("--by", help="Their key in the queue; repeatable.")] = None
    tag: Annotated[
        list[str] | None, typer.Option("--tag", metavar="NAME=VALUE", help="A tag; repeatable, and all must fit.")
    ] = None
    schedule: Annotated[list[str] | None, typer.Option("--schedule", help="What started them; repeatable.")] = None
    parent: Annotated[str | None, typer.Option("--parent", metavar="ID", help="Children of this workflow.")] = None
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="Started at or after this time, or within this long: 2h, 7d."),
    ] = None
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Started before a time, or 2h ago.")] = (
        None
    )
    error: Annotated[
        str | None, typer.Option("--error", metavar="TEXT", help="A text in the type or message of their error.")
    ] = None
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="input.PATH=VALUE", help="An argument: input.order_id=7; repeatable."),
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that are given, by name."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def is_empty(self) -> bool:
        """Whether none is given: all workflows are meant."""
        return not self.given

    def select(self) -> Select[Any]:
        """Return the query for what they mean, the newest first.

        Raises:
            CommandError: an option cannot be read.
        """
        from sqlalchemy import select

        from sqla_durable import Workflow

        return select(Workflow).where(*self._conditions()).order_by(Workflow.id.desc())

    def _conditions(self) -> list[ColumnElement[bool]]:
        from sqlalchemy import func, or_

        from sqla_durable import Workflow, WorkflowStatus

        found: list[ColumnElement[bool]] = []
        if self.status is not None:
            statuses = [str(each) for each in WorkflowStatus]
            for each in self.status:
                if each not in statuses:
                    raise CommandError(f"--status {each!r} is none of {', '.join(statuses)}.")
            # Not IN, for which PostgreSQL would not use the index that each of several statuses has.
            found.append(or_(*(Workflow.status == WorkflowStatus(each) for each in self.status)))
        texts = {each: getattr(self, each) for each in ("name", "queue", "key", "by", "schedule")}
        found.extend(getattr(Workflow, each).in_(values) for each, values in texts.items() if values is not None)
        if self.tag is not None:
            found.append(Workflow.tags.contains(parsed_tags(self.tag)))
        if self.parent is not None:
            found.append(Workflow.parent_id == parsed_id(self.parent))
        if self.since is not None:
            found.append(Workflow.id >= _id_at("--since", self.since))
        if self.until is not None:
            found.append(Workflow.id < _id_at("--until", self.until))
        if self.error is not None:
            of_error = (Workflow.error[each].astext for each in ("type", "message"))
            found.append(or_(*(func.pg_catalog.strpos(each, self.error) > 0 for each in of_error)))
        found.extend(Workflow.input.contains(_argument(each)) for each in self.where or ())
        return found


def _id_at(option: str, text: str) -> UUID:
    from sqla_durable import manage

    return manage.id_at(moment(option, text))


def with_filters(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command that has a parameter `filters` take all options of `Filters` in its place."""
    return grouped(command)


def parsed_id(text: str) -> UUID:
    """Return a workflow's id.

    Raises:
        CommandError: it is none.
    """
    try:
        return UUID(text)
    except ValueError:
        raise CommandError(f"{text!r} is not the id of a workflow: write it as `list` shows it.") from None


def parsed_tags(given: Iterable[str] | None) -> dict[str, str]:
    """Return tags by name, of texts such as `tenant=7`.

    Raises:
        CommandError: one is something else.
    """
    return dict(map(_tag, given or ()))


def _tag(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name and value):
        raise CommandError(f"--tag {text!r} is not NAME=VALUE, such as tenant=7.")
    return name, value


def _argument(text: str) -> dict[str, Any]:
    """Return the JSON object that the input is to contain: `{"order": {"id": 7}}` of `input.order.id=7`."""
    matched = _CONDITION.fullmatch(text)
    if matched is None:
        raise CommandError(f"--where {text!r} is not input.PATH=VALUE, such as input.order_id=7 or input.name=ada.")
    try:
        found: Any = json.loads(matched[2])
    except ValueError:
        found = matched[2]
    for name in reversed(matched[1][1:].split(".")):
        found = {name: found}
    return dict(found)
