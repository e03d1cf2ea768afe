"""Queues with limits, with workers."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import ExitStack
from datetime import timedelta

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Queue, Worker, Workflow, WorkflowStatus, manage, start_many
from sqla_durable.models import QueueKey
from tests.acceptance.shells import POLL
from tests.store.races import wait_until

Sessions = sessionmaker[Session]


class Gauge:
    """Workflows of a queue that count how many of them are executed at once, over all workers of this process."""

    def __init__(self) -> None:
        self.durable = Durable()
        self.most: Counter[str] = Counter()
        self.order: list[tuple[str, int]] = []
        self._now: Counter[str] = Counter()
        self._lock = threading.Lock()

        @self.durable.workflow(queue="limited")
        def work(key: str, number: int) -> None:
            with self._lock:
                self.order.append((key, number))
                for each in (key, "all"):
                    self._now[each] += 1
                    self.most[each] = max(self.most[each], self._now[each])
            time.sleep(0.01)  # so that they overlap
            with self._lock:
                for each in (key, "all"):
                    self._now[each] -= 1

        self.work = work

    def start(self, maker: Sessions, keys: str, count: int) -> None:
        with maker.begin() as session:
            start_many(session, [self.work.options(by=key).bind(key, n) for n in range(count) for key in keys])

    def worker(self, maker: Sessions, **options: object) -> Worker:
        given = {"sessionmaker": maker, "poll_interval": POLL, "concurrency": 8, **options}
        return Worker(self.durable, **given)  # type: ignore[arg-type]  # pyright: ignore


def finished(maker: Sessions) -> int:
    with maker() as session:
        return session.scalar(select(func.count()).where(Workflow.status == WorkflowStatus.SUCCEEDED)) or 0


@pytest.mark.parametrize("workers", [1, 3])
def test_limits_over_all_workers(session_factory: Sessions, workers: int) -> None:
    # behaviour: Q2
    gauge = Gauge()
    gauge.durable.queue("limited", concurrency=5, per_key=2)
    gauge.start(session_factory, "abc", 20)
    with ExitStack() as stack:
        for _ in range(workers):
            stack.enter_context(gauge.worker(session_factory))
        wait_until(lambda: finished(session_factory) == 60)
    assert gauge.most["all"] == 5
    assert max(gauge.most[key] for key in "abc") == 2


def test_a_place_that_is_free_again_is_filled_at_once(session_factory: Sessions) -> None:
    """And not at the next poll."""
    gauge = Gauge()
    gauge.durable.queue("limited", concurrency=1)
    gauge.start(session_factory, "a", 30)
    with gauge.worker(session_factory, poll_interval=timedelta(hours=1)):
        wait_until(lambda: finished(session_factory) == 30)
    assert gauge.order == [("a", number) for number in range(30)]


def test_fifo_with_several_workers(session_factory: Sessions) -> None:
    gauge = Gauge()
    gauge.durable.queue("limited", fifo="skip")
    gauge.start(session_factory, "abc", 10)
    with gauge.worker(session_factory), gauge.worker(session_factory):
        wait_until(lambda: finished(session_factory) == 30)
    for key in "abc":
        assert [number for each, number in gauge.order if each == key] == list(range(10))
        assert gauge.most[key] == 1


def test_a_rate_has_room_again_without_a_poll(session_factory: Sessions) -> None:
    # behaviour: Q3
    gauge = Gauge()
    gauge.durable.queue("limited", rate=(5, timedelta(milliseconds=200)))
    gauge.start(session_factory, "a", 20)
    with gauge.worker(session_factory, poll_interval=timedelta(hours=1)):
        wait_until(lambda: finished(session_factory) == 20)
    with session_factory() as session:
        started = list(session.scalars(select(Workflow.started_at).order_by(Workflow.started_at)))
    times = [each for each in started if each is not None]
    assert all(later - first >= timedelta(milliseconds=200) for first, later in zip(times, times[5:], strict=False))


def test_per_worker(session_factory: Sessions) -> None:
    gauges = Gauge(), Gauge()
    for each in gauges:
        each.durable.queue("limited", per_worker=2)
    gauges[0].start(session_factory, "a", 30)
    with gauges[0].worker(session_factory), gauges[1].worker(session_factory):
        wait_until(lambda: finished(session_factory) == 30)
    assert max(each.most["all"] for each in gauges) == 2


def test_what_the_code_declares_counts_when_a_worker_starts_but_a_pause_and_weights_of_the_table_stay(
    session_factory: Sessions,
) -> None:
    gauge = Gauge()
    gauge.durable.queue("limited", concurrency=1, fair=True)
    with session_factory.begin() as session:
        manage.put_queue(session, "limited", concurrency=4, per_key=2, weights={"a": 3})
        manage.pause_queue(session, "limited")
    with gauge.worker(session_factory), session_factory() as session:
        queue = session.get_one(Queue, "limited")
        assert (queue.concurrency, queue.per_key, queue.fair, queue.paused_at is None) == (1, None, True, False)
        weight = select(QueueKey.weight).where(QueueKey.by == "a")
        assert session.scalar(weight) == 3
        manage.put_queue(session, "limited", fair=True, weights={})
        assert session.scalar(weight) == 1


def test_changes_reach_running_workers(session_factory: Sessions) -> None:
    # behaviour: Q8
    gauge = Gauge()
    gauge.durable.queue("limited", concurrency=1)
    with gauge.worker(session_factory):
        wait_until(lambda: settings(session_factory))
        with session_factory.begin() as session:
            manage.put_queue(session, "limited", concurrency=4)
        gauge.start(session_factory, "ab", 20)
        wait_until(lambda: finished(session_factory) == 40)
        assert gauge.most["all"] == 4
        with session_factory.begin() as session:
            manage.put_queue(session, "limited")
        gauge.start(session_factory, "ab", 20)
        wait_until(lambda: finished(session_factory) == 80)
    assert gauge.most["all"] == 8


def settings(maker: Sessions) -> Queue | None:
    with maker() as session:
        return session.get(Queue, "limited")


def test_limited_queues_and_others_share_the_slots(session_factory: Sessions) -> None:
    gauge = Gauge()
    gauge.durable.queue("limited", concurrency=100)
    gauge.durable.queue("also", concurrency=100)
    with session_factory.begin() as session:
        for queue in ("limited", "also", "default"):
            start_many(session, [gauge.work.options(queue=queue).bind(queue, n) for n in range(60)])
    with gauge.worker(session_factory, concurrency=2):
        wait_until(lambda: finished(session_factory) == 180)
    first = Counter(key for key, _ in gauge.order[:90])
    assert min(first.values()) >= 15, first
