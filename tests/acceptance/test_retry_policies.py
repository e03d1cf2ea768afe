"""Which outcomes of a step are tried again, and when: as tenacity says it."""

from __future__ import annotations

import asyncio

import pytest
import tenacity

from sqla_durable import StepStatus
from sqla_durable.errors import UsageError
from tests.acceptance.application import Application
from tests.acceptance.plain_steps import ASYNC, Declined, Service, steps_of
from tests.acceptance.shells import Shell

pytestmark = pytest.mark.few_shells


# behaviour: S1
def test_step_is_tried_again_as_tenacity_says(shell: Shell, app: Application) -> None:
    service = Service(failures=2)
    waits: list[int] = []

    def wait(state: tenacity.RetryCallState) -> float:
        waits.append(state.attempt_number)
        return 0

    charge = app.plain(service.charge, stop=tenacity.stop_after_attempt(3), wait=wait)

    async def pay() -> int:
        return (await charge()).number

    assert shell.run(app.workflow(pay)) == 3
    assert waits == [1, 2]
    assert len(set(service.keys)) == 1
    assert [(each.key, each.tries) for each in steps_of(shell)] == [("charge", 3)]


# behaviour: S1
def test_no_wait_after_the_last_try(shell: Shell, app: Application) -> None:
    service = Service(failures=9)
    waits: list[int] = []

    def wait(state: tenacity.RetryCallState) -> float:
        waits.append(state.attempt_number)
        return 0 if state.attempt_number < 3 else 3600

    charge = app.plain(service.charge, stop=tenacity.stop_after_attempt(3), wait=wait)

    async def pay() -> int:
        return (await charge()).number

    with pytest.raises(Declined, match="declined with 51"):
        shell.run(app.workflow(pay))
    assert service.calls == 3
    assert waits == [1, 2, 3], "computed before `stop` is asked, as in tenacity"
    assert [(each.status, each.tries) for each in steps_of(shell)] == [(StepStatus.FAILED, 3)]


# behaviour: S2
def test_only_the_errors_of_the_predicate_are_tried_again(shell: Shell, app: Application) -> None:
    service = Service(failures=9)
    charge = app.plain(
        service.charge, retry=tenacity.retry_if_exception_type(ConnectionError), wait=tenacity.wait_none()
    )

    async def pay() -> int:
        return (await charge()).number

    with pytest.raises(Declined):
        shell.run(app.workflow(pay))
    assert service.calls == 1


# behaviour: S2
def test_predicate_on_the_result_asks_for_another_try(shell: Shell, app: Application) -> None:
    service = Service()
    unlike_three = tenacity.retry_if_result(lambda receipt: receipt.number < 3)
    charge = app.plain(service.charge, retry=unlike_three, wait=tenacity.wait_none())

    async def pay() -> int:
        return (await charge()).number

    assert shell.run(app.workflow(pay)) == 3
    assert [each.tries for each in steps_of(shell)] == [3]


# behaviour: S2
@ASYNC
def test_predicate_may_be_async(shell: Shell, app: Application) -> None:
    service = Service(failures=1)

    async def retry(state: tenacity.RetryCallState) -> bool:
        await asyncio.sleep(0)
        return bool(state.outcome and state.outcome.failed)

    charge = app.plain(service.charge, retry=retry, wait=tenacity.wait_none())

    async def pay() -> int:
        return (await charge()).number

    assert shell.run(app.workflow(pay)) == 2


@pytest.mark.shells(("executor", "worker"))
def test_async_predicate_in_sync_code_is_a_clear_error(shell: Shell, app: Application) -> None:
    service = Service(failures=1)

    async def retry(_state: tenacity.RetryCallState) -> bool:
        await asyncio.sleep(0)
        return True

    charge = app.plain(service.charge, retry=retry, wait=tenacity.wait_none())

    async def pay() -> int:
        return (await charge()).number

    with pytest.raises(UsageError, match="async code was called from a sync workflow or step"):
        shell.run(app.workflow(pay))
