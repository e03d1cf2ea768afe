"""`fork`: new workflows that begin with a part of the history of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypedDict, Unpack, overload
from uuid import UUID

from sqlalchemy import CompoundSelect, Select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

import sqla_durable.api.hints as hints
from sqla_durable.api.sessions import in_savepoint
from sqla_durable.definitions.checks import fault_in
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.payloads import Payloads, Place, argument, field_of_outcome
from sqla_durable.errors import ArgumentError, NotFoundError
from sqla_durable.manage.verbs import Selected, apply_verb
from sqla_durable.models import Workflow
from sqla_durable.store import forks, keys, manage
from sqla_durable.store.selecting import Selection

_FORK = "fork"
"""The owner of values that an operator gives forks: a fork may have them of anyone."""


class ForkOptions(TypedDict, total=False):
    """The options of `fork` for several workflows, for type checkers; `fork` says what each is."""

    from_step: str | None
    input: Mapping[str, object] | None
    outcomes: Mapping[str, object] | None
    version: str | None
    queue: str | None


class OneForkOptions(ForkOptions, total=False):
    """The options of `fork` for one workflow."""

    key: str | None


@overload
def fork(session: Session, workflows: Workflow | UUID, **options: Unpack[OneForkOptions]) -> Workflow: ...


@overload
def fork(
    session: Session,
    workflows: Iterable[Workflow | UUID] | Select[Any] | CompoundSelect[Any],
    **options: Unpack[ForkOptions],
) -> list[Workflow]: ...


def fork(
    session: Session,
    workflows: Selected,
    *,
    from_step: str | None = None,
    input: Mapping[str, object] | None = None,  # noqa: A002 (the record's own word for it)
    outcomes: Mapping[str, object] | None = None,
    version: str | None = None,
    key: str | None = None,
    queue: str | None = None,
) -> Any:
    """Start new workflows that begin with a part of the history of others, which stay as they are.

    ```python
    manage.fork(session, order.checkout, from_step="charge")
    manage.fork(session, order.checkout, from_step="ship", input={"address": address}, outcomes={"charge": receipt})
    ```

    Copied is what was recorded before `from_step`, by the `position` of the steps: outcomes, failed ones too, with the
    events that these steps set and the items that they wrote to streams, which get new numbers. Not copied are steps
    without an outcome, signals, and children: a copied step that started a child has the old one. An outcome is copied
    and not its effects: nothing is executed or written twice.

    In the caller's transaction: they exist when it commits. From one snapshot, without a lock on what is copied, so a
    running workflow goes on undisturbed. Flushes the session.

    Args:
        session: the caller's session.
        workflows: one record or id; or several, or a `select()`, as for `cancel`.
        from_step: the key of a recorded step, as in `Step.key`, which is the first to be executed; None begins from the
            beginning. There, `#` and `/` of keys that were chosen are `%23` and `%2F`.
        input: arguments that differ, by parameter name.
        outcomes: by the key of a recorded step, the result that it is to have instead. Wherever the step stands: one
            behind `from_step` is not executed when the workflow comes to it.
        version: the version of the code that is to execute it; None keeps it.
        key: an idempotency key, for one workflow: a fork of it that has the key already is returned instead.
        queue: the queue to enqueue to; None keeps it.

    Returns:
        The new record; of several, a list in the order of the ids of what they were made of.

    Raises:
        ArgumentError: a workflow has no record of one of the steps, a name is blank, several workflows are to have one
            key, the key is another workflow's, or something else is given than workflows; nothing was started.
        EncodingError: an argument or a result cannot be stored.
        NotFoundError: a workflow that was given by its record or id is not there.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    one = isinstance(workflows, (Workflow, UUID))
    _refuse_names(from_step=from_step, version=version, key=key, queue=queue)
    if key is not None and not one:
        raise ArgumentError(f"key={key!r} is of one workflow, and several were given: fork them one by one.")
    change = forks.Change(
        from_step=from_step,
        input={name: _json(f"argument {name!r}", value) for name, value in (input or {}).items()},
        outcomes={step: _json(f"result of step {step!r}", value) for step, value in (outcomes or {}).items()},
        version=version,
        key=key,
        queue=queue,
    )
    forked = apply_verb(session, workflows, partial(_fork, change=change), name="fork")
    return forked[0] if one else forked


def _refuse_names(**names: str | None) -> None:
    for name, value in names.items():
        fault = None if value is None else fault_in(value)
        if fault is not None:
            raise ArgumentError(f"{name}={value!r} {fault}: pass a text that is not blank. Nothing was started.")


def _json(what: str, value: object) -> str:
    # By the value's own type: the annotations are where the workflow's code is, and need not be here.
    return Codec.inferred(what=f"{what} of a fork").encode(value)


def _fork(session: Session, wanted: Selection, change: forks.Change) -> list[Workflow]:
    names: Mapping[UUID, str] = {}
    for _ in range(keys.MOST_REPEATS):
        names = forks.sources(session, wanted)
        _refuse_missing(names, wanted)
        known = None if change.key is None else _known(session, names, change.key)
        if known is not None or not names:
            return [] if known is None else [known]
        ids = {source: uuid7() for source in names}
        made = _copied(session, names, ids, _sealed(change, names))
        if made:
            hints.announce(session, hints.EVERYWHERE)
            return forks.records(session, [each for each in ids.values() if each in made])
        manage.refuse_unrecorded(session, list(names), change.steps, verb="started")
        # Somebody has just started one with the key, or deleted what was to be forked: look again.
    raise keys.not_visible("workflow", name=next(iter(names.values())), key=change.key or "")


def _sealed(change: forks.Change, names: Mapping[UUID, str]) -> forks.Change:
    """Return the change with its values as they are to be stored: a fork may have values of any owner."""
    payloads = Payloads.of_workflow(next(iter(names.values())))
    return replace(
        change,
        input={name: payloads.seal(text, argument(name, _FORK)) for name, text in change.input.items()},
        outcomes={key: _sealed_outcome(payloads, key, text) for key, text in change.outcomes.items()},
    )


def _sealed_outcome(payloads: Payloads, key: str, text: str) -> str:
    field = field_of_outcome(key)
    return text if field is None else payloads.seal(text, Place(_FORK, field))


def _copied(session: Session, names: Mapping[UUID, str], ids: Mapping[UUID, UUID], change: forks.Change) -> set[UUID]:
    if change.key is not None:
        try:
            keys.require_the_latest(session)
        except keys.SnapshotKept:
            (name,) = names.values()
            with in_savepoint(session, what="workflow", name=name, key=change.key):
                return forks.copy(session, ids, change)
    return forks.copy(session, ids, change)


def _refuse_missing(names: Mapping[UUID, str], wanted: Selection) -> None:
    if wanted.query is not None:
        return
    for each in wanted.ids:
        if each not in names:
            raise NotFoundError(
                f"no workflow {each} is visible here: is the transaction that started it committed? Nothing was "
                "started.",
                workflow_id=each,
            )


def _known(session: Session, names: Mapping[UUID, str], key: str) -> Workflow | None:
    ((source, name),) = names.items()
    found = forks.find(session, name, key)
    if found is not None and found.forked_from != source:
        raise ArgumentError(
            f"key={key!r} is that of workflow {name!r} {found.id}, which is no fork of {source}: give another key. "
            "Nothing was started."
        )
    return found
