"""The statements of hints: what a notification carries, and on which channel."""

from __future__ import annotations

from collections.abc import Generator
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, create_engine, text

from sqla_durable.store import hints
from tests.support.databases import translated
from tests.support.notifications import Ear
from tests.support.statements import executed_on


@pytest.fixture
def connection(direct_url: str, durable_schema: str) -> Generator[Connection]:
    engine = create_engine(direct_url, isolation_level="AUTOCOMMIT")
    with translated(engine, durable_schema).connect() as connection:
        yield connection
    engine.dispose()


def test_channel_is_named_after_the_schema() -> None:
    engine = create_engine("postgresql+psycopg://")
    assert hints.channel_on(engine) == "sqla_durable.durable"
    assert hints.channel_on(translated(engine, "tenant_7")) == "sqla_durable.tenant_7"


@pytest.mark.parametrize("schema", ["s" * 63, "a b", 'a"b', "50%", "a:b", "größe"])
def test_long_and_unusual_schemas_have_channels_of_their_own(schema: str) -> None:
    channels = {hints.channel(each) for each in (schema, f"{schema}2", f"{schema}3")}
    assert len(channels) == 3
    assert all(each.isascii() and len(each) <= 63 for each in channels)


def test_payload_names_the_queue_unless_it_is_too_long() -> None:
    assert hints.to_queue("ü" * 3_998) == "q:" + "ü" * 3_998
    assert hints.to_queue("ü" * 3_999) == hints.EVERYWHERE


def test_payload_names_what_it_is_about() -> None:
    worker_id = uuid4()
    assert hints.read(hints.to_queue("w:mail")) == (hints.Kind.QUEUE, "w:mail")
    assert hints.read(hints.to_worker(worker_id)) == (hints.Kind.WORKER, str(worker_id))
    assert hints.read(hints.SENT) == (hints.Kind.SENT, "")
    for everywhere in (hints.EVERYWHERE, "mail", "x:mail", "qmail"):
        assert hints.read(everywhere) == (None, "")


def test_signals_have_a_hint_each_unless_there_are_many() -> None:
    ids = [uuid4() for _ in range(21)]
    signal_hints = [hints.sent_to(each, "go") for each in ids]
    assert hints.merged([*signal_hints[:20], "q:mail"]) == {*signal_hints[:20], "q:mail"}
    assert hints.merged([*signal_hints, "q:mail"]) == {hints.SENT, "q:mail"}
    assert hints.read(signal_hints[0]) == (hints.Kind.SENT, f"{ids[0]}:go")
    assert hints.sent_to(ids[0], "g" * 8_000) == hints.SENT


def test_longest_payload_is_accepted(connection: Connection, ear: Ear) -> None:
    hints.notify(connection, [(hints.channel_on(connection), hints.to_queue("q" * 7_997))])
    assert ear.hears() == ["q:" + "q" * 7_997]


@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
def test_hints_are_one_statement_and_each_comes_once(connection: Connection, ear: Ear) -> None:
    channel = hints.channel_on(connection)
    with executed_on(connection) as statements:
        hints.notify(connection, [(channel, "mail"), (channel, "default"), (channel, "mail"), ("another", "default")])
    assert len(statements) == 1
    assert ear.hears(2) == ["default", "mail"]
    hints.notify(connection, [(channel, "last")])
    assert ear.hears() == ["last"]


def test_connection_listens_on_the_channel_of_its_schema(engine: Engine) -> None:
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        hints.listen(connection)
        hints.probe(connection)
        assert connection.scalars(text("SELECT pg_listening_channels()")).all() == ["sqla_durable.durable"]
        connection.execute(text("UNLISTEN *"))  # behind PgBouncer the next one would get it
