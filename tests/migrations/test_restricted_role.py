"""A role that may not create schemas uses the one that was made for it."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from sqlalchemy import Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import ProgrammingError

from tests.migrations.application import Application
from tests.support.catalogue import Catalogue, catalogue, schemas

own_revision = pytest.mark.parametrize("application", ["own_revision"], indirect=True)
branch = pytest.mark.parametrize("application", ["own_revision", "branch"], indirect=True)


@pytest.fixture
def restricted_url(application: Application, empty_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    """The URL of the application's database for a role that may create tables in `public` and nothing else."""
    url = empty_engine.url
    role = f"restricted_{url.database}"
    with empty_engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'"))
        connection.execute(text(f"GRANT CREATE ON SCHEMA public TO {role}"))
    given = url.set(username=role, password="secret").render_as_string(hide_password=False)
    monkeypatch.setenv("DATABASE_URL", given)
    yield given
    with empty_engine.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {role}"))
        connection.execute(text(f"DROP ROLE {role}"))


# behaviour: X1
@branch
@pytest.mark.parametrize("owned", [True, False], ids=["owner of the schema", "guest in the schema"])
def test_restricted_role_migrates_up_and_down_in_a_schema_made_for_it(
    application: Application, empty_engine: Engine, restricted_url: str, owned: bool, expected: Catalogue
) -> None:
    role = make_url(restricted_url).username
    with empty_engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA durable {f'AUTHORIZATION {role}' if owned else ''}"))
        connection.execute(text(f"GRANT USAGE, CREATE ON SCHEMA durable TO {role}"))
    for _ in range(2):
        application.upgrade()
        with create_engine(restricted_url, poolclass=NullPool).begin() as connection:
            assert catalogue(connection, "durable") == expected
        application.downgrade()
        with empty_engine.begin() as connection:
            assert schemas(connection) == {"public", "durable"}


@own_revision
@pytest.mark.usefixtures("restricted_url")
def test_missing_schema_is_an_error_that_names_the_missing_right(application: Application) -> None:
    with pytest.raises(ProgrammingError, match="permission denied for database"):
        application.upgrade()
