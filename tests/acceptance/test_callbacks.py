"""Callbacks: a workflow waits for who has its token, and is answered once, in time, by the token alone."""

from __future__ import annotations

import asyncio
import inspect
import re
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

import sqla_durable.asyncio as aio
from sqla_durable import (
    Callback,
    StepStatus,
    WorkflowStatus,
    complete_callback,
    create_callback,
    errors,
    fail_callback,
    heartbeat_callback,
    manage,
    parallel,
    send_signal,
)
from sqla_durable.testing import advance
from tests.acceptance import either
from tests.acceptance.application import AnyWorkflow, Application, Form
from tests.acceptance.shells import Shell
from tests.store import races

COMMITTING = pytest.mark.shells(("executor", "async-executor", "worker", "asyncpg-worker"))
BOTH = pytest.mark.shells(("async-executor", "mixed-worker"))
ONE_WORKER = pytest.mark.shells(("worker",))
WORKERS = pytest.mark.shells(("worker", "asyncpg-worker"))
DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)


@dataclass
class Receipt:
    charge: str
    cents: int


async def awaited(outcome: Any) -> Any:
    """Return the outcome of an operation, in either form."""
    return await outcome if inspect.isawaitable(outcome) else outcome


def paying(app: Application, **options: Any) -> AnyWorkflow[[], Any]:
    """Make a workflow that waits for a payment, and returns the name and the text of the error if there is none."""

    async def pay() -> Any:
        payment = await awaited(either.create_callback(Receipt, **options))
        assert isinstance(payment, Callback if app.form is Form.SYNC else aio.AsyncCallback)
        try:
            receipt = await awaited(payment.result())
            return [receipt.charge, receipt.cents]
        except (errors.CallbackFailedError, errors.WaitTimeoutError, errors.NotFoundError) as error:
            details = error.details if isinstance(error, errors.CallbackFailedError) else None
            return [type(error).__name__, str(error), details]

    return app.workflow(pay)


def token_of(shell: Shell, workflow_id: UUID, key: str = "create_callback") -> str:
    """Wait for a callback's record and return its token."""

    def find() -> Any:
        return [each.output for each in shell.one(workflow_id).steps if each.key == key]

    (made,) = races.wait_until(find, what="the callback")
    return str(made["token"])


def wait_until_suspended(shell: Shell, workflow_id: UUID) -> None:
    races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED, what="the suspension")


def answer(shell: Shell, token: str, value: object = None) -> None:
    with shell.sessionmaker.begin() as session:
        complete_callback(session, token, value)


def let_pass(shell: Shell, duration: timedelta) -> None:
    with shell.sessionmaker.begin() as session:
        advance(session, duration)


@COMMITTING
def test_waiting_workflow_goes_on_with_the_answer(shell: Shell, app: Application) -> None:
    workflow = paying(app)
    workflow_id = shell.begin(workflow)
    with shell.background():
        wait_until_suspended(shell, workflow_id)
        suspended = shell.one(workflow_id)
        assert (suspended.worker_id, suspended.wake_at) == (None, None)
        with shell.client() as client:
            client.complete_callback(token_of(shell, workflow_id), Receipt("ch_1", 500))
            client.commit()
        assert shell.result(workflow, workflow_id) == ["ch_1", 500]
    made, result = shell.one(workflow_id).steps
    assert (made.key, result.key, result.status) == ("create_callback", "result:create_callback", StepStatus.SUCCEEDED)


@BOTH
def test_answer_may_come_before_the_workflow_waits(shell: Shell, app: Application) -> None:
    """And the token is committed before the workflow's code has it."""

    def hand_over(token: str) -> None:
        answer(shell, token, 7)

    step = app.plain(hand_over)

    async def ask() -> list[int]:
        callback = await awaited(either.create_callback(int, step_key="payment"))
        await step(callback.token)
        return [await awaited(callback.result()), await awaited(callback.result())]

    workflow = app.workflow(ask)
    workflow_id = shell.begin(workflow)
    assert shell.finish(workflow, workflow_id) == [7, 7]
    assert [each.key for each in shell.one(workflow_id).steps if each.name != "hand_over"] == [
        "payment",
        "result:payment",
        "result:payment#2",
    ]


