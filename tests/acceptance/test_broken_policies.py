"""Retry policies that fail themselves: their error is the step's outcome, so that a replay takes the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tenacity
from sqlalchemy import select
from sqlalchemy.orm import Session

from sqla_durable import Durable, Step, StepStatus, errors
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell
from tests.support.domain import Entry

pytestmark = pytest.mark.few_shells


def _of_no_response(error: BaseException) -> bool:
    response: Any = getattr(error, "response")  # noqa: B009 (what a hurried user writes)
    return bool(response.status_code >= 500)


def _raises(_state: tenacity.RetryCallState) -> Any:
    raise LookupError("broken")


def _gives(value: object) -> Callable[[tenacity.RetryCallState], Any]:
    return lambda state: value


POLICIES: dict[str, dict[str, Any]] = {
    "retry that raises": {"retry": tenacity.retry_if_exception(_of_no_response)},
    "stop that raises": {"stop": _raises},
    "wait that raises": {"wait": _raises},
    "wait for ever": {"wait": _gives(float("inf"))},
    "wait for nan": {"wait": _gives(float("nan"))},
    "wait for a text": {"wait": _gives("5")},
    "wait for nothing": {"wait": _gives(None)},
    "wait for ages": {"wait": _gives(1e20)},
}


@pytest.mark.parametrize("kind", ["plain", "transactional"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.shells(["executor", "worker", "async-worker"])
def test_a_policy_that_fails_fails_its_step_at_first_and_on_replay(
    shell: Shell, app: Application, policy: str, kind: str
) -> None:
    calls: list[int] = []

    def call() -> int:
        calls.append(1)
        raise ConnectionError("no answer")

    def write(session: Session) -> int:
        session.add(Entry(account="policy", cents=1))
        session.flush()
        return call()

    make: Callable[..., Any] = app.plain if kind == "plain" else app.transactional
    step = make(call if kind == "plain" else write, name="call", **POLICIES[policy])

    async def pay() -> str:
        try:
            await step()
        except errors.UsageError as error:
            return str(error)
        return "paid"

    workflow = app.workflow(pay)
    first = shell.run(workflow)
    assert first.startswith("the step's retry policy failed with ")
    assert "ConnectionError('no answer')" in first
    with shell.sessionmaker() as session:
        (recorded,) = session.scalars(select(Step))
        assert (recorded.status, recorded.tries) == (StepStatus.FAILED, 1)
        assert session.scalars(select(Entry)).all() == []
        workflow_id = recorded.workflow_id
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == first
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("wait", 5),
        ("wait", tenacity.wait_exponential),
        ("stop", 3),
        ("stop", tenacity.stop_after_attempt),
        ("retry", (ValueError,)),
        ("retry", ValueError),
    ],
)
def test_what_is_no_tenacity_object_is_refused_with_an_example_of_its_own(option: str, given: Any) -> None:
    options: dict[str, Any] = {option: given}
    with pytest.raises(errors.DefinitionError, match=rf"{option}=.* pass, for example, {option}=tenacity\."):
        Durable().step(lambda: 1, name="call", **options)
