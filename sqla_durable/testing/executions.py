"""One execution of a workflow after another: by a worker that is killed, and by the one that reclaims the workflow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import UUID

from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.models import Step, Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import workers
from sqla_durable.testing.crash_points import CrashPoint
from sqla_durable.testing.end_states import CrashDifference, CrashTestError, CrashTimeoutError, EndState, Reference
from sqla_durable.testing.forking import (
    Assignment,
    ForkServer,
    Imported,
    PointReached,
    WorkerEnded,
    WorkerStarted,
)

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.005, 0.05


@dataclass(frozen=True, slots=True)
class StartedWorkflow:
    """A workflow of the test.

    Attributes:
        queue: the queue that it was started in.
        own_queue: a queue of its own, in which it waits for the workers of the test.
    """

    workflow_id: UUID
    name: str
    queue: str
    own_queue: str


class CrashTestDatabase:
    """Starts and reads workflows in the test's own process, from any thread; `start` and `end_state` take turns."""

    def __init__(
        self,
        sessions: sessionmaker[Session],
        start: Callable[[Session], Workflow],
        end_state: Callable[[Session, Workflow], object],
    ) -> None:
        self._sessions = sessions
        self._start = start
        self._end_state = end_state
        self._lock = threading.Lock()
        self._started: set[UUID] = set()
        self._workers: set[UUID] = set()

    def start(self) -> StartedWorkflow:
        """Start a workflow, in a queue of its own."""
        with self._lock, self._sessions() as session:
            workflow = self._start(session)
            if not isinstance(workflow, Workflow):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise CrashTestError(f"start returned {workflow!r}: let it return the Workflow that it has started.")
            session.flush()
            self._require_new(workflow)
            started = StartedWorkflow(workflow.id, workflow.name, workflow.queue, f"crash test {workflow.id}")
            workflow.queue = started.own_queue
            session.commit()
        return started

    def has_ended(self, started: StartedWorkflow) -> bool:
        """Return whether the workflow has an outcome."""
        with self._sessions() as session:
            return session.get_one(Workflow, started.workflow_id).status.finished

    def end_state(self, started: StartedWorkflow) -> EndState:
        """Move the workflow back to the queue that it was started in, and return how it ended."""
        with self._sessions.begin() as session:
            session.get_one(Workflow, started.workflow_id).queue = started.queue
        with self._lock, self._sessions() as session:
            return EndState.of(session, session.get_one(Workflow, started.workflow_id), self._end_state)

    def describe(self, started: StartedWorkflow) -> str:
        """Return a description of the workflow and its history."""
        with self._sessions() as session:
            workflow = session.get_one(Workflow, started.workflow_id)
            head = f"workflow {workflow.name!r} {workflow.id}: {workflow.status}, attempt {workflow.attempt}"
            ending = [f"  error: {workflow.error}"] if workflow.error else [f"  output: {workflow.output!r}"]
            return "\n".join((head, *map(_shown, workflow.steps), *ending))

    def add_worker(self, worker_id: UUID) -> None:
        """Remember a worker of the test, whose lease `close` deletes."""
        self._workers.add(worker_id)

    def delete_leases(self, *worker_ids: UUID) -> None:
        """Delete the leases of dead workers, so that their workflows are reclaimed at once."""
        with self._sessions.begin() as session:
            for each in worker_ids:
                workers.end_lease(session, each)

    def close(self) -> None:
        """Delete all leases of the test: a heartbeat that a dying worker had sent may have been executed late."""
        self.delete_leases(*self._workers)

    def _require_new(self, workflow: Workflow) -> None:
        if workflow.id in self._started or workflow.status.finished:
            raise CrashTestError(
                f"start returned {workflow!r}, which is not new: it is called for each execution, and each needs a "
                "workflow of its own. Does it start with the same key again?"
            )
        self._started.add(workflow.id)


def _shown(step: Step) -> str:
    return f"  {step.position}. {step.key}: {step.status}, {step.error or repr(step.output)}"


