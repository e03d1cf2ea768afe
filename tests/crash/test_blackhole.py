"""The way to the server swallows what is sent: no error arrives anywhere, until the way is back, is cut, or never."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine

from tests.crash import accounts, survivors
from tests.crash.survivors import FORMS, GATED_CALL, GATED_CREDIT, Kind
from tests.crash.test_outage import SHORT, SOON, elapse
from tests.store import races
from tests.support.databases import Databases
from tests.support.proxy import Proxy
from tests.support.sampling import thorough_cases

SILENCE = 4.0


@pytest.fixture
def own(databases: Databases) -> Generator[Engine]:
    """The test's own way to the workflows' database, past the proxy."""
    with databases.migrated("durable") as url:
        engine = create_engine(url, poolclass=NullPool)
        yield engine
        engine.dispose()


@pytest.fixture
def proxy(own: Engine) -> Generator[Proxy]:
    proxy = Proxy(own.url.render_as_string(hide_password=False))
    yield proxy
    proxy.cut()


@pytest.mark.parametrize(
    ("kind", "ending"),
    [("sync", "resumed"), ("asyncpg", "cut"), *thorough_cases([("sync", "cut"), ("asyncpg", "resumed")])],
)
@pytest.mark.usefixtures("gate")
def test_a_worker_goes_on_after_a_silence_that_is_longer_than_its_lease(
    own: Engine, outside: Engine, gate: Any, proxy: Proxy, kind: Kind, ending: str
) -> None:
    """The steps end in the middle of the silence, and it ends by bytes that come late, or by a reset."""
    forms = FORMS[kind]
    with survivors.worker(kind, proxy.url, **SHORT) as process:
        accounts.wait_for_workers(own, 1)
        for account in (GATED_CREDIT, GATED_CALL):
            accounts.start(own, forms * (4 // len(forms)), account=account)
        accounts.wait_for_arrivals(outside, 8)
        accounts.start(own, forms * 20)
        proxy.silence()
        elapse(SILENCE / 2)
        gate.touch()
        elapse(SILENCE / 2)
        if ending == "cut":
            proxy.end_connections()
        proxy.resume()
        _wait_for_the_end(own)
        assert process.exitcode is None
    verdict = accounts.check(own, outside)
    print(verdict)
    assert verdict.workflows == 8 + 20 * len(forms)


@pytest.mark.parametrize("kind", ["sync", "asyncpg"])
def test_a_worker_goes_on_when_its_connections_stay_silent_for_ever_and_new_ones_are_answered(
    own: Engine, outside: Engine, gate: Any, proxy: Proxy, kind: Kind
) -> None:
    """Only the worker's own statements are caught: the workflows are in plain steps, which need no connection.

    NullPool, because what the user's own transactions hang in is bounded by the connection's settings alone.
    """
    forms = FORMS[kind]
    with survivors.worker(kind, proxy.url, **SHORT, engine={"poolclass": NullPool}) as process:
        accounts.wait_for_workers(own, 1)
        accounts.start(own, forms * (4 // len(forms)), account=GATED_CALL)
        accounts.wait_for_arrivals(outside, 4)
        proxy.silence()
        elapse(1)
        proxy.forget()
        gate.touch()
        accounts.start(own, forms)
        _wait_for_the_end(own)
        assert process.exitcode is None
    assert accounts.check(own, outside).workflows == 4 + len(forms)


def _wait_for_the_end(own: Engine) -> None:
    began = time.monotonic()
    races.wait_until(lambda: accounts.unfinished(own) == 0, what="the end of all", seconds=SOON)
    print(f"after the silence: all {time.monotonic() - began:.1f} s")
