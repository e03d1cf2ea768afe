"""What the tests of children share: workflows that are started as children, and how a parent is brought to its end."""

from __future__ import annotations

import inspect
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from sqla_durable import Workflow, errors
from tests.acceptance import either
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.shells import Shell

WORKERS = pytest.mark.shells(("worker", "async-worker", "asyncpg-worker", "mixed-worker"))
COMMITTING = pytest.mark.shells(
    ("executor", "async-executor", "worker", "async-worker", "asyncpg-worker", "mixed-worker")
)


async def awaited(outcome: Any) -> Any:
    """Return the outcome of an operation, in either form."""
    return await outcome if inspect.isawaitable(outcome) else outcome


async def result_of(child: Any, **options: Any) -> Any:
    return await awaited(child.result(**options))


def doubling(app: Application) -> AnyWorkflow[[int], int]:
    async def double(number: int) -> int:
        if number < 0:
            raise ValueError(f"{number} is negative")
        return 2 * number

    return app.workflow(double)


def waiting(app: Application) -> AnyWorkflow[[], str]:
    async def wait() -> str:
        return str(await awaited(either.wait_signal("go")))

    return app.workflow(wait)


def finish(shell: Shell, workflow: AnyWorkflow[..., Any], workflow_id: UUID) -> Any:
    """Bring a parent to its end, with a worker for its children beside it."""
    with shell.background():
        try:
            return shell.result(workflow, workflow_id)
        except errors.ResultTimeoutError:
            raise AssertionError([(each.name, each.status) for each in all_of(shell)]) from None


def run(shell: Shell, workflow: AnyWorkflow[..., Any], *args: Any) -> Any:
    return finish(shell, workflow, shell.begin(workflow, *args))


def all_of(shell: Shell, name: str | None = None) -> list[Workflow]:
    with shell.sessionmaker() as session:
        query = select(Workflow).order_by(Workflow.id)
        return list(session.scalars(query if name is None else query.where(Workflow.name == name)))
