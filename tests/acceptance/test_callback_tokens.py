"""Tokens of callbacks: after a fork, a rewind and a cancel, made of a secret, and refused where they are none."""

from __future__ import annotations

import secrets
from collections.abc import Generator
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from sqla_durable import (
    Durable,
    Executor,
    Step,
    complete_callback,
    create_callback,
    errors,
    fail_callback,
    heartbeat_callback,
    manage,
    new_uuid,
)
from sqla_durable.definitions.checks import LONGEST

DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)


# What operators do; by executors, which poll ten times a second


class PowerCut(BaseException):
    """Ends an executor in the middle of a workflow."""


@pytest.fixture
def durable() -> Durable:
    return Durable()


def waiting(session: Session, durable: Durable) -> tuple[Any, UUID, str]:
    """Return a workflow whose executor died before it waits for its callback, its id and the token."""
    leaves = [True]

    @durable.workflow
    def pay() -> int:
        callback = create_callback(int)
        new_uuid()  # which a fork may be from
        if leaves:
            leaves.clear()
            raise PowerCut
        return callback.result()

    workflow_id = pay.start(session).id
    session.commit()
    with pytest.raises(PowerCut):
        Executor(session).execute(pay, workflow_id)
    return pay, workflow_id, made(session, workflow_id)


def made(session: Session, workflow_id: UUID) -> str:
    """Return the token of the workflow's callback."""
    record = session.get_one(Step, (workflow_id, "create_callback"), populate_existing=True)
    session.commit()
    assert record.output is not None
    return str(record.output["token"])


@pytest.fixture
def session(engine: Engine) -> Generator[Session]:
    with Session(engine) as session:
        yield session


def test_fork_has_the_answer_of_its_original(session: Session, durable: Durable) -> None:
    pay, original, token = waiting(session, durable)
    forked = manage.fork(session, original, from_step="new_uuid").id
    session.commit()
    complete_callback(session, token, 7)
    session.commit()
    assert [Executor(session).execute(pay, each) for each in (forked, original)] == [7, 7]
    again = manage.fork(session, original, from_step="new_uuid").id
    session.commit()
    assert Executor(session).execute(pay, again) == 7


def test_fork_of_what_nobody_can_answer_fails_clearly(session: Session, durable: Durable) -> None:
    pay, original, _ = waiting(session, durable)
    forked = manage.fork(session, original, from_step="new_uuid").id
    manage.cancel(session, original)
    session.commit()
    with pytest.raises(errors.NotFoundError, match=f"workflow {original}, of which this one is a fork"):
        Executor(session).execute(pay, forked)


def test_rewound_workflow_has_another_token(session: Session, durable: Durable) -> None:
    tokens: list[str] = []

    @durable.workflow
    def pay() -> int:
        callback = create_callback(int)
        with Session(session.get_bind()) as other:
            complete_callback(other, callback.token, len(tokens))
            other.commit()
        tokens.append(callback.token)
        return callback.result()

    workflow_id = pay.start(session).id
    session.commit()
    assert Executor(session).execute(pay, workflow_id) == 0
    manage.rewind(session, workflow_id, to_step="create_callback")
    session.commit()
    with pytest.raises(errors.NotFoundError):
        complete_callback(session, tokens[0], 0)
    assert Executor(session).execute(pay, workflow_id) == 1
    assert len(set(tokens)) == 2


def test_cancelled_workflow_cannot_be_answered(session: Session, durable: Durable) -> None:
    _, workflow_id, token = waiting(session, durable)
    manage.cancel(session, workflow_id)
    with pytest.raises(errors.WorkflowFinishedError, match="which was cancelled"):
        complete_callback(session, token, 7)
    with pytest.raises(errors.WorkflowFinishedError):
        heartbeat_callback(session, token)


def test_answer_that_does_not_fit_counts(session: Session, durable: Durable) -> None:
    pay, workflow_id, token = waiting(session, durable)
    complete_callback(session, token, "seven")
    session.commit()
    with pytest.raises(errors.DecodingError, match="value of callback 'create_callback' does not fit"):
        Executor(session).execute(pay, workflow_id)
    with pytest.raises(errors.CallbackFinishedError):
        complete_callback(session, token, 7)


# Secrets

OLD, NEW = "an old secret of a worker", "a new secret of a worker"


def asking(secret: str | list[str], tokens: list[str]) -> Any:
    durable = Durable(secret=secret)

    @durable.workflow
    def pay() -> int:
        callback = create_callback(int)
        tokens.append(callback.token)
        if len(tokens) == 1:
            raise PowerCut
        return callback.result()

    return pay


def cut_off(session: Session) -> tuple[UUID, list[str]]:
    """Return a workflow whose power was cut when it had its callback, and the list of its tokens."""
    tokens: list[str] = []
    pay = asking(OLD, tokens)
    workflow_id = pay.start(session).id
    session.commit()
    with pytest.raises(PowerCut):
        Executor(session).execute(pay, workflow_id)
    return workflow_id, tokens


