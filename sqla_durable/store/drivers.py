"""What the drivers leave to be known: which statements can be transactions of their own, and who hears a NOTIFY."""

from __future__ import annotations

import sqlalchemy as sa


def alone(engine: sa.Engine) -> sa.Engine:
    """Give an engine whose statements are each a transaction of their own, in one round trip.

    But for asyncpg: it prepares a statement in one round trip and executes it in another, and a pooler in transaction
    mode may give the two to different server processes. Its statements are in transactions as usual.
    """
    return engine if engine.dialect.driver == "asyncpg" else engine.execution_options(isolation_level="AUTOCOMMIT")


def keeps_statements(connection: sa.Connection) -> bool:
    """Tell whether the driver keeps prepared statements; executes nothing.

    Who has turned that off has a pooler in transaction mode in between, behind which no notification arrives.
    """
    match connection.dialect.driver:
        case "psycopg":
            return getattr(connection.connection.driver_connection, "prepare_threshold", 0) is not None
        case "asyncpg":
            # SQLAlchemy's own cache, which `prepared_statement_cache_size=0` turns off; it has no public name.
            return getattr(connection.connection.dbapi_connection, "_prepared_statement_cache", 0) is not None
        case _:
            return True
