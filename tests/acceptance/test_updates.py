"""Updates: sent in the sender's transaction, refused or taken once, and answered once."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import tenacity
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import (
    Durable,
    Executor,
    UpdateRequest,
    WorkflowStatus,
    errors,
    manage,
    start_with_update,
    update_handle,
    wait_update,
)
from sqla_durable.testing import advance, export, replay
from tests.acceptance import either
from tests.acceptance.application import Application, Form
from tests.acceptance.readers import accepted, answer
from tests.acceptance.shells import AsyncShell, Shell
from tests.acceptance.updates import (
    Address,
    Saved,
    again,
    answering,
    answers,
    ask,
    asked,
    awaited,
    in_europe,
    keys,
    send,
)
from tests.store import races
from tests.support.domain import Entry

WORKERS = pytest.mark.shells(("worker", "asyncpg-worker"))
WORKER = pytest.mark.shells(("worker",))
ASYNC_WORKER = pytest.mark.shells(("async-worker",))
BOTH = pytest.mark.shells(("joined", "async-executor"))
SOON = timedelta(milliseconds=30)
DAY = timedelta(days=1)


@WORKERS
def test_waiting_workflow_refuses_and_takes_and_answers(shell: Shell, app: Application) -> None:
    # behaviour: C1 C7
    seen: list[str] = []

    def validate(address: Address) -> None:
        seen.append(address.street)
        address.street = "another"
        in_europe(address)

    async def validate_async(address: Address) -> None:
        await asyncio.sleep(0)
        validate(address)

    async def moving() -> list[str]:
        streets: list[str] = []
        while len(streets) < 2:
            request = await asked(validate=validate if app.form is Form.SYNC else validate_async)
            streets.append(request.payload.street)
            await awaited(request.reply(Saved(f"{request.payload.street}, {len(streets)}")))
        return streets

    workflow = app.workflow(moving)
    workflow_id = shell.begin(workflow)
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED, what="the suspension")
        assert shell.one(workflow_id).awaits == [{"signal": "#update:set_address"}]
        with pytest.raises(
            errors.UpdateRejectedError, match=r"rejected update 'set_address'.*us is not in Europe"
        ) as no:
            answer(shell, ask(shell, workflow_id, Address("Elm", "us")))
        assert (no.value.reason, no.value.workflow_id) == (r"us is not in Europe\0\ud800", workflow_id)
        with pytest.raises(errors.UpdateRejectedError, match="the payload does not fit: street: Field required"):
            accepted(shell, ask(shell, workflow_id, {"city": "Ulm"}))
        assert keys(shell, workflow_id) == ["update:set_address"]  # which waits
        assert answer(shell, ask(shell, workflow_id, Address("Oak"), reply=Saved)) == Saved("Oak, 1")
        last = ask(shell, workflow_id, Address("Ash", "fr"))
        accepted(shell, last)
        assert answer(shell, again(shell, last, reply=Saved)) == Saved("Ash, 2")
        assert shell.result(workflow, workflow_id) == ["Oak", "Ash"]
    assert keys(shell, workflow_id) == [
        "update:set_address",
        "reply(set_address)",
        "update:set_address#2",
        "reply(set_address)#2",
    ]
    assert seen == ["Elm", "Oak", "Ash"]


@pytest.mark.few_shells
def test_update_that_was_sent_before_is_taken_and_a_replay_does_neither_again(shell: Shell, app: Application) -> None:
    # behaviour: E8
    calls: list[Address] = []
    workflow = answering(app, Saved("fine"), validate=calls.append)
    with shell.client() as client:
        record = client.start(workflow)
        client.flush()
        request = client.update(record, "set_address", Address("Elm"), reply=Saved)
        workflow_id = record.id
        client.commit()
    assert shell.finish(workflow, workflow_id) == "Elm"
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == "Elm"
    assert answer(shell, request) == Saved("fine")
    assert calls == [Address("Elm")]
    assert answers(shell) == [({"reply": {"line": "fine"}}, "reply(set_address)")]
    with shell.sessionmaker() as session:
        (history,) = export(session, workflow_id)
    assert replay(workflow, history).fits


@pytest.mark.shells(("executor", "asyncpg-worker"))
def test_answer_in_a_transactional_step_commits_with_what_the_step_writes(shell: Shell, app: Application) -> None:
    # behaviour: T8
    tries: list[int] = []

    def save(session: Session, given: UpdateRequest[Address] | aio.AsyncUpdateRequest[Address]) -> str:
        request = given if isinstance(given, UpdateRequest) else given.sync_request
        session.add(Entry(account=request.payload.street, cents=1))
        request.reply(Saved(f"try {len(tries)}"), session=session)
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError("again")
        return request.payload.street

    step = app.transactional(save, wait=tenacity.wait_none())

    async def moving() -> str:
        return await step(await asked())

    workflow = app.workflow(moving)
    workflow_id = shell.begin(workflow)
    request = ask(shell, workflow_id, Address("Elm"), reply=Saved)
    assert shell.finish(workflow, workflow_id) == "Elm"
    assert answer(shell, request) == Saved("try 1")
    assert answers(shell) == [({"reply": {"line": "try 1"}}, "save")]
    with shell.sessionmaker() as session:
        assert len(session.scalars(select(Entry)).all()) == 1


@ASYNC_WORKER
def test_taken_update_is_answered_once_after_a_crash(shell: Shell, app: Application) -> None:
    # behaviour: E8
    async def moving() -> None:
        request = await asked()
        await awaited(either.wait_signal("go"))
        await awaited(request.reject("the order is sent"))
        await awaited(either.wait_signal("end"))

    workflow = app.workflow(moving)
    workflow_id = shell.begin(workflow)
    request = ask(shell, workflow_id, Address("Elm"))
    with shell.background():
        accepted(shell, request)
        with pytest.raises(errors.ResultTimeoutError, match="it still may"):
            answer(shell, request, timeout=SOON)
        races.wait_until(lambda: shell.one(workflow_id).awaits == [{"signal": "go"}], what="the suspension")
    shell.crashed(workflow_id)
    send(shell, workflow_id, "go")
    with shell.background():
        with pytest.raises(errors.UpdateRejectedError, match="the order is sent"):
            answer(shell, request)
        races.wait_until(lambda: shell.one(workflow_id).awaits == [{"signal": "end"}], what="the second suspension")
    shell.crashed(workflow_id)
    send(shell, workflow_id, "end")
    shell.finish(workflow, workflow_id)
    accepted(shell, request)  # that it was rejected later changes nothing of it
    assert answers(shell) == [({"rejected": "the order is sent"}, "reject(set_address)")]


@BOTH
def test_update_of_a_known_key_is_the_same_and_has_the_same_answer(shell: Shell, app: Application) -> None:
    # behaviour: C2
    workflow = answering(app)
    workflow_id = shell.begin(workflow)
    with shell.client() as client:
        lost = client.update(workflow_id, "set_address", Address("Ash"), key="once")
        client.rollback()
    with pytest.raises(errors.NotFoundError, match="The transaction that sent it is not committed"):
        answer(shell, lost)
    one, other = (ask(shell, workflow_id, Address(street), key="once") for street in ("Elm", "Oak"))
    assert one.id == other.id
    assert shell.finish(workflow, workflow_id) == "Elm"
    late = ask(shell, workflow_id, Address("Ash"), key="once")
    assert [answer(shell, each) for each in (one, other, late)] == ["saved", "saved", "saved"]


@WORKER
def test_wait_that_takes_too_long_is_over_also_when_all_that_came_was_refused(shell: Shell, app: Application) -> None:
    async def patient() -> str:
        try:
            await asked(validate=in_europe, timeout=DAY)
        except errors.WaitTimeoutError as late:
            return str(late)
        return "in time"

    workflow = app.workflow(patient)
    workflow_id = shell.begin(workflow)
    with shell.background():
        with pytest.raises(errors.UpdateRejectedError):
            answer(shell, ask(shell, workflow_id, Address("Elm", "us")))
        races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED, what="the suspension")
        with shell.sessionmaker.begin() as session:
            advance(session, DAY)
        found = shell.result(workflow, workflow_id)
    assert found == "no update 'set_address' that is not refused arrived within 1 day, 0:00:00."


@BOTH
def test_sender_learns_that_nobody_takes_or_answers_it(shell: Shell, app: Application) -> None:
    async def forgetful(takes: bool) -> None:
        if takes:
            await asked()

    workflow = app.workflow(forgetful)
    for takes, why in ((False, "has succeeded without answering update 'set_address'"), (True, "without answering")):
        workflow_id = shell.begin(workflow, takes)
        request = ask(shell, workflow_id, Address("Elm"))
        shell.finish(workflow, workflow_id)
        with pytest.raises(errors.UpdateNotAnsweredError, match=why):
            answer(shell, request)
    accepted(shell, request)
    assert answers(shell) == []


@WORKER
def test_cancelled_workflow_answers_nothing(shell: Shell, app: Application) -> None:
    workflow_id = shell.begin(answering(app))
    request = ask(shell, workflow_id, Address("Elm"))
    with shell.sessionmaker.begin() as session:
        manage.cancel(session, workflow_id)
    with pytest.raises(errors.UpdateNotAnsweredError, match="was cancelled without receiving"):
        accepted(shell, request)


@WORKER
def test_workflow_that_continues_as_new_forgets_what_it_took_and_takes_what_it_did_not(
    shell: Shell, app: Application
) -> None:
    found: list[Any] = []

    async def moving(number: int) -> str:
        request = await asked()
        if number == 0:
            await awaited(found[0].continue_as_new(1))
        await awaited(request.reply(number))
        await awaited(either.wait_signal("end"))
        return str(request.payload.street)

    found.append(app.workflow(moving))
    workflow_id = shell.begin(found[0], 0)
    first, second = (ask(shell, workflow_id, Address(street)) for street in ("Elm", "Oak"))
    with shell.background():
        assert answer(shell, second) == 1
        with pytest.raises(errors.UpdateNotAnsweredError, match="continued as new without answering it"):
            answer(shell, first)
        send(shell, workflow_id, "end")
        assert shell.result(found[0], workflow_id) == "Oak"


@WORKER
def test_fork_answers_nothing_of_the_original(shell: Shell, app: Application) -> None:
    async def moving() -> None:
        request = await asked()
        await awaited(either.set_event("took", request.payload.street))
        await awaited(request.reply("original"))

    workflow = app.workflow(moving)
    workflow_id = shell.begin(workflow)
    request = ask(shell, workflow_id, Address("Elm"))
    shell.finish(workflow, workflow_id)
    with shell.sessionmaker.begin() as session:
        one = manage.fork(session, workflow_id, from_step="reply(set_address)").id
        other = manage.fork(session, workflow_id, from_step="set_event(took)", outcomes={"reply(set_address)": None}).id
    for each in (one, other):
        shell.finish(workflow, each)
        with pytest.raises(errors.NotFoundError):
            update_handle(shell.sessionmaker, each, request.id).result()
    assert answer(shell, request) == "original"


@WORKER
def test_rewound_workflow_takes_again_what_it_took_and_nothing_that_it_refused(shell: Shell, app: Application) -> None:
    calls: list[str] = []

    def validate(address: Address) -> None:
        calls.append(address.street)
        in_europe(address)

    workflow = answering(app, validate=validate)
    workflow_id = shell.begin(workflow)
    refused = ask(shell, workflow_id, Address("Elm", "us"))
    request = ask(shell, workflow_id, Address("Oak"))
    shell.finish(workflow, workflow_id)
    with shell.sessionmaker.begin() as session:
        manage.rewind(session, workflow_id, to_step="update:set_address")
    with pytest.raises(errors.ResultTimeoutError):
        answer(shell, request, timeout=SOON)
    shell.finish(workflow, workflow_id)
    assert answer(shell, request) == "saved"
    with pytest.raises(errors.UpdateRejectedError):
        answer(shell, refused)
    assert calls == ["Elm", "Oak", "Oak"]


@ASYNC_WORKER
def test_of_two_branches_that_read_one_update_one_takes_it(shell: Shell, app: Application) -> None:
    """Both have read the first one before either takes it; with one branch left, nobody waits for another."""
    looking: list[Address] = []
    together = asyncio.Event()

    async def validate(address: Address) -> None:
        looking.append(address)
        if len(looking) == 2:
            together.set()
        await together.wait()

    async def branch(name: str) -> str:
        request = await asked(validate=validate)
        await request.reply(name)
        return f"{name} {request.payload.street}"

    async def moving() -> list[str]:
        return sorted(await asyncio.gather(branch("a"), branch("b")))

    workflow = app.workflow(moving)
    workflow_id = shell.begin(workflow)
    with shell.background():
        first = answer(shell, ask(shell, workflow_id, Address("Elm")))
        second = answer(shell, ask(shell, workflow_id, Address("Oak")))
        assert shell.result(workflow, workflow_id) == sorted([f"{first} Elm", f"{second} Oak"])
    assert {first, second} == {"a", "b"}


@pytest.mark.shells(("joined", "async-joined"))
def test_joined_executor_does_not_wait_for_what_nobody_can_send(shell: Shell, app: Application) -> None:
    with pytest.raises(errors.UsageError, match="would wait for what others do"):
        shell.run(answering(app))


def test_start_with_an_update_finds_the_workflow_of_a_known_key(engine: Engine) -> None:
    durable = Durable()

    @durable.workflow
    def add(by: int) -> None:
        request = wait_update("add", int, validate=lambda number: number < 10)
        request.reply(request.payload + by)

    bound = add.options(key="cart 7").bind(5)
    maker = sessionmaker(engine)
    with maker.begin() as session:
        cart, refused = start_with_update(session, bound, "add", 11)
        _, request = start_with_update(session, bound, "add", 2, reply=int, key="item 1")
        cart_id = cart.id
    with maker() as session:
        Executor(session).execute(add, cart_id)
        _, same = start_with_update(session, bound, "add", 3, reply=int, key="item 1")
        assert (request.workflow_id, request.result(), same.result()) == (cart_id, 7, 7)
        with pytest.raises(errors.WorkflowFinishedError, match="Nothing was sent"):
            start_with_update(session, bound, "add", 3)
    with pytest.raises(errors.UpdateRejectedError, match="it was refused"):
        refused.result()


@pytest.mark.shells(("async-executor",))
def test_async_session_starts_with_an_update(shell: Shell, app: Application) -> None:
    assert isinstance(shell, AsyncShell)
    workflow = answering(app)

    async def start(maker: async_sessionmaker[AsyncSession]) -> tuple[UUID, aio.AsyncUpdateHandle[str]]:
        async with maker.begin() as session:
            record, request = await aio.start_with_update(
                session, workflow.bind(), "set_address", Address("Elm"), reply=str
            )
            return record.id, request

    workflow_id, request = shell.runner.run(start(shell.async_sessionmaker))
    assert shell.finish(workflow, workflow_id) == "Elm"
    assert answer(shell, request) == "saved"
