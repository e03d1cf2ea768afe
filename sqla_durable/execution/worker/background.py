"""A worker in a thread of its own, for code that has no event loop."""

from __future__ import annotations

import threading
from typing import Protocol

from sqla_durable.definitions.log import Log
from sqla_durable.errors import UsageError

log = Log("sqla_durable.worker")


class Stoppable(Protocol):
    """What this needs of a worker."""

    def run(self) -> None:
        """Run until stopped."""

    def stop(self) -> None:
        """Ask it to stop."""

    def refuse_start(self, error: BaseException) -> None:
        """Tell whoever waits for the start that there will be none."""


class Background:
    """A worker in a thread of its own, with its own event loop."""

    def __init__(self, worker: Stoppable) -> None:
        self._worker = worker
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sqla-durable worker", daemon=True)

    def start(self) -> None:
        """Begin; whether it has started, the worker itself tells."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, wait, and raise what ended the worker."""
        self._worker.stop()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._worker.run()
        except BaseException as error:
            log.debug("the worker in the background ended", exc_info=True)
            self._error = error
            self._worker.refuse_start(error)
        else:
            self._worker.refuse_start(UsageError("the worker was stopped before it had started."))
