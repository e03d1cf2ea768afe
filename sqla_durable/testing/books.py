"""What the test itself does in the database: start workflows, watch them, bury dead workers, read how it ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.models import Step, Workflow
from sqla_durable.store import workers
from sqla_durable.testing.errors import CrashTestError
from sqla_durable.testing.states import EndState


@dataclass(frozen=True, slots=True)
class Started:
    """A workflow of the test.

    Attributes:
        queue: the queue that it was started in.
        private: the queue that it waits in.
    """

    workflow_id: UUID
    name: str
    queue: str
    private: str


class Books:
    """The sessions of the test's own process. Callable from any thread; `start` and `end_state` take turns."""

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
        self._known: set[UUID] = set()
        self._workers: set[UUID] = set()

    def start(self) -> Started:
        """Start a workflow, in a queue of its own."""
        with self._lock, self._sessions() as session:
            workflow = self._start(session)
            if not isinstance(workflow, Workflow):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise CrashTestError(f"start gave {workflow!r}: let it return the Workflow that it has started.")
            session.flush()
            self._require_fresh(workflow)
            started = Started(workflow.id, workflow.name, workflow.queue, f"crash test {workflow.id}")
            workflow.queue = started.private
            session.commit()
        return started

    def has_ended(self, started: Started) -> bool:
        """Tell whether the workflow has an outcome."""
        with self._sessions() as session:
            return session.get_one(Workflow, started.workflow_id).status.finished

    def end_state(self, started: Started) -> EndState:
        """Read how the workflow has ended, after it was put back into the queue that it was started in."""
        with self._sessions.begin() as session:
            session.get_one(Workflow, started.workflow_id).queue = started.queue
        with self._lock, self._sessions() as session:
            return EndState.of(session, session.get_one(Workflow, started.workflow_id), self._end_state)

    def describe(self, started: Started) -> str:
        """Show the workflow and its history."""
        with self._sessions() as session:
            workflow = session.get_one(Workflow, started.workflow_id)
            head = f"workflow {workflow.name!r} {workflow.id}: {workflow.status}, attempt {workflow.attempt}"
            ending = [f"  error: {workflow.error}"] if workflow.error else [f"  output: {workflow.output!r}"]
            return "\n".join((head, *map(_shown, workflow.steps), *ending))

    def enter(self, worker_id: UUID) -> None:
        """Know a worker as one of the test's."""
        self._workers.add(worker_id)

    def bury(self, *worker_ids: UUID) -> None:
        """Delete the leases of dead workers: what they had running is anybody's at once."""
        with self._sessions.begin() as session:
            for each in worker_ids:
                workers.end_lease(session, each)

    def close(self) -> None:
        """Leave no lease behind; what a dying worker had sent may have been carried out late."""
        self.bury(*self._workers)

    def _require_fresh(self, workflow: Workflow) -> None:
        if workflow.id in self._known or workflow.status.finished:
            raise CrashTestError(
                f"start gave {workflow!r}, which is not new: it is called for each execution, and each needs a "
                "workflow of its own. Is it started with the same key again?"
            )
        self._known.add(workflow.id)


def _shown(step: Step) -> str:
    return f"  {step.position}. {step.key}: {step.status}, {step.error or repr(step.output)}"
