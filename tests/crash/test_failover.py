"""The primary dies and its standby is promoted: workers and clients with a URL of both go on by themselves."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine, NullPool, create_engine, event, select, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqla_durable import Workflow
from tests.crash import accounts, survivors
from tests.crash.survivors import FORMS, GATED_CALL, GATED_CREDIT, Kind
from tests.crash.test_outage import SHORT, SOON, elapse
from tests.store import races
from tests.support.clusters import Cluster, Clusters
from tests.support.proxy import Proxy
from tests.support.sampling import thorough_cases

UNLED = 3.0
"""Seconds without a primary: longer than the lease."""
KINDS: list[Kind] = ["sync", "psycopg", "asyncpg"]


@pytest.fixture
def standby(made: Clusters, cluster: Cluster) -> Cluster:
    """A standby of `cluster` without which nothing is acknowledged there."""
    standby = made.standby_of(cluster)
    cluster.set("synchronous_standby_names", standby.name)
    engine = create_engine(cluster.url(), poolclass=NullPool)
    synchronous = text("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'")
    with engine.connect() as connection:
        races.wait_until(lambda: connection.execute(synchronous).scalar_one() == 1, what="a synchronous standby")
    engine.dispose()
    return standby


@pytest.fixture
def of_both(cluster: Cluster, standby: Cluster) -> URL:
    """The URL of whichever of the two accepts writes; SQLAlchemy hands it to psycopg and to asyncpg."""
    hosts = tuple(f"127.0.0.1:{each.port}" for each in (cluster, standby))
    query = {"host": hosts, "target_session_attrs": "read-write"}
    one = cluster.url()
    return URL.create(one.drivername, one.username, one.password, database=one.database, query=query)


@pytest.fixture
def either(of_both: URL) -> Generator[Engine]:
    """The test's own way to whichever is the primary."""
    engine = create_engine(of_both, poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("kind", ["asyncpg", *thorough_cases(["sync", "psycopg"])])
def test_nothing_that_was_acknowledged_is_lost_when_the_standby_is_promoted(
    cluster: Cluster, standby: Cluster, of_both: URL, either: Engine, outside: Engine, gate: Path, kind: Kind
) -> None:
    """With a synchronous standby: every acknowledged start, checkpoint and effect is there, each effect once."""
    url, forms = of_both.render_as_string(hide_password=False), FORMS[kind]
    with ExitStack() as stack:
        workers = [stack.enter_context(survivors.worker(kind, url, **SHORT)) for _ in range(2)]
        client = stack.enter_context(survivors.client(url, forms))
        _begin_steps(either, outside, forms)
        cluster.stop("immediate")
        died = time.monotonic()
        gate.touch()
        before = accounts.acknowledged(outside)
        elapse(UNLED)
        standby.promote()
        promoted = time.monotonic()
        races.wait_until(lambda: len(accounts.acknowledged(outside)) > len(before), what="a new start", seconds=SOON)
        print(f"promotion took {promoted - died:.1f} s, the next start came after {time.monotonic() - died:.1f} s")
        client.terminate()
        client.join()
        races.wait_until(lambda: accounts.unfinished(either) == 0, what="the end of all", seconds=SOON)
        print(f"all finished after {time.monotonic() - died:.1f} s")
        assert [each.exitcode for each in workers] == [None, None]
    print(f"{len(before)} starts acknowledged before, {len(accounts.acknowledged(outside))} in all")
    assert before
    assert accounts.acknowledged(outside) <= _accounts(either)
    print(accounts.check(either, outside))


def _begin_steps(engine: Engine, outside: Engine, forms: tuple[str, ...]) -> None:
    accounts.wait_for_workers(engine, 2)
    for account in (GATED_CREDIT, GATED_CALL):
        accounts.start(engine, forms * (8 // len(forms)), account=account)
    accounts.wait_for_arrivals(outside, 16)
    races.wait_until(lambda: len(accounts.acknowledged(outside)) > 20, what="twenty acknowledged starts")


def _accounts(engine: Engine) -> set[str]:
    with Session(engine) as session:
        return {str(each["account"]) for each in session.scalars(select(Workflow.input))}


@pytest.mark.parametrize("kind", ["psycopg", *thorough_cases(["sync", "asyncpg"])])
def test_a_primary_that_comes_back_as_a_standby_is_left_for_the_new_primary(
    cluster: Cluster, standby: Cluster, of_both: URL, either: Engine, outside: Engine, gate: Path, kind: Kind
) -> None:
    """The old primary answers at the first address of the URL, and refuses writes: 25006."""
    gate.touch()
    forms = FORMS[kind]
    with survivors.worker(kind, of_both.render_as_string(hide_password=False), **SHORT) as process:
        accounts.wait_for_workers(either, 1)
        accounts.start(either, forms * 20)
        standby.promote()
        cluster.restart_as_standby()
        accounts.start(either, forms * 20)
        races.wait_until(lambda: accounts.unfinished(either) == 0, what="the end of all", seconds=SOON)
        assert process.exitcode is None
    assert accounts.check(either, outside).workflows == 40 * len(forms)


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("sync", "any"),
        ("asyncpg", "any"),
        ("psycopg", "read-write"),
    ],
)
def test_a_server_that_turns_read_only_for_a_while_is_waited_for(
    cluster: Cluster, own: Engine, outside: Engine, gate: Path, kind: Kind, attributes: str
) -> None:
    """One address, as of a proxy or a DNS name: for a while it leads to a standby, then to a primary again.

    With `any`, statements are refused with 25006, and no connection is closed when the standby is promoted; with
    `read-write`, connections are refused.
    """
    forms = FORMS[kind]
    url = cluster.url().update_query_dict({"target_session_attrs": attributes}).render_as_string(hide_password=False)
    with survivors.worker(kind, url, **SHORT) as process:
        accounts.wait_for_workers(own, 1)
        accounts.start(own, forms * (4 // len(forms)), account=GATED_CALL)
        accounts.wait_for_arrivals(outside, 4)
        cluster.restart_as_standby()
        _assert_read_only(own)
        gate.touch()
        elapse(3)
        cluster.promote()
        assert process.exitcode is None, "the worker process has ended"
        accounts.start(own, forms)
        races.wait_until(lambda: accounts.unfinished(own) == 0, what="the end of all", seconds=SOON)
    print(accounts.check(own, outside))


def _assert_read_only(engine: Engine) -> None:
    with pytest.raises(DBAPIError) as refused:
        accounts.start(engine, ["sync"])
    assert getattr(refused.value.orig, "sqlstate", None) == "25006"


@pytest.mark.parametrize("kind", ["sync", *thorough_cases(["psycopg", "asyncpg"])])
def test_connections_to_a_demoted_server_leave_the_pool(
    made: Clusters, cluster: Cluster, own: Engine, outside: Engine, gate: Path, kind: Kind
) -> None:
    """One address leads to another server after a demotion; connections made in between stay with the demoted one."""
    forms = FORMS[kind]
    other = made.standby_of(cluster)
    proxy = Proxy(cluster.text)
    to_other = create_engine(other.url(), poolclass=NullPool)
    with survivors.worker(kind, proxy.url, **SHORT) as process:
        accounts.wait_for_workers(own, 1)
        accounts.start(own, forms * (4 // len(forms)), account=GATED_CALL)
        accounts.wait_for_arrivals(outside, 4)
        cluster.restart_as_standby()
        races.wait_until(lambda: _clients(own) > 0, what="the worker's connections to the demoted server")
        other.promote()
        proxy.lead_to(other.text)
        gate.touch()
        accounts.start(to_other, forms)
        races.wait_until(lambda: accounts.unfinished(to_other) == 0, what="the end of all", seconds=SOON)
        assert process.exitcode is None
    print(accounts.check(to_other, outside))
    proxy.cut()


def _clients(engine: Engine) -> int:
    statement = text(
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    with engine.connect() as connection:
        return int(connection.execute(statement).scalar_one())


def test_the_listener_of_the_docs_lets_a_connection_to_a_demoted_server_leave_the_pool(cluster: Cluster) -> None:
    cluster.restart_as_standby()
    engine = create_engine(cluster.url(), pool_size=1, max_overflow=0)

    @event.listens_for(engine, "handle_error")
    def _leave(context: ExceptionContext) -> None:
        if getattr(context.original_exception, "sqlstate", None) == "25006":
            context.is_disconnect = True

    backend = text("SELECT pg_backend_pid()")
    with engine.connect() as connection:
        before = connection.execute(backend).scalar_one()
    _assert_read_only(engine)
    with engine.connect() as connection:
        assert connection.execute(backend).scalar_one() != before
    engine.dispose()
