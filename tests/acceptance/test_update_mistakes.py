"""Updates that are sent, waited for or answered where or as they cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqla_durable import (
    Signal,
    UpdateHandle,
    UpdateRequest,
    Workflow,
    errors,
    send_signal,
    send_update,
    set_event,
    sleep,
    start_with_update,
    update_handle,
    wait_update,
)
from tests.acceptance.application import Application
from tests.acceptance.readers import answer
from tests.acceptance.shells import Shell
from tests.acceptance.updates import (
    Address,
    answers,
    ask,
    asked,
    awaited,
)
from tests.store import races
from tests.support.domain import Entry

BOTH = pytest.mark.shells(("joined", "async-executor"))
SYNC = pytest.mark.shells(("joined",))
DAY = timedelta(days=1)


@pytest.fixture
def session(engine: Engine) -> Generator[Session]:
    with Session(engine) as session:
        yield session


@pytest.mark.shells(("executor", "async-executor"))
def test_second_answer_is_refused_and_the_first_one_stands(shell: Shell, app: Application) -> None:
    def save(session: Session, request: UpdateRequest[Address]) -> None:
        session.add(Entry(account="a", cents=1))
        request.reject("no", session=session)

    step = app.transactional(save)

    async def moving() -> list[str]:
        request = await asked()
        await awaited(request.reply("yes"))
        found: list[str] = []
        try:
            await awaited(request.reply("no"))
        except errors.UsageError as error:
            found.append(str(error))
        try:
            await step(request)
        except errors.UsageError as error:
            found.append(str(error))
        return found

    workflow = app.workflow(moving)
    workflow_id = shell.begin(workflow)
    request = ask(shell, workflow_id, Address("Elm"))
    found = shell.finish(workflow, workflow_id)
    assert len(found) == 2
    assert all("was answered before" in each for each in found)
    assert answer(shell, request) == "yes"
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == found
    with shell.sessionmaker() as session:
        assert session.scalars(select(Entry)).all() == []


@SYNC
def test_answer_that_cannot_be_stored_can_be_given_otherwise(shell: Shell, app: Application) -> None:
    # behaviour: C6
    app.durable.options = replace(app.durable.options, payload_limit=1_000)

    async def moving() -> list[str]:
        request = await asked()
        found: list[str] = []
        for value in (object(), "\0", "x" * 2_000):
            try:
                await awaited(request.reply(value))
            except errors.EncodingError as error:
                found.append(type(error).__name__)
        await awaited(request.reply())
        return found

    workflow = app.workflow(moving)
    workflow_id = shell.begin(workflow)
    request = ask(shell, workflow_id, Address("Elm"))
    assert shell.finish(workflow, workflow_id) == ["EncodingError", "EncodingError", "PayloadTooLargeError"]
    assert answer(shell, request) is None


@BOTH
def test_what_belongs_to_the_workflow_is_refused_elsewhere(shell: Shell, app: Application) -> None:
    async def waits() -> None:
        await asked()

    async def answers_(request: Any) -> None:
        await awaited(request.reply("plain"))

    waiting, plain = app.publishing(waits), app.publishing(answers_)

    async def moving() -> list[str]:
        request = await asked()
        found: list[str] = []
        for wrong in (
            lambda: plain(request),
            waiting,
            lambda: awaited(request.reply(1, session=shell.sessionmaker())),
            lambda: awaited(request.reject("")),
            lambda: awaited(type(request)(uuid4(), 1, "other", None).reply()),
        ):
            try:
                await wrong()
            except (errors.UsageError, errors.ArgumentError) as error:
                found.append(str(error))
        return found

    workflow = app.workflow(moving)
    workflow_id = shell.begin(workflow)
    ask(shell, workflow_id, Address("Elm"))
    plain_, waiting_, session, blank, other = shell.finish(workflow, workflow_id)
    assert "which is plain and may be executed again" in plain_
    assert "which is executed as a whole" in waiting_
    assert "was given a session in the code of workflow" in session
    assert "say in words why" in blank
    assert "only its own can do that" in other
    assert answers(shell) == []


@pytest.mark.shells(("executor",))
def test_validator_is_no_part_of_the_workflow(shell: Shell, app: Application) -> None:
    async def suspends(_: Address) -> None:
        await asyncio.sleep(0)

    def sleeps(_: Address) -> None:
        sleep(DAY)

    async def moving() -> str:
        with pytest.raises(errors.UsageError):
            await asked(validate=suspends, step_key="first")
        await asked(validate=sleeps, timeout=timedelta())
        return "it came"

    workflow = app.workflow(moving)
    workflow_id = shell.begin(workflow)
    request = ask(shell, workflow_id, Address("Elm"))
    with pytest.raises(errors.WaitTimeoutError):
        shell.finish(workflow, workflow_id)
    with pytest.raises(errors.UpdateRejectedError, match="outside of one"):
        answer(shell, request)


def test_outside_a_workflow_an_answer_does_nothing_and_nobody_waits() -> None:
    UpdateRequest(uuid4(), 1, "set_address", Address("Elm")).reply("saved")
    with pytest.raises(errors.UsageError, match="outside of one"):
        wait_update("set_address")


# Bad input of senders


def test_unknown_and_finished_workflows_take_no_update_and_the_transaction_goes_on(session: Session) -> None:
    with pytest.raises(errors.NotFoundError, match="Nothing was sent"):
        send_update(session, uuid4(), "set_address")
    (known,) = races.enqueue(session)
    races.cancel(session, known)
    with pytest.raises(errors.WorkflowFinishedError, match="which was cancelled"):
        send_update(session, known, "set_address")
    assert session.scalars(select(Signal)).all() == []


def test_what_cannot_be_sent_is_refused(session: Session) -> None:
    (known,) = races.enqueue(session)
    for name in ("", "#a", "nul\0"):
        with pytest.raises(errors.ArgumentError, match="the update name"):
            send_update(session, known, name)
        with pytest.raises(errors.ArgumentError, match="the update name"):
            wait_update(name)
    with pytest.raises(errors.ArgumentError, match="pass a text that is not blank"):
        send_update(session, known, "set_address", key=" ")
    with pytest.raises(errors.EncodingError, match="payload of update 'set_address'"):
        send_update(session, known, "set_address", object())
    with pytest.raises(errors.PayloadTooLargeError):
        send_update(session, known, "set_address", "x" * 2_000_000)
    with pytest.raises(errors.ArgumentError, match="is no workflow"):
        send_update(session, "1234", "set_address")  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentError, match="is in no database"):
        send_update(session, Workflow(name="checkout"), "set_address")
    with pytest.raises(errors.ArgumentError, match=r"expected workflow.bind\(...\)"):
        start_with_update(session, known, "set_address")  # type: ignore[arg-type]
    with pytest.raises(errors.SessionError, match="the caller's Session or AsyncSession comes first"):
        send_update("nothing", known, "set_address")  # type: ignore[arg-type]
    assert session.scalars(select(Signal)).all() == []


def test_signal_is_no_update(session: Session) -> None:
    (known,) = races.enqueue(session)
    send_signal(session, known, "set_address")
    session.flush()
    sent = session.scalars(select(Signal)).one().id
    session.commit()
    with pytest.raises(errors.NotFoundError):
        update_handle(session, known, sent).result()


def test_sync_result_is_refused_in_an_event_loop(session: Session) -> None:
    (known,) = races.enqueue(session)
    request: UpdateHandle[Any] = send_update(session, known, "set_address")

    async def block() -> None:
        request.result()

    with pytest.raises(errors.UsageError, match="would block the event loop"):
        asyncio.run(block())


def test_key_of_an_event_that_is_the_engine_s_own_is_refused() -> None:
    with pytest.raises(errors.ArgumentError, match="such keys are the engine's own"):
        set_event("#reply:1", "forged")
