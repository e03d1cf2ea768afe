"""Callbacks: a token for a foreign system, which answers a workflow by it alone, from any session."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Generic
from uuid import UUID

from sqlalchemy.orm import Session
from typing_extensions import TypeVar

import sqla_durable.api.hints as hints
from sqla_durable.api.calls import ANY, Call, operation
from sqla_durable.api.sessions import in_savepoint, write
from sqla_durable.definitions.checks import require_positive_duration
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.payloads import Payloads, Place
from sqla_durable.errors import (
    ArgumentError,
    CallbackFinishedError,
    NotFoundError,
    WorkflowFinishedError,
)
from sqla_durable.operations import callback
from sqla_durable.operations.calls import Position
from sqla_durable.operations.runtime import Runtime
from sqla_durable.store import blobs, keys
from sqla_durable.store import callbacks as statements

T = TypeVar("T", default=Any)
C = TypeVar("C")
R = TypeVar("R", covariant=True)

_TOKEN = re.compile(r"([0-9a-f]{32})\.[0-9a-f]{48}")


class _BaseCallback(Generic[R]):
    def __init__(
        self, made: callback.CallbackRecord, position: Position, kind: Codec, name: str, secrets: tuple[bytes, ...]
    ) -> None:
        self._made = made
        self._secrets = secrets
        self._key = position.key
        self._kind = kind
        self._name = name

    @property
    def token(self) -> str:
        """The token by which the foreign system answers.

        Raises:
            UsageError: it was made with a secret that this worker does not have.
        """
        return self._made.reveal_token(self._secrets)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._key!r} of workflow {self._made.workflow_id}>"  # the token is secret

    def _result(self, step_key: str | None) -> Call[R]:
        receive = partial(callback.result, key=self._key, callback=self._made, kind=self._kind)
        return operation("Callback.result", f"result:{self._name}", receive, step_key=step_key)


class Callback(_BaseCallback[R]):
    """An answer that a `def` workflow waits for, and a foreign system gives.

    ```python
    payment = create_callback(Receipt, timeout=timedelta(hours=1))
    ask_provider(order_id, payment.token)
    receipt = payment.result()
    ```

    Attributes:
        token: what the foreign system answers by: 81 letters, digits and a dot, of which 192 bits are random. Whoever
            has it can answer.
    """

    def result(self, *, step_key: str | None = None) -> R:
        """Wait for the outcome: return the value or raise the error, the same on every replay and for every call.

        Meanwhile the workflow is suspended and needs a row and nothing else; with a `heartbeat` it is woken once in
        that time to see that the callback is alive.

        Args:
            step_key: an explicit identity in the history, instead of `result:NAME` and its occurrence.

        Raises:
            CallbackFailedError: it has failed, says whoever has the token.
            WaitTimeoutError: it was not answered within its `timeout`.
            CallbackSilentError: the same, because it was silent for longer than its `heartbeat`.
            NotFoundError: this workflow is a fork, and nobody can answer the original any more.
            DecodingError: the value does not fit the callback's type. It counts as received.
            UsageError: this is not a workflow's own code, or nobody could answer (a joined executor).
        """
        return self._result(step_key).outcome()


class AsyncCallback(_BaseCallback[R]):
    """An answer that an `async def` workflow waits for: await it, or its `result()`. See `Callback`.

    ```python
    payment = await create_callback(Receipt, timeout=timedelta(hours=1))
    await ask_provider(order_id, payment.token)
    receipt = await payment
    ```
    """

    def result(self, *, step_key: str | None = None) -> Coroutine[Any, Any, R]:
        """Wait for the outcome; see `Callback.result`."""
        return self._result(step_key).coroutine()

    def __await__(self) -> Generator[Any, None, R]:
        return self.result().__await__()


def create_callback(
    kind: type[T] = ANY,
    *,
    timeout: timedelta | None = None,
    heartbeat: timedelta | None = None,
    step_key: str | None = None,
) -> Callback[T]:
    """Create a callback in a workflow's code, to be answered by its token.

    ```python
    payment = create_callback(Receipt, timeout=timedelta(hours=1))
    ask_provider(order_id, payment.token)
    receipt = payment.result()
    ```

    It is an operation, recorded once: a replay has the same token, which is committed when this returns. From then
    on it can be answered, before the workflow waits for it too. The first answer stands. Its times are on the
    database's clock and run from when it is created, whoever waits; when one is over, it cannot be answered any more.

    Args:
        kind: the type of the value that it is completed with.
        timeout: how long it can be answered.
        heartbeat: how long it may be silent: `heartbeat_callback` is to be called more often than that.
        step_key: an explicit identity in the history, instead of `create_callback` and its occurrence.

    Raises:
        UsageError: this is not a workflow's own code.
        UsageError: the workflow is `async def`.
        ArgumentError: a time is no timedelta, or not positive.
    """
    return create_callback_call(Callback[T], kind, timeout, heartbeat, step_key).outcome()


def create_callback_call(
    face: Callable[[callback.CallbackRecord, Position, Codec, str, tuple[bytes, ...]], C],
    kind: Any,
    timeout: timedelta | None,
    heartbeat: timedelta | None,
    step_key: str | None,
) -> Call[C]:
    """Return the call of `create_callback`, which returns a callback of this class."""
    for option, value in {"timeout": timeout, "heartbeat": heartbeat}.items():
        if value is not None:
            require_positive_duration(value, option)
    name = step_key or statements.NAME
    codec = Codec.of(kind, what=f"value of callback {name!r}")

    async def create(runtime: Runtime, position: Position) -> C:
        made = await callback.create(runtime, position, within=timeout, heartbeat=heartbeat)
        return face(made, position, codec, name, runtime.attempt.options.secrets)

    return operation("create_callback", statements.NAME, create, step_key=step_key)


def complete_callback(session: Session, token: str, value: object = None) -> None:
    """Answer a callback with a value, by its token, in the caller's transaction.

    ```python
    with SessionLocal.begin() as session:
        complete_callback(session, request["reference"], Receipt(request["charge"]))
    ```

    Never commits: it is answered when the caller commits. The workflow may wait for it already, or come to wait for it
    later. Of several that answer at once one is the first; the others wait until it commits, and learn what came of it.
    The same answer again is accepted and changes nothing. Inserts a row and locks the callback's own record, for which
    the workflow's worker does not wait, but for `continue_as_new`, which deletes that record: so commit soon.

    Args:
        session: the caller's session.
        token: that of `Callback.token`.
        value: a value that goes into JSON: what JSON knows, a dataclass, a pydantic model, a datetime.

    Raises:
        NotFoundError: there is no such callback. Nothing was written, and the transaction is usable.
        CallbackFinishedError: it has another outcome, or its time is over. Likewise.
        WorkflowFinishedError: its workflow has an outcome, and it has none. Likewise.
        EncodingError, PayloadTooLargeError: the value cannot be stored, or is too large.
        ArgumentError: this is no token.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    found = _Token.of(token)
    text = Codec.inferred(what="value of a callback").encode(value)
    answer = partial(_answer, token=found, value=text)
    write(session, answer, name="complete_callback", rights="answerer")


