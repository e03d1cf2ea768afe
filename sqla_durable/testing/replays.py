"""Export histories from a database, and replay them with changed code, before it is deployed.

`export` reads a database; `replay` needs none.
"""

from __future__ import annotations

import json
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, overload
from uuid import UUID

from sqlalchemy import CompoundSelect, Select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable.api.sessions import id_of
from sqla_durable.api.workflows import AsyncWorkflowFunction, WorkflowFunction
from sqla_durable.definitions.failure import Failure
from sqla_durable.definitions.payloads import ANYONE, PLAIN, Place, opened
from sqla_durable.errors import ArgumentError, DecodingError
from sqla_durable.execution import replaying
from sqla_durable.models import Workflow
from sqla_durable.models.base import StepStatus, WorkflowStatus
from sqla_durable.operations.history import Mismatch
from sqla_durable.store import Claimed, Completion, Fence, Recorded, schema, steps
from sqla_durable.store import workflows as store_workflows
from sqla_durable.store.workers import MAX_ATTEMPTS_TYPE

History: TypeAlias = dict[str, Any]
"""A workflow and its steps, as JSON holds them."""

Selected: TypeAlias = "Workflow | UUID | Iterable[Workflow | UUID] | Select[Any] | CompoundSelect[Any]"

_FORMAT = "sqla-durable history 1"


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What the current code does with a history. Its `str` is for people.

    Attributes:
        workflow_id: the id of the workflow that was exported.
        name: its name.
        differences: descriptions of what would break, or is done differently than it was recorded.
        recorded: the keys of the history, in its assignment.
        visited: the keys that the code visited, in its order; the last may be a call that is not in the history.
    """

    workflow_id: UUID
    name: str
    differences: tuple[str, ...]
    recorded: tuple[str, ...]
    visited: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the code does what was recorded, as far as the history goes."""
        return not self.differences

    def __str__(self) -> str:
        what = f"workflow {self.name!r} {self.workflow_id}"
        if self.fits:
            return f"{what}: the current code does what was recorded"
        keys = [f"  recorded: {', '.join(self.recorded)}", f"  visited:  {', '.join(self.visited)}"]
        return "\n".join((f"{what}: the current code differs", *(f"- {each}" for each in self.differences), *keys))


@overload
def export(session: Session, workflows: Selected) -> list[History]: ...


@overload
def export(session: AsyncSession, workflows: Selected) -> Coroutine[Any, Any, list[History]]: ...


def export(session: Session | AsyncSession, workflows: Selected) -> list[History] | Coroutine[Any, Any, list[History]]:
    """Return workflows with their histories, as values that `json.dump` takes.

    ```python
    json.dump(export(session, select(Workflow).where(Workflow.finished_at.is_(None)).limit(1000)), file)
    ```

    They contain the arguments of the workflows and the results of their steps: protect the file like the database.
    Reads in the caller's transaction and takes no lock.

    Args:
        session: the caller's session; with an `AsyncSession`, await the call.
        workflows: a record or an id, several, or a `select()` of `Workflow` or of a column of ids.

    Raises:
        ArgumentError: something other than workflows is given.
        SchemaError, SessionError: the session's database does not have the tables.
    """
    if isinstance(session, AsyncSession):
        return session.run_sync(_export, workflows)
    return _export(session, workflows)


