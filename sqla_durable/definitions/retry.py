"""When to try again: a step's own policy, in tenacity's terms, and the engine's backoff for its own statements.

Decides and computes; nothing here waits. `operations` waits through its runtime.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import field
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from sqla_durable.definitions.checks import LONGEST
from sqla_durable.definitions.database_errors import is_obstacle
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.libraries import tenacity
from sqla_durable.definitions.redaction import brief
from sqla_durable.errors import DefinitionError, UsageError

if TYPE_CHECKING:
    from tenacity import RetryCallState

RetryPredicate: TypeAlias = "Callable[[RetryCallState], bool | Awaitable[bool]]"
StopPredicate: TypeAlias = "Callable[[RetryCallState], bool]"
WaitFunction: TypeAlias = "Callable[[RetryCallState], float]"

_EXAMPLES = {
    "retry": "tenacity.retry_if_exception_type(ConnectionError)",
    "stop": "tenacity.stop_after_attempt(5)",
    "wait": "tenacity.wait_fixed(5)",
}
_LONGEST_WAIT = LONGEST.total_seconds()
LONGEST_BACKOFF = 2.0
"""The most seconds that the engine waits before it tries a transaction again."""

_NOTHING = object()  # in place of a value, while no try has returned


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a step's function is tried again after an error.

    Args:
        retry: which outcomes are tried again; by default any `Exception`.
        stop: when to stop trying; by default never, as in tenacity. Without any of the three there is one try.
        wait: seconds before the next try; by default exponential from 0.1 s to 60 s with full jitter.
    """

    retry: RetryPredicate = field(default_factory=lambda: tenacity.retry_if_exception_type())
    stop: StopPredicate = field(default_factory=lambda: tenacity.stop_never)
    wait: WaitFunction = field(default_factory=lambda: tenacity.wait_random_exponential(multiplier=0.1, max=60))

    @classmethod
    def of(
        cls, *, retry: RetryPredicate | None, stop: StopPredicate | None, wait: WaitFunction | None
    ) -> RetryPolicy | None:
        """Return the policy of these options; None, for one try, if none is given.

        Raises:
            DefinitionError: one is not a tenacity object.
        """
        given = {"retry": retry, "stop": stop, "wait": wait}
        for name, value in given.items():
            if value is not None and (not callable(value) or isinstance(value, type)):
                raise DefinitionError(
                    f"{name}={value!r} is not a tenacity object: pass, for example, {name}={_EXAMPLES[name]}."
                )
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return cls(**chosen) if chosen else None

    async def wait_before_next(self, tries: Tries) -> float | None:
        """Return the seconds to wait before the next try, or None if there is none.

        Raises:
            UsageError: one of the three raised, or `wait` returned no number of seconds.
        """
        state = tries.state()
        with _reporting_failures(state):
            return await self._evaluate(tries, state)

    def stops(self, tries: Tries, *, upcoming: float) -> bool:
        """Return whether `stop` rules out another try after a wait of `upcoming` seconds, whatever the last outcome.

        Raises:
            UsageError: `stop` raised.
        """
        state = tries.state()
        state.upcoming_sleep = upcoming
        with _reporting_failures(state):
            return self.stop(state)

    async def _evaluate(self, tries: Tries, state: RetryCallState) -> float | None:
        if not tries.requests_another:
            verdict = self.retry(state)
            if inspect.isawaitable(verdict):
                verdict = await verdict
            if not verdict:
                return None
        # In tenacity's order: `stop_before_delay` reads the upcoming wait.
        state.upcoming_sleep = _seconds(self.wait(state))
        return None if self.stop(state) else state.upcoming_sleep


@contextmanager
def _reporting_failures(state: RetryCallState) -> Generator[None]:
    try:
        yield
    except Exception as error:
        outcome = state.outcome.exception() if state.outcome is not None else None
        asked = "" if outcome is None else f", called with {brief(outcome)}"
        raise UsageError(f"the step's retry policy failed with {brief(error)}{asked}.") from error


