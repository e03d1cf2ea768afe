"""`Telemetry`, the interceptor: a span for each start, attempt, try of a step and signal, and what is counted of them.

The context of a trace is in the workflow's headers, as W3C traceparent: it goes through the queue, and every attempt
finds it there, in whichever process. What is measured is in `instruments`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from uuid import UUID

from opentelemetry import baggage, context, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sqla_durable.definitions.interceptors import Execution, Interceptor, Start
from sqla_durable.definitions.log import worker_name
from sqla_durable.definitions.registry import StepDefinition
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import StepCall
from sqla_durable.runtime.context import Context as AmbientContext
from sqla_durable.runtime.context import active, current
from sqla_durable.telemetry.ends import add_error, error_type_of, outcome_of, unwinding_of
from sqla_durable.telemetry.gauges import QUEUE
from sqla_durable.telemetry.guarding import guarded, guarded_context
from sqla_durable.telemetry.instruments import OUTCOME, STEP, WORKFLOW, Instruments

QUEUE_HEADER = "sqla_durable.queue"
"""The header with the queue of the start, for the spans of its attempts."""

_MOST_PREVIOUS = 10_000  # workflows whose last attempt here is remembered
_TRACE = TraceContextTextMapPropagator()
_BAGGAGE = W3CBaggagePropagator()


class Telemetry(Interceptor):
    """Spans and metrics by OpenTelemetry for the workflows of a `Durable`.

    ```python
    durable = Durable(interceptors=[Telemetry(carry_baggage=["tenant"])])
    ```

    Make one for the process; several `Durable` objects may share it. A step's span is a child of its attempt's, which
    is a child of the start's span in every process. An attempt that continues what this process has executed before is
    linked to that span. What OpenTelemetry or a processor of yours raises is logged, and fails no workflow.

    Args:
        tracer_provider: makes the spans; by default the global one.
        meter_provider: has the counters and histograms; by default the global one.
        carry_baggage: the names of the baggage that workflows keep from their caller, and pass on to what they start.
            It is stored in the headers, and sent on by what your steps call: name no secrets.
    """

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        carry_baggage: Iterable[str] = (),
    ) -> None:
        self._tracer = trace.get_tracer("sqla_durable", tracer_provider=tracer_provider)
        self.instruments = Instruments(meter_provider)
        self._carried = tuple(carry_baggage)
        self._previous: OrderedDict[UUID, SpanContext] = OrderedDict()

    @guarded
    def prepare(self, start: Start, headers: dict[str, str]) -> None:
        """Make the span of a start, and let the workflow keep its context."""
        headers[QUEUE_HEADER] = start.queue
        self.instruments.start(start.workflow, start.queue)
        attributes = {
            **_messaging("start", "create", str(start.workflow_id), start.queue),
            **_of_workflow(start.workflow_id, start.workflow),
        }
        span = self._tracer.start_span(f"start {start.workflow}", kind=SpanKind.PRODUCER, attributes=attributes)
        _TRACE.inject(headers, trace.set_span_in_context(span))
        if self._carried:
            _BAGGAGE.inject(headers, self._chosen_baggage(context.get_current(), Context()))
        span.end()

    @contextmanager
    def workflow(self, execution: Execution) -> Generator[None]:
        """Make the span of an attempt the current one."""
        attempt = cast("AmbientContext", active()).attempt
        begun = self._begin_attempt(execution, attempt)
        ending: BaseException | None = None
        began = time.perf_counter()
        token = context.attach(begun)
        try:
            yield
        except BaseException as error:
            ending = error
            raise
        finally:
            context.detach(token)
            span = trace.get_current_span(begun)
            self._end_attempt(span, execution, attempt, ending, time.perf_counter() - began)

    @contextmanager
    def step(self, execution: Execution) -> Generator[None]:
        """Make the span of a try of a step the current one."""
        attempt, called = cast("AmbientContext", active()).attempt, cast("AmbientContext", active()).step
        definition = cast("StepCall", called).definition
        begun = self._begin_step(execution, definition)
        ending: BaseException | None = None
        began = time.perf_counter()
        token = context.attach(begun)
        try:
            yield
        except BaseException as error:
            ending = error
            raise
        finally:
            context.detach(token)
            seconds = time.perf_counter() - began
            self._end_step(trace.get_current_span(begun), execution, definition.name, attempt, ending, seconds)

    @guarded
    def finished(self, execution: Execution, status: str) -> None:
        """Measure the whole workflow, and with that count its outcome."""
        self._previous.pop(execution.workflow_id, None)
        self.instruments.finish(execution.workflow, status, _age(execution.workflow_id))

    @contextmanager
    def signal(self, name: str, workflow_ids: Sequence[UUID]) -> Generator[None]:
        """Make the span of a signal that is sent."""
        begun = self._begin_signal(name, workflow_ids)
        ending: BaseException | None = None
        token = context.attach(begun)
        try:
            yield
        except BaseException as error:
            ending = error
            raise
        finally:
            context.detach(token)
            _end_signal(trace.get_current_span(begun), ending)

    @guarded_context
    def _begin_attempt(self, execution: Execution, attempt: Attempt) -> Context:
        is_first = execution.attempt == 1 and not attempt.is_replaying
        if is_first:
            self.instruments.begin(execution.workflow, _age(execution.workflow_id))
        parent, links = self._parent_and_links(execution)
        attributes: dict[str, Any] = {
            **_messaging("execute", "process", str(execution.workflow_id), execution.headers.get(QUEUE_HEADER)),
            **_of_workflow(execution.workflow_id, execution.workflow, execution.attempt),
            "sqla_durable.worker": worker_name.get(),
            "sqla_durable.continued": not is_first,
        }
        span = self._tracer.start_span(
            f"execute {execution.workflow}", parent, SpanKind.CONSUMER, attributes, links=links
        )
        return trace.set_span_in_context(span, parent)

    @guarded_context
    def _begin_step(self, execution: Execution, definition: StepDefinition) -> Context:
        attributes: dict[str, Any] = {
            **_of_workflow(execution.workflow_id, execution.workflow, execution.attempt),
            STEP: definition.name,
            "sqla_durable.step.key": execution.step,
            "sqla_durable.step.try": execution.try_number,
            "sqla_durable.step.session": definition.session.value,
        }
        return trace.set_span_in_context(self._tracer.start_span(f"step {definition.name}", attributes=attributes))

    @guarded
    def _end_step(
        self,
        span: Span,
        execution: Execution,
        name: str,
        attempt: Attempt,
        ending: BaseException | None,
        seconds: float,
    ) -> None:
        unwound = None if ending is None else unwinding_of(attempt, ending)
        failure = ending if unwound is None else None
        self.instruments.step(execution.workflow, name, seconds, None if failure is None else error_type_of(failure))
        if failure is not None:
            add_error(span, failure, details=attempt.options.errors.details)
        elif unwound is not None:
            span.set_attribute(OUTCOME, unwound)
        span.end()

    @guarded_context
    def _begin_signal(self, name: str, workflow_ids: Sequence[UUID]) -> Context:
        one = str(workflow_ids[0]) if len(workflow_ids) == 1 else None
        attributes = _messaging("signal", "send", one, None)
        if one is None:
            attributes["messaging.batch.message_count"] = len(workflow_ids)
        else:
            attributes["sqla_durable.receiver.id"] = one
        attributes["sqla_durable.signal.name"] = name
        if (sender := current()) is not None:
            attributes |= _of_workflow(sender.workflow_id, sender.workflow, sender.attempt)
        span = self._tracer.start_span(f"signal {name}", kind=SpanKind.PRODUCER, attributes=attributes)
        return trace.set_span_in_context(span)

    def _parent_and_links(self, execution: Execution) -> tuple[Context, list[Link]]:
        """Return the context of the start, with its baggage; and the attempt here that this one continues.

        What a schedule starts is no part of the trace in which the schedule was made, and linked to that.
        """
        here = trace.set_span_in_context(trace.INVALID_SPAN)
        parent = _TRACE.extract(execution.headers, here)
        if self._carried:
            parent = self._chosen_baggage(_BAGGAGE.extract(execution.headers), parent)
        links: list[Link] = []
        if execution.tick is not None:
            made = trace.get_current_span(parent).get_span_context()
            parent = trace.set_span_in_context(trace.INVALID_SPAN, parent)
            links += [Link(made)] if made.is_valid else []
        before = self._previous.pop(execution.workflow_id, None)
        if before is not None:
            links.append(Link(before, {"sqla_durable.link": "continues"}))
        return parent, links

    @guarded
    def _end_attempt(
        self, span: Span, execution: Execution, attempt: Attempt, ending: BaseException | None, seconds: float
    ) -> None:
        outcome = outcome_of(attempt, ending)
        self.instruments.attempt(execution.workflow, outcome, seconds)
        span.set_attribute(OUTCOME, outcome)
        if ending is not None and outcome in ("failed", "crashed"):
            add_error(span, ending, details=attempt.options.errors.details)
        if outcome not in ("succeeded", "failed") and span.get_span_context().is_valid:
            self._previous[execution.workflow_id] = span.get_span_context()
            if len(self._previous) > _MOST_PREVIOUS:
                self._previous.popitem(last=False)
        span.end()

    def _chosen_baggage(self, given: Context, base: Context) -> Context:
        """Return `base` with those entries of the baggage that workflows keep."""
        for name in self._carried:
            value = baggage.get_baggage(name, given)
            if value is not None:
                base = baggage.set_baggage(name, value, base)
        return base


@guarded
def _end_signal(span: Span, ending: BaseException | None) -> None:
    if ending is not None:
        add_error(span, ending, details=False)  # the text of a database's error has the payload
    span.end()


def _messaging(operation: str, kind: str, message_id: str | None, queue: str | None) -> dict[str, Any]:
    """Return the attributes of OpenTelemetry's messaging conventions."""
    found = {
        "messaging.system": "sqla_durable",
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
    }
    if message_id is not None:
        found["messaging.message.id"] = message_id
    if queue is not None:
        found[QUEUE] = queue
    return found


def _of_workflow(workflow_id: UUID, name: str, attempt: int | None = None) -> Mapping[str, Any]:
    found: dict[str, Any] = {"sqla_durable.workflow.id": str(workflow_id), WORKFLOW: name}
    return found if attempt is None else found | {"sqla_durable.attempt": attempt}


def _age(workflow_id: UUID) -> float:
    """Return the seconds since a workflow was started, by the time in its id; 0 where the clocks differ."""
    return max(0.0, time.time() - (workflow_id.int >> 80) / 1_000)
