"""The command `doctor`: a healthy database has no findings, and each fault is found as what it is, and as nothing else.

What the server of the tests has everywhere is left out: it writes without fsync, and keeps dead rows of other tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, NullPool, create_engine, make_url
from typer.testing import CliRunner

from sqla_durable.tools.cli.application import app
from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.doctor import Code, Finding, Severity, examination, examine, server
from tests.store import races
from tests.support.roles import TASKS, roles

OF_TEST_SERVER = {Code.FSYNC_OFF, Code.FULL_PAGE_WRITES_OFF, Code.DEAD_ROWS}
IGNORING = [part for code in sorted(OF_TEST_SERVER) for part in ("--ignore", code)]
ERROR, WARNING, NOTE = Severity

LIVE = (
    "INSERT INTO durable.worker (id, name, queues, names, versions, slots, lease_expires_at) VALUES "
    "(gen_random_uuid(), 'ada', '{default}', '{checkout}', '{1}', 10, now() + interval '1 hour')"
)
FORGED = "SET session_replication_role = replica"
AGO = "now() - interval '10 minutes'"
LONG_AGO = "now() - interval '2 hours'"
PENDING = "INSERT INTO durable.workflow (name, queue, by) VALUES ('checkout', 'default', 'a')"
DEAD = (
    "INSERT INTO durable.worker (id, name, queues, heartbeat_at, lease_expires_at) VALUES "
    f"('00000000-0000-7000-8000-000000000001', 'bob', '{{default}}', {LONG_AGO}, {AGO})"
)
RUNNING = (
    "INSERT INTO durable.workflow (name, status, token, worker_id, started_at) VALUES "
    "('checkout', 'running', gen_random_uuid(), '00000000-0000-7000-8000-000000000001', now())"
)
PARENT = (
    "INSERT INTO durable.workflow (name, status, started_at, awaits) VALUES ('checkout', 'suspended', now(), "
    '\'[{"children": ["00000000-0000-7000-8000-000000000002"], "open": 0}]\')'
)
CHILD = (
    "INSERT INTO durable.workflow (id, name, status, output, finished_at) VALUES "
    f"('00000000-0000-7000-8000-000000000002', 'child', 'succeeded', 'null', {AGO})"
)


def pending(column: str, value: str, since: str = AGO) -> str:
    columns = {"name": "'checkout'", "version": "'1'", "enqueued_at": since, column: value}
    return f"INSERT INTO durable.workflow ({', '.join(columns)}) VALUES ({', '.join(columns.values())})"


# What is found, how bad it is, and the SQL that brings it about in a database with a live worker.
OF_TABLES: list[tuple[Code, Severity, list[str]]] = [
    (
        Code.SCHEMA_OLDER,
        ERROR,
        ["COMMENT ON TABLE durable.workflow IS 'sqla-durable for durable_0001 and later, at durable_0001'"],
    ),
    (
        Code.SCHEMA_NEWER,
        ERROR,
        ["COMMENT ON TABLE durable.workflow IS 'sqla-durable for durable_9998 and later, at durable_9999'"],
    ),
    (
        Code.ALEMBIC_DIFFERS,
        WARNING,
        [
            "CREATE TABLE alembic_version (version_num varchar(32))",
            "INSERT INTO alembic_version VALUES ('durable_0001')",
        ],
    ),
    (Code.MISSING_TABLE, ERROR, ["DROP TABLE durable.queue_use"]),
    (Code.TABLE_UNLOGGED, ERROR, ["ALTER TABLE durable.queue_use SET UNLOGGED"]),
    (Code.MISSING_COLUMN, ERROR, ["ALTER TABLE durable.audit DROP COLUMN reason"]),
    (Code.COLUMN_DIFFERS, ERROR, ["ALTER TABLE durable.audit ALTER COLUMN reason TYPE varchar(10)"]),
    (Code.COLUMN_DIFFERS, ERROR, ["ALTER TABLE durable.audit ALTER COLUMN at DROP DEFAULT"]),
    (Code.COLUMN_DIFFERS, ERROR, ["ALTER TABLE durable.audit ALTER COLUMN who DROP NOT NULL"]),
    (Code.COLUMN_REQUIRED, ERROR, ["ALTER TABLE durable.audit ADD COLUMN mine int NOT NULL"]),
    (Code.MISSING_CONSTRAINT, ERROR, ["ALTER TABLE durable.workflow DROP CONSTRAINT workflow_attempt_check"]),
    (
        Code.CONSTRAINT_UNCHECKED,
        WARNING,
        [
            "ALTER TABLE durable.workflow DROP CONSTRAINT workflow_attempt_check",
            "ALTER TABLE durable.workflow ADD CONSTRAINT workflow_attempt_check CHECK (attempt >= 1) NOT VALID",
        ],
    ),
    (Code.MISSING_INDEX, WARNING, ["DROP INDEX durable.workflow_failed_idx"]),
    (Code.MISSING_INDEX, ERROR, ["DROP INDEX durable.workflow_name_key_key"]),
    (
        Code.INDEX_DIFFERS,
        WARNING,
        [
            "DROP INDEX durable.workflow_failed_idx",
            "CREATE INDEX workflow_failed_idx ON durable.workflow (finished_at)",
        ],
    ),
    (
        Code.INVALID_INDEX,
        ERROR,
        [
            "INSERT INTO durable.audit (who, verb) VALUES ('ada', 'cancel'), ('ada', 'cancel')",
            "!CREATE UNIQUE INDEX CONCURRENTLY failed_idx ON durable.audit (verb)",
        ],
    ),
    (Code.MISSING_TRIGGER, WARNING, ["DROP TRIGGER workflow_new_check ON durable.workflow"]),
    (Code.TRIGGER_DISABLED, WARNING, ["ALTER TABLE durable.workflow DISABLE TRIGGER workflow_new_check"]),
    (Code.MISSING_VIEW, WARNING, ["DROP VIEW durable.step_latency"]),
    (Code.VIEW_OF_OWNER, WARNING, ["ALTER VIEW durable.worker_load RESET (security_invoker)"]),
    (Code.MISSING_STORAGE, WARNING, ["ALTER TABLE durable.queue RESET (fillfactor)"]),
    (Code.MISSING_STORAGE, NOTE, ["ALTER TABLE durable.queue SET (fillfactor = 80)"]),
    (Code.AUTOVACUUM_OFF, WARNING, ["ALTER TABLE durable.step SET (autovacuum_enabled = false)"]),
    (Code.CONNECTIONS, WARNING, ["ALTER DATABASE {database} CONNECTION LIMIT 1"]),
]
OF_WORK: list[tuple[Code, Severity, list[str]]] = [
    (Code.DEAD_WORKER, NOTE, [DEAD]),
    (Code.UNRECLAIMED, ERROR, [FORGED, DEAD, RUNNING]),
    (Code.UNKNOWN_WORKER, WARNING, [FORGED, RUNNING]),
    (Code.NO_WORKER, ERROR, ["DELETE FROM durable.worker", pending("queue", "'mail'")]),
    (Code.QUEUE_UNCLAIMED, WARNING, [pending("queue", "'mail'"), pending("queue", "'mail'")]),
    (Code.NAME_UNCLAIMED, WARNING, [pending("name", "'forgotten'")]),
    (Code.VERSION_UNCLAIMED, WARNING, [pending("version", "'2'")]),
    (Code.BACKLOG, NOTE, [pending("by", "'a'", LONG_AGO)]),
    (
        Code.TIMERS_OVERDUE,
        ERROR,
        [f"INSERT INTO durable.workflow (name, status, wake_at) VALUES ('checkout', 'suspended', {AGO})"],
    ),
    (Code.DEADLINES_OVERDUE, ERROR, [f"INSERT INTO durable.workflow (name, deadline_at) VALUES ('checkout', {AGO})"]),
    (
        Code.UNDELIVERED,
        ERROR,
        [
            PENDING,
            f"INSERT INTO durable.signal (workflow_id, name, created_at) SELECT id, 'go', {AGO} FROM durable.workflow",
        ],
    ),
    (Code.WAIT_OVER, ERROR, [FORGED, PARENT, CHILD]),
    (
        Code.QUEUE_PAUSED,
        WARNING,
        [PENDING, f"INSERT INTO durable.queue (name, paused_at) VALUES ('default', {LONG_AGO})"],
    ),
    (
        Code.KEY_PAUSED,
        WARNING,
        [
            PENDING,
            "INSERT INTO durable.queue (name, fair) VALUES ('default', true)",
            f"INSERT INTO durable.queue_key (queue, by, paused_at) VALUES ('default', 'a', {LONG_AGO})",
        ],
    ),
    (
        Code.KEY_BLOCKED,
        WARNING,
        [
            PENDING,
            "INSERT INTO durable.queue (name, fifo) VALUES ('default', 'block')",
            FORGED,
            "INSERT INTO durable.workflow (name, status, by, place, error, finished_at) "
            f"""VALUES ('checkout', 'failed', 'a', 'key_failed', '{{"type": "E"}}', {AGO})""",
        ],
    ),
    (
        Code.SCHEDULE_OVERDUE,
        ERROR,
        [f"INSERT INTO durable.schedule (name, workflow, every, due_at) VALUES ('s', 'checkout', '1 h', {AGO})"],
    ),
    (
        Code.SCHEDULE_UNDECLARED,
        NOTE,
        [
            "INSERT INTO durable.schedule (name, workflow, every, paused_at, pause_reason) "
            "VALUES ('s', 'checkout', '1 h', now(), 'the code no longer declares it')"
        ],
    ),
]
OF_SETTINGS: list[tuple[Code, Severity, str]] = [
    (Code.SYNCHRONOUS_COMMIT_OFF, WARNING, "synchronous_commit=off"),
    (Code.READ_ONLY, ERROR, "default_transaction_read_only=on"),
    (Code.ISOLATION_LEVEL, NOTE, "default_transaction_isolation=serializable"),
    (Code.STATEMENT_TIMEOUT, WARNING, "statement_timeout=9s"),
    (Code.LOCK_TIMEOUT, WARNING, "lock_timeout=900ms"),
    (Code.IDLE_IN_TRANSACTION_TIMEOUT, WARNING, "idle_in_transaction_session_timeout=9s"),
    (Code.IDLE_SESSION_TIMEOUT, WARNING, "idle_session_timeout=50s"),
    (Code.DATE_STYLE, ERROR, "datestyle=SQL"),
    (Code.INTERVAL_STYLE, ERROR, "intervalstyle=iso_8601"),
]


def execute(url: str, *statements: str) -> None:
    """Execute statements, each in a transaction of its own; one that begins with `!` is to fail."""
    plain = make_url(url).set(drivername="postgresql")
    with closing(psycopg.connect(plain.render_as_string(hide_password=False), autocommit=True)) as connection:
        for each in statements:
            statement: Any = each.removeprefix("!").replace("{database}", str(plain.database))
            if each.startswith("!"):
                with pytest.raises(psycopg.errors.UniqueViolation):
                    connection.execute(statement)
            else:
                connection.execute(statement)


def found_in(url: str, *, options: str = "", **chosen: Any) -> list[Finding]:
    """Return the findings of a database but for those of the server of the tests."""
    query = {"options": f"-c {options}"} if options else {}
    engine = create_engine(make_url(url).update_query_dict(query), poolclass=NullPool)
    return [each for each in examine(engine, **chosen) if each.code not in OF_TEST_SERVER]


def shown(found: list[Finding]) -> list[tuple[Code, Severity]]:
    return [(each.code, each.severity) for each in found]


def test_a_healthy_database_with_a_live_worker_has_no_findings(direct_url: str) -> None:
    execute(direct_url, LIVE, PENDING)
    assert found_in(direct_url) == []
    done = CliRunner().invoke(app, ["doctor", "--url", direct_url, *IGNORING])
    assert (done.exit_code, done.stdout) == (0, "Nothing was found.\n")


@pytest.mark.parametrize(
    ("code", "severity", "statements"), OF_TABLES + OF_WORK, ids=[each[0].value for each in OF_TABLES + OF_WORK]
)
def test_each_fault_is_found_as_what_it_is(
    direct_url: str, code: Code, severity: Severity, statements: list[str]
) -> None:
    execute(direct_url, LIVE, *statements)
    found = found_in(direct_url)
    assert shown(found) == [(code, severity)], found
    assert found[0].found.endswith(".")
    assert found[0].todo


def test_settings_that_will_hurt_are_found(direct_url: str) -> None:
    found = found_in(direct_url, options=" -c ".join(setting for _, _, setting in OF_SETTINGS))
    assert sorted(shown(found)) == sorted((code, severity) for code, severity, _ in OF_SETTINGS), found


def test_what_to_do_about_drift_is_sql_that_repairs_it(direct_url: str) -> None:
    execute(
        direct_url,
        "ALTER TABLE durable.workflow DROP CONSTRAINT workflow_attempt_check",
        "DROP INDEX durable.workflow_tags_idx",
        "DROP INDEX durable.workflow_name_key_key",
        "DROP VIEW durable.queue_depth",
        "DROP TRIGGER workflow_new_check ON durable.workflow",
        "ALTER TABLE durable.audit DROP COLUMN reason",
        "ALTER TABLE durable.queue RESET (fillfactor)",
        "DROP TABLE durable.queue_use",
    )
    found = found_in(direct_url)
    assert len(found) == 8
    execute(direct_url, *(each.todo for each in found))
    assert found_in(direct_url) == []


def test_dead_rows_are_found(direct_url: str) -> None:
    execute(
        direct_url,
        "ALTER TABLE durable.queue_use SET (autovacuum_enabled = off)",
        "INSERT INTO durable.queue (name) VALUES ('mail')",
        "INSERT INTO durable.queue_use (queue, used_at, by, claim, number) "
        "SELECT 'mail', now() + n * interval '1 s', '', gen_random_uuid(), 1 FROM generate_series(1, 10500) n",
        # What stays is so much that no other test gets this database.
        "DELETE FROM durable.queue_use WHERE used_at > now() + interval '250 s'",
    )
    engine = create_engine(direct_url, poolclass=NullPool)
    (only,) = (each for each in examine(engine) if each.code is Code.DEAD_ROWS)
    assert only.severity is WARNING
    assert only.values["table"] == "queue_use"
    assert only.values["dead"] > 10_000


def test_transactions_that_hold_dead_rows_are_found(direct_url: str) -> None:
    plain = make_url(direct_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with closing(psycopg.connect(plain)) as idle, closing(psycopg.connect(plain)) as busy:
        idle.execute("SELECT FROM durable.workflow")
        busy.pgconn.send_query(b"BEGIN; SELECT pg_sleep(60)")
        races.wait_until(lambda: len(found_in(direct_url, patience=timedelta(0))) == 2)
        found = {each.code: each.values["pid"] for each in found_in(direct_url, patience=timedelta(0))}
        assert found == {
            Code.IDLE_IN_TRANSACTION: idle.info.backend_pid,
            Code.OLD_SNAPSHOT: busy.info.backend_pid,
        }
        assert found_in(direct_url) == []  # not yet for long
        busy.cancel_safe()


def row(**columns: Any) -> Any:
    return SimpleNamespace(**columns)


MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)
SLOT = {"slot_name": "s", "slot_type": "physical", "active": False, "wal_status": "reserved", "xmin_age": None}
SERVER = {"connections": 10, "connections_here": 5, "datconnlimit": -1, "datname": "d"}
LIMITS = {"max_connections": 100, "superuser_reserved_connections": 3, "reserved_connections": 0}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (server.of_settings({"fsync": "off"}), [(Code.FSYNC_OFF, ERROR)]),
        (server.of_settings({"full_page_writes": "off"}), [(Code.FULL_PAGE_WRITES_OFF, WARNING)]),
        (server.of_settings({"autovacuum": "off", "track_counts": "on"}), [(Code.AUTOVACUUM_OFF, WARNING)]),
        (server.of_settings({"transaction_timeout": "20000"}), [(Code.TRANSACTION_TIMEOUT, WARNING)]),
        (server.of_settings({"transaction_timeout": "0", "statement_timeout": "10000"}), []),
        (server.of_clock(MOMENT + SECOND, MOMENT, MOMENT), []),
        (server.of_clock(MOMENT - 2 * SECOND, MOMENT, MOMENT), [(Code.CLOCK, NOTE)]),
        (server.of_clock(MOMENT + 31 * SECOND, MOMENT, MOMENT), [(Code.CLOCK, WARNING)]),
        (server.of_clock(MOMENT + 4 * SECOND, MOMENT, MOMENT + 8 * SECOND), []),
        (server.of_connections(row(**SERVER), LIMITS), []),
        (server.of_connections(row(**SERVER | {"connections": 78}), LIMITS), [(Code.CONNECTIONS, WARNING)]),
        (server.of_pooler(7, 7), []),
        (server.of_pooler(7, 8), [(Code.POOLER, NOTE)]),
        (server.of_slots([row(**SLOT, retained=1 << 20)]), []),
        (server.of_slots([row(**SLOT, retained=1 << 31)]), [(Code.SLOT_HOLDS_WAL, WARNING)]),
        (
            server.of_slots([row(**SLOT | {"active": True, "xmin_age": 2_000_000}, retained=None)]),
            [(Code.SLOT_HOLDS_ROWS, WARNING)],
        ),
        (
            server.of_replicas([row(pid=1, application_name="b", xmin_age=2_000_000)]),
            [(Code.STANDBY_HOLDS_ROWS, WARNING)],
        ),
        (
            server.of_prepared([row(gid="x'y", owner="ada", open_for=60 * SECOND)], 30 * SECOND),
            [(Code.PREPARED_TRANSACTION, WARNING)],
        ),
        (server.of_prepared([row(gid="x'y", owner="ada", open_for=SECOND)], 30 * SECOND), []),
    ],
)
def test_what_the_server_of_the_tests_has_not_is_found_in_rows(
    found: Iterator[Finding], expected: list[tuple[Code, Severity]]
) -> None:
    assert shown(list(found)) == expected


def test_rights_that_a_role_lacks_are_found_and_what_it_may_not_read_is_a_note(engine: Engine, direct_url: str) -> None:
    execute(direct_url, LIVE)
    with roles(engine, direct_url, *TASKS) as made:
        made.grant(*TASKS)
        assert Code.MISSING_RIGHTS not in {each.code for each in examine(made.engine("worker"))}
        made.execute("REVOKE INSERT ON durable.queue_use FROM worker", "REVOKE SELECT ON durable.signal FROM reader")
        of_worker = {each.code: each for each in examine(made.engine("worker"))}
        found = {each.code: each for each in examine(made.engine("reader"))}
    assert of_worker[Code.MISSING_RIGHTS].values["missing"] == {"queue_use": ["insert"]}
    assert found.keys() - OF_TEST_SERVER == {Code.MISSING_RIGHTS, Code.NOT_CHECKED, Code.HIDDEN_SESSIONS}
    assert f"GRANT SELECT ON durable.signal TO {made.prefix}reader" in found[Code.MISSING_RIGHTS].todo
    assert "permission denied for table" in found[Code.NOT_CHECKED].found
    assert found[Code.NOT_CHECKED].values["checks"] == ["signals", "waits"]


def test_locks_of_others_are_not_waited_for(direct_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "_MILLISECONDS", 100)
    plain = make_url(direct_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with closing(psycopg.connect(plain)) as other:
        other.execute("LOCK TABLE durable.schedule")
        (only,) = found_in(direct_url)
    assert only.code is Code.NOT_CHECKED
    assert only.values["checks"] == ["schedules"]


def test_the_command_prints_what_was_found_for_people_and_for_programs(direct_url: str) -> None:
    def invoke(*options: str) -> Any:
        return CliRunner().invoke(app, ["doctor", "--url", direct_url, *IGNORING, *options])

    execute(direct_url, "DROP INDEX durable.workflow_failed_idx")
    plain = invoke()
    assert plain.exit_code == 3
    assert plain.stdout.startswith("warning: missing_index: the index workflow_failed_idx of durable.workflow is")
    assert "\n    CREATE INDEX CONCURRENTLY workflow_failed_idx ON" in plain.stdout
    assert plain.stdout.endswith("\n1 warning.\n")
    elsewhere = invoke("--json", "--schema", "nowhere")
    assert elsewhere.exit_code == 4
    only = json.loads(elsewhere.stdout)
    assert "without Alembic, sqla-durable migrate" in only["todo"]
    assert (only["severity"], only["code"], only["values"]) == ("error", "schema_missing", {"schema": "nowhere"})
    assert invoke("--quiet").stdout == "missing_index\n"
    assert invoke("--ignore", "missing_index").exit_code == 0
    with pytest.raises(CommandError, match="--ignore 'fsink' is no finding: name one of schema_missing, "):
        CliRunner().invoke(app, ["doctor", "--ignore", "fsink"], catch_exceptions=False)
    with pytest.raises(CommandError, match="--patience must be between 0 and 365d, got 366d"):
        CliRunner().invoke(app, ["doctor", "--patience", "366d"], catch_exceptions=False)


def test_a_schema_of_another_name_is_examined(direct_url: str) -> None:
    execute(direct_url, 'ALTER SCHEMA durable RENAME TO "Tenant 7"')
    done = CliRunner().invoke(app, ["doctor", "--url", direct_url, "--schema", "Tenant 7", *IGNORING])
    assert (done.exit_code, done.stdout) == (0, "Nothing was found.\n")


def test_the_page_describes_every_finding() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text().partition("## Findings")[2]
    first_cells = re.findall(r"^\| (`.*?) \|", page, re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_cells))) == sorted(Code)
