"""The PostgreSQL server of one test run: embedded 18, Debian's of another version, or one that runs already."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url

from sqla_durable import embedded

SETTINGS = {
    "max_connections": "300",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "128MB",
    "max_wal_size": "2GB",
    "log_line_prefix": "%m [%p] %d ",
    "timezone": "UTC",
}


@dataclass(frozen=True, slots=True)
class Server:
    """Where the server of this run is, and how to end it."""

    url: str
    stop: Callable[[], None]


def start(version: str | None) -> Server:
    """Start the server that the environment or `--pg` asks for."""
    url = os.environ.get("SQLA_DURABLE_TEST_URL")
    if url:
        return Server(_normalised(url).render_as_string(hide_password=False), stop=lambda: None)
    binaries = None if version in (None, "18") else debian_binaries(version)
    server = embedded.server(settings=SETTINGS, binaries=binaries)
    return Server(server.url, server.stop)


def debian_binaries(version: str) -> Path:
    """Find the programs of a PostgreSQL from Debian."""
    found = {path.parent.name: path for path in Path("/usr/lib/postgresql").glob("*/bin")}
    if version not in found:
        raise pytest.UsageError(
            f"--pg={version}: no PostgreSQL {version} in /usr/lib/postgresql, which has {sorted(found)}. "
            f"Install it with: apt-get install postgresql-{version}"
        )
    return found[version]


def _normalised(url: str) -> URL:
    return make_url(url).set(drivername="postgresql+psycopg")
