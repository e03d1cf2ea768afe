"""Traces go with a workflow: from its caller through the queue, a suspend, another attempt, and to its children."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType
from typing import Any
from uuid import UUID

import pytest
import tenacity
from opentelemetry import baggage, context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import (
    Durable,
    Executor,
    Worker,
    Workflow,
    WorkflowStatus,
    manage,
    map_children,
    send_signal,
    start_child,
)
from sqla_durable.telemetry import Telemetry
from tests.acceptance.shells import PATIENCE, POLL
from tests.store import races
from tests.support.domain import Entry
from tests.telemetry.conftest import Collected

Sessions = sessionmaker[Session]


class Crash(BaseException):
    """No outcome of a workflow: what raises it is an attempt that broke."""


def traced(collected: Collected, *carried: str) -> Durable:
    telemetry = Telemetry(
        tracer_provider=collected.tracer_provider, meter_provider=collected.meter_provider, carry_baggage=carried
    )
    return Durable(interceptors=[telemetry])


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.trace_id)


@contextmanager
def carrying(name: str, value: str) -> Generator[None]:
    token = context.attach(baggage.set_baggage(name, value, baggage.set_baggage("secret", "s3")))
    try:
        yield
    finally:
        context.detach(token)


def test_a_trace_goes_through_the_queue_a_suspend_and_a_signal(
    collected: Collected,
    engine: Engine,
    session_factory: Sessions,
    async_session_factory: async_sessionmaker[AsyncSession],
) -> None:
    durable = traced(collected, "tenant")
    seen: list[object] = []

    @durable.step
    async def charge(cents: int) -> int:
        seen.append(dict(baggage.get_all()))
        return cents

    @durable.step
    def book(session: Session, cents: int) -> None:
        seen.append(dict(baggage.get_all()))
        session.add(Entry(account="traced", cents=cents))

    @durable.workflow
    async def pay(cents: int) -> int:
        await charge(cents)
        cents += await aio.wait_signal("tip", int)
        await aio.to_thread(book, cents)
        return cents

    makers: Any = {"sessionmaker": session_factory, "async_sessionmaker": async_session_factory}
    tracer = collected.tracer_provider.get_tracer("shop")
    with session_factory.begin() as session, tracer.start_as_current_span("request"), carrying("tenant", "acme"):
        workflow = pay.options(queue="money").start(session, 7)
        headers, workflow_id = dict(workflow.headers or {}), workflow.id
    assert headers.keys() == {"traceparent", "baggage", "sqla_durable.queue"}
    assert headers["baggage"] == "tenant=acme"

    with Worker(durable, **makers, queues=["money"], poll_interval=POLL, name="till-1"):
        races.wait_until(lambda: races.status_of(engine, workflow_id) is WorkflowStatus.SUSPENDED)
    with session_factory.begin() as session:
        send_signal(session, workflow_id, "tip", 1)
    with Worker(durable, **makers, queues=["money"], poll_interval=POLL, name="till-2"):
        assert pay.handle(session_factory, workflow_id).result(timeout=PATIENCE) == 8

    assert seen == [{"tenant": "acme"}] * 2
    _expect_one_trace(collected)
    _expect_attributes(collected, workflow_id)
    _expect_metrics(collected)


def _expect_one_trace(collected: Collected) -> None:
    (request,), (start,) = collected.spans("request"), collected.spans("start pay")
    first, second = collected.spans("execute pay")
    (charged,), (booked,), (signal,) = (collected.spans(each) for each in ("step charge", "step book", "signal tip"))
    assert {trace_of(each) for each in (request, start, first, second, charged, booked)} == {trace_of(request)}
    assert [parent_of(each) for each in (start, first, second)] == [id_of(request), id_of(start), id_of(start)]
    assert (parent_of(charged), parent_of(booked)) == (id_of(first), id_of(second))
    assert [each.context.span_id for each in second.links] == [id_of(first)]
    assert (first.links, signal.kind, start.kind, second.kind) == (
        (),
        SpanKind.PRODUCER,
        SpanKind.PRODUCER,
        SpanKind.CONSUMER,
    )
    assert {each.status.status_code for each in (first, second, charged, booked)} == {StatusCode.UNSET}


def _expect_attributes(collected: Collected, workflow_id: UUID) -> None:
    first, second = collected.spans("execute pay")
    (booked,), (signal,) = collected.spans("step book"), collected.spans("signal tip")
    assert dict(second.attributes or {}) == {
        "messaging.system": "sqla_durable",
        "messaging.operation.name": "execute",
        "messaging.operation.type": "process",
        "messaging.destination.name": "money",
        "messaging.message.id": str(workflow_id),
        "sqla_durable.workflow.id": str(workflow_id),
        "sqla_durable.workflow.name": "pay",
        "sqla_durable.attempt": 1,
        "sqla_durable.worker": "till-2",
        "sqla_durable.continued": True,
        "sqla_durable.outcome": "succeeded",
    }
    assert (first.attributes or {})["sqla_durable.outcome"] == "suspended"
    assert (signal.attributes or {})["messaging.message.id"] == str(workflow_id)
    assert (booked.attributes or {}).items() >= {
        "sqla_durable.step.name": "book",
        "sqla_durable.step.key": "book",
        "sqla_durable.step.try": 1,
        "sqla_durable.step.session": "Session",
    }.items()


def _expect_metrics(collected: Collected) -> None:
    of_pay, queue = {"sqla_durable.workflow.name": "pay"}, {"messaging.destination.name": "money"}
    assert collected.points("sqla_durable.workflows.started") == [({**of_pay, **queue}, 1)]
    assert collected.points("sqla_durable.workflow.duration") == [({**of_pay, "sqla_durable.status": "succeeded"}, 1)]
    assert collected.points("sqla_durable.workflow.wait") == [(of_pay, 1)]
    assert sorted(count for _, count in collected.points("sqla_durable.step.duration")) == [1, 1]
    assert {each["sqla_durable.outcome"] for each, _ in collected.points("sqla_durable.attempt.duration")} == {
        "suspended",
        "succeeded",
    }


def test_an_error_is_described_once_where_it_occurred(collected: Collected, session_factory: Sessions) -> None:
    durable = traced(collected)

    @durable.step(retry=tenacity.retry_if_exception_type(ValueError), stop=tenacity.stop_after_attempt(2))
    def charge() -> None:
        raise ValueError("no money")

    @durable.workflow
    def pay() -> None:
        charge()

    @durable.workflow
    def broken() -> None:
        raise KeyError("own")

    with session_factory() as session:
        for each in (pay, broken):
            with pytest.raises((ValueError, KeyError)):
                Executor(session).run(each)
    tries, (attempt,), (own,) = (
        collected.spans("step charge"),
        collected.spans("execute pay"),
        collected.spans("execute broken"),
    )
    described = [(each.status.status_code, [event.name for event in each.events]) for each in (*tries, attempt, own)]
    error = StatusCode.ERROR
    assert described == [(error, ["exception"]), (error, ["exception"]), (error, []), (error, ["exception"])]
    assert attempt.status.description == "no money"
    assert [(each.attributes or {})["error.type"] for each in (*tries, attempt)] == ["builtins.ValueError"] * 3
    event = tries[0].events[0].attributes or {}
    assert (event["exception.type"], event["exception.message"]) == ("builtins.ValueError", "no money")
    assert "raise ValueError" in str(event["exception.stacktrace"])
    assert {count for _, count in collected.points("sqla_durable.step.failures")} == {2}
    assert {each["sqla_durable.status"] for each, _ in collected.points("sqla_durable.workflow.duration")} == {"failed"}


def test_an_attempt_after_a_crash_is_linked_and_children_are_started_once(
    collected: Collected, session_factory: Sessions
) -> None:
    durable = traced(collected)
    crashes = [1]

    @durable.workflow
    def pack(number: int) -> int:
        return number

    @durable.workflow
    def ship() -> int:
        one = start_child(pack, 1)
        if crashes:
            crashes.pop()
            raise Crash
        return one.result() + sum(map_children(pack, [2, 3]))

    with session_factory.begin() as session:
        workflow_id = ship.start(session).id
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        assert ship.handle(session_factory, workflow_id).result(timeout=PATIENCE) == 6
    attempts, children = collected.spans("execute ship"), collected.spans("start pack")
    assert [(each.attributes or {})["sqla_durable.attempt"] for each in attempts][:2] == [1, 2]
    assert [(each.attributes or {})["sqla_durable.outcome"] for each in (attempts[0], attempts[-1])] == [
        "crashed",
        "succeeded",
    ]
    for before, after in pairwise(attempts):
        assert [each.context.span_id for each in after.links] == [id_of(before)]
    assert len(children) == 3
    assert parent_of(children[0]) == id_of(attempts[0])
    assert {parent_of(each) for each in collected.spans("execute pack")} == {id_of(each) for each in children}
    assert len({trace_of(each) for each in (*attempts, *children, *collected.spans("execute pack"))}) == 1


def test_what_a_schedule_starts_has_a_trace_of_its_own(collected: Collected, session_factory: Sessions) -> None:
    durable = traced(collected)

    @durable.workflow
    def digest() -> None: ...

    with session_factory.begin() as session:
        manage.put_schedule(session, "daily", digest.bind(), cron="0 7 * * *")
        assert manage.run_schedule(session, "daily")
        workflow_id = session.scalars(select(Workflow.id)).one()
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        digest.handle(session_factory, workflow_id).result(timeout=PATIENCE)
    (made,), (attempt,) = collected.spans("start digest"), collected.spans("execute digest")
    assert attempt.parent is None
    assert [each.context.span_id for each in attempt.links] == [id_of(made)]


def test_a_step_costs_few_calls_and_nothing_where_there_is_no_telemetry(
    collected: Collected, session_factory: Sessions
) -> None:
    def execute(durable: Durable) -> int:
        @durable.step
        def charge(cents: int) -> int:
            return cents

        @durable.workflow
        def pay(cents: int) -> int:
            return charge(cents)

        calls: Counter[str] = Counter()

        def count(frame: FrameType, happening: str, _: Any) -> None:
            if happening == "call" and "/sqla_durable/telemetry/" in frame.f_code.co_filename:
                calls[frame.f_code.co_qualname] += 1

        with session_factory() as session:
            sys.setprofile(count)
            try:
                Executor(session).run(pay, 1)
            finally:
                sys.setprofile(None)
        return calls.total()

    assert execute(Durable()) == 0
    assert execute(traced(collected)) <= 30  # of a start, an attempt, a step and an outcome
    assert len(collected.exporter.get_finished_spans()) == 3


def test_a_signal_that_the_database_refuses_leaves_no_payload_in_its_span(engine: Engine, collected: Collected) -> None:
    telemetry = Telemetry(tracer_provider=collected.tracer_provider, meter_provider=collected.meter_provider)
    kept = Durable(interceptors=[telemetry])
    with Session(engine) as session:
        (receiver,) = races.enqueue(session)
        session.execute(
            text("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$")
        )
        session.execute(
            text("CREATE TRIGGER refuse BEFORE INSERT ON durable.signal FOR EACH ROW EXECUTE FUNCTION refuse()")
        )
        session.commit()
        with pytest.raises(DBAPIError):
            send_signal(session, receiver, "card", {"number": "4111-secret"})
    assert kept.options.interceptors.signals
    (span,) = collected.spans("signal card")
    said = f"{[dict(each.attributes or {}) for each in span.events]} {span.status.description}"
    assert "refused" in said
    assert "4111-secret" not in said


class Failing(SpanProcessor):
    """A processor of an application that always raises."""

    def __init__(self) -> None:
        self.called: Counter[str] = Counter()

    def on_start(self, span: Span, parent_context: context.Context | None = None) -> None:
        self.called["start"] += 1
        raise RuntimeError("no memory for spans")

    def on_end(self, span: ReadableSpan) -> None:
        self.called["end"] += 1
        raise RuntimeError("no memory for spans")


class FailingAtEnd(Failing):
    def on_start(self, span: Span, parent_context: context.Context | None = None) -> None:
        """Accept it."""


@pytest.mark.parametrize("kind", [Failing, FailingAtEnd])
def test_what_fails_in_telemetry_fails_no_workflow(
    collected: Collected,
    session_factory: Sessions,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Failing],
) -> None:
    monkeypatch.setattr("sqla_durable.telemetry.guarding._warned", False)
    failing = kind()
    collected.tracer_provider.add_span_processor(failing)
    durable = traced(collected)
    written: list[str] = []

    @durable.step
    def book(session: Session, account: str) -> str:
        session.add(Entry(account=account, cents=1))
        written.append(account)
        return account

    @durable.workflow
    def order(account: str) -> str:
        return book(account)

    with session_factory() as session:
        made = order.start(session, "ada").id
        send_signal(session, made, "noted", 1)
        session.commit()
        assert Executor(session).execute(order, made) == "ada"
        session.commit()
        assert session.scalars(select(Entry.account)).all() == written == ["ada"]
    assert failing.called["end"] >= (3 if kind is FailingAtEnd else 0)
    assert {"sqla_durable.workflows.started", "sqla_durable.step.duration"} <= collected.metrics().keys()
    if kind is FailingAtEnd:  # the trace is whole
        with session_factory() as session:
            assert "traceparent" in (session.get_one(Workflow, made).headers or {})
    (warning,) = [each for each in caplog.records if each.name == "sqla_durable.telemetry"]
    assert "telemetry failed; no workflow is affected" in warning.message
    assert "no memory for spans" in warning.message
