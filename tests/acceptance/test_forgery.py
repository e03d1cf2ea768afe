"""What no role of docs/security.md can forge: states, outcomes, and what the engine sends to itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import psycopg
import pytest
from sqlalchemy import Connection, Engine, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqla_durable import Step, Workflow, errors, send_signal, start_many
from tests.acceptance.rights import DAY, VERBS, WITH_POLICIES, Verb, World, expected, greet, tried
from tests.support.roles import CHECKED, DENIED, GENERATED, TASKS, Roles, recipe, refused

HERE = "tests/acceptance/test_forgery.py"


def test_a_starter_forges_nothing(granted: Roles, world: World) -> None:
    engine = granted.engine("starter")
    new = "INSERT INTO durable.workflow (name, key, {}) VALUES ('greet', 'forged', {})"
    columns = {
        "output": "'1'",
        "error": "'{}'",
        "token": "gen_random_uuid()",
        "worker_id": "gen_random_uuid()",
        "started_at": "now()",
        "finished_at": "now()",
        "awaits": "'[]'",
        "attempt": "7",
        "crashes": "1",
        "cancellation": "'requested'",
        "continued_at": "now()",
        "created_at": "now()",
        "enqueued_at": "'2020-01-01'",
        "parent_id": f"'{world.owner}'",
        "parent_key": "'x'",
        "detached": "true",
        "forked_from": f"'{world.owner}'",
    }
    assert {name: refused(engine, new.format(name, value)) for name, value in columns.items()} == dict.fromkeys(
        columns, DENIED
    )
    statuses = ("running", "succeeded", "failed", "cancelled")
    assert [refused(engine, new.format("status", f"'{each}'")) for each in statuses] == [CHECKED] * 4
    for each in (
        "INSERT INTO durable.workflow (name, key, status, output, finished_at) "
        "VALUES ('greet', 'forged', 'succeeded', '\"gold\"', now())",
        "INSERT INTO durable.workflow SELECT * FROM durable.workflow",
        "INSERT INTO durable.workflow (id, name) VALUES (gen_random_uuid(), 'greet') "
        "ON CONFLICT (id) DO UPDATE SET name = 'greet'",
        "UPDATE durable.workflow SET status = 'pending'",
        "UPDATE durable.workflow SET priority = -1",
        "DELETE FROM durable.workflow",
        "SELECT input FROM durable.workflow",
        "SELECT output FROM durable.workflow",
        "SELECT headers FROM durable.workflow",
        "SELECT id FROM durable.workflow FOR UPDATE",
        "LOCK TABLE durable.workflow IN EXCLUSIVE MODE",
        "TRUNCATE durable.workflow",
        "SELECT key FROM durable.step",
        "INSERT INTO durable.step (workflow_id, key, name, position, status, attempt, started_at) "
        f"VALUES ('{world.owner}', 'x', 'x', 1, 'waiting', 1, now())",
        f"INSERT INTO durable.signal (workflow_id, name) VALUES ('{world.owner}', 'go')",
        "SELECT id FROM durable.worker",
        "INSERT INTO durable.queue (name, paused_at) VALUES ('default', now())",
    ):
        assert refused(engine, each) == DENIED, each


_ID, _TIME = "0190a0a0-0000-7000-8000-000000000001", "2026-01-01 00:00:00Z"
STATES: Mapping[str, Mapping[str, str]] = {
    "running": {"token": _ID, "worker_id": _ID, "started_at": _TIME},
    "succeeded": {"output": '"gold"', "finished_at": _TIME},
    "failed": {"error": '{"type": "builtins:ValueError"}', "finished_at": _TIME},
    "cancelled": {"finished_at": _TIME},
}


def new_row(status: str) -> str:
    """Return the columns and values of a new row of a status, for an INSERT."""
    given = {"name": "greet", "key": "forged", "status": status, **STATES.get(status, {})}
    values = ", ".join(f"'{each}'" for each in given.values()).replace(":", r"\:")
    return f"({', '.join(given)}) VALUES ({values})"


def test_nobody_inserts_a_forged_state(granted: Roles) -> None:
    for role in TASKS:
        engine = granted.engine(role)
        for status in STATES:
            assert refused(engine, f"INSERT INTO durable.workflow {new_row(status)}") == DENIED, (role, status)
            alone = refused(engine, f"INSERT INTO durable.workflow (name, status) VALUES ('greet', '{status}')")
            assert alone in (DENIED, CHECKED), (role, status)


WAYS: Mapping[str, str] = {
    "INSERT": "INSERT INTO durable.workflow {row}",
    "DO NOTHING": "INSERT INTO durable.workflow {row} ON CONFLICT DO NOTHING",
    "DO UPDATE": "INSERT INTO durable.workflow {row} ON CONFLICT (id) DO UPDATE SET priority = 1",
    "WITH": "WITH new AS (INSERT INTO durable.workflow {row} RETURNING id) SELECT id FROM new",
    "MERGE": "MERGE INTO durable.workflow USING (SELECT) AS one ON false WHEN NOT MATCHED THEN INSERT {row}",
    "view": "INSERT INTO public.workflows {row}",
}


def inserted(connection: Connection, statement: str) -> None:
    connection.execute(text(statement))


def copied(connection: Connection, status: str) -> None:
    """Insert a row of a status by COPY."""
    given = {"name": "greet", "key": "forged", "status": status, **STATES.get(status, {})}
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(f"COPY durable.workflow ({', '.join(given)}) FROM STDIN") as copy:
        copy.write_row(list(given.values()))


def refusal(engine: Engine, insert: Callable[[Connection, str], None], what: str) -> tuple[str, ...]:
    """Insert and roll back; return what PostgreSQL says of the refusal."""
    with engine.connect() as connection:
        try:
            insert(connection, what)
        except (DBAPIError, psycopg.Error) as error:
            said = cast("Any", getattr(error, "orig", error)).diag
            return said.sqlstate, f"{said.schema_name}.{said.table_name}", said.constraint_name, said.message_primary
    return ()


def test_whoever_may_insert_whole_rows_forges_no_state(granted: Roles, world: World, engine: Engine) -> None:
    """A role with INSERT on the table, and its owner, a superuser: a later start would return the outcome."""
    granted.execute(
        "GRANT INSERT, SELECT, UPDATE ON durable.workflow TO starter",
        "CREATE VIEW public.workflows AS SELECT * FROM durable.workflow",
        "GRANT INSERT ON public.workflows TO starter",
    )
    wanted = {"pending": (), **{status: refused_by_the_trigger(status) for status in STATES}}
    for each in (granted.engine("starter"), engine):
        for way, statement in WAYS.items():
            new = {status: statement.format(row=new_row(status)) for status in wanted}
            assert {status: refusal(each, inserted, new[status]) for status in wanted} == wanted, way
        assert {status: refusal(each, copied, status) for status in wanted} == wanted
    with Session(granted.engine("starter")) as session:
        assert greet.options(key="forged").start(session, "x").status == "pending"


def refused_by_the_trigger(status: str) -> tuple[str, ...]:
    message = (
        "a new workflow is pending, or suspended until wake_at: insert it without token and finished_at, got status"
    )
    return CHECKED, "durable.workflow", "workflow_new_check", f"{message} '{status}'"


def test_what_a_new_row_may_be_goes_in_and_old_rows_are_changed_as_before(world: World, engine: Engine) -> None:
    again = "INSERT INTO durable.workflow (id, name) VALUES (:id, 'greet') ON CONFLICT (id) DO UPDATE SET {} "
    delayed = (
        "INSERT INTO durable.workflow (name, status, wake_at, started_at) VALUES ('greet', 'suspended', now(), now())"
    )
    with engine.connect() as connection:
        connection.execute(text(delayed))
        for change in ("priority = 1", "status = 'succeeded', output = '1', finished_at = now()"):
            status = connection.scalar(text(f"{again.format(change)} RETURNING status"), {"id": world.done})
            assert status == "succeeded"


def test_the_owner_loads_rows_from_elsewhere_while_the_trigger_is_disabled(engine: Engine) -> None:
    disable, enable = recipe(HERE, 1).strip().split("-- load\n")
    succeeded = f"INSERT INTO durable.workflow {new_row('succeeded')}"
    with engine.begin() as connection:
        connection.execute(text(disable))
        connection.execute(text(succeeded))
        connection.execute(text(enable))
    assert refused(engine, succeeded) == CHECKED


def starting(**options: Any) -> Verb:
    return lambda session, _: greet.options(**options).start(session, "x")


def starting_many(**options: Any) -> Verb:
    return lambda session, _: start_many(session, [greet.options(**options).bind("x")])


def test_what_is_left_out_of_the_grant_cannot_be_chosen(granted: Roles, world: World) -> None:
    granted.execute("REVOKE INSERT (headers, priority, queue, status, key) ON durable.workflow FROM starter")
    engine = granted.engine("starter")
    assert tried(engine, lambda session, _: greet.start(session, "x"), world) == ""
    assert tried(engine, lambda session, _: start_many(session, [greet.bind("x")]), world) == ""
    options: tuple[dict[str, Any], ...] = ({"priority": 1}, {"queue": "mail"}, {"delay": DAY}, {"key": "k"})
    for each in options:
        assert tried(engine, starting(**each), world) == DENIED, each
        assert tried(engine, starting_many(**each), world) == DENIED, each
    headers = "INSERT INTO durable.workflow (name, headers) VALUES ('greet', '{}')"
    assert refused(engine, headers.replace(":", r"\:")) == DENIED


def test_a_hidden_key_starts_nothing_for_who_may_not_delete(granted: Roles, world: World, engine: Engine) -> None:
    granted.execute(
        "ALTER TABLE durable.workflow ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY hides ON durable.workflow TO starter USING (id <> '{world.done}') WITH CHECK (true)",
    )
    with Session(granted.engine("starter")) as session:
        bound = [greet.options(key=each).bind("x") for each in ("free", "known")]
        with pytest.raises(errors.KeyNotVisibleError, match="'known'"):
            start_many(session, bound)
        session.commit()
    with Session(engine) as session:
        assert session.scalars(select(Workflow.key).where(Workflow.key.is_not(None))).all() == ["known"]


def test_a_canceller_gives_no_outcome(granted: Roles, world: World) -> None:
    engine = granted.engine("canceller")
    change = "UPDATE durable.workflow SET {} WHERE finished_at IS NULL"
    for status in ("succeeded", "failed"):
        assert refused(engine, change.format(f"status = '{status}', finished_at = now()")) == CHECKED, status
    for each in (
        *(change.format(f"{column} = NULL") for column in ("output", "error", "key", "deadline_at", "headers")),
        change.format("queue = 'mail'"),
        change.format("priority = 1"),
        "DELETE FROM durable.workflow",
        "SELECT input FROM durable.workflow",
        "SELECT output FROM durable.workflow",
        "SELECT payload FROM durable.signal",
        "UPDATE durable.signal SET consumed_by = 'x'",
        "SELECT key FROM durable.step",
        INSERT.format(", key", ", 'x'").replace(":id", f"'{world.owner}'").replace(":name", "'go'"),
    ):
        assert refused(engine, each) == DENIED, each
    notice = INSERT.format(", is_notice", ", true")
    assert refused(engine, notice, id=world.owner, name="go") == CHECKED


ENGINE_NAMES = ("#suspended", "#child", "#orphans", "#callback:{}", "#update:change", "#", "#whatever")
INSERT = "INSERT INTO durable.signal (workflow_id, name{}) VALUES (:id, :name{})"


def test_a_signaller_sends_nothing_of_the_engine_s(granted: Roles, world: World, engine: Engine) -> None:
    signaller = granted.engine("signaller")
    with Session(engine) as session:
        signalled = Step.output["signal"].astext
        name_of_callback: str = session.scalars(select(signalled).where(Step.workflow_id == world.owner)).one()
    assert name_of_callback.startswith("#callback:")
    for name in (*ENGINE_NAMES, name_of_callback):
        given = {"id": world.owner, "name": name}
        assert refused(signaller, INSERT.format("", ""), **given) == CHECKED, name
        for column in ("is_answer", "is_update", "is_notice"):
            assert refused(signaller, INSERT.format(f", {column}", ", true"), **given) == DENIED, (name, column)
        with Session(signaller) as session, pytest.raises(errors.ArgumentError):
            send_signal(session, world.owner, name)
    for column, value in {"delivered_at": "now()", "consumed_by": "'x'", "created_at": "now()"}.items():
        assert refused(signaller, INSERT.format(f", {column}", f", {value}"), id=world.owner, name="go") == DENIED
    chosen = "INSERT INTO durable.signal (workflow_id, name, id) {} VALUES (:id, 'go', 1)"
    assert refused(signaller, chosen.format("OVERRIDING SYSTEM VALUE"), id=world.owner) == DENIED
    assert refused(engine, chosen.format(""), id=world.owner) == GENERATED
    for each in (
        "UPDATE durable.signal SET consumed_by = 'x'",
        "UPDATE durable.signal SET delivered_at = now()",
        "DELETE FROM durable.signal",
        "SELECT payload FROM durable.signal",
        "SELECT output FROM durable.step",
        "SELECT awaits FROM durable.workflow",
    ):
        assert refused(signaller, each) == DENIED, each


COLUMN_OF = {"updater": "is_update", "answerer": "is_answer", "operator": "is_notice"}
OWN = {"updater": {"#update:x"}, "answerer": {"#callback:x"}, "operator": {"#suspended", "#child", "#orphans", "#x"}}


def test_each_kind_of_name_needs_its_own_column(granted: Roles, world: World) -> None:
    names = ("go", "#suspended", "#child", "#orphans", "#x", "#update:x", "#callback:x")
    for role, own in COLUMN_OF.items():
        engine = granted.engine(role)
        for name in names:
            for column in ("is_update", "is_answer", "is_notice"):
                outcome = refused(engine, INSERT.format(f", {column}", ", true"), id=world.owner, name=name)
                allowed = "" if name in OWN[role] else CHECKED
                assert outcome == (allowed if column == own else DENIED), (role, name, column)


def test_policies_keep_answers_and_updates_apart_from_signals(granted: Roles, engine: Engine, world: World) -> None:
    granted.execute(*recipe(HERE).split(";\n")[:-1])
    for role in VERBS:
        own = granted.engine(role)
        found = {name: tried(own, verb, world) for verbs in VERBS.values() for name, verb in verbs.items()}
        assert found == expected(role, WITH_POLICIES), role
    sent = {
        role: refused(granted.engine(role), INSERT.format("", ""), id=world.owner, name="go")
        for role in ("signaller", "updater", "answerer")
    }
    assert sent == {"signaller": "", "updater": DENIED, "answerer": DENIED}
