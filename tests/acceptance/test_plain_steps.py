"""Steps without a session: an outcome that is recorded, an effect that happens at least once."""

from __future__ import annotations

import asyncio
import threading
from uuid import UUID

import pytest
from sqlalchemy import select

from sqla_durable import Durable, Step, StepStatus, Workflow, WorkflowStatus, current, current_step
from sqla_durable.asyncio import AsyncWorkflowFunction, to_thread
from sqla_durable.errors import UsageError
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.plain_steps import ASYNC, Declined, Receipt, Service, steps_of
from tests.acceptance.shells import AsyncShell, Shell

pytestmark = pytest.mark.few_shells


class Unreachable(Exception):
    """An exception that JSON cannot hold."""

    def __init__(self, where: object) -> None:
        super().__init__(where)
        self.where = where


# behaviour: E2 E10
def test_outcome_is_recorded_and_replayed_typed(shell: Shell, app: Application) -> None:
    service = Service()
    charge = app.plain(service.charge)

    async def pay() -> list[Receipt]:
        receipts = [await charge(), await charge()]
        assert all(type(each) is Receipt and type(each.keys) is tuple for each in receipts)
        return receipts

    paying = app.workflow(pay)
    first = shell.run(paying)
    assert first == [Receipt(1, ("a", "b")), Receipt(2, ("a", "b"))]
    workflow_id = only_id(shell)
    shell.crashed(workflow_id)
    assert shell.finish(paying, workflow_id) == first
    assert service.calls == 2
    assert service.keys == [f"{workflow_id}/charge", f"{workflow_id}/charge#2"]
    assert [each.attempt for each in steps_of(shell)] == [1, 1]
    assert shell.one(workflow_id).attempt == 2


def test_there_is_no_step_between_steps_and_outside_of_workflows(shell: Shell, app: Application) -> None:
    async def between() -> None:
        with pytest.raises(UsageError, match="in the own code of workflow 'between'"):
            current_step()

    shell.run(app.workflow(between))
    with pytest.raises(UsageError, match="outside a workflow"):
        current_step()


# behaviour: E2
def test_workflow_goes_on_after_its_last_checkpoint(shell: Shell, app: Application) -> None:
    service = Service()
    charge = app.plain(service.charge)

    async def pay() -> list[int]:
        return [(await charge()).number, (await charge()).number, (await charge()).number]

    paying = app.workflow(pay)
    assert shell.run(paying) == [1, 2, 3]
    workflow_id = only_id(shell)
    shell.crashed(workflow_id)
    with shell.sessionmaker.begin() as session:
        session.delete(session.get_one(Step, (workflow_id, "charge#3")))
    assert shell.finish(paying, workflow_id) == [1, 2, 4]
    assert [(each.key, each.attempt) for each in steps_of(shell)] == [("charge", 1), ("charge#2", 1), ("charge#3", 2)]
    assert service.keys[2] == service.keys[3]


# behaviour: E3
def test_error_is_the_steps_own_at_first_and_on_replay(shell: Shell, app: Application) -> None:
    service = Service(failures=1)
    charge = app.plain(service.charge)

    async def pay() -> list[object]:
        try:
            await charge()
        except Declined as error:
            return [type(error).__name__, str(error), error.code, error.retry_after]
        return []

    paying = app.workflow(pay)
    first = shell.run(paying)
    assert first == ["Declined", "declined with 51", 51, 1.5]
    workflow_id = only_id(shell)
    shell.crashed(workflow_id)
    assert shell.finish(paying, workflow_id) == first
    assert service.calls == 1
    assert [each.status for each in steps_of(shell)] == [StepStatus.FAILED]


# behaviour: E3
def test_error_that_cannot_travel_is_the_same_substitute_at_first_and_on_replay(shell: Shell, app: Application) -> None:
    service = Service(failures=1, error=lambda: Unreachable(object()))
    charge = app.plain(service.charge)

    async def pay() -> list[str]:
        try:
            await charge()
        except Exception as error:
            return [type(error).__name__, str(error).partition("<")[0]]
        return []

    paying = app.workflow(pay)
    first = shell.run(paying)
    assert first == ["StepFailedError", f"step 'charge' failed with {__name__}:Unreachable: "]
    workflow_id = only_id(shell)
    shell.crashed(workflow_id)
    assert shell.finish(paying, workflow_id) == first


# behaviour: S5
def test_outside_a_workflow_a_step_is_a_plain_call(app: Application) -> None:
    service = Service()
    charge = app.plain(service.charge).step
    outcome = charge()
    receipt = asyncio.run(outcome) if asyncio.iscoroutine(outcome) else outcome
    assert receipt == Receipt(1, ("a", "b"))
    assert service.keys == []
    assert current() is None


