"""The counters and histograms of `Telemetry`: what is counted and measured, and by which attributes.

A histogram counts what it measures: tries and outcomes have no counter beside it, which would cost as much again.
"""

from __future__ import annotations

from opentelemetry.metrics import Counter, Histogram, Meter, MeterProvider, get_meter

from sqla_durable.telemetry.gauges import QUEUE

WORKFLOW = "sqla_durable.workflow.name"
STEP = "sqla_durable.step.name"
OUTCOME = "sqla_durable.outcome"
STATUS = "sqla_durable.status"
ERROR = "error.type"

_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_LONG = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3_600, 14_400, 86_400, 604_800)


class Instruments:
    """The instruments of one `Telemetry`."""

    def __init__(self, meter_provider: MeterProvider | None) -> None:
        meter = get_meter("sqla_durable", meter_provider=meter_provider)
        self._started = _counter(meter, "workflows.started", "{workflow}", "Workflows that code has started.")
        self._failures = _counter(meter, "step.failures", "{try}", "Tries of steps that raised an error.")
        self._attempt = _histogram(meter, "attempt.duration", "How long workflows were executed, until they waited.")
        self._step = _histogram(meter, "step.duration", "How long tries of steps took.")
        self._workflow = _histogram(meter, "workflow.duration", "From the start to the outcome.", _LONG)
        self._wait = _histogram(meter, "workflow.wait", "From the start to the first attempt.", _LONG)

    def start(self, workflow: str, queue: str) -> None:
        """Count a start."""
        self._started.add(1, {WORKFLOW: workflow, QUEUE: queue})

    def begin(self, workflow: str, waited: float) -> None:
        """Measure how long a workflow has waited until its first attempt."""
        self._wait.record(waited, {WORKFLOW: workflow})

    def attempt(self, workflow: str, outcome: str, seconds: float) -> None:
        """Measure one execution of a workflow's function."""
        self._attempt.record(seconds, {WORKFLOW: workflow, OUTCOME: outcome})

    def step(self, workflow: str, step: str, seconds: float, error_type: str | None) -> None:
        """Measure a try of a step, and count it if it has failed."""
        attributes = {WORKFLOW: workflow, STEP: step}
        self._step.record(seconds, attributes)
        if error_type is not None:
            self._failures.add(1, {**attributes, ERROR: error_type})

    def finish(self, workflow: str, status: str, seconds: float) -> None:
        """Measure a whole workflow, which has an outcome now."""
        self._workflow.record(seconds, {WORKFLOW: workflow, STATUS: status})


def _counter(meter: Meter, name: str, unit: str, description: str) -> Counter:
    return meter.create_counter(f"sqla_durable.{name}", unit, description)


def _histogram(meter: Meter, name: str, description: str, bounds: tuple[float, ...] = _SHORT) -> Histogram:
    return meter.create_histogram(
        f"sqla_durable.{name}", "s", description, explicit_bucket_boundaries_advisory=list(bounds)
    )
