"""What the tests of hints share: engines past PgBouncer, and what is sent on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

from sqla_durable import Durable
from sqla_durable.api.hints import announce

durable = Durable()
Make = Callable[..., Engine]
DRIVERS = pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])


@durable.workflow(queue="mail")
def mail() -> None: ...


def asynchronous(direct_url: str, driver: str, **options: Any) -> AsyncEngine:
    return create_async_engine(make_url(direct_url).set(drivername=f"postgresql+{driver}"), **options)


def commit_hint(engine: Engine, queue: str) -> None:
    with Session(engine) as session:
        announce(session, queue)
        session.commit()


class Statements:
    """What is executed on an engine, by the connection that it is executed on."""

    def __init__(self, engine: Engine) -> None:
        self.seen: list[tuple[Connection, str]] = []
        event.listen(engine, "before_cursor_execute", self._note)

    @property
    def notifying(self) -> list[Connection]:
        return [connection for connection, statement in self.seen if "pg_notify" in statement]

    def _note(self, connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        self.seen.append((connection, statement))
