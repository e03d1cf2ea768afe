"""What a parent that fails beside its map leaves behind."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import select

from sqla_durable import Workflow, WorkflowStatus
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell
from tests.store import races


@pytest.mark.shells(("async-worker",))
def test_held_children_do_not_wait_for_ever_when_their_parent_has_failed(shell: Shell, app: Application) -> None:
    async def child(number: int) -> int:
        return number

    each = app.workflow(child)

    async def parent() -> None:
        async def breaks() -> None:
            raise LookupError("beside")

        async def maps() -> None:
            await each.map([1, 2, 3, 4], max_concurrency=1)

        one = asyncio.create_task(maps())
        await asyncio.sleep(0.02)
        await asyncio.gather(breaks(), one)

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).finished_at, what="the end of the parent")
        with pytest.raises(Exception):  # noqa: B017, PT011
            shell.result(workflow, workflow_id)

    def statuses() -> list[WorkflowStatus]:
        with shell.sessionmaker() as session:
            return list(session.scalars(select(Workflow.status).where(Workflow.name == "child")))

    assert WorkflowStatus.SUSPENDED not in statuses()
