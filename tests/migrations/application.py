"""A small application with its own Alembic history, run as its owner would: from a directory, by Alembic's commands."""

from __future__ import annotations

import io
import shutil
from argparse import Namespace
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config

APPLICATIONS = Path(__file__).parent / "applications"
_EARLIER = {"next_revision": "own_revision"}  # whose files an application has, except those that are its own


class Application:
    """A copy of one of the applications; it finds its database in the environment variable DATABASE_URL."""

    def __init__(self, route: str, directory: Path) -> None:
        self.route = route
        self.directory = directory / route
        for each in (_EARLIER.get(route, route), route):
            shutil.copytree(
                APPLICATIONS / each, self.directory, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
            )

    def upgrade(self, target: str = "heads", *x: str) -> None:
        command.upgrade(self._config(*x), target)

    def downgrade(self, target: str = "base", *x: str) -> None:
        command.downgrade(self._config(*x), target)

    def check(self) -> None:
        """Fail if an autogenerate would propose anything."""
        command.check(self._config())

    def upgrade_sql(self, target: str = "heads") -> str:
        config = self._config()
        command.upgrade(config, target, sql=True)
        return self._printed(config)

    def downgrade_sql(self, span: str) -> str:
        config = self._config()
        command.downgrade(config, span, sql=True)
        return self._printed(config)

    def edit_environment(self, *replacements: tuple[str, str]) -> None:
        """Change env.py as its owner would."""
        path = self.directory / "env.py"
        for old, new in replacements:
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new))

    def autogenerate(self, revision: str, message: str) -> Path:
        """Write a revision from the difference between models and database; gives its file."""
        script = command.revision(self._config(), message, autogenerate=True, rev_id=revision)
        assert script is not None
        assert not isinstance(script, list)
        return Path(script.path)

    def _config(self, *x: str) -> Config:
        return Config(
            self.directory / "alembic.ini",
            stdout=io.StringIO(),
            output_buffer=io.StringIO(),
            cmd_opts=Namespace(x=list(x)),
        )

    @staticmethod
    def _printed(config: Config) -> str:
        assert isinstance(config.output_buffer, io.StringIO)
        return config.output_buffer.getvalue()


def run_script(url: str, script: str) -> None:
    """Execute a printed script as psql would: as it is, without parameters."""
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(script.encode())