class Execution:
    """Executes workflows with the workers of one fork server, one after another."""

    def __init__(self, fork_server: ForkServer, database: CrashTestDatabase, *, url: str, timeout: timedelta) -> None:
        self.fork_server = fork_server
        self._database = database
        self._url = url
        self._timeout = timeout
        self._imported = False

    def undisturbed(self, status: WorkflowStatus) -> EndState:
        """Execute a workflow without killing its worker, and return how it ended.

        Raises:
            CrashTestError: it ended with another status.
        """
        started = self._database.start()
        self._work(started)
        found = self._database.end_state(started)
        if found.status is not status:
            raise self.fork_server.error(
                f"undisturbed, the workflow {found.status}: let it end as {status}, or pass "
                f"status=WorkflowStatus.{found.status.name} if it is meant to.\n{self._database.describe(started)}"
            )
        return found

    def disturbed(self, point: CrashPoint, reference: Reference) -> CrashPoint | None:
        """Execute a workflow whose worker is killed at the point, and compare how it ended with the reference.

        Returns:
            The point, or None if the worker never reached it.

        Raises:
            CrashDifference: the workflow ended differently.
        """
        started = self._database.start()
        victim = self._work(started, point)
        if victim.killed is not None:
            self._work(started, dead=victim.worker_id)
        found = self._database.end_state(started)
        diff = reference.difference(found, name=_described(victim.killed))
        if diff:
            raise CrashDifference(
                f"{_described(victim.killed)}, the workflow ended differently than undisturbed:\n{diff}\n\n"
                f"{self._database.describe(started)}",
                point=victim.killed,
                workflow_id=started.workflow_id,
                expected=reference.end_state,
                found=found,
                diff=diff,
            )
        return victim.killed

    def _work(
        self, started: StartedWorkflow, point: CrashPoint | None = None, *, dead: UUID | None = None
    ) -> _WorkerMonitor:
        """Let a worker execute the workflow, until the worker was killed or the workflow has ended."""
        self._import()
        self.fork_server.start_worker(
            Assignment(self._url, started.workflow_id, started.name, started.queue, started.own_queue, point=point)
        )
        monitor = _WorkerMonitor(self.fork_server, self._database, started, point=point, dead=dead)
        monitor.wait_for_end(self._timeout)
        return monitor

    def _import(self) -> None:
        """Wait until the fork server has imported the application."""
        if not self._imported and not isinstance(
            self.fork_server.message(seconds=self._timeout.total_seconds()), Imported
        ):
            raise self.fork_server.error(f"make_worker was not imported within {self._timeout}", CrashTimeoutError)
        self._imported = True


class _WorkerMonitor:
    """Watches one worker until its process has ended."""

    def __init__(
        self,
        fork_server: ForkServer,
        database: CrashTestDatabase,
        started: StartedWorkflow,
        *,
        point: CrashPoint | None,
        dead: UUID | None,
    ) -> None:
        self.killed: CrashPoint | None = None
        self.worker_id: UUID | None = None
        self._fork_server = fork_server
        self._database = database
        self._started = started
        self._point = point
        self._dead = dead
        self._workflow_ended = False
        self._stopped = False

    def wait_for_end(self, timeout: timedelta) -> None:
        """Wait until the worker's process has ended, because it was killed or because its workflow has ended."""
        deadline = time.monotonic() + timeout.total_seconds()
        pause = _SHORTEST_PAUSE
        while True:
            match self._fork_server.message(seconds=pause):
                case WorkerStarted(worker_id):
                    self.worker_id = worker_id
                    self._database.add_worker(worker_id)
                case PointReached(writes) if self._point is not None:
                    self.killed = replace(self._point, writes=writes)
                case WorkerEnded(exitcode):
                    return self._require_expected_end(exitcode)
                case _:
                    self._poll()
                    pause = min(pause * 1.2, _LONGEST_PAUSE)  # polling takes time from the worker
            if time.monotonic() > deadline:
                raise self._timeout_error(timeout)

    def _poll(self) -> None:
        """Check whether the workflow has ended; by then, a `PointReached` sent before that commit has been received."""
        if self._dead is not None:
            # Repeatedly: a heartbeat that the dead worker had sent may have been executed after the last time.
            self._database.delete_leases(self._dead)
        if self.killed is not None or self._stopped:
            return
        if self._workflow_ended:
            self._stopped = True
            self._fork_server.stop_worker()
        self._workflow_ended = self._workflow_ended or self._database.has_ended(self._started)

    def _require_expected_end(self, exitcode: int) -> None:
        if self.killed is not None and self.worker_id is not None:
            self._database.delete_leases(self.worker_id)
        elif not self._stopped:
            raise self._fork_server.error(
                f"the worker's process ended by itself, with exit code {exitcode}.\n"
                f"{self._database.describe(self._started)}"
            )

    def _timeout_error(self, timeout: timedelta) -> CrashTestError:
        worker = "a worker that was not killed" if self._dead is None else "the worker that reclaimed it"
        where = f" to be killed {self._point}" if self._point is not None else ""
        return self._fork_server.error(
            f"{worker}{where} did not end the workflow within {timeout}. Does it wait for something? It stays in queue "
            f"{self._started.own_queue!r}, where no worker claims it.\n{self._database.describe(self._started)}",
            CrashTimeoutError,
        )


def _described(killed: CrashPoint | None) -> str:
    return "not killed" if killed is None else f"killed {killed}"