# behaviour: S6
def test_step_in_a_step_is_a_plain_call(shell: Shell, app: Application) -> None:
    service = Service()
    inner = app.plain(service.charge)

    def outer() -> list[object]:
        called = inner.step()
        if asyncio.iscoroutine(called):
            called.close()
            service.charge()
        return ["outer", service.calls]

    calling = app.plain(outer)

    async def nest() -> list[object]:
        return await calling()

    assert shell.run(app.workflow(nest)) == ["outer", 1]
    assert [each.key for each in steps_of(shell)] == ["outer"]
    assert service.keys[0] is not None
    assert service.keys[0].endswith("/outer")


# behaviour: S6
@ASYNC
def test_async_step_in_an_async_step_is_a_plain_call(shell: Shell, app: Application) -> None:
    @app.durable.step
    async def inner() -> str:
        execution = current()
        return execution.step or "" if execution else ""

    @app.durable.step
    async def outer() -> str:
        return await inner()

    async def nest() -> str:
        return await outer()

    assert shell.run(app.workflow(nest)) == "outer"
    assert [each.key for each in steps_of(shell)] == ["outer"]


# behaviour: S7
@ASYNC
def test_gathered_steps_replay_the_same_in_any_completion_order(shell: Shell, app: Application) -> None:
    finished: list[int] = []
    calls: list[int] = []
    gates: dict[int, asyncio.Event] = {}

    @app.durable.step
    async def fetch(number: int) -> int:
        calls.append(number)
        await gates[number].wait()
        finished.append(number)
        following = number - 1
        if following in gates:
            gates[following].set()
        return number * 10

    async def gathering() -> list[int]:
        gates.update({number: asyncio.Event() for number in range(3)})
        for number in opened:
            gates[number].set()
        return list(await asyncio.gather(*(fetch(number) for number in range(3))))

    opened = [2]
    gathered = app.workflow(gathering)
    assert shell.run(gathered) == [0, 10, 20]
    assert finished == [2, 1, 0]
    steps = {each.key: (each.position, each.output) for each in steps_of(shell)}
    assert steps == {"fetch": (1, 0), "fetch#2": (2, 10), "fetch#3": (3, 20)}
    workflow_id = only_id(shell)
    shell.crashed(workflow_id)
    with shell.sessionmaker.begin() as session:
        session.delete(session.get_one(Step, (workflow_id, "fetch#2")))
    calls.clear()
    opened = [1]  # on replay only the missing one is executed, and each gets its own outcome
    assert shell.finish(gathered, workflow_id) == [0, 10, 20]
    assert calls == [1]


@ASYNC
def test_sync_step_in_an_async_workflow_is_awaited_and_recorded(shell: Shell, app: Application) -> None:
    @app.durable.step
    def blocking(number: int) -> int:
        execution = current()
        assert execution is not None
        assert execution.step == ("blocking" if number == 1 else "blocking#2")
        return number + 1

    async def mixed() -> int:
        return await to_thread(blocking, 1) + await to_thread(blocking, 2)

    assert shell.run(app.workflow(mixed)) == 5
    assert [each.key for each in steps_of(shell)] == ["blocking", "blocking#2"]


@pytest.mark.shells(("executor", "worker"))
def test_to_thread_in_a_sync_workflow_is_refused(shell: Shell, app: Application) -> None:
    service = Service()
    step = app.durable.step(service.charge)

    async def wrong() -> None:
        _ = to_thread(step)

    with pytest.raises(UsageError, match=r"asyncio.to_thread\(\) is for async def code and was called in workflow"):
        shell.run(app.workflow(wrong))


async def test_to_thread_outside_a_workflow_calls_the_function_in_a_thread() -> None:
    step = Durable().step(threading.get_ident, name="thread")
    assert await to_thread(step) != threading.get_ident()


@ASYNC
def test_sync_step_that_an_async_workflow_calls_itself_is_refused(shell: Shell, app: Application) -> None:
    step = app.durable.step(Service().charge)

    async def wrong() -> None:
        step()

    with pytest.raises(UsageError, match=r"await sqla_durable.asyncio.to_thread\(charge, ...\)"):
        shell.run(app.workflow(wrong))


# behaviour: T7
@pytest.mark.shells(("executor", "worker"))
def test_async_step_in_a_sync_workflow_is_refused(shell: Shell, app: Application) -> None:
    async def fetch() -> int:
        return 1

    step = app.durable.step(fetch)

    async def wrong() -> object:
        return step()

    message = "step 'fetch' is async def and workflow 'wrong' is def, which cannot await it"
    with pytest.raises(UsageError, match=message):
        shell.run(app.workflow(wrong))