def replay(
    workflow: WorkflowFunction[..., Any] | AsyncWorkflowFunction[..., Any], history: Mapping[str, Any]
) -> ReplayReport:
    """Execute the current code of a workflow on an exported history, and return what it does differently.

    ```python
    @pytest.mark.parametrize("history", json.loads(Path("histories.json").read_text()))
    def test_deploy(history):
        report = replay(workflows[history["name"]], history)
        assert report.fits, str(report)
    ```

    No step is executed: each returns what was recorded. The code is stopped at the first step that is not recorded, or
    at anything else that would have an effect; for a workflow that had not finished, that is the expected end. The
    workflow's own code is executed for real, so it must have no effects of its own. Needs no database.

    Differences are: a recorded step that is not visited, or in another order, or under the name of another step; a new
    step in the middle of the history, or in the history of a workflow that has ended; input or outcomes that the
    current annotations cannot read; and, of a workflow that has ended, another result or another type of error. A step
    that is added on purpose is a difference too; it is harmless if it may be executed late.

    Args:
        workflow: the workflow, as it is in the current code.
        history: one of those that `export` returned.

    Raises:
        ArgumentError: it is not a history, or that of another workflow.
        UsageError: an event loop is running in this thread, and the workflow is `async def`.
    """
    recorded = _Recorded.of(history)
    definition = workflow.definition
    definition.require_record(recorded.claimed.name, recorded.claimed.fence.workflow_id)
    try:
        definition.arguments.decode(PLAIN.open_members(recorded.claimed.input, Place("", "input", ANYONE)))
    except DecodingError as error:
        return recorded.report([str(error)], ())
    replayed = replaying.replay(definition, recorded.claimed)
    visits = replayed.attempt.history_check
    if replayed.undecodable:  # other differences may be consequences of these
        return recorded.report(replayed.undecodable, visits.keys)
    found = _descriptions(visits.mismatch(), replayed, recorded)
    if replayed.completion is not None and recorded.is_final:
        found += recorded.outcome_difference(replayed.completion)
    return recorded.report(found, visits.keys)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """An exported history, parsed."""

    claimed: Claimed
    status: WorkflowStatus
    output: Any
    error: dict[str, Any] | None

    @classmethod
    def of(cls, history: Mapping[str, Any]) -> _Recorded:
        if not isinstance(history, Mapping) or history.get("format") != _FORMAT:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(
                f"{history!r:.200} is not a history: pass one element of the list that export() returned."
            )
        recorded = [_step(each) for each in history["steps"]]
        claimed = Claimed(
            fence=Fence(UUID(history["id"]), UUID(int=0)),
            name=history["name"],
            attempt=history["attempt"],
            input=json.dumps(history["input"]),
            origin="",  # a history is read wherever it is brought
            history={each.key: each for each in recorded},
        )
        return cls(claimed, WorkflowStatus(history["status"]), history["output"], history["error"])

    @property
    def is_final(self) -> bool:
        """Whether the workflow's code itself came to an outcome."""
        if self.status is WorkflowStatus.FAILED:
            return self.error is not None and self.error.get("type") != MAX_ATTEMPTS_TYPE
        return self.status is WorkflowStatus.SUCCEEDED

    def outcome_difference(self, completion: Completion) -> list[str]:
        failure = None if completion.error is None else Failure.from_text(completion.error)
        recorded = self.error["type"] if self.error else None
        if failure is None and recorded is None:
            was, now = self._plain(json.dumps(self.output)), self._plain(completion.output or "null")
            return [] if was == now else [f"it returned {was!r:.500} and now {now!r:.500}"]
        if failure is not None and failure.type == recorded:
            return []
        now = (
            f"returns {completion.output:.500}" if failure is None else f"fails with {failure.type}: {failure.message}"
        )
        was = f"returned {self.output!r:.500}" if recorded is None else f"failed with {recorded}"
        return [f"it {was} and now {now}"]

    def _plain(self, output: str) -> Any:
        return json.loads(opened(output, Place.of(self.claimed.fence.workflow_id, "result", is_fork=True)))

    def report(self, differences: Iterable[str], visited: tuple[str, ...]) -> ReplayReport:
        in_order = sorted(self.claimed.history.values(), key=lambda each: each.position)
        return ReplayReport(
            workflow_id=self.claimed.fence.workflow_id,
            name=self.claimed.name,
            differences=tuple(differences),
            recorded=tuple(each.key for each in in_order),
            visited=visited,
        )


def _descriptions(mismatch: Mismatch | None, replayed: replaying.Replayed, recorded: _Recorded) -> list[str]:
    found: list[str] = []
    if mismatch is not None:
        found += [f"{key!r} is visited after what was recorded later" for key in mismatch.moved]
        found += [
            f"{key!r} was recorded by step {was!r} and is now of step {now!r}" for key, was, now in mismatch.renamed
        ]
    left = mismatch.not_visited if mismatch is not None else ()
    names = ", ".join(map(repr, left[:20])) + (f" and {len(left) - 20} more" if len(left) > 20 else "")
    stopped = replayed.completion is None
    if left and stopped:
        found.append(f"{replayed.at!r} is called and has no recorded outcome, while the history goes on with {names}")
    elif left:
        found.append(f"recorded and not visited: {names}")
    elif stopped and recorded.is_final:
        found.append(f"{replayed.at!r} is called and has no recorded outcome, and the workflow had {recorded.status}")
    return found


def _export(session: Session, workflows: Selected) -> list[History]:
    schema.require(session)
    session.flush()
    ids = _ids(session, workflows)
    histories = steps.histories(session, ids)
    return [_history(each, histories.get(each.id, {})) for each in store_workflows.export(session, ids)]


def _ids(session: Session, workflows: Selected) -> list[UUID]:
    given: Iterable[Any]
    match workflows:
        case Select() | CompoundSelect():
            given = session.scalars(workflows)
        case Workflow() | UUID():
            given = [workflows]
        case _:
            given = workflows
    found = list(given)
    for each in found:
        if not isinstance(each, (Workflow, UUID)):
            raise ArgumentError(f"{each!r} is not a workflow: pass records, ids as UUIDs, or a select() of either.")
    return [id_of(each) for each in found]


def _history(workflow: store_workflows.Exported, recorded: Mapping[str, Recorded]) -> History:
    return {
        "format": _FORMAT,
        "id": str(workflow.id),
        "name": workflow.name,
        "version": workflow.version,
        "status": workflow.status.value,
        "attempt": workflow.attempt,
        "input": _loaded(workflow.input),
        "output": _loaded(workflow.output),
        "error": _loaded(workflow.error),
        "steps": [
            {
                "key": each.key,
                "name": each.name,
                "position": each.position,
                "status": each.status.value,
                "output": _loaded(each.output),
                "error": _loaded(each.error),
            }
            for each in sorted(recorded.values(), key=lambda each: (each.position, each.key))
        ],
    }


def _step(exported: Mapping[str, Any]) -> Recorded:
    status = StepStatus(exported["status"])
    return Recorded(
        key=exported["key"],
        name=exported["name"],
        position=exported["position"],
        status=status,
        output=json.dumps(exported["output"]) if status is StepStatus.SUCCEEDED else None,
        error=None if exported["error"] is None else json.dumps(exported["error"]),
    )


def _loaded(text: str | None) -> Any:
    return None if text is None else json.loads(text)
