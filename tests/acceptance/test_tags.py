"""Tags that a workflow sets while it is executed."""

from __future__ import annotations

from typing import Any

import pytest
import tenacity
from sqlalchemy import select
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import Workflow, set_tags
from sqla_durable.errors import ArgumentError, UsageError
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell
from tests.support.domain import Entry

pytestmark = pytest.mark.few_shells


# behaviour: M3 E2
def test_tags_are_merged_once_and_found(shell: Shell, app: Application) -> None:
    async def checkout() -> None:
        await either.set_tags({"tenant": "7", "region": "eu", "step": "one"})
        await either.set_tags({"region": "us", "step": None, "never": None})

    workflow = app.workflow(checkout)
    shell.run(workflow)
    shell.crashed(shell.only)
    with shell.sessionmaker.begin() as session:  # a replay does not set them again
        session.get_one(Workflow, shell.only).tags = {"tenant": "8", "region": "us"}
    shell.finish(workflow, shell.only)
    with shell.sessionmaker() as session:
        found = select(Workflow).where(Workflow.tags.contains({"tenant": "8"}))
        assert session.scalars(found).one().tags == {"tenant": "8", "region": "us"}
    assert [each.key for each in shell.one(shell.only).steps] == ["set_tags", "set_tags#2"]


def test_the_last_tag_can_be_removed(shell: Shell, app: Application) -> None:
    async def checkout() -> None:
        await either.set_tags({"a": "1", "b": "2"})
        await either.set_tags({"a": None})
        await either.set_tags({"b": None})

    shell.run(app.workflow(checkout))
    assert shell.one(shell.only).tags is None


# behaviour: M3
def test_tags_of_steps_are_set_with_a_transaction_or_at_once(shell: Shell, app: Application) -> None:
    failures = [True, True]

    def book(session: Session) -> None:
        session.add(Entry(account="a", cents=1))
        set_tags({"booked" if len(failures) == 1 else "lost": "yes"}, session=session)
        loaded = session.scalars(select(Workflow)).one()
        set_tags({"seen": "yes"}, session=session)
        assert "seen" in (loaded.tags or {})
        if len(failures) > 1:
            failures.pop()
            raise ConnectionError("try again")

    async def charge() -> None:
        await either.set_tags({"charged": "yes"})

    booking, charging = app.transactional(book, wait=tenacity.wait_none()), app.publishing(charge)

    async def checkout() -> None:
        await booking()
        await charging()

    shell.run(app.workflow(checkout))
    assert shell.one(shell.only).tags == {"booked": "yes", "seen": "yes", "charged": "yes"}


def test_what_is_no_tag_is_refused_and_outside_a_workflow_nothing_happens(shell: Shell, app: Application) -> None:
    refused: list[str] = []

    async def checkout() -> None:
        wrong: list[Any] = [7, {"a": 1}, {"": "b"}, {"a": " "}, {f"{each}": "a" for each in range(101)}]
        for tags in wrong:
            with pytest.raises(ArgumentError, match="tags="):
                await either.set_tags(tags)
            refused.append(str(tags))
        with pytest.raises(UsageError, match="was given a session"):
            await either.set_tags({"a": "b"}, session=object())

    shell.run(app.workflow(checkout))
    assert (len(refused), shell.one(shell.only).tags) == (5, None)
    set_tags({"a": "b"})


async def test_outside_an_async_workflow_nothing_happens() -> None:
    await aio.set_tags({"a": "b"})
