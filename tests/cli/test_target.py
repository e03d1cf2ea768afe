"""Which object and which database a command line names, and how it is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from sqlalchemy import Engine, make_url, text

from sqla_durable.tools.cli.urls import normalised
from tests.cli.conftest import Application
from tests.support.roles import roles

USELESS = "postgresql://nobody@127.0.0.1:1/none"


WRONG = [
    ("nowhere:durable", "there is no module 'nowhere' in"),
    ("ledgre:durable", "there is no module 'ledgre' to import: did you mean 'ledger'?"),
    ("sqla_durable.signal:durable", "there is no module 'sqla_durable.signal' to import: did you mean"),
    ("sqla_durable.nowhere:durable", "there is no module 'sqla_durable.nowhere'"),
    ("ledger:durabel", "module 'ledger' has no attribute 'durabel': did you mean 'durable'?"),
    ("ledger:durable.registre", "has no attribute 'registre': did you mean 'registry'?"),
    ("ledger:pay", "is a WorkflowFunction, not a Durable object: name the object whose"),
    ("ledger:pay_later", "is an AsyncWorkflowFunction, not a Durable object"),
    ("ledger:pay", "decorators make the workflows: did you mean 'durable'?"),
    ("ledger:Durable", "'ledger:Durable' is the class: write durable = Durable()"),
    ("ledger:socket", "is module 'socket', not a Durable object"),
    ("ledger", "'ledger' is not module:attribute: write, for example, shop:durable."),
    ("../app:durable", "'../app' is not the name of a module"),
    ("./ledger:durable", "'./ledger' is not the name of a module"),
    ("ledger.py:durable", "'ledger.py' is not the name of a module"),
    ("shop-app:durable", "'shop-app' is not the name of a module"),
    ("ledger:", "'ledger:' is not module:attribute"),
    ("broken:durable", "module 'broken' does not import: ZeroDivisionError: division by zero ("),
    ("old:durable", "`postgresql://` means psycopg2 in SQLAlchemy 2.0: write `postgresql+psycopg://`."),
    ("needy:durable", "module 'needy' does not import: ModuleNotFoundError: No module named 'absent'"),
]


def test_wrong_target_is_explained_in_one_paragraph(application: Application) -> None:
    application.write("broken.py", "durable = 1 / 0\n")
    application.write("old.py", "raise ModuleNotFoundError('no psycopg2', name='psycopg2')\n")
    application.write("needy.py", "import absent\n")
    for target, said in WRONG:
        done = application.run("worker", target, "--url", USELESS)
        assert said in done.stderr, target
        assert done.stderr.startswith("sqla-durable: "), target
        assert done.stderr.count("\n") == 1, target
        assert done.returncode == 2, target


def test_help_and_version_need_no_application(application: Application) -> None:
    assert "worker" in application.run("--help").stdout
    assert "--poll-interval" in application.run("worker", "--help").stdout
    assert application.run("--version").stdout.startswith("sqla-durable ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory another user's")
def test_modules_are_not_taken_from_another_users_directory_that_everybody_may_write_to(
    application: Application,
) -> None:
    os.chown(application.directory, 65_533, 65_533)
    application.directory.chmod(0o1777)
    done = application.run("worker", "ledger:durable", "--url", USELESS)
    assert "any user can put modules there that this command would execute" in done.stderr
    assert done.returncode == 2


def test_the_current_directory_is_not_on_the_path_when_python_is_safe(application: Application) -> None:
    started = application.start_fresh("worker", "ledger:durable", "--url", USELESS, environment={"PYTHONSAFEPATH": "1"})
    said = started.communicate(timeout=60)[1]
    assert "there is no module 'ledger' on the path, which is without the current directory" in said
    assert started.returncode == 2


def test_command_says_that_it_is_an_extra_where_typer_is_not_installed() -> None:
    without = "import sys; sys.modules['typer'] = None; from sqla_durable.tools.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=False)
    assert done.stderr == "sqla-durable: the command line is an extra: pip install 'sqla-durable[cli]'.\n"
    assert done.returncode == 2


SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        "postgres://ada:pw@host:5433/name?sslmode=require",
        "postgresql://ada:pw@host:5433/name?sslmode=require",
        "postgresql+psycopg2://ada:pw@host:5433/name?sslmode=require",
        "postgresql+asyncpg://ada:pw@host:5433/name?sslmode=require",
        "postgresql+psycopg://ada:pw@host:5433/name?sslmode=require",
    ],
)
def test_every_form_of_a_postgresql_url_is_understood(url: str) -> None:
    assert normalised(url) == make_url("postgresql+psycopg://ada:pw@host:5433/name?sslmode=require")


@pytest.mark.parametrize(
    ("url", "said", "code"),
    [
        (f"nonsense {SECRET}", "the database URL cannot be read", 2),
        (f"postgresql://ada:{SECRET}@host:port/name", "the database URL cannot be read", 2),
        (f"mysql://ada:{SECRET}@host/name", "begins with 'mysql': durable workflows need PostgreSQL", 2),
        (f"postgresql://ada:{SECRET}@127.0.0.1:1/name", "ada:***@127.0.0.1:1/name cannot be reached", 1),
    ],
)
def test_wrong_url_is_explained_without_its_password(application: Application, url: str, said: str, code: int) -> None:
    done = application.run("worker", "ledger:durable", "--start-timeout", "0", "--url", url)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr
    assert done.returncode == code


def test_no_database_at_all_is_explained(application: Application) -> None:
    done = application.run("worker", "ledger:durable")
    assert "there is no database: give the Durable object a sessionmaker" in done.stderr
    assert done.returncode == 2


def test_unmigrated_database_is_explained(application: Application, empty_database_url: str) -> None:
    # behaviour: X2
    done = application.run("worker", "ledger:durable", environment={"DATABASE_URL": empty_database_url})
    assert "the durable tables are not in" in done.stderr
    assert "Run `alembic upgrade heads`" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_missing_rights_are_explained(application: Application, engine: Engine, direct_url: str) -> None:
    with roles(engine, direct_url, "reader", sql="GRANT USAGE ON SCHEMA durable TO reader") as made:
        options = {"PGOPTIONS": made.options("reader")}
        done = application.run("worker", "ledger:durable", "--url", direct_url, environment=options)
    assert "the database refused: permission denied for table" in done.stderr
    assert "needs the rights of `worker`: see docs/security.md, Roles and tenants." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("revision", "said"), [("durable_9999", "newer than this package"), ("", "needs 'durable_")])
def test_other_schema_version_is_explained(
    application: Application, database_url: str, engine: Engine, revision: str, said: str
) -> None:
    # behaviour: X2
    with engine.begin() as connection:
        connection.execute(text(f"COMMENT ON TABLE durable.workflow IS '{revision}'"))
    done = application.run("worker", "ledger:durable", "--url", database_url)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lease", "0"], "lease must be longer than zero, got 0 seconds"),
        (["--poll-interval", "0"], "poll_interval must be longer than zero"),
        (["--queue", " "], "names no queue"),
        (["--lease", "30"], "--lease '30' is no duration: write a number with a unit, such as 30s, 5m, 2h or 7d."),
        (["--poll-interval", "-1s"], "--poll-interval '-1s' is no duration"),
        (["--grace", "9999999999w"], "--grace '9999999999w' is no duration"),
        (["--start-timeout", "366d"], "--start-timeout must be between 0 and 365d, got 366d"),
        (["--log-level", "loud"], "--log-level 'loud' is none of"),
        (["--concurrency", "0"], "Invalid value for '--concurrency'"),
    ],
)
def test_wrong_setting_is_explained(application: Application, arguments: list[str], said: str) -> None:
    done = application.run("worker", "ledger:durable", "--url", "postgresql://nobody@127.0.0.1:1/none", *arguments)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_modules_are_not_taken_from_a_directory_that_all_users_share(application: Application) -> None:
    """As /tmp is, also for root, whose it is."""
    application.directory.chmod(0o1777)
    done = application.run("worker", "ledger:durable", "--url", USELESS)
    assert "any user can put modules there that this command would execute" in done.stderr
    assert done.returncode == 2
