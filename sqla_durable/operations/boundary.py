"""Watches over the transaction that a step's writes and its checkpoint share while the user's function has it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction

from sqla_durable.errors import StepTransactionError

# Not in Session.info, which is the user's: a step that clears it must not take its guard off.
_watched: WeakKeyDictionary[Session, Boundary] = WeakKeyDictionary()


class Boundary:
    """Refuses that a step ends its own transaction, or lets it span two databases.

    A commit by the step is refused before it happens, because its writes would be durable without the checkpoint. A
    rollback or a close is noticed afterwards: then nothing of the step is written. Savepoints are the step's own.
    """

    def __init__(self, session: Session, *, step: str) -> None:
        self._session = session
        self._step = step
        self._transaction = _innermost(session)
        self._connections = 1  # the one for the checkpoint is there from the beginning
        self._outer = _watched.get(session)
        _watched[session] = self

    def check(self) -> None:
        """Give the transaction back to the engine.

        Raises:
            StepTransactionError: it is no longer the one that the step was given, or a failed flush has spoilt it.
        """
        transaction = self._transaction
        self.leave()
        if not any(each is transaction for each in _open(self._session)):
            raise self._error("rolled back or closed its session", "leave both to the engine, or use begin_nested()")
        if transaction is None or not transaction.is_active:
            raise self._error("went on after a failed flush", "let the error out, or flush inside begin_nested()")

    def leave(self) -> None:
        """Stop watching."""
        if self._transaction is not None:
            self._transaction = None
            if self._outer is None:
                _watched.pop(self._session, None)
            else:
                _watched[self._session] = self._outer

    def refuse_commit(self) -> None:
        """Refuse a commit of the step's transaction, or of the whole one around it.

        Raises:
            StepTransactionError: it is one of them.
        """
        if _innermost(self._session) in (self._transaction, self._session.get_transaction()):
            raise self._error("committed its session", "return, and the engine commits both together")

    def refuse_second(self, transaction: SessionTransaction) -> None:
        """Refuse a second connection.

        Raises:
            StepTransactionError: this is one.
        """
        self._connections += not transaction.nested
        if self._connections > 1:
            raise self._error("uses two databases in one session", "write to the second one in a step of its own")

    def _error(self, what: str, instead: str) -> StepTransactionError:
        return StepTransactionError(
            f"step {self._step!r} {what}, but its checkpoint must commit with its writes: {instead}.", step=self._step
        )


def is_of_step(session: Session) -> bool:
    """Return whether a step that is being executed has this session."""
    return session in _watched


# For all sessions: to listen to one, and to stop, takes forty microseconds, and every step would pay for it.
@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    boundary = _watched.get(session)
    if boundary is not None:
        boundary.refuse_commit()


@event.listens_for(Session, "after_begin")
def _after_begin(session: Session, transaction: SessionTransaction, _connection: Connection) -> None:
    boundary = _watched.get(session)
    if boundary is not None:
        boundary.refuse_second(transaction)


def _innermost(session: Session) -> SessionTransaction | None:
    return session.get_nested_transaction() or session.get_transaction()


def _open(session: Session) -> list[SessionTransaction]:
    found: list[SessionTransaction] = []
    transaction = _innermost(session)
    while transaction is not None:
        found.append(transaction)
        transaction = transaction.parent
    return found
