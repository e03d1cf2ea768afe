"""Setbacks: errors that rolled the transaction of a step back without a fault of the step, and when to try again.

The same error is the step's own at one of its statements, and a setback at a statement of the engine's. Decides and
computes; nothing here waits.
"""

from __future__ import annotations

from enum import Enum, auto
from functools import cache

from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sqla_durable.definitions.database_errors import (
    first_line,
    is_conflict,
    is_engine_error,
    is_obstacle,
    is_outage,
    is_pooler_mixup,
    sqlstate,
)
from sqla_durable.definitions.libraries import tenacity
from sqla_durable.definitions.log import Log
from sqla_durable.definitions.retry import Tries, backoff

LOSSES = 20
"""How many transactions of one step may be lost in a row after its function was called."""

# disk_full and its class, system_error, io_error, read_only_sql_transaction: meanwhile every write fails.
# Not configuration_limit_exceeded (temp_file_limit) nor undefined_file, which are about what the statement asks for.
_DISABLED = frozenset({"53000", "53100", "58000", "58030", "25006"})
# What a statement meets that waits for a lock, or for which the server lacks resources.
_DELAYS = ("53", "55P03", "57014", "58")
# The step itself may need too much memory, so this is not waited for without a limit.
_OUT_OF_MEMORY = "53200"
_INVALID_TRANSACTION = "8s2b"
"""SQLAlchemy's code: the connection was lost, and the code caught that error and went on."""

_SHORTEN = "raise it for the role of the worker, or do what takes long in a plain step before this one"
_REASONS = {
    "25P03": f"idle_in_transaction_session_timeout is shorter than a pause between two of its statements: {_SHORTEN}",
    "25P04": f"transaction_timeout is shorter than the step: {_SHORTEN}",
    "57P05": f"idle_session_timeout is shorter than the time before its first statement: {_SHORTEN}",
    "57P01": "the step or somebody else ended its server process with pg_terminate_backend(), or stopped the server",
    "57P02": "the server crashed, perhaps by a statement of the step: see the log of the server",
    "42501": "the step or an interceptor changed the role of its session, or a privilege was revoked: grant it",
    _OUT_OF_MEMORY: "the server has too little memory for the step: let it process less at a time",
}
_ANY_REASON = (
    "the step ends its own server process, the server, a proxy or the network ended the connection, or one of "
    "idle_in_transaction_session_timeout, transaction_timeout and idle_session_timeout is shorter than the step: "
    f"{_SHORTEN}"
)
_AT_COMMIT = (
    "a before_commit listener takes longer than the five seconds that the server waits between checkpoint and COMMIT: "
    "do what takes long in the step"
)
log = Log("sqla_durable.step")


class Phase(Enum):
    """Where in the transaction of a step an error was raised."""

    BEFORE = auto()
    """Before a function of the user was called."""
    FUNCTION = auto()
    """In the function or after it. Errors of the engine's own statements are marked: see `mark_engine_error`."""
    COMMIT = auto()
    """At COMMIT, where deferred constraints and triggers of the application are checked too."""


class Setback(Enum):
    """Why a transaction was rolled back without a fault of the step."""

    CONFLICT = auto()
    """It lost against another transaction. It is tried again a limited number of times."""
    LOSS = auto()
    """Its connection was lost after its function was called. That is recorded and counted."""
    OBSTACLE = auto()
    """The database is unreachable, full or busy. It is tried again until that is over."""

    @classmethod
    def of(cls, error: BaseException, phase: Phase) -> Setback | None:
        """Return which setback an error is; None if it is the step's own error."""
        code = _code(error)
        if is_conflict(error) and not (phase is Phase.BEFORE and is_pooler_mixup(error)):
            return cls.CONFLICT
        if phase is Phase.BEFORE:
            return cls.OBSTACLE if is_obstacle(error) else None
        if code in _DISABLED:
            return cls.OBSTACLE
        if _is_loss(error, code):
            return cls.LOSS
        ours = is_engine_error(error)
        if phase is Phase.FUNCTION and not ours:
            return None
        if code.startswith(_DELAYS):
            return cls.OBSTACLE
        # The rest may be caused by the step, which can change its session's role.
        return cls.LOSS if (ours and is_obstacle(error)) or isinstance(error, OSError) else None


class TransactionRetry:
    """Decides how the transaction of one step, or of one write of the engine's, is tried again.

    Args:
        conflicts: how many conflicts are tried again.
        obstacles: how many obstacles are, while the database can be reached.
        outages: whether to wait without a limit for a database that cannot be reached; the fence stops an attempt that
            no longer owns its workflow.
    """

    def __init__(self, *, conflicts: int = 20, obstacles: float = float("inf"), outages: bool = True) -> None:
        self._conflicts = conflicts
        self._obstacles = obstacles
        self._outages = outages
        self._tries = Tries()

    def wait_before_next(self, setback: Setback, error: BaseException, *, what: str) -> float | None:
        """Return the seconds to wait, or None for no other try. Obstacles are logged, less and less often.

        Args:
            setback: why the transaction was rolled back.
            error: the error.
            what: the workflow and step, for the log.
        """
        match setback:
            case Setback.CONFLICT:
                self._conflicts -= 1
                again = self._conflicts >= 0
            case Setback.OBSTACLE if _is_delay(error):
                self._obstacles -= 1
                again = self._obstacles >= 0
            case _:
                again = self._outages
        if not again:
            return None
        self._tries.begin()
        seconds = backoff(self._tries)
        count = self._tries.count
        if setback is Setback.OBSTACLE and not count & (count - 1):  # the first, second, fourth, eighth ...
            log.warning("%s: %s; trying again in %.1f s, repeat %d", what, first_line(error), seconds, count)
        return seconds


def wait_after_loss(count: int) -> float:
    """Return the seconds to wait after so many losses in a row: 5 at most."""
    tries = Tries()
    tries.resume(count=count, age=0.0)
    return float(_loss_backoff()(tries.state()))


@cache
def _loss_backoff() -> tenacity.wait_random_exponential:
    return tenacity.wait_random_exponential(multiplier=0.1, max=5)


def describe(error: BaseException, phase: Phase) -> str:
    """Return a line that describes a setback: PostgreSQL's text and code, and the likely reason."""
    code = _code(error)
    likely = _AT_COMMIT if (phase, code) == (Phase.COMMIT, "25P03") else _REASONS.get(code, _ANY_REASON)
    return f"{first_line(error)} [{code or 'no SQLSTATE'}]. The likely reason: {likely}"


def sqlstate_of(error: BaseException) -> str | None:
    """Return PostgreSQL's code of an error; None if it has none or is no error of the database."""
    return sqlstate(error) if isinstance(error, DBAPIError) else None


def _code(error: BaseException) -> str:
    return sqlstate_of(error) or ""


def _is_delay(error: BaseException) -> bool:
    """Return whether the database can be reached nevertheless."""
    return is_pooler_mixup(error) or (_code(error).startswith(_DELAYS) and not is_outage(error))


def _is_loss(error: BaseException, code: str) -> bool:
    pool_or_connection = isinstance(error, PoolTimeoutError) or _is_invalid(error) or is_outage(error)
    return pool_or_connection or code == _OUT_OF_MEMORY


def _is_invalid(error: BaseException) -> bool:
    return isinstance(error, PendingRollbackError) and error.code == _INVALID_TRANSACTION
