"""What the command line says when MODULE:ATTRIBUTE does not name a Durable object."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cli.conftest import Application

USELESS = "postgresql://nobody@127.0.0.1:1/none"


@pytest.mark.parametrize(
    ("target", "said"),
    [
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
        ("../app:durable", "'../app' is no name of a module"),
        ("./ledger:durable", "'./ledger' is no name of a module"),
        ("ledger.py:durable", "'ledger.py' is no name of a module"),
        ("shop-app:durable", "'shop-app' is no name of a module"),
        ("ledger:", "'ledger:' is not module:attribute"),
        ("broken:durable", "module 'broken' does not import: ZeroDivisionError: division by zero ("),
        ("old:durable", "`postgresql://` means psycopg2 in SQLAlchemy 2.0: write `postgresql+psycopg://`."),
        ("needy:durable", "module 'needy' does not import: ModuleNotFoundError: No module named 'absent'"),
    ],
)
def test_wrong_target_is_explained_in_one_paragraph(application: Application, target: str, said: str) -> None:
    application.write("broken.py", "durable = 1 / 0\n")
    application.write("old.py", "raise ModuleNotFoundError('no psycopg2', name='psycopg2')\n")
    application.write("needy.py", "import absent\n")
    done = application.run("worker", target, "--url", USELESS)
    assert said in done.stderr
    assert done.stderr.startswith("sqla-durable: ")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 2


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


def test_the_current_directory_is_not_on_the_path_where_python_is_told_so(application: Application) -> None:
    done = application.run("worker", "ledger:durable", "--url", USELESS, environment={"PYTHONSAFEPATH": "1"})
    assert "there is no module 'ledger' on the path, which is without the current directory" in done.stderr
    assert done.returncode == 2


def test_command_says_that_it_is_an_extra_where_typer_is_not_installed() -> None:
    without = "import sys; sys.modules['typer'] = None; from sqla_durable.tools.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=False)
    assert done.stderr == "sqla-durable: the command line is an extra: pip install 'sqla-durable[cli]'.\n"
    assert done.returncode == 2
