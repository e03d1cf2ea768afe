"""What schedules start: checked when they are declared, and encoded when a worker brings them into the table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sqla_durable.api.options import DUPLICATES, StartOptions
from sqla_durable.api.workflows import AnyWorkflowFunction, BoundWorkflow
from sqla_durable.definitions.payloads import Payloads, owner_of_schedule
from sqla_durable.definitions.schedules import ScheduleDeclaration, ScheduleOptions, fault_in_schedule_name
from sqla_durable.errors import ArgumentError, DefinitionError
from sqla_durable.store import NewWorkflow


def declaration_of(
    function: object, name: str | None, arguments: Mapping[str, Any] | None, options: ScheduleOptions
) -> ScheduleDeclaration:
    """Return the declaration of a schedule.

    Raises:
        ArgumentError: the name is none.
        DefinitionError: the function is no workflow, or has options that a schedule decides.
    """
    if not isinstance(function, AnyWorkflowFunction):
        raise DefinitionError(
            f"schedule() was given {function!r}, which is no workflow: write it above @durable.workflow."
        )
    chosen = function.name if name is None else require_schedule_name(name)
    if wrong := _decided_by_ticks(function.start_options):
        raise DefinitionError(_refusal(chosen, function.name, wrong))
    bind = partial(function.bind, **(arguments or {}))
    return ScheduleDeclaration(chosen, function.name, partial(_bound, chosen, bind), options)


def require_schedule_name(name: str) -> str:
    """Refuse what cannot be the name of a schedule.

    Raises:
        ArgumentError: it is blank, too long, or cannot be stored.
    """
    fault = fault_in_schedule_name(name)
    if fault is not None:
        raise ArgumentError(f"a schedule is named {name!r}, which {fault}: pass another name.")
    return name


def scheduled(bound: BoundWorkflow, *, schedule: str) -> NewWorkflow:
    """Return what a schedule starts, without what each tick decides.

    Raises:
        ArgumentError: it has options that a schedule decides.
    """
    new = bound.new  # one with a rule for its key has a key
    if wrong := _decided_by_ticks(new):
        raise ArgumentError(_refusal(schedule, new.name, wrong))
    return new._replace(input=Payloads.moved(new.input, new.name, owner_of_schedule(schedule)))


def _decided_by_ticks(given: NewWorkflow | StartOptions) -> list[str]:
    """Return the options that are given, and that each tick decides."""
    names = "key", "delay", "at", "wake_at", "deadline", "deadline_at", "detached", *DUPLICATES
    return [each for each in names if getattr(given, each, None) not in (None, False)]


def _refusal(schedule: str, workflow: str, wrong: list[str]) -> str:
    return (
        f"schedule {schedule!r} starts {workflow!r} with options that each tick decides by itself: leave "
        f"{', '.join(wrong)} out; queue, by, priority and timeout count."
    )


def _bound(schedule: str, bind: Any) -> NewWorkflow:
    return scheduled(bind(), schedule=schedule)
