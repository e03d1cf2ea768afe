"""How policies of retention are declared: which finished workflows are deleted, and how long after their end."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple, TypeAlias

from sqla_durable.definitions.checks import LONGEST, require_duration, require_text
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.errors import ArgumentError

Statuses: TypeAlias = "str | Iterable[str] | None"
"""A status or several, as `WorkflowStatus` or as text; None means every finished one."""

SHORTEST = timedelta(seconds=1)

_FINISHED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class RetentionOptions:
    """What a policy is about.

    Attributes:
        workflow: the name of a workflow, or a pattern in which `*` stands for any text; None means all of them.
        statuses: those of finished workflows, in order; None means every finished one.
        keep: how long after its end a workflow is kept.
    """

    workflow: str | None
    statuses: tuple[str, ...] | None
    keep: timedelta

    @classmethod
    def of(cls, *, workflow: str | None, status: Statuses, keep: timedelta) -> RetentionOptions:
        """Return what was passed, checked.

        Raises:
            ArgumentError: the name is blank, a status is not one of a finished workflow, or the time is none.
        """
        if workflow is not None:
            require_text(workflow, what="workflow's name")
        return cls(workflow, finished_statuses(status), require_keep(keep))


class RetentionDeclaration(NamedTuple):
    """A policy as the application's code declares it."""

    name: str
    options: RetentionOptions


def finished_statuses(status: Statuses) -> tuple[str, ...] | None:
    """Return statuses as their texts, in order.

    Raises:
        ArgumentError: one is not that of a finished workflow, or there are none.
    """
    if status is None:
        return None
    wanted = [status] if isinstance(status, str) else list(status)
    for each in wanted:
        if each not in _FINISHED:
            raise ArgumentError(f"status={each!r} is none of {', '.join(_FINISHED)}: only what is finished is deleted.")
    if not wanted:
        raise ArgumentError("status= has no status: leave it out for every finished workflow.")
    return tuple(sorted({str(each) for each in wanted}))


def require_keep(keep: timedelta) -> timedelta:
    """Refuse what is no time to keep workflows for.

    Raises:
        ArgumentError: it is no timedelta, or shorter than a second, or too long.
    """
    require_duration(keep, "keep")
    if keep < SHORTEST:
        raise ArgumentError(
            f"keep={keep} is less than a second: whoever waits for a result must be able to read it. Keep workflows "
            f"from one second to {LONGEST.days:,} days after their end."
        )
    return keep
