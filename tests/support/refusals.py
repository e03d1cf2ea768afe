"""Steps whose checkpoints the database refuses, as it does what it cannot store."""

from __future__ import annotations

from sqlalchemy import Engine, text

UNSTORABLE = "unstorable"
"""The name of the steps."""


def refuse(engine: Engine, name: str = UNSTORABLE) -> None:
    """Let the database refuse the checkpoints of a step, with the error of a row that is too large for an index."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                "'BEGIN RAISE program_limit_exceeded USING MESSAGE = ''too large for an index''; END'"
            )
        )
        connection.execute(
            text(
                "CREATE TRIGGER refuse BEFORE INSERT ON durable.step FOR EACH ROW "
                f"WHEN (NEW.name = '{name}') EXECUTE FUNCTION refuse()"
            )
        )
