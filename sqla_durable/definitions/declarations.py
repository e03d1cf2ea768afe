"""What an application's code declares beside its functions: queues, schedules, and how long workflows are kept."""

from __future__ import annotations

from sqla_durable.definitions.queues import QueueDeclaration
from sqla_durable.definitions.retention import RetentionDeclaration
from sqla_durable.definitions.schedules import ScheduleDeclaration
from sqla_durable.errors import DefinitionError


class Declarations:
    """The declarations of one `Durable`, by name; workers bring them into the tables."""

    def __init__(self) -> None:
        self._schedules: dict[str, ScheduleDeclaration] = {}
        self._queues: dict[str, QueueDeclaration] = {}
        self._retention: dict[str, RetentionDeclaration] = {}

    def add_queue(self, declared: QueueDeclaration) -> None:
        """Register the settings of a queue.

        Raises:
            DefinitionError: it has others already.
        """
        known = self._queues.setdefault(declared.name, declared)
        if known != declared:
            raise DefinitionError(
                f"queue {declared.name!r} is declared twice, with different settings: keep one of them."
            )

    def add_schedule(self, declared: ScheduleDeclaration) -> None:
        """Register a schedule.

        Raises:
            DefinitionError: another one has the name.
        """
        if declared.name in self._schedules:
            raise DefinitionError(f"two schedules are named {declared.name!r}: give one of them another name=.")
        self._schedules[declared.name] = declared

    def add_retention(self, declared: RetentionDeclaration) -> None:
        """Register a policy of retention.

        Raises:
            DefinitionError: another one has the name.
        """
        known = self._retention.setdefault(declared.name, declared)
        if known != declared:
            raise DefinitionError(
                f"two policies of retention are named {declared.name!r}: give one of them another name."
            )

    def queues(self) -> list[QueueDeclaration]:
        """Return the queues whose settings are declared, in the order of their names."""
        return [self._queues[name] for name in sorted(self._queues)]

    def schedules(self) -> list[ScheduleDeclaration]:
        """Return the registered schedules, in the order of their names."""
        return [self._schedules[name] for name in sorted(self._schedules)]

    def retention(self) -> list[RetentionDeclaration]:
        """Return the registered policies of retention, in the order of their names."""
        return [self._retention[name] for name in sorted(self._retention)]