@ASYNC
def test_step_that_is_not_awaited_is_a_clear_error(shell: Shell, app: Application) -> None:
    kept: list[object] = []

    async def forget() -> str:
        kept.append(charge.step())
        kept.append(either.wait_signal("approved", bool))
        return "paid"

    service = Service()
    charge = app.plain(service.charge)
    with pytest.raises(UsageError, match=r"unfinished calls: 'charge', 'signal:approved'. Await each"):
        shell.run(app.workflow(forget))
    assert [getattr(each, "__qualname__", "") for each in kept] == ["charge", "signal:approved"]
    for each in kept:
        each.close()  # type: ignore[attr-defined]


def test_steps_are_made_at_run_time_of_closures_and_bound_methods(shell: Shell, app: Application) -> None:
    service = Service()

    async def dynamic(word: str) -> list[object]:
        def shout() -> str:
            return word.upper()

        async def whisper() -> str:
            return word.lower()

        is_async = isinstance(shell, AsyncShell) and app.form == "async def"
        quiet = await either.run_step("quiet", whisper if is_async else lambda: word.lower())
        shouting, paying = either.run_step("loud", shout), either.run_step("pay", service.charge)
        loud, receipt = await shouting, await paying
        return [quiet, loud, receipt.number]

    workflow = app.workflow(dynamic)
    assert shell.run(workflow, "Hey") == ["hey", "HEY", 1]
    workflow_id = only_id(shell)
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == ["hey", "HEY", 1]
    assert service.calls == 1
    assert [each.key for each in steps_of(shell)] == ["quiet", "loud", "pay"]


def test_explicit_key_is_the_steps_identity(shell: Shell, app: Application) -> None:
    service = Service()
    charge = app.plain(service.charge)

    async def pay() -> list[int]:
        return [(await charge.options(step_key="deposit")()).number, (await charge()).number]

    assert shell.run(app.workflow(pay)) == [1, 2]
    assert [(each.key, each.name) for each in steps_of(shell)] == [("deposit", "charge"), ("charge", "charge")]


def test_key_may_contain_the_marks_of_occurrences_and_branches(shell: Shell, app: Application) -> None:
    service = Service()
    charge = app.plain(service.charge)
    keys = ("charge#2", "orders/7", "50%23")

    async def pay() -> list[int]:
        keyed = [(await charge.options(step_key=key)()).number for key in keys]
        return [*keyed, (await charge()).number, (await charge()).number]

    workflow = app.workflow(pay)
    assert shell.run(workflow) == [1, 2, 3, 4, 5]
    workflow_id = only_id(shell)
    recorded = ["charge%232", "orders%2F7", "50%2523", "charge", "charge#2"]
    assert [each.key for each in steps_of(shell)] == recorded
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == [1, 2, 3, 4, 5]
    assert service.keys == [f"{workflow_id}/{key}" for key in recorded]


def test_explicit_key_used_twice_is_refused(shell: Shell, app: Application) -> None:
    service = Service()
    charge = app.plain(service.charge)

    async def pay() -> None:
        await charge.options(step_key="deposit")()
        await charge.options(step_key="deposit")()

    with pytest.raises(UsageError, match="the step key 'deposit' is used twice in workflow 'pay'"):
        shell.run(app.workflow(pay))
    assert service.calls == 1


@pytest.mark.shells(("executor", "joined", "worker"))
def test_two_functions_under_one_step_name_are_refused(shell: Shell, app: Application) -> None:
    first, second = Durable(), Durable()

    def one() -> int:
        return 1

    def two() -> int:
        return 2

    async def confuse() -> int:
        return first.step(one, name="same")() + second.step(two, name="same")()

    with pytest.raises(UsageError, match="two functions are called under the step name 'same'"):
        shell.run(app.workflow(confuse))


def test_call_of_a_workflow_as_a_function_is_plain(app: Application) -> None:
    service = Service()
    charge = app.plain(service.charge)

    async def pay() -> int:
        return (await charge()).number

    workflow = app.workflow(pay)
    outcome = asyncio.run(workflow()) if isinstance(workflow, AsyncWorkflowFunction) else workflow()
    assert outcome == 1


def only_id(shell: Shell) -> UUID:
    with shell.sessionmaker() as session:
        record = session.scalars(select(Workflow)).one()
        assert record.status in (WorkflowStatus.SUCCEEDED, WorkflowStatus.FAILED)
        return record.id
