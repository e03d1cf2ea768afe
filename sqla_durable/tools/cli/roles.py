"""The command `roles`: prints or executes the statements that create roles and grant their rights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.cli.output import Yes, confirm, print_table

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

_MIGRATE_FIRST = (
    "The role `migrate` needs no tables: create it by `sqla-durable roles migrate`, run the migrations as a member of "
    "it, then this command."
)


def roles(
    role: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ROLE]...",
            help="start, work, operate, read or migrate, by default all of them; or a set of rights, such as caller.",
        ),
    ] = None,
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements, and connect to nothing.")] = False,
    schema: Annotated[str | None, typer.Option(help="The schema of the tables; by default durable.")] = None,
    prefix: Annotated[str, typer.Option(help="What the name of each role begins with.")] = "durable_",
    url: Annotated[
        str | None, typer.Option(help="The database, as its superuser or owner; by default DATABASE_URL.")
    ] = None,
    yes: Yes = False,
) -> None:
    """Create roles, where they are missing, and grant each what it needs on the tables and nothing else."""
    from sqla_durable.errors import ArgumentError
    from sqla_durable.models import SCHEMA
    from sqla_durable.store import rights

    chosen = list(dict.fromkeys(role or rights.ROLES))
    try:
        names = rights.names_of(chosen, prefix=prefix)
        statements = rights.statements(chosen, schema=SCHEMA if schema is None else schema, prefix=prefix)
    except ArgumentError as error:
        raise CommandError(str(error)) from error
    if not sql:
        _apply(statements, names, url=url, schema=schema, yes=yes)
        return
    if url is not None:
        raise CommandError("--sql prints the statements and connects to nothing: leave out one of --sql and --url.")
    typer.echo("\n\n".join(f"{each};" for each in ["BEGIN", *statements, "COMMIT"]))


def _apply(
    statements: Sequence[str], names: Mapping[str, str], *, url: str | None, schema: str | None, yes: bool
) -> None:
    """Execute the statements in one transaction, which no migration of the same database overlaps."""
    from sqlalchemy.orm import Session

    from sqla_durable import migrations
    from sqla_durable.models import SCHEMA
    from sqla_durable.store import rights
    from sqla_durable.tools.cli.database import engine_of

    engine = engine_of(url, None, schema)
    try:
        with Session(engine) as session:
            if set(names) != {rights.OWNER}:
                _require_tables(session)
            known = rights.existing(session, names.values())
        owner = f", and make {names[rights.OWNER]!r} the owner of the tables" if rights.OWNER in names else ""
        confirm(
            f"Set the rights of {', '.join(map(repr, names.values()))} in schema {schema or SCHEMA!r} of "
            f"{engine.url.render_as_string(hide_password=True)}{owner}?",
            yes=yes,
        )
        with Session(engine) as session, session.begin():
            migrations.lock(session.connection())
            rights.grant(session, statements)
    finally:
        engine.dispose()
    _print(names, known)


def _print(names: Mapping[str, str], known: Collection[str]) -> None:
    from sqla_durable.store.rights import sets_of

    rows = [
        (name, "was there" if name in known else "created", ", ".join(sets_of(role)) or "owner")
        for role, name in names.items()
    ]
    print_table(["role", "", "rights of"], rows)


def _require_tables(session: Session) -> None:
    """Raise if the tables are not those of this package, whose columns are granted."""
    from sqla_durable.errors import SchemaError
    from sqla_durable.store.schema import require

    try:
        require(session)
    except SchemaError as error:
        raise SchemaError(f"{error} {_MIGRATE_FIRST}") from error
