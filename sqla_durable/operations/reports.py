"""What a step has reported of itself, and when that was sent; `progress` sends it."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext

from sqla_durable.definitions.limits import Watch


class Progress:
    """What a step reports of itself while it is executed, in all tries of one attempt.

    Attributes:
        details: the last that it has reported, as JSON text, in an earlier attempt perhaps.
        watch: the limits of the try that is being made, if it has some.
    """

    def __init__(self, details: str | None) -> None:
        self.details = details
        self.watch: Watch | None = None
        self._sent_at = float("-inf")
        self._unsent = False

    @property
    def unsent(self) -> bool:
        """Whether there is something newer than what was sent."""
        return self._unsent

    def report(self, details: str | None, *, interval: float) -> bool:
        """Note details; tell whether they are to be sent now, `interval` seconds after the last ones.

        Raises:
            StepTimeoutError: the try has been silent for too long, or its time is over.
        """
        if self.watch is not None:
            self.watch.hear()
        self.details = self.details if details is None else details
        self._unsent = True
        return time.monotonic() - self._sent_at >= interval

    @contextmanager
    def sending(self) -> Generator[None]:
        """Send the newest details; if that is cut off, they are not sent yet."""
        self._sent_at = time.monotonic()
        self._unsent = False
        try:
            with nullcontext() if self.watch is None else self.watch.writing():
                yield
        except BaseException:
            self._unsent = True
            raise
