"""Which workflows a command is about: options that several commands have, and the `select()` that they mean."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints
from uuid import UUID

import typer

from sqla_durable.tools.cli.errors import CommandError

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
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
    parent: Annotated[str | None, typer.Option("--parent", metavar="ID", help="The workflow whose children.")] = None
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Started since a time, or for as long: 2h, 7d.")
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
    def is_empty(self) -> bool:
        """Whether none is given: all workflows are meant."""
        return all(getattr(self, each.name) is None for each in fields(self))

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

        from sqla_durable import Workflow, WorkflowStatus, manage

        found: list[ColumnElement[bool]] = []
        if self.status is not None:
            statuses = [str(each) for each in WorkflowStatus]
            for each in self.status:
                if each not in statuses:
                    raise CommandError(f"--status {each!r} is none of {', '.join(statuses)}.")
            found.append(Workflow.status.in_(map(WorkflowStatus, self.status)))
        texts = {each: getattr(self, each) for each in ("name", "queue", "key", "by", "schedule")}
        found.extend(getattr(Workflow, each).in_(values) for each, values in texts.items() if values is not None)
        if self.tag is not None:
            found.append(Workflow.tags.contains(dict(map(_tag, self.tag))))
        if self.parent is not None:
            found.append(Workflow.parent_id == parsed_id(self.parent))
        if self.since is not None:
            found.append(Workflow.id >= manage.id_at(moment("--since", self.since)))
        if self.until is not None:
            found.append(Workflow.id < manage.id_at(moment("--until", self.until)))
        if self.error is not None:
            of_error = (Workflow.error[each].astext for each in ("type", "message"))
            found.append(or_(*(func.strpos(each, self.error) > 0 for each in of_error)))
        found.extend(Workflow.input.contains(_argument(each)) for each in self.where or ())
        return found


def with_filters(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command that has a parameter `filters` take all options of `Filters` in its place."""
    own = inspect.signature(command, eval_str=True)
    hints = get_type_hints(Filters, include_extras=True)
    options = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[each.name])
        for each in fields(Filters)
    ]
    kept = [each for each in own.parameters.values() if each.name != "filters"]
    positional = [each for each in kept if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    named = [each for each in kept if each.kind is inspect.Parameter.KEYWORD_ONLY]

    @wraps(command)
    def with_options(*args: Any, **given: Any) -> None:
        chosen = {each.name: given.pop(each.name) or None for each in fields(Filters)}
        command(*args, filters=Filters(**chosen), **given)

    parameters = [*positional, *options, *named]
    with_options.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


def parsed_id(text: str) -> UUID:
    """Return a workflow's id.

    Raises:
        CommandError: it is none.
    """
    try:
        return UUID(text)
    except ValueError:
        raise CommandError(f"{text!r} is not the id of a workflow: write it as `list` shows it.") from None


def moment(option: str, text: str) -> datetime:
    """Return a time: one in ISO 8601, in UTC where it has no zone, or so long ago: 30s, 5m, 2h, 7d, 1w.

    Raises:
        CommandError: it is none.
    """
    matched = _DURATION.fullmatch(text)
    try:
        if matched is not None:
            return datetime.now(UTC) - timedelta(**{_UNITS[matched[2]]: float(matched[1])})
        found = datetime.fromisoformat(text)
        return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise CommandError(
            f"{option} {text!r} is no time: write 2026-11-29T08:00, or how long ago, such as 2h."
        ) from None


def span(option: str, text: str) -> timedelta:
    """Return a duration: 30s, 5m, 2h, 7d, 1w.

    Raises:
        CommandError: it is none.
    """
    matched = _DURATION.fullmatch(text)
    try:
        if matched is not None:
            return timedelta(**{_UNITS[matched[2]]: float(matched[1])})
    except OverflowError:
        pass
    raise CommandError(f"{option} {text!r} is no duration: write 90d, 12h, or another number of s, m, h, d or w.")


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