@BOTH
def test_failure_is_the_outcome_also_on_replay(shell: Shell, app: Application) -> None:
    workflow = paying(app)
    workflow_id = shell.begin(workflow)
    details = {"uuid": "no id", "long": "x" * 100_000}
    with shell.background():
        token = token_of(shell, workflow_id)
        with shell.sessionmaker.begin() as session:
            fail_callback(session, token, "card declined", details=details)
        expected = ["CallbackFailedError", "card declined", details]
        assert shell.result(workflow, workflow_id) == expected
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == expected


@WORKERS
def test_time_runs_from_the_creation_and_ends_the_token(shell: Shell, app: Application) -> None:
    workflow = paying(app, timeout=DAY)
    workflow_id = shell.begin(workflow)
    with shell.background():
        wait_until_suspended(shell, workflow_id)
        let_pass(shell, DAY / 2)
        assert shell.one(workflow_id).status is WorkflowStatus.SUSPENDED
        let_pass(shell, DAY / 2)
        expected = ["WaitTimeoutError", "callback 'create_callback' was not answered within 1 day, 0:00:00.", None]
        assert shell.result(workflow, workflow_id) == expected
    with pytest.raises(errors.CallbackFinishedError, match="was not answered in time"):
        answer(shell, token_of(shell, workflow_id))
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == expected


@ONE_WORKER
def test_late_answer_is_refused_although_the_workflow_does_not_wait_yet(shell: Shell, app: Application) -> None:
    async def slow() -> None:
        callback = await awaited(either.create_callback(timeout=DAY))
        await awaited(either.wait_signal("go"))
        await awaited(callback.result())

    workflow = app.workflow(slow)
    workflow_id = shell.begin(workflow)
    with shell.background():
        wait_until_suspended(shell, workflow_id)
        let_pass(shell, DAY)
        with pytest.raises(errors.CallbackFinishedError, match="was not answered in time"):
            answer(shell, token_of(shell, workflow_id))
        with shell.sessionmaker.begin() as session:
            send_signal(session, workflow_id, "go")
        with pytest.raises(errors.WaitTimeoutError):
            shell.result(workflow, workflow_id)


@WORKERS
def test_heartbeats_keep_it_alive_in_one_row_and_silence_is_noticed(shell: Shell, app: Application) -> None:
    workflow = paying(app, heartbeat=MINUTE)
    workflow_id = shell.begin(workflow)
    with shell.background():
        wait_until_suspended(shell, workflow_id)
        token = token_of(shell, workflow_id)
        for _ in range(3):
            with shell.sessionmaker.begin() as session:
                advance(session, MINUTE / 2)
                heartbeat_callback(session, token)
        races.wait_until(lambda: is_waiting_again(shell, workflow_id), what="the next wait")
        assert [each.key for each in shell.one(workflow_id).steps] == ["create_callback"]
        let_pass(shell, MINUTE)
        expected = [
            "CallbackSilentError",
            "callback 'create_callback' sent no heartbeat for longer than 0:01:00.",
            None,
        ]
        assert shell.result(workflow, workflow_id) == expected
    assert len(shell.one(workflow_id).steps) == 2
    with shell.sessionmaker() as session, pytest.raises(errors.CallbackFinishedError, match="silent for too long"):
        heartbeat_callback(session, token)


def is_waiting_again(shell: Shell, workflow_id: UUID) -> bool:
    """Return whether it was woken once, has seen the heartbeats, and is suspended for longer."""
    with shell.sessionmaker() as session:
        statement = (
            "SELECT status = 'suspended' AND wake_at > statement_timestamp() + interval '10 seconds' "
            f"FROM {shell.schema}.workflow WHERE id = :id"
        )
        return bool(session.execute(text(statement), {"id": workflow_id}).scalar_one())


