"""The gauges as observable instruments of OpenTelemetry: read from the database when a metric reader collects."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.definitions.log import Log
from sqla_durable.telemetry.gauges import GAUGES, QUEUE, Gauge, Reading, read

log = Log("sqla_durable.telemetry")

_KEPT = 1.0  # seconds for which a reading counts: a collection asks for each gauge in turn


def observe(sessionmaker: sessionmaker[Session], *, meter_provider: MeterProvider | None = None) -> None:
    """Let OpenTelemetry read the gauges from the database, whenever its metrics are collected.

    ```python
    observe(SessionLocal)
    ```

    Call it once, in one process of the application: every process that does so reports the same numbers. A collection
    is two statements on a connection of its own, in the thread of the metric reader; where they fail, a line is logged
    and the gauges have no value.

    Args:
        sessionmaker: makes a session of a role that may read the views; a blocking one, also of an async application.
        meter_provider: where the instruments are created; by default the global one.
    """
    meter = get_meter("sqla_durable", meter_provider=meter_provider)
    collector = _Collector(sessionmaker)
    for gauge in GAUGES.values():
        meter.create_observable_gauge(
            gauge.name, [collector.callback(gauge)], unit=gauge.unit, description=gauge.description
        )


class _Collector:
    """Reads all gauges at once, for the callbacks of all of them."""

    def __init__(self, sessionmaker: sessionmaker[Session]) -> None:
        self._sessionmaker = sessionmaker
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._readings: dict[Gauge, Reading] = {}

    def callback(self, gauge: Gauge) -> Callable[[CallbackOptions], Iterable[Observation]]:
        """Return what an instrument calls."""

        def observations(_: CallbackOptions) -> Sequence[Observation]:
            reading = self._current().get(gauge)
            values = {} if reading is None else reading.values
            return [Observation(value, {} if queue is None else {QUEUE: queue}) for queue, value in values.items()]

        return observations

    def _current(self) -> dict[Gauge, Reading]:
        with self._lock:
            if time.monotonic() - self._read_at > _KEPT:
                self._readings = self._read()
                self._read_at = time.monotonic()
            return self._readings

    def _read(self) -> dict[Gauge, Reading]:
        try:
            with self._sessionmaker() as session:
                return {each.gauge: each for each in read(session)}
        except Exception as error:
            log.warning("the gauges could not be read, and have no value: %s", error)
            return {}
