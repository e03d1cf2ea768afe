"""Errors that the database raises at a statement or at a COMMIT, a number of times, and then no more."""

from __future__ import annotations

from sqlalchemy import Engine, text


def at_statement(engine: Engine, state: str, *, times: int, table: str = "entry", when: str = "true") -> None:
    """Let the database refuse INSERTs into a table with this SQLSTATE.

    Args:
        engine: where the table is.
        state: the SQLSTATE.
        times: how often; counted by a sequence, which no rollback undoes.
        table: the table.
        when: a condition on `NEW`.
    """
    _create(engine, state, times, f"BEFORE INSERT ON {table} FOR EACH ROW WHEN ({when})")


def at_commit(engine: Engine, state: str, *, times: int, when: str = "true") -> None:
    """Let the database refuse COMMITs of transactions that have inserted into `entry`, by a deferred trigger."""
    deferred = "AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
    _create(engine, state, times, f"{deferred} WHEN ({when})", constraint=True)


def slow_commit(engine: Engine, seconds: float) -> None:
    """Let each COMMIT of a transaction that has inserted into `entry` take so long."""
    body = f"PERFORM pg_sleep({seconds});"
    deferred = "AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
    _trigger(engine, "slow_commit", body, deferred, constraint=True)


def _create(engine: Engine, state: str, times: int, event: str, *, constraint: bool = False) -> None:
    name = f"fault_{state}".lower()
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SEQUENCE {name}"))
    body = (
        f"IF nextval('public.{name}') <= {times} THEN "
        f"RAISE EXCEPTION 'made for a test' USING ERRCODE = '{state}'; END IF;"
    )
    _trigger(engine, name, body, event, constraint=constraint)


def _trigger(engine: Engine, name: str, body: str, event: str, *, constraint: bool) -> None:
    kind = "CONSTRAINT TRIGGER" if constraint else "TRIGGER"
    with engine.begin() as connection:
        connection.execute(
            text(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$")
        )
        connection.execute(text(f"CREATE {kind} {name} {event} EXECUTE FUNCTION {name}()"))
