"""One execution of a workflow after another: by a worker that is killed somewhere, and by the one that takes over."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from uuid import UUID

from sqla_durable.models.status import WorkflowStatus
from sqla_durable.testing.books import Books, Started
from sqla_durable.testing.errors import CrashTestError, CrashTimeoutError
from sqla_durable.testing.lanes import Begun, Dying, Ended, Lane, Order, Ready
from sqla_durable.testing.points import CrashPoint
from sqla_durable.testing.states import CrashDifference, EndState, Reference

_PAUSE = 0.005


class Execution:
    """Executes workflows on a lane, one after another."""

    def __init__(self, lane: Lane, books: Books, *, url: str, timeout: timedelta) -> None:
        self.lane = lane
        self._books = books
        self._url = url
        self._timeout = timeout
        self._imported = False

    def undisturbed(self, status: WorkflowStatus) -> EndState:
        """Execute one workflow.

        Raises:
            CrashTestError: it ended with another status.
        """
        started = self._books.start()
        self._work(started)
        found = self._books.end_state(started)
        if found.status is not status:
            raise self.lane.error(
                f"undisturbed, the workflow {found.status}: let it end as {status}, or pass "
                f"status=WorkflowStatus.{found.status.name} if it is meant to.\n{self._books.describe(started)}"
            )
        return found

    def disturbed(self, point: CrashPoint, reference: Reference) -> CrashPoint | None:
        """Execute one whose worker dies there, and compare; give the point, or None if the worker never got there.

        Raises:
            CrashDifference: the workflow ended otherwise than the reference.
        """
        started = self._books.start()
        victim = self._work(started, point)
        if victim.killed is not None:
            self._work(started, dead=victim.worker_id)
        found = self._books.end_state(started)
        diff = reference.difference(found, name=_name(victim.killed))
        if diff:
            raise CrashDifference(
                f"{_name(victim.killed)}, the workflow ended otherwise than undisturbed:\n{diff}\n\n"
                f"{self._books.describe(started)}",
                point=victim.killed,
                workflow_id=started.workflow_id,
                expected=reference.end_state,
                found=found,
                diff=diff,
            )
        return victim.killed

    def _work(self, started: Started, point: CrashPoint | None = None, *, dead: UUID | None = None) -> _Watch:
        """Let a worker execute the workflow, until it has died or the workflow has ended."""
        self._import()
        self.lane.begin(
            Order(self._url, started.workflow_id, started.name, started.queue, started.private, point=point)
        )
        watch = _Watch(self.lane, self._books, started, point=point, dead=dead)
        watch.until_the_end(self._timeout)
        return watch

    def _import(self) -> None:
        """Wait until the process behind the lane has imported the application."""
        if not self._imported and not isinstance(self.lane.message(seconds=self._timeout.total_seconds()), Ready):
            raise self.lane.error(f"make_worker was not imported within {self._timeout}", CrashTimeoutError)
        self._imported = True


class _Watch:
    """Watches one worker."""

    def __init__(
        self, lane: Lane, books: Books, started: Started, *, point: CrashPoint | None, dead: UUID | None
    ) -> None:
        self.killed: CrashPoint | None = None
        self.worker_id: UUID | None = None
        self._lane = lane
        self._books = books
        self._started = started
        self._point = point
        self._dead = dead
        self._workflow_ended = False
        self._stopped = False

    def until_the_end(self, timeout: timedelta) -> None:
        """Wait until the worker's process has ended, because it was killed or because its workflow has ended."""
        deadline = time.monotonic() + timeout.total_seconds()
        while True:
            match self._lane.message(seconds=_PAUSE):
                case Begun(worker_id):
                    self.worker_id = worker_id
                    self._books.enter(worker_id)
                case Dying(writes) if self._point is not None:
                    self.killed = replace(self._point, writes=writes)
                case Ended(exitcode):
                    return self._require_expected(exitcode)
                case _:
                    self._look()
            if time.monotonic() > deadline:
                raise self._late(timeout)

    def _look(self) -> None:
        """Look at the workflow; what a dying worker had to say before the commit that ends it has been read by then."""
        if self._dead is not None:
            # Again and again: a heartbeat that the dead worker had sent may have come after the last time.
            self._books.bury(self._dead)
        if self.killed is not None or self._stopped:
            return
        if self._workflow_ended:
            self._stopped = True
            self._lane.stop_worker()
        self._workflow_ended = self._workflow_ended or self._books.has_ended(self._started)

    def _require_expected(self, exitcode: int) -> None:
        if self.killed is not None and self.worker_id is not None:
            self._books.bury(self.worker_id)
        elif not self._stopped:
            raise self._lane.error(
                f"the worker's process ended by itself, with exit code {exitcode}.\n"
                f"{self._books.describe(self._started)}"
            )

    def _late(self, timeout: timedelta) -> CrashTestError:
        who = "a worker that was not killed" if self._dead is None else "the worker that took over"
        where = f" to be killed {self._point}" if self._point is not None else ""
        return self._lane.error(
            f"{who}{where} did not end the workflow within {timeout}. Does it wait for something? It stays in queue "
            f"{self._started.private!r}, where no worker claims it.\n{self._books.describe(self._started)}",
            CrashTimeoutError,
        )


def _name(killed: CrashPoint | None) -> str:
    return "not killed" if killed is None else f"killed {killed}"
