"""A workflow function with two ways: for what had passed the point before the deploy, and for what comes after."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from uuid import UUID

import pytest
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from sqla_durable import Durable, Step, WorkflowStatus, deprecate_patch, patched
from sqla_durable.asyncio import AsyncStepFunction, to_thread
from sqla_durable.errors import ArgumentError, HistoryMismatchError, UsageError
from tests.acceptance.application import Application, Called
from tests.acceptance.shells import AsyncShell, Shell
from tests.store.races import wait_until

pytestmark = pytest.mark.few_shells

ASYNC = pytest.mark.shells(("async-executor", "async-joined", "async-worker", "asyncpg-worker"))
EXECUTORS = pytest.mark.shells(("executor", "async-executor"))
WORKERS = pytest.mark.shells(("worker", "async-worker", "asyncpg-worker", "mixed-worker"))


class Shop:
    """An application whose code is replaced; its steps note what they do."""

    def __init__(self, app: Application) -> None:
        self.done: list[str] = []
        self.deploy = "v1"
        self.reserve = self._step(app, "reserve")
        self.check = self._step(app, "check")
        self.charge = self._step(app, "charge")
        self.ship = self._step(app, "ship")

        async def checkout() -> str:
            match self.deploy:
                case "v1":
                    await self.reserve()
                    await self.charge()
                case "v2":
                    await self.reserve()
                    if patched("check fraud"):
                        await self.check()
                    await self.charge()
                case "v3":
                    await self.reserve()
                    deprecate_patch("check fraud")
                    await self.check()
                    await self.charge()
                case "without charge":
                    await self.reserve()
                case "misplaced":
                    await self.misplaced()
                case "broken":
                    await self.reserve()
                    raise ValueError("a bug of today's code")
                case _:
                    await self.charge()
                    await self.reserve()
            await self.ship()
            return self.deploy

        async def strict_checkout() -> str:
            return await checkout()

        self.checkout = app.workflow(checkout)
        self.strict_checkout = app.workflow(strict_checkout, strict=True)

        def misplaced() -> bool:
            return patched("in a step")

        self.misplaced = app.plain(misplaced)

    def _step(self, app: Application, name: str) -> Called[[], None]:
        def note() -> None:
            self.done.append(name)

        note.__name__ = note.__qualname__ = name
        return app.plain(note)


def keys(shell: Shell, workflow_id: UUID) -> list[str]:
    return [each.key for each in shell.one(workflow_id).steps]


def ran(shell: Shell, shop: Shop, *, until: str | None = None) -> UUID:
    """Execute the workflow with the code of now, and then take its outcome and what came after a step away."""
    with shell.client() as client:
        workflow_id: UUID = client.start(shop.checkout).id
        client.commit()
    shell.finish(shop.checkout, workflow_id)
    forget(shell, workflow_id, after=until)
    return workflow_id


def forget(shell: Shell, workflow_id: UUID, *, after: str | None) -> None:
    shell.crashed(workflow_id)
    left = keys(shell, workflow_id)
    gone = left[left.index(after) + 1 :] if after else []
    with shell.sessionmaker.begin() as session:
        session.execute(delete(Step).where(Step.workflow_id == workflow_id, Step.key.in_(gone)))


@pytest.fixture
def shop(app: Application) -> Shop:
    return Shop(app)


def test_workflow_that_had_passed_the_patch_goes_the_old_way(shell: Shell, shop: Shop) -> None:
    workflow_id = ran(shell, shop, until="charge")
    shop.deploy = "v2"
    assert shell.finish(shop.checkout, workflow_id) == "v2"
    assert shop.done == ["reserve", "charge", "ship", "ship"]
    assert keys(shell, workflow_id) == ["reserve", "charge", "ship"]


def test_workflow_that_had_not_passed_the_patch_goes_the_new_way(shell: Shell, shop: Shop) -> None:
    workflow_id = ran(shell, shop, until="reserve")
    shop.deploy = "v2"
    shop.done.clear()
    shell.finish(shop.checkout, workflow_id)
    assert shop.done == ["check", "charge", "ship"]
    assert keys(shell, workflow_id) == ["reserve", "#patched/check fraud", "check", "charge", "ship"]


@pytest.mark.parametrize("left", ["#patched/check fraud", "check", "charge", "ship"])
def test_new_way_is_gone_again_on_every_replay(shell: Shell, shop: Shop, left: str) -> None:
    shop.deploy = "v2"
    workflow_id = ran(shell, shop, until=left)
    shop.done.clear()
    shell.finish(shop.checkout, workflow_id)
    later = ["#patched/check fraud", "check", "charge", "ship"]
    assert shop.done == later[later.index(left) + 1 :]


def test_deprecated_patch_goes_on_marking_new_workflows(shell: Shell, shop: Shop) -> None:
    shop.deploy = "v3"
    workflow_id = ran(shell, shop, until="charge")
    assert keys(shell, workflow_id) == ["reserve", "#patched/check fraud", "check", "charge"]
    shop.deploy = "v2"  # the deploy is rolled back
    shell.finish(shop.checkout, workflow_id)
    assert shop.done.count("check") == 1
    shop.deploy = "v3"
    shell.crashed(workflow_id)
    shell.finish(shop.checkout, workflow_id)
    assert shop.done.count("ship") == 2


def test_marker_is_the_only_row_of_a_workflow_without_steps(shell: Shell, app: Application) -> None:
    async def asks() -> bool:
        return patched("a") and patched("b") and patched("a")

    workflow = app.workflow(asks)
    assert shell.run(workflow) is True
    with shell.sessionmaker() as session:
        assert session.query(Step.key, Step.position).order_by(Step.position).all() == [
            ("#patched/a", 1),
            ("#patched/b", 2),
        ]


def test_patched_in_a_step_is_refused(shell: Shell, shop: Shop) -> None:
    shop.deploy = "misplaced"
    with pytest.raises(UsageError, match="was called in step 'misplaced', which is not replayed"):
        shell.run(shop.checkout)


def test_outside_a_workflow_the_new_way_is_gone() -> None:
    assert patched("anything")
    deprecate_patch("anything")


@pytest.mark.parametrize("patch_id", ["", " ", "\0", None, 7])
def test_id_that_cannot_be_stored_is_refused(patch_id: str) -> None:
    with pytest.raises(ArgumentError, match="Give a text that is not blank"):
        patched(patch_id)


@ASYNC
def test_patched_beside_parallel_steps_is_recorded_before_what_follows(shell: Shell) -> None:
    assert isinstance(shell, AsyncShell)
    durable: Durable = shell.app.durable
    done: list[str] = []

    def step(name: str) -> AsyncStepFunction[[], None]:
        async def note() -> None:
            done.append(name)

        note.__name__ = note.__qualname__ = name
        return durable.step(note)

    one, other, last = step("one"), step("other"), step("last")

    @durable.workflow
    async def both() -> bool:
        answer = patched("both")
        await asyncio.gather(one(), other())
        await last()
        return answer

    with shell.client() as client:
        workflow_id = client.start(both).id
        client.commit()
    assert shell.finish(both, workflow_id) is True
    assert keys(shell, workflow_id) == ["#patched/both", "one", "other", "last"]


def test_marker_is_durable_before_the_next_step_begins(shell: Shell, app: Application) -> None:
    def read_committed(session: Session) -> list[str]:
        return [*session.scalars(select(Step.key))]

    read_keys = app.transactional(read_committed)

    async def reading() -> list[str]:
        patched("read")
        return await read_keys()

    assert shell.run(app.workflow(reading)) == ["#patched/read"]


@pytest.mark.shells(("async-executor", "async-joined"))
def test_marker_is_durable_before_a_sync_step_of_an_async_executor_begins(shell: Shell) -> None:
    @shell.app.durable.step
    def read_keys(session: Session) -> list[str]:
        return [*session.scalars(select(Step.key))]

    @shell.app.durable.workflow
    async def reading() -> list[str]:
        patched("read")
        return await to_thread(read_keys)

    assert shell.run(reading) == ["#patched/read"]


# What does not fit


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "sqla_durable.changes"]


def test_removed_step_is_reported_once_and_the_workflow_ends(
    shell: Shell, shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    workflow_id = ran(shell, shop, until="charge")
    shop.deploy = "without charge"
    shell.finish(shop.checkout, workflow_id)
    (warning,) = warnings(caplog)
    assert warning.startswith(f"workflow 'checkout' {workflow_id} was recorded by other code than today's: ")
    assert "recorded and not visited: 'charge'; recorded: 'reserve', 'charge'" in warning


def test_other_order_is_reported(shell: Shell, shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    workflow_id = ran(shell, shop)
    shop.deploy = "reordered"
    shell.finish(shop.checkout, workflow_id)
    (warning,) = warnings(caplog)
    assert "visited in another order than recorded: 'reserve'" in warning
    assert shop.done == ["reserve", "charge", "ship"]


def test_workflow_that_fails_in_todays_code_is_reported_too(
    shell: Shell, shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    workflow_id = ran(shell, shop, until="charge")
    shop.deploy = "broken"
    with pytest.raises(ValueError, match="a bug of today's code"):
        shell.finish(shop.checkout, workflow_id)
    assert "recorded and not visited: 'charge'" in warnings(caplog)[0]


def test_what_fits_is_not_reported(shell: Shell, shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    workflow_id = ran(shell, shop, until="reserve")
    shop.deploy = "v2"
    shell.finish(shop.checkout, workflow_id)
    assert warnings(caplog) == []


@contextmanager
def strictly(shell: Shell, shop: Shop) -> Generator[UUID]:
    with shell.client() as client:
        workflow_id = client.start(shop.strict_checkout).id
        client.commit()
    shell.finish(shop.strict_checkout, workflow_id)
    forget(shell, workflow_id, after="charge")
    yield workflow_id


@EXECUTORS
@pytest.mark.parametrize("bad", ["without charge", "broken"])
def test_strict_workflow_has_no_outcome_until_its_history_fits_again(shell: Shell, shop: Shop, bad: str) -> None:
    with strictly(shell, shop) as workflow_id:
        shop.deploy = bad
        with pytest.raises(HistoryMismatchError, match="has no outcome for now") as caught:
            shell.finish(shop.strict_checkout, workflow_id)
        assert caught.value.recorded == ("reserve", "charge")
        assert caught.value.visited[0] == "reserve"
        assert "recorded: 'reserve', 'charge'\n  visited:  'reserve'" in str(caught.value)
        assert shell.one(workflow_id).status is WorkflowStatus.PENDING
        shop.deploy = "v1"
        assert shell.finish(shop.strict_checkout, workflow_id) == "v1"


@WORKERS
@pytest.mark.parametrize("bad", ["without charge", "broken"])
def test_strict_workflow_in_a_worker_is_suspended_and_goes_on_with_a_good_deploy(
    shell: Shell, shop: Shop, bad: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with strictly(shell, shop) as workflow_id:
        shop.deploy = bad
        with shell.background():
            wait_until(
                lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED, what="the workflow to be suspended"
            )
        suspended = shell.one(workflow_id)
        assert (suspended.attempt, suspended.crashes) == (2, 0)  # one of the story's own crash, none of the bad deploy
        assert any("has no outcome for now" in each.getMessage() for each in caplog.records)
        monkeypatch.setattr("sqla_durable.execution.worker.attempts.MISMATCH_PAUSE", 0.05)
        with shell.sessionmaker.begin() as session:
            session.merge(suspended).wake_at = suspended.created_at
        with shell.background():  # again and again, and never too often
            wait_until(lambda: _mismatches(caplog) > 3, what="more tries")
            shop.deploy = "v1"
            assert shell.result(shop.strict_checkout, workflow_id) == "v1"


def _mismatches(caplog: pytest.LogCaptureFixture) -> int:
    return sum("has no outcome for now" in each.getMessage() for each in caplog.records)