# behaviour: C2
def test_token_that_is_made_of_a_secret_is_in_no_table(session: Session) -> None:
    workflow_id, tokens = cut_off(session)
    for name in ("workflow", "step", "signal", "event"):
        rows = session.scalars(text(f"SELECT CAST(t AS text) FROM durable.{name} AS t"))
        assert tokens[0].partition(".")[2] not in "".join(rows)
    (made,) = session.scalars(select(Step.output).where(Step.key == "create_callback"))
    assert made is not None
    for guess in (made["digest"], made["nonce"], made["signal"].rpartition(":")[2]):
        with pytest.raises((errors.ArgumentError, errors.NotFoundError)):
            complete_callback(session, f"{workflow_id.hex}.{guess[:48]}", 6)
    complete_callback(session, tokens[0], 7)
    session.commit()
    # A worker with another secret, which knows the old one too, replays it.
    assert Executor(session).execute(asking([NEW, OLD], tokens), workflow_id) == 7
    assert tokens[0] == tokens[1]


def test_token_of_another_secret_is_refused_and_its_answer_is_not(session: Session) -> None:
    workflow_id, tokens = cut_off(session)
    complete_callback(session, tokens[0], 7)
    session.commit()
    durable = Durable(secret=NEW)
    refused: list[str] = []

    @durable.workflow
    def pay_again() -> int:
        callback = create_callback(int)
        with pytest.raises(errors.UsageError, match="derived from a secret that this worker does not have") as caught:
            _ = callback.token
        refused.append(str(caught.value))
        return callback.result()

    renamed: Any = durable.workflow(pay_again.definition.fn, name="pay")
    assert Executor(session).execute(renamed, workflow_id) == 7
    assert tokens[0] not in refused[0]


@pytest.mark.parametrize("secret", ["short", [OLD, ""]])
def test_short_secret_is_refused(secret: Any) -> None:
    with pytest.raises(errors.DefinitionError, match="must have at least 16 characters"):
        Durable(secret=secret)


# Bad input


def test_unknown_token_is_not_found_and_not_shown(session: Session, durable: Durable) -> None:
    _, _, token = waiting(session, durable)
    secret = secrets.token_hex(24)
    with pytest.raises(errors.NotFoundError) as caught:
        complete_callback(session, f"{token[:33]}{secret}", 7)
    assert secret[4:] not in str(caught.value)
    complete_callback(session, token, 7)
    fail = partial(fail_callback, session, token, "too late")
    with pytest.raises(errors.CallbackFinishedError, match="was completed already") as finished:
        fail()
    assert token not in str(finished.value)


@pytest.mark.parametrize(
    "token", ["", "x", "0" * 81, f"{'0' * 32}.{'0' * 48}\n", f"{'0' * 32}.{'G' * 48}", None, 7, b"x"]
)
def test_malformed_token_is_refused(token: Any) -> None:
    for call in (complete_callback, heartbeat_callback, partial(fail_callback, message="no")):
        with pytest.raises(errors.ArgumentError, match="is no token of a callback"):
            call(Session(), token)


def test_value_that_cannot_be_stored_is_refused() -> None:
    session = Session()
    token = f"{'0' * 32}.{'0' * 48}"
    with pytest.raises(errors.EncodingError):
        complete_callback(session, token, float("nan"))
    with pytest.raises(errors.PayloadTooLargeError):
        complete_callback(session, token, "x" * 2_000_000)
    with pytest.raises(errors.EncodingError):
        fail_callback(session, token, "nul\0")
    with pytest.raises(errors.ArgumentError, match="is no text"):
        fail_callback(session, token, KeyError())  # type: ignore[arg-type]
    with pytest.raises(errors.SessionError):
        complete_callback("nothing", token)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [timedelta(), -DAY, 7])
def test_time_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(errors.ArgumentError, match=r"^timeout(=| must be positive)"):
        create_callback(timeout=given)
    with pytest.raises(errors.ArgumentError, match=r"^heartbeat(=| must be positive)"):
        create_callback(heartbeat=given)


def test_callback_is_for_the_code_of_a_workflow(session: Session, durable: Durable) -> None:
    with pytest.raises(errors.UsageError, match="outside of one"):
        create_callback(int)

    @durable.step
    def inner() -> None:
        create_callback(int)

    @durable.workflow
    def outer() -> None:
        inner()

    with pytest.raises(errors.UsageError, match="was called in step 'inner'"):
        Executor(session).run(outer)


def test_longest_times_are_none_that_end(session: Session, durable: Durable) -> None:
    @durable.workflow
    def patient() -> int:
        callback = create_callback(int, timeout=LONGEST, heartbeat=LONGEST)
        with Session(session.get_bind()) as other:
            heartbeat_callback(other, callback.token)
            complete_callback(other, callback.token, 7)
            other.commit()
        return callback.result()

    assert Executor(session).run(patient) == 7
