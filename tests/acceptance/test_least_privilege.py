"""The five roles that `sqla-durable roles` makes: each does its part of one story, and is refused all else."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow, manage, send_signal, wait_signal
from sqla_durable.models import Audit
from sqla_durable.store.rights import ROLES
from tests.acceptance.rights import VERBS, World, tried
from tests.acceptance.shells import PATIENCE, POLL
from tests.support.domain import Entry
from tests.support.roles import DENIED, Roles, refused, roles

durable = Durable()


@durable.step
def book(session: Session, cents: int) -> int:
    session.add(Entry(account="roles", cents=cents, note=None))
    return cents


@durable.workflow
def pay(cents: int) -> int:
    return book(cents) + wait_signal("tip", int)


@pytest.fixture
def five(engine: Engine, direct_url: str) -> Generator[Roles]:
    with roles(engine, direct_url, *ROLES) as made:
        made.grant(*ROLES)
        yield made


def test_start_work_operate_and_read_share_a_workflow(five: Roles, world: World) -> None:
    """What the trigger and the identity columns need is no right of theirs."""
    five.execute(
        "REVOKE ALL ON ALL SEQUENCES IN SCHEMA durable FROM PUBLIC",
        "REVOKE ALL ON FUNCTION durable.check_new_workflow() FROM PUBLIC",
        "GRANT INSERT, SELECT ON public.entry TO work",
        "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO work",
    )
    starter, operator, reader = (five.engine(each) for each in ("start", "operate", "read"))
    with sessionmaker(starter).begin() as session:
        paid = pay.options(tags={"tenant": "7"}).start(session, 3).id
        cancelled = pay.start(session, 4).id
        session.flush()
        send_signal(session, paid, "tip", 1)
    with Session(starter) as session:
        assert session.execute(select(Workflow.status).where(Workflow.id == paid)).scalar_one() == "pending"
    with sessionmaker(operator).begin() as session:
        manage.cancel(session, cancelled)
        manage.put_queue(session, "default", concurrency=5)
        session.add(Audit(who="ada", verb="cancel", workflow_id=cancelled, reason="by mistake"))
    with Worker(durable, sessionmaker=sessionmaker(five.engine("work")), poll_interval=POLL):
        assert pay.handle(sessionmaker(reader), paid).result(timeout=PATIENCE) == 4
    with reader.connect() as connection:
        found = connection.execute(text("SELECT id, status, tags FROM durable.workflow_overview ORDER BY created_at"))
        assert {(paid, "succeeded"), (cancelled, "cancelled")} <= {(each.id, each.status) for each in found}
        assert connection.scalars(text("SELECT reason FROM durable.audit")).all() == ["by mistake"]
    allowed = {*VERBS["starter"], *VERBS["signaller"], *VERBS["uploader"]}
    tries = {name: tried(starter, verb, world) for verbs in VERBS.values() for name, verb in verbs.items()}
    assert tries == {name: "" if name in allowed else DENIED for name in tries}


_DDL = (
    "ALTER TABLE durable.workflow ADD COLUMN more int",
    "ALTER TABLE durable.workflow DISABLE TRIGGER workflow_new_check",
    "CREATE INDEX more ON durable.step (name)",
    "CREATE TABLE durable.more ()",
    "CREATE TRIGGER more BEFORE INSERT ON durable.step EXECUTE FUNCTION durable.check_new_workflow()",
    "CREATE POLICY more ON durable.workflow",
    "DROP VIEW durable.worker_load",
    "DROP TABLE durable.audit",
    "DROP SCHEMA durable CASCADE",
    "CREATE OR REPLACE FUNCTION durable.check_new_workflow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'",
    "TRUNCATE durable.event",
    "LOCK TABLE durable.worker_load",
)
_ONLY_OPERATORS_DELETE = ("DELETE FROM durable.queue", "DELETE FROM durable.schedule", "DELETE FROM durable.queue_key")
_AUDIT_STANDS = (
    "UPDATE durable.audit SET who = 'eve'",
    "DELETE FROM durable.audit",
    "INSERT INTO durable.audit (at, who, verb) VALUES ('2020-01-01', 'eve', 'cancel')",
)
_NO_WRITES = (
    "UPDATE durable.workflow SET status = 'pending'",
    "UPDATE durable.workflow SET token = gen_random_uuid()",
    "DELETE FROM durable.workflow",
    "INSERT INTO durable.queue (name) VALUES ('more')",
    "UPDATE durable.queue SET paused_at = now()",
    *_ONLY_OPERATORS_DELETE,
    *_AUDIT_STANDS,
    "INSERT INTO durable.audit (who, verb) VALUES ('eve', 'cancel')",
)
REFUSED: Mapping[str, Sequence[str]] = {
    "start": (
        *_DDL,
        *_NO_WRITES,
        "SELECT input FROM durable.workflow",
        "SELECT output FROM durable.workflow",
        "SELECT tags FROM durable.workflow",
        "SELECT payload FROM durable.signal",
        "SELECT key FROM durable.step",
        "SELECT name FROM durable.queue",
        "SELECT who FROM durable.audit",
        "SELECT id FROM durable.workflow_overview",
        "INSERT INTO durable.workflow (name, token) VALUES ('pay', gen_random_uuid())",
        "INSERT INTO durable.workflow (name, finished_at) VALUES ('pay', now())",
    ),
    "work": (
        *_DDL,
        *_AUDIT_STANDS,
        *_ONLY_OPERATORS_DELETE,
        "SELECT who FROM durable.audit",
        "INSERT INTO durable.workflow (name, token) VALUES ('pay', gen_random_uuid())",
    ),
    "operate": (*_DDL, *_AUDIT_STANDS, "UPDATE durable.workflow SET input = '{}'", "DELETE FROM durable.worker"),
    "read": (*_DDL, *_NO_WRITES, "INSERT INTO durable.workflow (name) VALUES ('pay')", "SELECT 1 FROM public.entry"),
}
"""What PostgreSQL refuses to each role, whichever rows there are."""


def test_each_role_is_refused_what_it_is_not_for(five: Roles) -> None:
    for role, statements in REFUSED.items():
        engine = five.engine(role)
        found = {each: refused(engine, each) for each in statements}
        assert {each for each, sqlstate in found.items() if sqlstate != DENIED} == set(), role


def test_only_migrate_changes_the_tables_and_readers_see_what_it_adds(five: Roles) -> None:
    owner = five.engine("migrate")
    changes = [each for each in _DDL if not each.startswith(("DROP SCHEMA", "CREATE TRIGGER"))]
    assert {each: refused(owner, each) for each in changes} == dict.fromkeys(changes, "")
    with owner.begin() as connection:
        connection.execute(text("CREATE TABLE durable.later AS SELECT 1 AS found"))
    found = {role: refused(five.engine(role), "SELECT found FROM durable.later") for role in REFUSED}
    assert found == {"start": DENIED, "work": DENIED, "operate": "", "read": ""}


def test_rights_that_were_added_by_hand_are_taken_away(five: Roles) -> None:
    five.execute(
        "GRANT SELECT (output), UPDATE ON durable.workflow TO start", "GRANT SELECT ON durable.queue_depth TO start"
    )
    five.grant("start")
    engine = five.engine("start")
    for each in ("SELECT output FROM durable.workflow", "SELECT queue FROM durable.queue_depth", *_NO_WRITES):
        assert refused(engine, each) == DENIED
