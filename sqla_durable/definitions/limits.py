"""The time limits of a step: of each try, of all of them together, and of the time between heartbeats."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta

from sqla_durable.definitions.checks import require_duration
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.redaction import message_of
from sqla_durable.errors import DefinitionError, HeartbeatTimeoutError, StepTimeoutError


@dataclass(frozen=True, slots=True)
class Limit:
    """How long one try of a step may take.

    Args:
        step: the step's key.
        given: the option, a `timeout`, a `total_timeout` or a `heartbeat_timeout`.
        seconds: how many seconds of it are left.
        message: the message of the error.
        kind: the class of the error.
    """

    step: str
    given: timedelta
    seconds: float
    message: str
    kind: type[StepTimeoutError] = StepTimeoutError

    @classmethod
    def of_time(cls, step: str, given: timedelta, seconds: float, what: str) -> Limit:
        """Return the limit of the time of a try; `what` names the option in the message."""
        return cls(step, given, seconds, f"step {step!r} was not done within {given}, {what}")

    @classmethod
    def of_silence(cls, step: str, given: timedelta) -> Limit:
        """Return the limit of the time without a heartbeat."""
        message = f"step {step!r} sent no heartbeat within {given}, its heartbeat timeout"
        return cls(step, given, given.total_seconds(), message, HeartbeatTimeoutError)

    def exceeded(self, more: str = "") -> StepTimeoutError:
        """Return the error of a try that exceeded the limit."""
        return self.kind(f"{self.message}{more}.", step=self.step, seconds=self.given.total_seconds())


class Watch:
    """Measures the current try of a step against its limits. Thread-safe.

    The time without a heartbeat is counted from the beginning and from each heartbeat, but not while a heartbeat is
    being written, however long the database takes. A limit that was once found exceeded stays exceeded.

    Args:
        time: how long the try may take.
        silence: how long it may go without a heartbeat.
    """

    def __init__(self, *, time: Limit | None, silence: Limit | None) -> None:
        self._time = time
        self._silence = silence
        self._writing = 0
        self._exceeded: Limit | None = None
        self._lock = threading.Lock()
        self.begin()

    def begin(self) -> None:
        """Begin to measure."""
        self._began = self._heartbeat_at = time.monotonic()

    @property
    def left(self) -> float:
        """The seconds until the next limit is reached without another heartbeat; 0 if one is exceeded."""
        with self._lock:
            return self._left()

    def check(self) -> None:
        """Raise the error of a limit that was exceeded.

        Raises:
            StepTimeoutError: a limit was exceeded.
        """
        with self._lock:
            if self._left() <= 0 and self._exceeded is not None:
                raise self._exceeded.exceeded()

    def note_heartbeat(self) -> None:
        """Note a heartbeat.

        Raises:
            StepTimeoutError: it is too late, or the time of the try is over.
        """
        self.check()
        self._heartbeat_at = time.monotonic()

    @contextmanager
    def writing(self) -> Generator[None]:
        """Do not count the time of the block as time without a heartbeat, which it writes."""
        with self._lock:
            self._writing += 1
        try:
            yield
        finally:
            with self._lock:
                self._writing -= 1
                self._heartbeat_at = time.monotonic()

    @contextmanager
    def measured(self) -> Generator[None]:
        """Measure a block that cannot be interrupted, and raise if it took too long.

        Raises:
            StepTimeoutError: it did.
        """
        self.begin()
        yield
        self.check()

    def _left(self) -> float:
        if self._exceeded is not None:
            return 0.0
        now = time.monotonic()
        heartbeat_at = now if self._writing else self._heartbeat_at
        ends = [
            (since + limit.seconds, number, limit)
            for number, (since, limit) in enumerate([(self._began, self._time), (heartbeat_at, self._silence)])
            if limit is not None
        ]
        first, _, limit = min(ends)
        if now >= first:
            self._exceeded = limit
        return max(0.0, first - now)


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """How long a step may take.

    Args:
        timeout: the limit of each try.
        total_timeout: the limit of all tries and the waits between them, from the beginning of the first on, including
            crashes.
        heartbeat_timeout: the limit of the time without a heartbeat in each try.
    """

    timeout: timedelta | None = None
    total_timeout: timedelta | None = None
    heartbeat_timeout: timedelta | None = None

    @classmethod
    def of(
        cls,
        *,
        timeout: timedelta | None,
        total_timeout: timedelta | None,
        heartbeat_timeout: timedelta | None = None,
    ) -> TimeLimits | None:
        """Return the limits of these options, or None if none is given.

        Raises:
            DefinitionError: one is not a `timedelta`, or not positive.
            ArgumentError: one is too long.
        """
        given = {"timeout": timeout, "total_timeout": total_timeout, "heartbeat_timeout": heartbeat_timeout}
        for name, value in given.items():
            if value is None:
                continue
            if not isinstance(value, timedelta):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise DefinitionError(
                    f"{name}={value!r} is not a timedelta: write, for example, timedelta(seconds=30)."
                )
            if value <= timedelta():
                raise DefinitionError(
                    f"{name} must be positive, got {value!r}: write, for example, timedelta(seconds=30)."
                )
            require_duration(value, name)
        return cls(**given) if any(value is not None for value in given.values()) else None

    def left(self, age: float) -> float:
        """Return the seconds left of the total, if the first try began `age` seconds ago."""
        return float("inf") if self.total_timeout is None else self.total_timeout.total_seconds() - age

    def of_try(self, step: str, age: float) -> Watch:
        """Return the watch of a try that begins now."""
        silent = self.heartbeat_timeout
        silence = None if silent is None else Limit.of_silence(step, silent)
        return Watch(time=self._of_try(step, age), silence=silence)

    def exceeded(self, step: str, last: BaseException | None) -> StepTimeoutError:
        """Return the error of a step whose total time is over, with the error of its last try."""
        limit = self._of_all(step, 0.0)
        assert limit is not None  # noqa: S101 (without a total, time is always left)
        if last is None:
            return limit.exceeded()
        if type(last) is StepTimeoutError and last.seconds == limit.given.total_seconds():
            return last
        error = limit.exceeded(f"; its last try failed with {type(last).__name__}: {message_of(last)}")
        error.__cause__ = last
        return error

    def _of_try(self, step: str, age: float) -> Limit | None:
        """Return the limit of the time of a try: that of the try or the rest of the total, whichever is less."""
        total = self._of_all(step, age)
        if self.timeout is None:
            return total
        single = Limit.of_time(step, self.timeout, self.timeout.total_seconds(), "the timeout of each try")
        return single if total is None or single.seconds <= total.seconds else total

    def _of_all(self, step: str, age: float) -> Limit | None:
        if self.total_timeout is None:
            return None
        return Limit.of_time(step, self.total_timeout, self.left(age), "the timeout of all its tries")
