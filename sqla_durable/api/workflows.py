"""Workflow functions: what `durable.workflow` returns, and how workflows are started in the caller's transaction.

Called directly, a workflow function is the plain function that it was made of, in a workflow too; `start` makes it
durable.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property, partial
from typing import Any, NoReturn, ParamSpec, Self, TypeVar, cast, overload
from uuid import UUID

from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

import sqla_durable.api.conflicts as conflicts
import sqla_durable.api.hints as hints
from sqla_durable.api.calls import Call, require_workflow, visit
from sqla_durable.api.options import OnConflict, StartOptions, Unique
from sqla_durable.api.polling import AsyncHandle, Handle, PollingEngine, session_of
from sqla_durable.api.sessions import id_of, in_savepoint, require_session, write, write_in_either
from sqla_durable.api.steps import DurableFunction
from sqla_durable.definitions.blobs import MARK, blobs_in
from sqla_durable.definitions.checks import fault_in
from sqla_durable.definitions.interceptors import Start
from sqla_durable.definitions.payloads import Payloads, owner_of_key
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.errors import ArgumentError, KeyNotVisibleError, UsageError
from sqla_durable.models import Workflow
from sqla_durable.operations.workflow import continue_as_new
from sqla_durable.runtime.context import Context, active
from sqla_durable.store import KeyRule, NewWorkflow, blobs, starts
from sqla_durable.store.keys import SnapshotKept

_BATCH = starts.MOST_AT_ONCE

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


@dataclass(frozen=True, slots=True)
class BoundWorkflow:
    """A workflow with its arguments and options, checked and ready to be started."""

    new: NewWorkflow
    rule: KeyRule | None = None
    blobs: tuple[UUID, ...] = ()


def _in_common(definition: WorkflowDefinition, options: StartOptions) -> tuple[Any, ...]:
    """Return what all starts with these options have in common: what a `NewWorkflow` has from its queue to its version.

    Positional, because that is how a tuple is made fastest.
    """
    timeout, deadline, delay = options.timeout, options.deadline, options.debounce or options.delay
    new = NewWorkflow(
        id=UUID(int=0),
        name="",
        input="",
        queue=options.queue or definition.options.queue,
        priority=options.priority,
        key=options.key,
        delay=None if delay is None or delay <= timedelta() else delay.total_seconds(),
        wake_at=options.at,
        detached=options.detached,
        timeout=None if timeout is None else timeout.total_seconds(),
        deadline=deadline.total_seconds() if isinstance(deadline, timedelta) else None,
        deadline_at=deadline if isinstance(deadline, datetime) else None,
        version=definition.durable_options.version,
        by=options.by,
        tags=None if options.tags is None else dict(options.tags),
    )
    return new[3:-1]


def bind_without_headers(
    workflow: AnyWorkflowFunction[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> BoundWorkflow:
    """Bind a child: it gets its headers when it is started, so that a replay asks no interceptor."""
    given = workflow.definition.encode(args, kwargs)
    new = NewWorkflow._make((uuid7(), workflow.name, given, *workflow.in_common, None))
    if workflow.definition.durable_options.payloads.codecs:
        new = _sealed(workflow, new)
    return BoundWorkflow(new, workflow.rule)


def _sealed(workflow: AnyWorkflowFunction[..., Any], new: NewWorkflow) -> NewWorkflow:
    # With a rule, the input may come to replace that of another row, which has the key.
    owner = str(new.id) if workflow.rule is None else owner_of_key(new.name, new.key)
    return new._replace(input=workflow.definition.durable_options.payloads.seal_members(new.input, owner))


def with_id(new: NewWorkflow, workflow_id: UUID) -> NewWorkflow:
    """Return what is to be started, without a rule for its key, under another id."""
    return new._replace(id=workflow_id, input=Payloads.moved(new.input, new.name, str(workflow_id)))


def with_headers(definition: WorkflowDefinition, new: NewWorkflow) -> NewWorkflow:
    """Ask the interceptors, and refuse what cannot be stored.

    Raises:
        ArgumentError: a header cannot be stored.
    """
    interceptors = definition.durable_options.interceptors
    if not interceptors.starts:
        return new
    headers = interceptors.headers(Start(new.id, new.name, new.queue, new.key))
    for name, value in (headers or {}).items():
        for text in (name, value):
            fault = fault_in(text, longest=None)
            if fault is not None:
                raise ArgumentError(
                    f"an interceptor gave workflow {definition.name!r} the header {name!r}: {value!r}, of which "
                    f"{text!r} {fault}. Nothing was started."
                )
    return new._replace(headers=headers)


def start(session: Session, bound: BoundWorkflow) -> Workflow:
    """Add a workflow to the caller's transaction and return its record; see `WorkflowFunction.start`.

    Raises:
        ArgumentError: this is not what `bind` returned.
        KeyNotVisibleError: the workflow that has the key cannot be seen.
        UsageError: this is a workflow's own code, and there is no key.
    """
    given, context = _checked(bound), active()
    workflow = add(session, given if context is None else _started_in(context, given))
    hints.announce(session, *_hints_for([given.new]))
    return workflow


def add(session: Session, bound: BoundWorkflow) -> Workflow:
    """Add a workflow as `start` does, without a hint to workers: it is executed here."""
    workflow = _added(session, bound)
    if bound.blobs:
        session.flush()
        blobs.adopt(session, dict.fromkeys(bound.blobs, workflow.id))
    return workflow


def _added(session: Session, bound: BoundWorkflow) -> Workflow:
    if bound.new.key is None:
        return starts.add(session, bound.new)
    if bound.rule is not None:
        return conflicts.add_ruled(session, (bound.new, bound.rule))
    try:
        return starts.insert_unless_known(session, bound.new)
    except SnapshotKept:
        with in_savepoint(session, what="workflow", name=bound.new.name, key=bound.new.key):
            return starts.insert_in_snapshot(session, bound.new)


def start_many(session: Session, bound: Iterable[BoundWorkflow]) -> list[UUID]:
    """Start many workflows in the caller's transaction, one statement for each 5,000.

    ```python
    start_many(session, (checkout.bind(order.id) for order in orders))
    ```

    Never commits. Up to 5,000 workflows are due in the order given, more of them with keys in the order of keys from
    statement to statement. Waits for another transaction that is inserting one of the same keys.

    Args:
        session: the caller's session.
        bound: what `checkout.bind(...)` returned, of any workflows.

    Returns:
        The ids of the records in order; for a known key the id of the record that has it.

    Raises:
        ArgumentError, EncodingError: some arguments do not fit; nothing was started.
        KeyNotVisibleError: a workflow that has one of the keys cannot be seen; likewise. A role that may not delete
            has to roll back then.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    return write(session, partial(_start_many, bound=bound), name="start_many", rights="starter")


