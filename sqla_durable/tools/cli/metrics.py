"""`sqla-durable metrics`: prints the gauges of queues and workers for Prometheus."""

from __future__ import annotations

import typer

from sqla_durable.tools.cli.database import App, Schema, Url, session_of


def metrics(url: Url = None, app: App = None, schema: Schema = None) -> None:
    """Print how full the queues and workers are, in the text format of Prometheus."""
    from sqla_durable.telemetry.gauges import exposition, read

    with session_of(url, app, schema) as session:
        readings = read(session)
    typer.echo(exposition(readings), nl=False)
