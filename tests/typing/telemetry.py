"""Interceptors, telemetry and log records, as type checkers see them."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import assert_type
from uuid import UUID

from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Execution, Interceptor, Start, WorkflowLogFilter, is_recorded_error
from sqla_durable.telemetry import Telemetry, observe


class Counting(Interceptor):
    def prepare(self, start: Start, headers: dict[str, str]) -> None:
        assert_type(start.workflow_id, UUID)
        assert_type(start.key, str | None)
        headers["queue"] = start.queue

    def finished(self, execution: Execution, status: str) -> None:
        assert_type(execution.workflow, str)

    @contextmanager
    def signal(self, name: str, workflow_ids: Sequence[UUID]) -> Generator[None]:
        yield


def set_up(sessions: sessionmaker[Session], handler: logging.Handler, error: Exception) -> Durable:
    observe(sessions)
    handler.addFilter(WorkflowLogFilter())
    assert_type(is_recorded_error(error), bool)
    return Durable(interceptors=[Telemetry(carry_baggage=["tenant"]), Counting()])
