"""The types of our text columns: what is compared with them is sent as `text`, which no other operator fits better.

SQLAlchemy sends a `str` as `varchar`. PostgreSQL has no operators for that, and prefers one of another role that fits
exactly, in whatever schema of the search_path, to its own for text.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, TypeVar

from sqlalchemy import Dialect, TypeDecorator
from sqlalchemy import Text as PlainText

S = TypeVar("S", bound=StrEnum)

_ALEMBIC_NAME = "sqlalchemy.types"
"""Where an autogenerate is to look: what it writes into an application's revision is `sa.Text()`."""


class Text(PlainText):
    """Text whose parameters are sent as such."""

    __module__ = _ALEMBIC_NAME
    render_bind_cast = True

    def adapt(self, cls: Any, **kw: Any) -> Any:
        """Return a copy for a dialect, and not the type that it has for every string."""
        return super().adapt(type(self), **kw)


class StatusText(TypeDecorator[S]):
    """A status as text; which texts are legal is a named CHECK constraint, not a PostgreSQL enum."""

    __module__ = _ALEMBIC_NAME
    impl = Text
    cache_ok = True

    def __init__(self, statuses: type[S]) -> None:
        super().__init__()
        self.statuses = statuses

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Return the text of a status, or of its name."""
        return None if value is None else self.statuses(value).value

    def process_result_value(self, value: Any, dialect: Dialect) -> S | None:
        """Return the status that a text is."""
        return None if value is None else self.statuses(value)

    def __repr__(self) -> str:
        return "Text()"
