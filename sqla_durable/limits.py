"""How long a step may take: each of its tries, and all of them together. Decides; the shells cut off."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from sqla_durable.errors import DefinitionError, StepTimeoutError


@dataclass(frozen=True, slots=True)
class Limit:
    """How long one try of a step may take.

    Args:
        step: the step's key.
        given: what was given for it, a `timeout` or a `total_timeout`.
        seconds: what is left of that.
        what: what was to be done within it, for the message.
    """

    step: str
    given: timedelta
    seconds: float
    what: str

    def exceeded(self, more: str = "") -> StepTimeoutError:
        """Give the error of a try that was not done in time."""
        message = f"step {self.step!r} was not done within {self.given}, {self.what}{more}."
        return StepTimeoutError(message, step=self.step, seconds=self.given.total_seconds())

    @contextmanager
    def measured(self) -> Generator[None]:
        """Refuse what returns too late: for code that cannot be cut off.

        Raises:
            StepTimeoutError: it did.
        """
        ends = time.monotonic() + self.seconds
        yield
        if time.monotonic() > ends:
            raise self.exceeded()


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """How long a step may take.

    Args:
        timeout: each of its tries.
        total_timeout: all of them and the waits between them, from the beginning of the first, whatever crashed since.
    """

    timeout: timedelta | None = None
    total_timeout: timedelta | None = None

    @classmethod
    def of(cls, *, timeout: timedelta | None, total_timeout: timedelta | None) -> TimeLimits | None:
        """Check what was given; None means no limits.

        Raises:
            DefinitionError: one is not a `timedelta`, or not longer than nothing.
        """
        for name, value in {"timeout": timeout, "total_timeout": total_timeout}.items():
            if value is None:
                continue
            if not isinstance(value, timedelta) or value <= timedelta():  # pyright: ignore[reportUnnecessaryIsInstance]
                raise DefinitionError(f"{name}={value!r} is no time to do anything in: write timedelta(seconds=30).")
        return None if timeout is None and total_timeout is None else cls(timeout, total_timeout)

    def left(self, age: float) -> float:
        """Give the seconds that are left of the total, when the first try began `age` seconds ago."""
        return float("inf") if self.total_timeout is None else self.total_timeout.total_seconds() - age

    def of_try(self, step: str, age: float) -> Limit | None:
        """Give the limit of a try that begins now: the one that is reached first."""
        total = self._of_all(step, age)
        if self.timeout is None:
            return total
        single = Limit(step, self.timeout, self.timeout.total_seconds(), "the timeout of each try")
        return single if total is None or single.seconds <= total.seconds else total

    def exceeded(self, step: str, last: BaseException | None) -> StepTimeoutError:
        """Give the error of a step for which no other try is left, with the error of the last one."""
        limit = self._of_all(step, 0.0)
        assert limit is not None  # noqa: S101 (without a total something is always left)
        if last is None:
            return limit.exceeded()
        if isinstance(last, StepTimeoutError) and last.seconds == limit.given.total_seconds():
            return last
        error = limit.exceeded(f"; its last try failed with {type(last).__name__}: {last}")
        error.__cause__ = last
        return error

    def _of_all(self, step: str, age: float) -> Limit | None:
        if self.total_timeout is None:
            return None
        return Limit(step, self.total_timeout, self.left(age), "the timeout of all its tries")