@BOTH
def test_row_inserted_by_sql_is_an_answer(shell: Shell, app: Application, durable_schema: str) -> None:
    """The statement is that of the page on callbacks."""
    page = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text()
    (statement,) = re.findall(r"```sql\n(INSERT.*?)```", page, re.DOTALL)
    sql = re.sub(r"'<token>'", ":token", statement).replace("durable.", f"{durable_schema}.")
    workflow = paying(app)
    workflow_id = shell.begin(workflow)
    with shell.background():
        token = token_of(shell, workflow_id)
        with shell.engine.begin() as connection:
            assert (
                connection.execute(text(sql), {"token": f"{token[:-1]}{'1' if token[-1] == '0' else '0'}"}).rowcount
                == 0
            )
            assert connection.execute(text(sql), {"token": token}).rowcount == 1
        assert shell.result(workflow, workflow_id) == ["ch_1", 500]
    answer(shell, token, Receipt("ch_1", 500))
    with pytest.raises(errors.CallbackFinishedError, match="was completed already"):
        answer(shell, token, Receipt("ch_1", 501))


@ONE_WORKER
def test_token_is_the_same_after_a_crash(shell: Shell, app: Application) -> None:
    tokens: list[str] = []

    async def ask() -> int:
        callback = await awaited(either.create_callback(int))
        tokens.append(callback.token)
        return int(await awaited(callback.result()))

    workflow = app.workflow(ask)
    workflow_id = shell.begin(workflow)
    with shell.background():
        wait_until_suspended(shell, workflow_id)
    shell.crashed(workflow_id)
    answer(shell, tokens[0], 7)
    assert shell.finish(workflow, workflow_id) == 7
    assert len(tokens) == 2
    assert len(set(tokens)) == 1


@WORKERS
def test_branches_have_callbacks_of_their_own_and_may_share_one(shell: Shell, app: Application) -> None:
    def one(shared: Callback[int], key: str) -> list[int]:
        return [create_callback(int, step_key=key).result(), shared.result()]

    def both() -> list[Any]:
        shared = create_callback(int, step_key="shared")
        return list(parallel(partial(one, shared, "a"), partial(one, shared, "b")))

    async def aone(shared: aio.AsyncCallback[int], key: str) -> list[int]:
        return [await (await aio.create_callback(int, step_key=key)), await shared]

    async def aboth() -> list[Any]:
        shared = await aio.create_callback(int, step_key="shared")
        return list(await asyncio.gather(aone(shared, "a"), aone(shared, "b")))

    workflow: AnyWorkflow[[], list[Any]]
    workflow = app.durable.workflow(both) if app.form is Form.SYNC else app.durable.workflow(aboth)
    workflow_id = shell.begin(workflow)
    with shell.background():
        for number, key in enumerate(("a", "shared", "b")):
            answer(shell, token_of(shell, workflow_id, key), number)
            races.wait_until(lambda: shell.one(workflow_id).status is not WorkflowStatus.RUNNING, what="the suspension")
        assert shell.result(workflow, workflow_id) == [[0, 1], [2, 1]]


@ONE_WORKER
def test_workflow_may_end_without_its_answer(shell: Shell, app: Application) -> None:
    async def careless() -> None:
        await awaited(either.create_callback(step_key="answered"))
        await awaited(either.create_callback(step_key="open"))
        await awaited(either.wait_signal("go"))

    workflow = app.workflow(careless)
    workflow_id = shell.begin(workflow)
    with shell.background():
        wait_until_suspended(shell, workflow_id)
        answer(shell, token_of(shell, workflow_id, "answered"), 7)
        with shell.sessionmaker.begin() as session:
            send_signal(session, workflow_id, "go")
        shell.result(workflow, workflow_id)
    answer(shell, token_of(shell, workflow_id, "answered"), 7)
    with pytest.raises(errors.WorkflowFinishedError, match="which has succeeded"):
        answer(shell, token_of(shell, workflow_id, "open"), 7)
    token = token_of(shell, workflow_id, "answered")
    with shell.sessionmaker.begin() as session:
        manage.delete(session, workflow_id)
    with pytest.raises(errors.NotFoundError, match="was deleted"):
        answer(shell, token, 7)


@pytest.mark.shells(("joined", "async-joined"))
def test_joined_executor_does_not_wait_for_what_nobody_can_answer(shell: Shell, app: Application) -> None:
    with pytest.raises(errors.UsageError, match="would wait for what others do"):
        shell.run(paying(app))
