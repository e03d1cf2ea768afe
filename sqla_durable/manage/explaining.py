"""Says in words why a workflow does not start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

import sqla_durable.api.sessions as sessions
from sqla_durable.api.sessions import id_of
from sqla_durable.definitions.queues import fitting
from sqla_durable.definitions.texts import duration_text, time_text
from sqla_durable.models import Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import explanations, workflows
from sqla_durable.store.explanations import MOST_AHEAD, Holder, LiveWorker


def explain_pending(session: Session, workflow: Workflow | UUID) -> list[str]:
    """Return in words why a workflow does not start, or go on: a sentence for each reason.

    ```python
    for reason in manage.explain_pending(session, order.checkout):
        print(reason)
    ```

    Its queue or key is paused; a limit is reached, with the workflows that take the places; others come before it; a
    rate is used up, and until when; no live worker claims from its queue, or knows its name or version, or all slots
    of those that do are taken. What is read
    is of this moment, takes no lock, and is not exact while workers claim. Reads the tables of workers and queues.

    Args:
        session: the caller's session.
        workflow: the record, or its id.

    Raises:
        NotFoundError: there is no such workflow.
        ArgumentError: this is no workflow.
        SchemaError, SessionError: the session's database does not hold the tables.
    """
    return sessions.read(session, partial(_explain, workflow_id=id_of(workflow)), name="manage.explain_pending")


def _explain(session: Session, *, workflow_id: UUID) -> list[str]:
    found = explanations.situation(session, workflow_id)
    if found is None:
        raise workflows.not_found(session, workflow_id)
    status: WorkflowStatus = found["status"]
    if status is not WorkflowStatus.PENDING:
        return [_other_status(status, found["wake_at"])]
    reasons = [
        *_pauses(found),
        *_workers(found, explanations.live_workers(session, found["queue"])),
        *_places(session, found),
        *_rates(session, found),
        *_order(session, found),
    ]
    return reasons or ["nothing keeps it: a worker with a free slot claims it at its next poll at the latest."]


def _other_status(status: WorkflowStatus, wake_at: datetime | None) -> str:
    if status is WorkflowStatus.RUNNING:
        return "it is running."
    if status is not WorkflowStatus.SUSPENDED:
        return f"it {status.as_predicate}."
    until = "until what it awaits is there" if wake_at is None else f"until {time_text(wake_at)}"
    return f"it is suspended {until}."


def _pauses(found: Any) -> Iterator[str]:
    if found["paused_at"] is not None:
        since = time_text(found["paused_at"])
        yield f"queue {found['queue']!r} has been paused since {since}: resume it (`sqla-durable queue resume`)."
    if found["key_paused_at"] is not None:
        since = time_text(found["key_paused_at"])
        yield (
            f"key {found['by']!r} of its queue has been paused since {since}: resume it "
            "(`sqla-durable queue resume --by`)."
        )
    if found["deadline_at"] is not None and found["deadline_at"] <= found["read_at"]:
        yield f"its deadline was {time_text(found['deadline_at'])}: a worker lets it fail."


def _workers(found: Any, live: list[LiveWorker]) -> Iterator[str]:
    queue, name, version = found["queue"], found["name"], found["version"]
    of_queue = [each for each in live if fitting(each.queues).fullmatch(queue)]
    knowing = [each for each in of_queue if each.names is None or name in each.names]
    if not of_queue:
        others = f"those that live claim from {_listed(sorted({one for each in live for one in each.queues}))}"
        yield f"no live worker claims from queue {queue!r}: {others if live else 'no worker is alive'}."
    elif not knowing:
        yield (
            f"of the live workers of queue {queue!r}, {_listed(each.name for each in of_queue)}, none knows a workflow "
            f"named {name!r}."
        )
    elif version is not None and not any(not each.versions or version in each.versions for each in knowing):
        yield f"no live worker of queue {queue!r} claims the version {version!r}."
    elif found["per_worker"] is not None and all(each.of_queue >= found["per_worker"] for each in knowing):
        yield f"each live worker of queue {queue!r} executes {found['per_worker']} of it, which is its per_worker."
    elif all(each.slots is not None and each.executing >= each.slots for each in knowing):
        busy = ", ".join(f"{each.name!r} ({each.executing} of {each.slots})" for each in knowing)
        yield f"all slots of the workers that could execute it are taken: {busy}."


def _places(session: Session, found: Any) -> Iterator[str]:
    queue, by, concurrency = found["queue"], found["by"], found["concurrency"]
    if concurrency is not None:
        taken, first = explanations.holders(session, found, in_key=False)
        if taken >= concurrency:
            yield f"{taken} of {concurrency} places of queue {queue!r} are taken: {_holders(first, taken)}."
    of_key = 1 if found["fifo"] else found["per_key"]
    if of_key is not None and by is not None:
        taken, first = explanations.holders(session, found, in_key=True)
        if taken >= of_key:
            yield f"{taken} of {of_key} places of key {by!r} are taken: {_holders(first, taken)}."


def _rates(session: Session, found: Any) -> Iterator[str]:
    queue, by = found["queue"], found["by"]
    given = [("rate", None, f"queue {queue!r}"), ("key_rate", by, f"key {by!r}")]
    for setting, key, what in given:
        number, period = found[setting], found[f"{setting}_period"]
        if number is None or (setting == "key_rate" and by is None):
            continue
        used, until = explanations.used(session, queue, period, key)
        if used >= number and until is not None:
            yield (
                f"{used} of {number} starts of {what} in {duration_text(period)} are used: there is room again at "
                f"{time_text(until)}."
            )


def _order(session: Session, found: Any) -> Iterator[str]:
    if found["fifo"] and found["by"] is not None:
        before = explanations.ahead(session, found, in_key=True)
        if before:
            yield f"{_number(before)} of key {found['by']!r} {_come(before)} before it."
    before = explanations.ahead(session, found, in_key=False)
    if before:
        turns = ", but keys take turns" if found["is_keyed"] else ""
        yield f"{_number(before)} of its queue {_come(before)} before it{turns}."


def _come(count: int) -> str:
    return "comes" if count == 1 else "come"


def _number(count: int) -> str:
    return f"{count:,} or more" if count >= MOST_AHEAD else f"{count:,}"


def _holders(first: list[Holder], number: int) -> str:
    more = f", and {number - len(first)} more" if number > len(first) else ""
    return f"{', '.join(map(_holder, first))}{more}"


def _holder(each: Holder) -> str:
    where = f" on {each.worker}" if each.worker else ""
    if each.status is WorkflowStatus.FAILED:
        return f"{each.name} {each.workflow_id} (failed: retry it or delete it)"
    verb = " since" if each.status is WorkflowStatus.RUNNING else ", started"
    since = f"{verb} {time_text(each.started_at)}" if each.started_at else ""
    return f"{each.name} {each.workflow_id} ({each.status}{where}{since})"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
