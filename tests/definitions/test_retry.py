"""When to try again."""

from __future__ import annotations

from typing import Any

import pytest
import tenacity

from sqla_durable.definitions.retry import RetryPolicy, Tries
from sqla_durable.errors import DefinitionError
from sqla_durable.operations.runtime import run_blocking


def _tried(error: Exception, *, count: int = 1) -> Tries:
    tries = Tries()
    for _ in range(count):
        tries.begin()
    tries.failed(error)
    return tries


def _decide(policy: RetryPolicy, tries: Tries) -> float | None:
    return run_blocking(policy.wait_before_next(tries))


def test_nothing_given_is_one_try() -> None:
    assert RetryPolicy.of(retry=None, stop=None, wait=None) is None


def test_stop_alone_tries_any_exception_again() -> None:
    policy = RetryPolicy.of(retry=None, stop=tenacity.stop_after_attempt(3), wait=None)
    assert policy is not None
    assert _decide(policy, _tried(ValueError(), count=2)) is not None
    assert _decide(policy, _tried(ValueError(), count=3)) is None


def test_predicate_decides() -> None:
    policy = RetryPolicy.of(retry=tenacity.retry_if_exception_type(OSError), stop=None, wait=tenacity.wait_fixed(3))
    assert policy is not None
    assert _decide(policy, _tried(ConnectionError())) == 3
    assert _decide(policy, _tried(ValueError())) is None


def test_wait_grows_with_the_tries() -> None:
    policy = RetryPolicy.of(retry=None, stop=None, wait=tenacity.wait_exponential(multiplier=1))
    assert policy is not None
    waits = [_decide(policy, _tried(ValueError(), count=count)) for count in (1, 2, 3, 4)]
    assert waits == [1, 2, 4, 8]


def test_returned_value_is_not_tried_again_by_default() -> None:
    policy = RetryPolicy.of(retry=None, stop=tenacity.stop_after_attempt(3), wait=None)
    tries = Tries()
    tries.begin()
    tries.returned("value")
    assert policy is not None
    assert _decide(policy, tries) is None


@pytest.mark.parametrize("name", ["retry", "stop", "wait"])
def test_something_that_is_not_tenacitys_is_refused(name: str) -> None:
    given: dict[str, Any] = {"retry": None, "stop": None, "wait": None, name: 3}
    with pytest.raises(DefinitionError, match=f"{name}=3 is not a tenacity object: pass, for example"):
        RetryPolicy.of(**given)
