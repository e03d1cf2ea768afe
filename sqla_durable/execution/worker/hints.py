"""What wakes the loops of a worker before their time, and which hint wakes which of them.

A hint says that there may be something to do; it is never needed, because every loop polls. The parts of a worker hold
these values, and none of them calls another one's loop.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from uuid import UUID

from sqla_durable.execution.worker.cursors import Cursors
from sqla_durable.operations.suspending import Wakers
from sqla_durable.store import hints


class Wakeup:
    """Wakes one loop, on the event loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def is_set(self) -> bool:
        """Whether the loop was woken since the last `clear`."""
        return self._event.is_set()

    def set(self) -> None:
        """Wake the loop now, or as soon as it waits."""
        self._event.set()

    def clear(self) -> None:
        """Forget that the loop was woken."""
        self._event.clear()

    async def wait(self, within: float | None) -> bool:
        """Wait until the loop is woken, for at most so many seconds; return whether it was."""
        if within is not None and within <= 0:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._event.wait()
        return self._event.is_set()


class MaintenanceWakeup(Wakeup):
    """Wakes the maintenance.

    Attributes:
        is_to_poll: whether there may be anything, such as a timer; otherwise there are signals at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_to_poll = False

    def set(self) -> None:
        """Wake it for anything that may be there."""
        self.is_to_poll = True
        super().set()

    def set_for_signals(self) -> None:
        """Wake it for signals, and nothing else that is new."""
        super().set()

    def clear(self) -> None:
        """Forget that it was woken."""
        self.is_to_poll = False
        super().clear()


class Wakeups:
    """What wakes the loops of one worker.

    Attributes:
        claims: something may be pending in the queues.
        maintenance: something may be due, or sent.
        heartbeat: something that this worker executes may have been taken from it.
    """

    def __init__(self) -> None:
        self.claims = Wakeup()
        self.maintenance = MaintenanceWakeup()
        self.heartbeat = Wakeup()


class HintReceiver:
    """Wakes what a hint is about: for a queue, for what this worker is executing, or for what waits.

    Args:
        wakeups: wake the loops of this worker.
        wakers: wake operations that wait in memory.
        cursors: are set back where something may stand before them.
        worker_id: this worker.
        queues: those that it claims from.
    """

    def __init__(
        self, wakeups: Wakeups, wakers: Wakers, cursors: Cursors, *, worker_id: UUID, queues: list[str]
    ) -> None:
        self._wakeups = wakeups
        self._wakers = wakers
        self._cursors = cursors
        self._worker_id = str(worker_id)
        self._queues = frozenset(queues)

    def receive(self, payload: str) -> None:
        """Wake what the payload of a hint is about."""
        match hints.read(payload):
            case hints.Kind.QUEUE, queue:
                if queue in self._queues:
                    self._wakeups.claims.set()
            case hints.Kind.WORKER, worker_id:
                if worker_id == self._worker_id:
                    self._wakeups.heartbeat.set()
            case hints.Kind.SENT, _:
                self._wakeups.maintenance.set_for_signals()
                self._wakers.wake(payload)
            case hints.Kind.LATE, _:
                self._cursors.restart()
                self._wakeups.maintenance.set()
            case _:
                self._wakeups.maintenance.set()
