"""What the end of a workflow says of code that has changed, and the marker with which a patch is recorded."""

from __future__ import annotations

from sqla_durable.definitions.log import Log, joined
from sqla_durable.errors import HistoryMismatchError
from sqla_durable.models.status import StepStatus
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.changes import PATCH
from sqla_durable.store import Checkpoint

log = Log("sqla_durable.changes")


def patched(attempt: Attempt, patch_id: str) -> tuple[bool, Checkpoint | None]:
    """Tell whether the workflow goes the new way, and give what is to be recorded before the next effect, if any."""
    with attempt.branches.lock:
        patch = attempt.visits.patched(patch_id)
    if patch.key is None:
        return patch.is_new, None
    attempt.refuse_after_signal(patch.key)
    marker = Checkpoint(
        fence=attempt.fence,
        key=patch.key,
        name=PATCH,
        position=patch.place,
        status=StepStatus.SUCCEEDED,
        output="true",
        error=None,
        attempt=attempt.number,
        attempts=1,
        elapsed=0.0,
    )
    return patch.is_new, marker


def report(attempt: Attempt, *, strict: bool) -> None:
    """Warn of a history that today's code has not visited as it was recorded.

    Raises:
        HistoryMismatchError: with `strict`, instead of the warning.
    """
    mismatch = attempt.visits.mismatch()
    if mismatch is None:
        return
    what = f"workflow {attempt.name!r} {attempt.workflow_id} was recorded by other code than today's: {mismatch}"
    if not strict:
        log.warning("%s", joined(what))
        return
    raise HistoryMismatchError(
        f"{what}\nIt is strict and has no outcome for now: deploy code that visits its history, or mark the change "
        "with patched().",
        workflow_id=attempt.workflow_id,
        recorded=mismatch.recorded,
        visited=mismatch.visited,
    )
