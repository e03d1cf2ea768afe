"""Servers that go down, and the world outside of them that does not."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from sqlalchemy import Engine, NullPool, create_engine

from tests.crash import application
from tests.support import postgres
from tests.support.clusters import Cluster, Clusters, clusters


@pytest.fixture(scope="session")
def binaries(request: pytest.FixtureRequest) -> Path | None:
    """The programs of the version that `--pg` asks for; None means those of the wheel."""
    version: str | None = request.config.getoption("--pg")
    return None if version in (None, "18") else postgres.debian_binaries(version)


@pytest.fixture(scope="session")
def pristine(binaries: Path | None) -> Generator[Cluster]:
    """A server with our tables and the domain's that is stopped, to be copied."""
    with clusters(binaries) as made:
        cluster = made.primary()
        cluster.stop("fast")
        yield cluster


@pytest.fixture
def made(binaries: Path | None, pristine: Cluster) -> Generator[Clusters]:
    """Makes servers, copies of `pristine`."""
    with clusters(binaries, pristine=pristine) as made:
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
def crash_url(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """The test's database as the outside world of `tests.crash.application`, in this process and in its children."""
    monkeypatch.setenv("CRASH_URL", database_url)
    yield
    application.outside(database_url).dispose()


@pytest.fixture
def outside(engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The world that plain steps write to: a database on the test run's server, which stays."""
    monkeypatch.setenv("OUTSIDE_URL", database_url)
    return engine