def fail_callback(session: Session, token: str, message: str, *, details: object = None) -> None:
    """Answer a callback with an error: the workflow gets a `CallbackFailedError`. Otherwise as `complete_callback`.

    Args:
        session: the caller's session.
        token: that of `Callback.token`.
        message: what has happened.
        details: what else there is to know, which goes into JSON.

    Raises:
        Exception: as `complete_callback`; ArgumentError also where the message is no text.
    """
    found = _Token.of(token)
    if not isinstance(message, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"message={message!r} is no text: say what has happened, and give the rest as details=.")
    given = {"error": message} if details is None else {"error": message, "details": details}
    text = Codec.inferred(what="error of a callback").encode(given)
    answer = partial(_answer, token=found, error=text)
    write(session, answer, name="fail_callback", rights="answerer")


def heartbeat_callback(session: Session, token: str) -> None:
    """Record that whoever is to answer a callback is alive, by its token.

    Never commits: it counts when the caller commits, as of now. Updates the callback's own record, one row however
    often; wakes nobody. Without a `heartbeat` of the callback it changes nothing for the workflow.

    Raises:
        Exception: as `complete_callback`; CallbackFinishedError whatever the outcome is.
    """
    beat = partial(_beat, token=_Token.of(token))
    write(session, beat, name="heartbeat_callback", rights="answerer")


