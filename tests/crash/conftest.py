"""Servers that go down, and the world outside of them that does not."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from sqlalchemy import Engine, NullPool, create_engine

from tests.support import postgres
from tests.support.clusters import Cluster, Clusters, clusters


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Generator[Clusters]:
    """Makes servers of the version that `--pg` asks for."""
    version: str | None = request.config.getoption("--pg")
    binaries = None if version in (None, "18") else postgres.debian_binaries(version)
    with clusters(binaries) as made:
        yield made


@pytest.fixture
def cluster(made: Clusters) -> Cluster:
    """A server that the test may stop, with our tables and the domain's."""
    return made.primary()


@pytest.fixture
def own(cluster: Cluster) -> Generator[Engine]:
    """The test's own way to `cluster`."""
    engine = create_engine(cluster.url(), poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The gate at which held steps wait: it is open when the file exists."""
    gate = tmp_path / "gate"
    monkeypatch.setenv("GATE", str(gate))
    return gate


@pytest.fixture
def outside(engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The world that plain steps write to: a database on the test run's server, which stays."""
    monkeypatch.setenv("OUTSIDE_URL", database_url)
    return engine
