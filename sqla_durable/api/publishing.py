"""Where something is published from: the workflow's own code, a plain step, a transactional one, or no workflow."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from dataclasses import replace
from functools import partial

from sqlalchemy.ext.asyncio import AsyncSession

from sqla_durable.api.callers import AnySession
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.inspection import SessionKind
from sqla_durable.errors import UsageError
from sqla_durable.operations.publishing import Publication, origin_of, publish_at_once, publish_once
from sqla_durable.operations.runtime import StepCall
from sqla_durable.runtime.context import Context, active

_CODEC = Codec.inferred(what="value")


class Done:
    """What is done already; awaiting it does nothing. Sync code gets it, and has nothing to wait for."""

    def __await__(self) -> Generator[None]:
        """Return at once."""
        yield from ()


DONE = Done()


def encode(value: object, *, what: str, limit: int) -> str:
    """Give the JSON text of a value, as what it is: whoever reads it says of which type it is to be.

    Raises:
        EncodingError: it cannot be stored.
        PayloadTooLargeError: it is larger than the limit.
    """
    return replace(_CODEC, what=what, limit=limit).encode(value)


def publish(
    call: str, session: AnySession | None, publication: Callable[[int], Publication], *, name: str
) -> Awaitable[None]:
    """Publish from where the code is.

    Args:
        call: what the user has called, for messages.
        session: that of a transactional step, if the user has given one.
        publication: encodes what is to be published, within this many bytes.
        name: the name of the operation, where it is one of its own.
    """
    context = active()
    if context is None:
        return DONE  # nobody can read what belongs to no workflow
    if context.step is None:
        return _between_steps(context, call, session, publication, name)
    if context.step.definition.session is SessionKind.NONE:
        return _in_plain_step(context, context.step, call, session, publication)
    return _in_transaction(context, context.step, call, session, publication)


def _between_steps(
    context: Context,
    call: str,
    session: AnySession | None,
    publication: Callable[[int], Publication],
    name: str,
) -> Awaitable[None]:
    if session is not None:
        raise UsageError(
            f"{call} was given a session in the code of workflow {context.attempt.name!r}, between steps: leave it "
            "out, or call it in a transactional step with that step's own."
        )
    context.attempt.branches.require_here(call, workflow=context.attempt.name)
    position = context.attempt.begin_call(name, ("sqla_durable", call))
    encoded = partial(publication, context.limit)
    return context.runtime.operate(position, lambda runtime, at: publish_once(runtime, at, encoded)) or DONE


def _in_plain_step(
    context: Context,
    step: StepCall,
    call: str,
    session: AnySession | None,
    publication: Callable[[int], Publication],
) -> Awaitable[None]:
    if session is not None:
        raise UsageError(
            f"{call} was given a session in step {step.position.shown!r}, which is plain and writes at once: leave it "
            "out, or let the step take a Session, and pass that one."
        )
    encoded = partial(publication, context.limit)
    runtime = context.runtime
    return runtime.operate_in_step(step.position, lambda runtime, _: publish_at_once(runtime, step, encoded)) or DONE


def _in_transaction(
    context: Context,
    step: StepCall,
    call: str,
    session: AnySession | None,
    publication: Callable[[int], Publication],
) -> Awaitable[None]:
    if session is None:
        raise UsageError(
            f"{call} was called without the session of step {step.position.shown!r}, which is transactional: pass it "
            "first, so that what is published commits with the step."
        )
    origin = origin_of(context.attempt, step)
    written = publication(context.limit)
    if isinstance(session, AsyncSession):
        return session.run_sync(written.write, origin)
    written.write(session, origin)
    return DONE
