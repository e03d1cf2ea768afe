"""A hint wakes what it is about, and nothing else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from uuid_utils.compat import uuid7

from sqla_durable.execution.worker.cursors import Cursors
from sqla_durable.execution.worker.hints import ClaimsWakeup, HintReceiver, Wakeup, Wakeups
from sqla_durable.execution.worker.subscribed import Subscribed
from sqla_durable.operations.suspending import Waker, Wakers
from sqla_durable.runtime.waiting import LoopWaker
from sqla_durable.store import hints

WORKER, OTHER, WORKFLOW = uuid7(), uuid7(), uuid7()
SENT = hints.sent_to(WORKFLOW, "go")


def woken_by(payload: str, *, accepts_receivers: bool = False) -> set[str]:
    """Return what a hint wakes."""
    wakeups, wakers, cursors = Wakeups(), Wakers(), Cursors(["default"], poll_interval=1.0)
    wakeups.claims.accepts_receivers = accepts_receivers
    waker = Waker()
    wakers.subscribe(waker, [SENT])
    HintReceiver(wakeups, wakers, cursors, worker_id=WORKER, queues=Subscribed(["default", "mail.*"])).receive(payload)
    found = {
        "claims": wakeups.claims.is_set,
        "heartbeat": wakeups.heartbeat.is_set,
        "signals": wakeups.maintenance.is_set and not wakeups.maintenance.is_for_anything,
        "maintenance": wakeups.maintenance.is_for_anything,
        "operation": waker.is_woken,
        "cursors": cursors.restarts > 0,
    }
    return {name for name, is_woken in found.items() if is_woken}


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (hints.to_queue("default"), {"claims"}),
        (hints.to_queue("elsewhere"), set[str]()),
        (hints.to_queue("mail.new"), {"maintenance"}),
        (hints.to_worker(WORKER), {"heartbeat"}),
        (hints.to_worker(OTHER), set[str]()),
        (SENT, {"signals", "operation"}),
        (hints.sent_to(OTHER, "go"), {"signals"}),
        (hints.LATE, {"maintenance", "cursors"}),
        (hints.EVERYWHERE, {"maintenance"}),
    ],
    ids=[
        "our queue",
        "another queue",
        "a queue that fits a pattern",
        "this worker",
        "another worker",
        "awaited signal",
        "signal",
        "late",
        "anything",
    ],
)
async def test_a_hint_wakes_what_it_is_about(payload: str, expected: set[str]) -> None:
    assert woken_by(payload) == expected


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (hints.sent_to(OTHER, "go"), {"claims"}),
        (SENT, {"signals", "operation"}),
        (hints.SENT, {"signals"}),
        (f"{hints.SENT}no id:go", {"signals"}),
    ],
    ids=["a signal", "awaited in memory", "many signals", "of another form"],
)
async def test_claims_that_have_nothing_else_to_do_are_woken_for_receivers(payload: str, expected: set[str]) -> None:
    assert woken_by(payload, accepts_receivers=True) == expected


async def test_a_receiver_wakes_claims_for_nothing_else() -> None:
    wakeup = ClaimsWakeup()
    wakeup.set_for_receiver(WORKFLOW)
    assert (wakeup.is_set, wakeup.is_for_anything) == (True, False)
    wakeup.set()
    assert wakeup.is_for_anything
    wakeup.clear()
    assert (wakeup.is_set, wakeup.is_for_anything) == (False, False)
    assert wakeup.take_receivers() == [WORKFLOW]
    assert wakeup.take_receivers() == []


async def test_a_loop_that_is_woken_before_it_waits_does_not_wait() -> None:
    wakeup = Wakeup()
    wakeup.set()
    assert await wakeup.wait(None)
    wakeup.clear()
    assert not await wakeup.wait(0.0)
    assert not await wakeup.wait(0.001)


async def _woken_from_thread(waker: Waker) -> None:
    thread = threading.Thread(target=waker.wake)
    thread.start()
    await waker.wait(60)
    thread.join()


@pytest.mark.parametrize("make", [Waker, LoopWaker])
async def test_an_operation_is_woken_from_any_thread(make: Callable[[], Waker]) -> None:
    waker = make()
    async with asyncio.timeout(30):
        await _woken_from_thread(waker)
        await waker.wait(60)  # it stays woken until it is cleared
    waker.clear()
    await waker.wait(0.001)
    assert not waker.is_woken
