"""Spans and metrics that are collected in memory, by the SDK of OpenTelemetry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


class Collected:
    """The providers of a test, and what was reported to them."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meter_provider = MeterProvider([self.reader])

    def spans(self, name: str) -> list[ReadableSpan]:
        """Return the spans of a name that have ended, in the order of their beginnings."""
        found = [each for each in self.exporter.get_finished_spans() if each.name == name]
        return sorted(found, key=lambda each: each.start_time or 0)

    def metrics(self) -> dict[str, Any]:
        """Return the metrics by name."""
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def points(self, name: str) -> list[tuple[Mapping[str, Any], float]]:
        """Return the attributes and values of a metric; of a histogram the counts."""
        found = self.metrics()[name].data.data_points
        return [(dict(each.attributes), getattr(each, "count", None) or each.value) for each in found]


@pytest.fixture
def collected() -> Collected:
    return Collected()