@dataclass(frozen=True, slots=True)
class _Token:
    """A token that is well formed; where it is shown, its secret is not."""

    workflow_id: UUID
    digest: str
    shown: str

    @classmethod
    def of(cls, token: object) -> _Token:
        found = _TOKEN.fullmatch(token) if isinstance(token, str) else None
        if found is None:
            text = f"a text of {len(token):,} characters" if isinstance(token, str) else f"a {type(token).__name__}"
            raise ArgumentError(f"{text} is no token of a callback: give that of `Callback.token`, as it is.")
        text = found.string
        return cls(UUID(found[1]), callback.digest_of(text), f"{text[:37]}…")


def _answer(session: Session, *, token: _Token, value: str = "", error: str = "") -> None:
    key, name = _hold(session, token)
    place = Place.of(token.workflow_id, f"callback {key}")
    payload = error or f'{{"value": {Payloads.of_workflow(name).seal(value, place)}}}'
    blobs.adopt_in(session, error or value, token.workflow_id)
    found = _read_callback(session, token, key, payload)
    if found.is_same:
        return
    _refuse_finished(token, found)
    if _insert(session, token, key, signal=found.signal or "", payload=payload):
        hints.announce(session, hints.sent_to(token.workflow_id, found.signal or ""))
        return
    found = _read_callback(session, token, key, payload)  # inserted meanwhile by who does not hold the callback
    if not found.is_same:
        _refuse_finished(token, found)
        raise keys.not_visible("the outcome of callback", name=token.shown, key=key)


def _insert(session: Session, token: _Token, key: str, *, signal: str, payload: str) -> bool:
    try:
        return statements.answer(session, token.workflow_id, signal=signal, payload=payload)
    except keys.SnapshotKept:
        with in_savepoint(session, what="the outcome of callback", name=token.shown, key=key):
            return statements.answer_in_snapshot(session, token.workflow_id, signal=signal, payload=payload)


def _beat(session: Session, *, token: _Token) -> None:
    key = _hold(session, token).key
    _refuse_finished(token, _read_callback(session, token, key))
    statements.beat(session, token.workflow_id, key)


def _hold(session: Session, token: _Token) -> statements.Locked:
    """Lock the callback: what is asked then is newer than all answers before."""
    return statements.hold(session, token.workflow_id, digest=token.digest) or _refuse_unknown(token)


def _read_callback(session: Session, token: _Token, key: str, payload: str | None = None) -> statements.Callback:
    return statements.read(session, token.workflow_id, key, payload=payload) or _refuse_unknown(token)


def _refuse_unknown(token: _Token) -> Any:
    raise NotFoundError(
        f"no callback has the token {token.shown}: its workflow is not in this database, was deleted, rewound or "
        "continued as new, or the token was changed on its way. Nothing was written."
    )


def _refuse_finished(token: _Token, found: statements.Callback) -> None:
    past = _past(found)
    if past is not None:
        raise CallbackFinishedError(
            f"callback {token.shown} {past}, and the first outcome stands. Nothing was written.",
            workflow_id=token.workflow_id,
        )
    if found.workflow_status.finished:
        raise WorkflowFinishedError(
            f"callback {token.shown} is that of workflow {token.workflow_id}, which "
            f"{found.workflow_status.as_predicate}. Nothing was written.",
            workflow_id=token.workflow_id,
        )


def _past(found: statements.Callback) -> str | None:
    """Return what has become of a callback, for messages; None if it can be answered."""
    match found.answer:
        case None if found.due_in <= 0:
            return _expired(found.due_to)
        case None:
            return None
        case statements.Answer(expired=str(due_to)):
            return _expired(due_to)
        case statements.Answer(error=str()):
            return "has failed already"
        case _:
            return "was completed already"


def _expired(due_to: str) -> str:
    return "was silent for too long" if due_to == "heartbeat" else "was not answered in time"
