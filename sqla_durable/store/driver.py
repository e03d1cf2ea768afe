"""Statements of every step, claim and hint: SQLAlchemy compiles them once, and the driver gets the text each time.

This saves the search for the compiled form, the translation of the schema and the result object, which are a third to a
half of what such a statement costs this process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqla_durable.definitions.database_errors import mark_engine_error
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.store.statements import Connectable, Statement, connection_of

_Schemas: TypeAlias = "tuple[tuple[str | None, str | None], ...] | None"


@dataclass(frozen=True, slots=True)
class _Text:
    """The text of a statement for one dialect and schema.

    Attributes:
        sql: the text.
        constants: parameters that the statement has of its own, by name.
        order: the names of its parameters, where the driver takes them by position.
    """

    sql: str
    constants: Mapping[str, Any]
    order: Sequence[str] | None

    def parameters(self, given: Mapping[str, Any]) -> Any:
        """Return the parameters as the driver takes them."""
        every = {**self.constants, **given}
        return every if self.order is None else tuple(every[name] for name in self.order)


class DriverStatement(Statement):
    """A statement that is given to the driver as text.

    Its parameters are text, numbers, booleans, ids, lists of these, and None, which all drivers take as they are.
    """

    def __init__(self, make: Callable[[], sa.Executable]) -> None:
        super().__init__(make)
        self._texts: WeakKeyDictionary[sa.Dialect, dict[_Schemas, _Text]] = WeakKeyDictionary()

    def rows(self, connectable: Connectable, parameters: Mapping[str, Any]) -> Sequence[Any]:
        """Execute it, and return its rows as the driver reads them: an id is a UUID or its text.

        Where `_may_bypass` allows it, the driver's own cursor executes it, and once only: an error may come after the
        statement was executed, from a value that the driver cannot read.
        """
        try:
            connection = connection_of(connectable) if isinstance(connectable, Session) else connectable
            text = self._text(connection)
            given = text.parameters(parameters)
            if _may_bypass(connection):
                try:
                    return _fetched(connection, text.sql, given)
                except connection.dialect.loaded_dbapi.Error as error:
                    if not _is_lost(connection, error):
                        raise _wrapped(connection, text.sql, given, error) from error
            return connection.exec_driver_sql(text.sql, given).all()  # or finds that the connection is lost
        except (DBAPIError, OSError) as error:  # asyncpg's connections raise the latter too
            mark_engine_error(error)
            raise

    def _text(self, connection: sa.Connection) -> _Text:
        schemas = connection.get_execution_options().get("schema_translate_map") or None
        key = None if schemas is None else tuple(schemas.items())
        texts = self._texts.setdefault(connection.dialect, {})
        text = texts.get(key)
        if text is None:
            text = texts[key] = self._compiled(connection.dialect, schemas)
        return text

    def _compiled(self, dialect: sa.Dialect, schemas: Mapping[str | None, str | None] | None) -> _Text:
        options = {} if schemas is None else {"schema_translate_map": schemas, "render_schema_translate": True}
        made: Any = self.made
        compiled = made.compile(dialect=dialect, **options)
        constants = {name: value for name, value in compiled.params.items() if value is not None}
        return _Text(str(compiled), constants, compiled.positiontup)


def _may_bypass(connection: sa.Connection) -> bool:
    """Return whether SQLAlchemy may be bypassed: in AUTOCOMMIT, where no log and no event sees the statement."""
    seen, of_dialect = connection.dispatch, connection.dialect.dispatch
    if seen.begin or seen.before_cursor_execute or seen.after_cursor_execute:
        return False
    if of_dialect.do_execute or of_dialect.handle_error or connection.engine.logger.isEnabledFor(logging.INFO):
        return False
    # Asked of the driver, not of the options: an engine with an isolation level of its own may overrule those.
    return bool(getattr(connection.connection.dbapi_connection, "autocommit", False))


def _is_lost(connection: sa.Connection, error: Any) -> bool:
    return connection.dialect.is_disconnect(error, connection.connection.dbapi_connection, None)


def _wrapped(connection: sa.Connection, sql: str, parameters: Any, error: Exception) -> BaseException:
    """Return SQLAlchemy's error for one of the driver's."""
    dialect, hidden = connection.dialect, connection.engine.hide_parameters
    return DBAPIError.instance(
        sql, parameters, error, dialect.loaded_dbapi.Error, hide_parameters=hidden, dialect=dialect
    )


def _fetched(connection: sa.Connection, sql: str, parameters: Any) -> Sequence[Any]:
    with closing(connection.connection.cursor()) as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchall()