def _start_many(session: Session, *, bound: Iterable[BoundWorkflow]) -> list[UUID]:
    given, context = [_checked(each) for each in bound], active()
    given = given if context is None else [_started_in(context, each) for each in given]
    new = [each.new for each in given]
    has_rules = any(each.rule is not None for each in given)
    ids = _start_all(session, given) if has_rules else _start_plain(session, new)
    blobs.adopt(session, {blob: at for each, at in zip(given, ids, strict=True) for blob in each.blobs})
    hints.announce(session, *_hints_for(new))
    return ids


def _start_all(session: Session, given: Sequence[BoundWorkflow]) -> list[UUID]:
    """Start workflows some of which have a rule for their keys: all of them, or none."""
    plain = [each.new for each in given if each.rule is None]
    ruled = [(each.new, each.rule) for each in given if each.rule is not None]
    first, _ = ruled[0]
    with in_savepoint(session, what=_one_of(len(given)), name=first.name, key=first.key):
        ids = dict(zip((new.id for new in plain), _start_plain(session, plain), strict=True))
        ids |= conflicts.start_all_ruled(session, ruled)
    return [ids[each.new.id] for each in given]


def _start_plain(session: Session, given: Sequence[NewWorkflow]) -> list[UUID]:
    # In the order of keys over all statements: two callers with the same keys must not wait for each other.
    has_keys = any(new.key is not None for new in given)
    ordered = sorted(given, key=lambda new: (new.key or "", new.name)) if has_keys else given
    ids: list[UUID] = []
    try:
        for first in range(0, len(given), _BATCH):
            ids += _inserted(session, ordered[first : first + _BATCH])
    except KeyNotVisibleError as error:
        try:
            starts.undo(session, given)
        except ProgrammingError as denied:
            raise error from denied  # the transaction is aborted, with all that it has started
        raise
    if not has_keys:
        return ids
    by_own = dict(zip((new.id for new in ordered), ids, strict=True))
    return [by_own[new.id] for new in given]


def _inserted(session: Session, batch: Sequence[NewWorkflow]) -> list[UUID]:
    try:
        return starts.insert_many(session, batch)
    except SnapshotKept:
        first = next(each for each in batch if each.key is not None)
        with in_savepoint(session, what=_one_of(len(batch)), name=first.name, key=first.key or ""):
            return starts.insert_many_in_snapshot(session, batch)


def _one_of(count: int) -> str:
    return "workflow" if count == 1 else f"one of {count} workflows, the first of which is"


