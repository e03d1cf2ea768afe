"""The options of steps, of workflows, and of a `Durable`: each is declared here, checked once, and passed on whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, TypeAlias, TypedDict, get_args

from sqla_durable.definitions.checks import fault_in
from sqla_durable.definitions.error_classes import KnownErrors
from sqla_durable.definitions.interceptors import Interceptors
from sqla_durable.definitions.jsonb import DEFAULT_LIMIT
from sqla_durable.definitions.limits import TimeLimits
from sqla_durable.definitions.retry import RetryPolicy, RetryPredicate, StopPredicate, WaitFunction
from sqla_durable.errors import DefinitionError

IsolationLevel: TypeAlias = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
ISOLATION_LEVELS: tuple[str, ...] = get_args(IsolationLevel)
"""The isolation levels that a transactional step may ask for, the weakest first."""

_SHORTEST_SECRET = 16


class StepKeywords(TypedDict, total=False):
    """The keyword arguments of `Durable.step`, for type checkers; its docstring describes each."""

    name: str | None
    retry: RetryPredicate | None
    stop: StopPredicate | None
    wait: WaitFunction | None
    isolation_level: IsolationLevel | None
    timeout: timedelta | None
    total_timeout: timedelta | None
    heartbeat_timeout: timedelta | None


@dataclass(frozen=True, slots=True)
class StepOptions:
    """The options of a step.

    Attributes:
        name: its name; None for that of its function.
        policy: when its function is tried again after an error; None for never.
        isolation_level: of a transactional step's transaction; None for the engine's.
        time_limits: how long it may take; None for any time.
    """

    name: str | None = None
    policy: RetryPolicy | None = None
    isolation_level: str | None = None
    time_limits: TimeLimits | None = None


@dataclass(frozen=True, slots=True)
class WorkflowOptions:
    """The options of a workflow.

    Attributes:
        name: its name; None for that of its function.
        queue: the queue that it is enqueued in by default.
        strict: whether it gets no outcome while its code does not visit what its history holds.
    """

    name: str | None = None
    queue: str = "default"
    strict: bool = False


@dataclass(frozen=True, slots=True)
class DurableOptions:
    """The options of a `Durable`, which all of its workflows and steps share.

    Attributes:
        payload_limit: the largest payload in bytes of UTF-8 JSON.
        version: the version of the code, which each start records.
        history_limit: how many operations one workflow may call; None for the default.
        errors: the exception classes that recorded errors may be rebuilt as.
        secrets: the secrets that tokens of callbacks are derived from, the newest first.
        interceptors: called around its workflows and steps.
    """

    payload_limit: int = DEFAULT_LIMIT
    version: str | None = None
    history_limit: int | None = None
    errors: KnownErrors = field(default_factory=KnownErrors)
    secrets: tuple[bytes, ...] = ()
    interceptors: Interceptors = field(default_factory=Interceptors)

    def __post_init__(self) -> None:
        fault = None if self.version is None else fault_in(self.version)
        if fault is not None:
            raise DefinitionError(f"version={self.version!r} {fault}: pass a text that is not blank, or leave it out.")
        if self.history_limit is not None and self.history_limit < 1:
            raise DefinitionError(f"history_limit must be at least 1, got {self.history_limit!r}.")


def encode_secrets(secret: str | list[str] | None) -> tuple[bytes, ...]:
    """Return the secrets of a `Durable` as bytes.

    Raises:
        DefinitionError: one of them is too short.
    """
    given = [] if secret is None else [secret] if isinstance(secret, str) else secret
    if any(len(each) < _SHORTEST_SECRET for each in given):
        raise DefinitionError(
            f"a secret must have at least {_SHORTEST_SECRET} characters: generate one with secrets.token_hex()."
        )
    return tuple(each.encode() for each in given)