def until_true(policy: RetryPolicy | None, *, wait: WaitFunction | None, timeout: timedelta | None) -> RetryPolicy:
    """Return the policy of a step that is tried until its result is true; for errors, its own policy applies.

    Raises:
        DefinitionError: `wait` is not a tenacity object.
    """
    given = RetryPolicy.of(retry=None, stop=None, wait=wait) or policy or RetryPolicy()
    too_late = tenacity.stop_never if timeout is None else tenacity.stop_after_delay(timeout.total_seconds())

    async def again(state: RetryCallState) -> bool:
        if state.outcome is None or not state.outcome.failed:
            return state.outcome is None or not state.outcome.result()
        verdict = False if policy is None else policy.retry(state)
        return bool(await verdict if inspect.isawaitable(verdict) else verdict)

    def stop(state: RetryCallState) -> bool:
        failed = state.outcome is not None and state.outcome.failed
        return too_late(state) or (failed and policy is not None and policy.stop(state))

    return RetryPolicy(retry=again, stop=stop, wait=given.wait)


def _seconds(given: object) -> float:
    if not isinstance(given, (int, float)) or not given <= _LONGEST_WAIT:
        raise ValueError(f"wait returned {given!r}: return seconds, at most {_LONGEST_WAIT:.0f}")
    return max(0.0, float(given))


class Tries:
    """Counts the tries of one step, and provides the last outcome to tenacity."""

    def __init__(self) -> None:
        self.count = 0
        self._began = self._try_began = time.monotonic()
        self._error: BaseException | None = None
        self._value: object = _NOTHING

    @property
    def age(self) -> float:
        """How many seconds ago the first try began."""
        return time.monotonic() - self._began

    @property
    def age_of_try(self) -> float:
        """How many seconds ago the last try began."""
        return time.monotonic() - self._try_began

    @property
    def requests_another(self) -> bool:
        """Whether the last try raised `tenacity.TryAgain`, which requests another regardless of the predicate."""
        return isinstance(self._error, tenacity.TryAgain)

    def resume(self, *, count: int, age: float) -> None:
        """Continue to count after an earlier attempt: `count` tries, the first of which began `age` seconds ago."""
        self.count = count
        self._began = time.monotonic() - age

    def begin(self) -> None:
        """Count another try."""
        self.count += 1
        self._try_began = time.monotonic()

    def uncount(self) -> None:
        """Do not count the last try: the database rolled it back without a fault of the step."""
        self.count -= 1

    def failed(self, error: BaseException) -> None:
        """Note that the last try raised."""
        self._error, self._value = error, _NOTHING

    def returned(self, value: object) -> None:
        """Note that the last try returned."""
        self._error, self._value = None, value

    def state(self) -> RetryCallState:
        """Return the state that tenacity's predicates read."""
        state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        state.start_time = self._began
        state.attempt_number = self.count
        state.outcome = self._outcome()
        state.outcome_timestamp = time.monotonic()
        return state

    def _outcome(self) -> tenacity.Future | None:
        """Return the last outcome as tenacity's future, which is costly and so only created when it is read."""
        outcome = tenacity.Future(self.count)
        if self._error is not None:
            outcome.set_exception(self._error)
        elif self._value is not _NOTHING:
            outcome.set_result(self._value)
        else:
            return None
        return outcome


class ObstacleRetry:
    """Decides how a statement of the engine's own is tried again: without a limit, while an obstacle persists."""

    def __init__(self) -> None:
        self._tries = Tries()

    def wait_before_next(self, error: BaseException) -> float | None:
        """Return the seconds to wait, or None to raise the error."""
        if not is_obstacle(error):
            return None
        self._tries.begin()
        return backoff(self._tries)


def backoff(tries: Tries) -> float:
    """Return the seconds before the engine tries a transaction again: random, and increasing with each try."""
    return float(_backoff()(tries.state()))


@cache
def _backoff() -> tenacity.wait_random_exponential:
    return tenacity.wait_random_exponential(multiplier=0.02, max=LONGEST_BACKOFF)