def _started_in(context: Context, bound: BoundWorkflow) -> BoundWorkflow:
    """Return what is started in a step of a workflow as that one's child; in a workflow's own code, the same.

    Raises:
        UsageError: it has no key, or a rule for it, so that each replay of the workflow's own code would start another.
    """
    attempt, step, new = context.attempt, context.step, bound.new
    if step is None:
        if new.key is None or bound.rule is not None:
            key = "give it a key" if bound.rule is None else "leave out what its options say about others with its key"
            raise UsageError(
                f"{new.name!r} was started in the code of workflow {attempt.name!r}, which is executed again on "
                f"each replay and would start another: call start_child({new.name}, ...), start it in a step "
                f"that takes a Session, or {key}. Nothing was started."
            )
        return bound
    attempt.note_child()
    detached = new.detached or attempt.is_compensating
    child = new._replace(parent_id=attempt.workflow_id, parent_key=step.position.key, detached=detached)
    return replace(bound, new=child)


def _hints_for(given: Iterable[NewWorkflow]) -> set[str]:
    """Return the hints for new workflows: one with a delay is on no queue yet, and may be the next timer."""
    queues = {None if new.delay is not None or new.wake_at is not None else new.queue for new in given}
    return {hints.EVERYWHERE if each is None else hints.to_queue(each) for each in queues}


def _checked(bound: BoundWorkflow) -> BoundWorkflow:
    if not isinstance(bound, BoundWorkflow):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"expected workflow.bind(...), got {bound!r}. Nothing was started.")
    return bound


