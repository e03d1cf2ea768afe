"""The branches of a workflow: their names, their keys, and whether all of them wait."""

from __future__ import annotations

import threading
from functools import partial
from uuid import UUID

import pytest

from sqla_durable.errors import UsageError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.branch import Branch, name_of
from sqla_durable.operations.suspending import Wait
from sqla_durable.store import Claimed, Fence


class Shop:
    def pay(self) -> None: ...

    async def pack(self) -> None: ...


@pytest.fixture
def attempt() -> Attempt:
    return Attempt(Claimed(Fence(UUID(int=7), UUID(int=8)), "ship", 2, "{}"))


def test_operations_and_branches_are_counted_within_their_branch() -> None:
    root = Branch()
    first, second = root.open("pay"), root.open("pay")
    assert [first.key("charge"), second.key("charge"), first.key("charge"), root.key("charge")] == [
        "pay/charge",
        "pay#2/charge",
        "pay/charge#2",
        "charge",
    ]
    assert second.open("x").open("y").key("z") == "pay#2/x/y/z"


def test_explicit_key_is_the_whole_workflows() -> None:
    assert Branch().open("pay").key("charge", explicit="deposit") == "deposit"


def test_branch_is_named_after_its_function_without_the_functions_around_it() -> None:
    def inner() -> None: ...

    coroutine = Shop().pack()
    named = [name_of(each) for each in (inner, partial(inner), Shop().pay, coroutine, lambda: None, Shop())]
    coroutine.close()
    assert named == ["inner", "inner", "Shop.pay", "Shop.pack", "lambda", "Shop"]


def test_code_that_is_in_no_branch_is_refused(attempt: Attempt) -> None:
    attempt.branches.begin(threading.get_ident)
    assert attempt.begin_call("charge", 1).key == "charge"
    refused: list[UsageError] = []

    def call() -> None:
        with pytest.raises(UsageError, match="'charge' was called in a task or thread that is no branch") as caught:
            attempt.begin_call("charge", 1)
        refused.append(caught.value)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(refused) == 1
    assert attempt.begin_call("charge", 1).key == "charge#2"


def test_workflow_that_leaves_a_branch_is_refused(attempt: Attempt) -> None:
    attempt.branches.begin(lambda: "here")
    attempt.branches.enter(attempt.branches.root.open("pay"), "there")
    with pytest.raises(UsageError, match=r"returned with branches still running: 'pay'. Await"):
        attempt.refuse_unfinished()
    attempt.branches.leave("there")
    attempt.refuse_unfinished()


def test_workflow_is_idle_when_every_thread_waits_or_is_waited_for(attempt: Attempt) -> None:
    branches, home = attempt.branches, "root"
    branches.begin(lambda: home)

    def may_suspend() -> bool:
        idle = branches.all_wait_or_are_in(attempt.homes_in_calls)
        return attempt.begin_suspension(quiet=float("inf"), idle=lambda: idle) is not None

    first, second = branches.root.open("x"), branches.root.open("x")
    branches.begin_threads(branches.root, [first, second])
    branches.enter(first, home := "first")
    waiting = attempt.begin_call("charge", 1)
    attempt.begin_wait(waiting, Wait(until=float("inf"), in_memory_until=0))
    assert not may_suspend()  # the second has not begun
    branches.enter(second, "second")
    assert not may_suspend()  # it computes
    branches.end_thread(branches.root, "second")
    assert may_suspend()


def test_branch_goes_on_after_the_last_of_its_threads(attempt: Attempt) -> None:
    branches, home = attempt.branches, "root"
    branches.begin(lambda: home)
    nested, beside = branches.root.open("nested"), branches.root.open("beside")
    branches.begin_threads(branches.root, [nested, beside])
    branches.enter(nested, "nested")
    branches.enter(beside, "beside")
    inner = nested.open("inner")
    branches.begin_threads(nested, [inner])
    branches.enter(inner, "inner")
    assert branches.all_wait_or_are_in({"inner", "beside"})
    branches.end_thread(nested, "inner")
    assert not branches.all_wait_or_are_in({"beside"})  # `nested` goes on, and may call something
