"""The gauges that are read from the views, by their names, and their text for Prometheus. Needs no OpenTelemetry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqla_durable.store import gauges
from sqla_durable.store.statements import Connectable

QUEUE = "messaging.destination.name"
"""The attribute that names a queue; in Prometheus, as OpenTelemetry's exporters write it, with underscores."""


@dataclass(frozen=True, slots=True)
class Gauge:
    """A number that is read now and then.

    Attributes:
        name: its name in OpenTelemetry.
        description: what it counts or measures.
        unit: its unit, as UCUM writes it.
        is_of_queue: whether there is one for each queue.
    """

    name: str
    description: str
    unit: str
    is_of_queue: bool = True

    @property
    def prometheus_name(self) -> str:
        """Its name in Prometheus: what OpenTelemetry's exporters make of `name` and `unit`."""
        return self.name.replace(".", "_") + ("_seconds" if self.unit == "s" else "")


@dataclass(frozen=True, slots=True)
class Reading:
    """The values of one gauge: by queue, or a single one under None."""

    gauge: Gauge
    values: dict[str | None, float]


GAUGES: dict[str, Gauge] = {
    "pending": Gauge("sqla_durable.queue.pending", "Workflows that wait to be claimed.", "{workflow}"),
    "running": Gauge("sqla_durable.queue.running", "Workflows that a worker has claimed.", "{workflow}"),
    "delayed": Gauge("sqla_durable.queue.delayed", "Workflows whose delay is not over.", "{workflow}"),
    "suspended": Gauge(
        "sqla_durable.queue.suspended", "Workflows that have begun and wait for something.", "{workflow}"
    ),
    "oldest_pending_age": Gauge(
        "sqla_durable.queue.oldest_pending_age", "How long the oldest pending workflow has been waiting.", "s"
    ),
    "alive": Gauge("sqla_durable.workers.alive", "Workers whose lease is live.", "{worker}", is_of_queue=False),
    "executing": Gauge(
        "sqla_durable.workers.executing", "Workflows that the workers alive execute.", "{workflow}", is_of_queue=False
    ),
    "slots": Gauge("sqla_durable.workers.slots", "Slots of the workers alive.", "{slot}", is_of_queue=False),
}
"""The gauges, by the column that each is read from."""


def read(connectable: Connectable) -> list[Reading]:
    """Read all gauges, in two statements that take no lock."""
    depths, load = gauges.queue_depths(connectable), gauges.worker_load(connectable)
    return [
        Reading(
            gauge,
            {each.queue: getattr(each, column) for each in depths}
            if gauge.is_of_queue
            else {None: getattr(load, column)},
        )
        for column, gauge in GAUGES.items()
    ]


def exposition(readings: Iterable[Reading]) -> str:
    """Return readings in the text format of Prometheus, version 0.0.4."""
    return "".join(f"{line}\n" for each in readings for line in _lines(each))


def _lines(reading: Reading) -> Sequence[str]:
    name = reading.gauge.prometheus_name
    head = [f"# HELP {name} {reading.gauge.description}", f"# TYPE {name} gauge"]
    return head + [f"{name}{_labels(queue)} {value}" for queue, value in reading.values.items()]


def _labels(queue: str | None) -> str:
    if queue is None:
        return ""
    escaped = queue.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{{{QUEUE.replace(".", "_")}="{escaped}"}}'