class AnyWorkflowFunction(DurableFunction[P, R]):
    """A workflow function of either kind."""

    def __init__(self, definition: WorkflowDefinition, options: StartOptions | None = None) -> None:
        super().__init__(definition.fn, definition.name)
        self.definition = definition
        self.start_options = options or StartOptions()

    def options(
        self,
        *,
        key: str | None = None,
        queue: str | None = None,
        by: str | None = None,
        tags: Mapping[str, str] | None = None,
        priority: int | None = None,
        delay: timedelta | None = None,
        at: datetime | None = None,
        detached: bool | None = None,
        timeout: timedelta | None = None,
        deadline: timedelta | datetime | None = None,
        unique: Unique | None = None,
        on_conflict: OnConflict | None = None,
        debounce: timedelta | None = None,
        longest_wait: timedelta | None = None,
        throttle: timedelta | None = None,
    ) -> Self:
        """Return the workflow with options for its start, added to those that it has: see `StartOptions`.

        ```python
        checkout.options(key=f"order-{order.id}", priority=-1).start(session, order.id)
        ```

        Raises:
            ArgumentError: an option is blank, out of range, or contradicts another.
        """
        given = {
            "key": key,
            "queue": queue,
            "by": by,
            "tags": tags,
            "priority": priority,
            "delay": delay,
            "at": at,
            "detached": detached,
            "timeout": timeout,
            "deadline": deadline,
            "unique": unique,
            "on_conflict": on_conflict,
            "debounce": debounce,
            "longest_wait": longest_wait,
            "throttle": throttle,
        }
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return type(self)(self.definition, replace(self.start_options, **changes))

    def _continue_as_new(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call[NoReturn]:
        text = self.definition.encode(args, kwargs)
        payloads = self.definition.durable_options.payloads

        def carry_out(given: Context | None) -> Any:
            context = require_workflow("continue_as_new", given)
            if context.attempt.name != self.name:
                raise UsageError(
                    f"{self.name}.continue_as_new() was called in workflow {context.attempt.name!r}, which continues "
                    "as itself: call its own."
                )
            sealed = payloads.seal_members(text, str(context.attempt.workflow_id))
            return visit(context, "continue_as_new", partial(continue_as_new, given=sealed))

        return Call("WorkflowFunction.continue_as_new", carry_out)

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> BoundWorkflow:
        """Check the arguments and return them with the workflow, for `start_many` and its like.

        Raises:
            ArgumentError: they do not fit the annotations, or one is an ORM instance.
            EncodingError: one cannot be stored.
        """
        given = self.definition.encode(args, kwargs)
        new = NewWorkflow._make((uuid7(), self.definition.name, given, *self.in_common, None))
        if self.definition.durable_options.payloads.codecs:
            new = _sealed(self, new)
        found = blobs_in(given) if MARK in given else ()
        return BoundWorkflow(with_headers(self.definition, new), self.rule, found)

    @cached_property
    def in_common(self) -> tuple[Any, ...]:
        """What all starts with these options have in common: what a `NewWorkflow` has from its queue to its version."""
        return _in_common(self.definition, self.start_options)

    @cached_property
    def rule(self) -> KeyRule | None:
        """The rule that the options are for its key.

        Raises:
            ArgumentError: there is a rule and no key.
        """
        rule = self.start_options.rule
        if rule is not None and self.start_options.key is None:
            raise ArgumentError(
                f"{self.definition.name!r} is started with {self.start_options.needs_key}, and without a key: add "
                "options(key=...). Nothing was started."
            )
        return rule

    @overload
    def start(self, session: Session, *args: P.args, **kwargs: P.kwargs) -> Workflow: ...

    @overload
    def start(self, session: AsyncSession, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, Workflow]: ...

    def start(
        self, session: Session | AsyncSession, *args: P.args, **kwargs: P.kwargs
    ) -> Workflow | Coroutine[Any, Any, Workflow]:
        """Start the workflow in the caller's transaction and return its record.

        Never commits: the workflow is there when the caller commits, and is not when it rolls back. Without a key
        the record is added to the session like any other object and inserted with its next flush, so it can be
        assigned to a relationship before. With a key one INSERT is executed now; it waits for another transaction
        that is inserting the same key, takes its record if it commits, and leaves the caller's transaction usable.
        In REPEATABLE READ and SERIALIZABLE that wait ends with `KeyNotVisibleError` if the other one commits.
        In a step of another workflow the record is that one's child; see `start_child`. Blobs among the arguments that
        belong to no workflow are this one's from now on; with one, the session is flushed at once.

        Args:
            session: the caller's session; with an `AsyncSession`, await the call.
            *args: the arguments of the workflow function.
            **kwargs: the same, by name.

        Returns:
            The record; for a known key the one that has it, whatever its status. Of that, name, queue, status and the
            times of its start are read; its payloads are loaded when they are asked for.

        Raises:
            ArgumentError: the arguments do not fit the annotations, or one is an ORM instance.
            EncodingError: one cannot be stored, or is too large.
            KeyNotVisibleError: the workflow that has the key cannot be seen.
            SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
        """
        require_session(session)
        return write_in_either(session, partial(start, bound=self.bind(*args, **kwargs)), rights="starter")

    @overload
    def handle(self, session: Session | sessionmaker[Session], workflow: Workflow | UUID) -> Handle[R]: ...

    @overload
    def handle(
        self, session: AsyncSession | async_sessionmaker[AsyncSession], workflow: Workflow | UUID
    ) -> AsyncHandle[R]: ...

    def handle(
        self,
        session: Session | sessionmaker[Session] | AsyncSession | async_sessionmaker[AsyncSession],
        workflow: Workflow | UUID,
    ) -> Handle[R] | AsyncHandle[R]:
        """Return a handle that waits for the outcome, on the engine of the session or sessionmaker.

        The session itself is not used: the handle opens short transactions of its own.

        Raises:
            SessionError: this is no session or sessionmaker, or its engine is not PostgreSQL's.
        """
        found = id_of(workflow)
        opened = session_of(session, what="handle()")
        handle = AsyncHandle[R] if isinstance(opened, AsyncSession) else Handle[R]
        return handle(self.definition, PollingEngine.of(opened), found)


class WorkflowFunction(AnyWorkflowFunction[P, R]):
    """A workflow made of a `def`. Called directly it is the plain function; `start` makes it durable."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the plain function; inside another workflow its steps become that one's."""
        return cast("R", self.definition.fn(*args, **kwargs))

    def continue_as_new(self, *args: P.args, **kwargs: P.kwargs) -> NoReturn:
        """Continue the workflow as new, with these arguments and no history: for one that runs for months.

        ```python
        @durable.workflow
        def follow(customer: int, seen: int = 0) -> None:
            for _ in range(100):
                handle(wait_signal("event", Event))
                seen += 1
            follow.continue_as_new(customer, seen)
        ```

        In one statement its recorded steps are deleted and its input is replaced; its id, key, children, signals,
        events and streams stay. This attempt ends here, and a worker begins the next one. Branches that are still open
        are ended too.

        Raises:
            ArgumentError, EncodingError: an argument does not fit the annotations, or cannot be stored.
            UsageError: this is not the workflow's own code.
        """
        self._continue_as_new(args, kwargs).outcome()


class AsyncWorkflowFunction(AnyWorkflowFunction[P, R]):
    """A workflow made of an `async def`. Called directly it is the plain function; `start` makes it durable."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the plain function; inside another workflow its steps become that one's."""
        return cast("Coroutine[Any, Any, R]", self.definition.fn(*args, **kwargs))

    def continue_as_new(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, NoReturn]:
        """Continue the workflow as new with these arguments; await it. See `WorkflowFunction.continue_as_new`."""
        return self._continue_as_new(args, kwargs).coroutine()
