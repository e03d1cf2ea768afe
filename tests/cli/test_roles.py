"""The command `roles`: what it prints can be executed, what it executes is what it prints, and what it refuses."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import psycopg
import pytest
from sqlalchemy import Engine, NullPool, create_engine, make_url

from sqla_durable.models import Base
from sqla_durable.models.views import VIEWS
from sqla_durable.store import rights
from sqla_durable.tools.cli.application import main
from tests.support import notifications
from tests.support.databases import migrate

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
ODD = "odd '\"$$\\ %s :x\n-- /*"
"""What a name may contain; together with a role and the number of a database it has less than 64 bytes."""

Ran: TypeAlias = tuple[int, str, str]
Command: TypeAlias = Callable[..., Ran]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command in this process, where nobody can be asked, and returns its exit code and what it printed."""
    monkeypatch.delenv("DATABASE_URL", raising=False)

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["sqla-durable", "roles", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@contextmanager
def dropped(engine: Engine, prefix: str, *others: str) -> Generator[None]:
    """Drop the roles with a prefix afterwards, and others."""
    try:
        yield
    finally:
        with engine.begin() as connection:
            for name in (*(f"{prefix}{role}" for role in (*rights.ROLES, *rights.SETS)), *others):
                for each in ("REASSIGN OWNED BY %I TO CURRENT_USER", "DROP OWNED BY %I", "DROP ROLE %I"):
                    wanted = "SELECT format(%s, rolname) FROM pg_roles WHERE rolname = %s"
                    if statement := connection.exec_driver_sql(wanted, (each, name)).scalar():
                        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def execute(url: str, script: str) -> None:
    """Execute a script as psql does, without parameters."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(script.encode())


def rights_in(engine: Engine) -> list[str]:
    """Return who owns what is ours, and every right on it."""
    statements = (
        "SELECT relname, relowner, relacl FROM pg_class WHERE relnamespace = 'durable'::regnamespace",
        "SELECT attrelid, attname, attacl FROM pg_attribute WHERE attacl IS NOT NULL AND attrelid > 16383",
        "SELECT nspname, nspowner, nspacl FROM pg_namespace",
        "SELECT defaclobjtype, defaclrole, defaclacl FROM pg_default_acl",
        "SELECT proname, proowner, proacl FROM pg_proc WHERE proname = 'check_new_workflow'",
    )
    with engine.connect() as connection:
        return sorted(str(row) for each in statements for row in connection.exec_driver_sql(each))


def test_what_is_printed_is_what_the_command_does_once_or_again(
    command: Command, engine: Engine, direct_url: str
) -> None:
    prefix = f"{engine.url.database}_"
    arguments = "--url", direct_url, "--prefix", prefix
    with dropped(engine, prefix):
        before = rights_in(engine)
        code, _, said = command(*arguments)
        assert (code, rights_in(engine)) == (2, before)
        assert "There is no terminal to ask at: add --yes" in said
        code, printed, _ = command(*arguments, "--yes")
        assert re.findall(r"_([a-z]+) +created", printed) == list(rights.ROLES)
        done = rights_in(engine)
        assert done != before
        execute(direct_url, command("--sql", "--prefix", prefix)[1])
        assert "was there" in command("read", *arguments, "-y")[1]
        assert rights_in(engine) == done
        with engine.connect() as connection:
            found = connection.exec_driver_sql(
                "SELECT rolcanlogin, rolsuper FROM pg_roles WHERE starts_with(rolname, %s)", (prefix,)
            )
            assert [tuple(row) for row in found] == [(False, False)] * len(rights.ROLES)


def test_names_are_quoted_whatever_they_contain(command: Command, engine: Engine, direct_url: str) -> None:
    prefix = f"{engine.url.database}{ODD}"
    quoted = '"' + ODD.replace('"', '""') + '"'
    execute(direct_url, f"ALTER SCHEMA durable RENAME TO {quoted}; CREATE SCHEMA durable;")
    arguments = "--schema", ODD, "--prefix", prefix
    with dropped(engine, prefix):
        execute(direct_url, command("--sql", *arguments)[1])
        code, printed, said = command("--url", direct_url, *arguments, "--yes")
        assert (code, said, printed.count("was there")) == (0, "", len(rights.ROLES))
        with engine.connect() as connection:
            found = connection.exec_driver_sql(
                "SELECT relname, pg_get_userbyid(relowner), has_table_privilege(%s, pg_class.oid, 'SELECT') "
                "FROM pg_class WHERE relnamespace = to_regnamespace(%s) AND relkind IN ('r', 'v')",
                (f"{prefix}read", quoted),
            )
            tables = [*(table.name for table in Base.metadata.tables.values()), *VIEWS]
            assert sorted(map(tuple, found)) == sorted((each, f"{prefix}migrate", True) for each in tables)


def test_who_is_no_superuser_makes_the_roles_before_and_after_the_migrations(
    command: Command, empty_database_url: str, server_url: str
) -> None:
    url = make_url(notifications.direct(empty_database_url, server_url))
    engine, prefix, admin = create_engine(url, poolclass=NullPool), f"{url.database}_", f"{url.database}_admin"
    theirs = url.update_query_dict({"options": f"-c role={admin}"}).render_as_string(hide_password=False)
    arguments = "--url", theirs, "--prefix", prefix, "-y"
    with dropped(engine, prefix, admin):
        execute(
            url.render_as_string(hide_password=False),
            f"CREATE ROLE {admin} CREATEROLE; GRANT CREATE ON DATABASE {url.database} TO {admin};",
        )
        code, _, said = command(*arguments)
        assert code == 1
        assert "the durable tables are not in" in said
        assert "sqla-durable roles migrate" in said
        assert command("migrate", *arguments)[0] == 0
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SET ROLE {prefix}migrate")
            migrate(connection, "durable")
        assert command(*arguments)[0] == 0
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SET ROLE {prefix}read")
            assert connection.exec_driver_sql("SELECT count(*) FROM durable.workflow_overview").scalar() == 0


def test_the_page_shows_what_is_printed(command: Command) -> None:
    _, printed, _ = command("start", "work", "operate", "read", "--sql")
    assert printed.strip() in PAGE.read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.M))
    assert {*rights.ROLES, *rights.SETS} <= named


WRONG: list[tuple[list[str], str]] = [
    (["nobody", "--sql"], "there is no role 'nobody': choose among start, work,"),
    (["--sql", "--prefix", "x" * 60], "bytes long, and PostgreSQL would cut the name of a role off after 63"),
    (["--sql", "--prefix", "pg_"], "would be named 'pg_start', and PostgreSQL keeps pg_ for itself"),
    (["--sql", "--schema", ""], "'' is not the name of a schema of PostgreSQL"),
    (["--sql", "--url", "postgresql://u@h/n"], "leave out one of --sql and --url"),
    ([], "there is no database: give this command --url"),
    (["--url", "mysql://u@h/n"], "durable workflows need PostgreSQL"),
]


def test_what_is_wrong_is_refused_with_what_to_write(command: Command) -> None:
    for arguments, message in WRONG:
        code, printed, said = command(*arguments)
        assert (code, printed) == (2, ""), arguments
        assert message in said
