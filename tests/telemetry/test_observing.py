"""The gauges: by OpenTelemetry, as text for Prometheus, and in the dashboard, under the same names."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import sessionmaker
from typer.testing import CliRunner

from sqla_durable import Durable, start_many
from sqla_durable.telemetry import Telemetry, observe
from sqla_durable.telemetry.gauges import QUEUE
from sqla_durable.tools.cli.application import app
from tests.support.databases import Databases
from tests.telemetry.conftest import Collected

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
NAME = re.compile(r"\bsqla_durable_[a-z_]+")
ALIVE = text(
    "INSERT INTO durable.worker (id, name, queues, versions, slots, started_at, heartbeat_at, lease_expires_at) "
    "SELECT gen_random_uuid(), n::text, '{}', '{}', 100, began, began, began + interval '1 hour' "
    "FROM unnest(ARRAY[-2, 0, 0]) n, LATERAL (SELECT statement_timestamp() + n * interval '1 hour') AS b (began)"
)

durable = Durable()


@durable.workflow
def pay() -> None: ...


def fill(engine: Engine) -> None:
    """Two workflows wait in a queue whose name needs escaping, one is delayed, and two of three workers are alive."""
    with sessionmaker(engine).begin() as session:
        start_many(session, [pay.options(queue='q"\\').bind() for _ in range(2)])
        start_many(session, [pay.options(delay=timedelta(hours=1)).bind()])
        session.execute(text("UPDATE durable.workflow SET enqueued_at = enqueued_at - interval '90 s'"))
        session.execute(ALIVE)


def lines_of(url: str) -> dict[str, float]:
    done = CliRunner().invoke(app, ["metrics", "--url", url], catch_exceptions=False)
    assert done.exit_code == 0
    lines = [each for each in done.stdout.splitlines() if not each.startswith("#")]
    return {name: float(value) for name, value in (each.rsplit(" ", 1) for each in lines)}


def exported(collected: Collected) -> set[str]:
    """Return the names under which Prometheus has them, as OpenTelemetry's exporters make them."""
    found: set[str] = set()
    for name, metric in collected.metrics().items():
        base = name.replace(".", "_") + ("_seconds" if metric.unit == "s" else "")
        match type(metric.data).__name__:
            case "Sum":
                found.add(f"{base}_total")
            case "Histogram":
                found |= {f"{base}_bucket", f"{base}_count", f"{base}_sum"}
            case _:
                found.add(base)
    return found


def test_gauges_are_the_same_by_both_routes_and_the_dashboard_shows_no_other_metric(
    collected: Collected, engine: Engine, database_url: str
) -> None:
    fill(engine)
    observe(sessionmaker(engine), meter_provider=collected.meter_provider)
    printed = lines_of(database_url)
    of_queue = '{messaging_destination_name="q\\"\\\\"}'
    age = printed.pop(f"sqla_durable_queue_oldest_pending_age_seconds{of_queue}")
    assert 90 <= age < 150
    assert printed[f"sqla_durable_queue_pending{of_queue}"] == 2
    assert printed['sqla_durable_queue_delayed{messaging_destination_name="default"}'] == 1
    assert printed["sqla_durable_workers_alive"] == 2
    assert printed["sqla_durable_workers_slots"] == 200
    assert printed["sqla_durable_workers_executing"] == 0
    assert ({QUEUE: 'q"\\'}, 2) in collected.points("sqla_durable.queue.pending")
    assert collected.points("sqla_durable.workers.slots") == [({}, 200)]

    gauges = {NAME.match(each)[0] for each in printed} | {"sqla_durable_queue_oldest_pending_age_seconds"}  # type: ignore[index]
    assert gauges == exported(collected)

    telemetry = Telemetry(meter_provider=collected.meter_provider, tracer_provider=collected.tracer_provider)
    use_all(telemetry)
    shown = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in shown["panels"] for target in panel.get("targets", ())]
    named = {name for each in queries for name in NAME.findall(each) if not is_label(name)}
    assert named <= exported(collected)
    assert gauges <= named


def is_label(name: str) -> bool:
    return name in {"sqla_durable_workflow_name", "sqla_durable_step_name", "sqla_durable_status"}


def use_all(telemetry: Telemetry) -> None:
    """Let every instrument have a value."""
    instruments = telemetry.instruments
    instruments.start("pay", "default")
    instruments.begin("pay", 0.1)
    instruments.attempt("pay", "succeeded", 0.1)
    instruments.step("pay", "charge", 0.1, "builtins.ValueError")
    instruments.finish("pay", "succeeded", 0.1)


def test_a_database_that_is_gone_is_one_line_in_the_log(
    collected: Collected, databases: Databases, caplog: pytest.LogCaptureFixture
) -> None:
    from sqlalchemy import create_engine

    gone = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")
    observe(sessionmaker(gone), meter_provider=collected.meter_provider)
    assert not any("pending" in each for each in collected.metrics())
    assert [each.name for each in caplog.records] == ["sqla_durable.telemetry"]
    assert "could not be read" in caplog.text
