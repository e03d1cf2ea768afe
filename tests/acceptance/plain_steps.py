"""What the tests of plain steps share: a service that fails as often as asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from sqlalchemy import select

from sqla_durable import Step, current, current_step
from tests.acceptance.shells import Shell

ASYNC = pytest.mark.shells(("async-executor", "async-joined", "async-worker", "asyncpg-worker"))


class Declined(Exception):
    """What a payment service of the stories raises, with data that must survive."""

    def __init__(self, code: int, *, retry_after: float) -> None:
        super().__init__(f"declined with {code}")
        self.code = code
        self.retry_after = retry_after


@dataclass(frozen=True)
class Receipt:
    number: int
    keys: tuple[str, ...]


class Service:
    """Counts its calls, and fails as often as asked."""

    def __init__(
        self, failures: int = 0, error: Callable[[], Exception] = lambda: Declined(51, retry_after=1.5)
    ) -> None:
        self.calls = 0
        self.failures = failures
        self.error = error
        self.keys: list[str] = []

    def charge(self) -> Receipt:
        self.calls += 1
        if current() is not None:
            assert current_step() == current()
            self.keys.append(current_step().idempotency_key)
        if self.calls <= self.failures:
            raise self.error()
        return Receipt(self.calls, ("a", "b"))


def steps_of(shell: Shell) -> list[Step]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Step).order_by(Step.position)))
