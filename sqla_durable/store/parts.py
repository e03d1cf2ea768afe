"""Parts of what a statement over many workflows is about: for when the row of one of them makes it fail.

Each of these statements finds its workflows by itself. It is made in three forms: as it is executed normally, for some
of the workflows only, and as a select of the ids of those that it would change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from sqla_durable.store._rows import Condition, Connectable, parameter, scalars

Within: TypeAlias = Callable[[sa.ColumnElement[UUID]], Condition]
"""Makes the condition that a workflow with this id belongs to the part."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which workflows a statement is about, of those that it finds.

    Attributes:
        only: these; None means all of them.
        besides: not these.
    """

    only: Sequence[UUID] | None = None
    besides: Sequence[UUID] = ()

    @property
    def is_whole(self) -> bool:
        """Whether it is about all that it finds."""
        return self.only is None and not self.besides

    def choose(self, whole: Any, part: Any) -> Any:
        """Return the form of a statement to be executed."""
        return whole if self.is_whole else part

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that this form has more."""
        return {} if self.is_whole else self._ids

    @property
    def _ids(self) -> dict[str, Any]:
        return {"only_ids": None if self.only is None else list(self.only), "besides_ids": list(self.besides)}

    def found(self, connectable: Connectable, statement: Any, parameters: Mapping[str, Any]) -> list[UUID]:
        """Return the ids of those that a statement would change. Takes the same locks as that."""
        return list(dict.fromkeys(scalars(connectable, statement, {**parameters, **self._ids})))


WHOLE = Part()
"""All that a statement finds."""


def divided(build: Callable[[Within], tuple[Any, Any]]) -> tuple[Any, Any, Any]:
    """Make the three forms of a statement: for all, for a part, and the select of ids.

    Args:
        build: makes the statement and the select, with a condition on the column of ids.
    """
    whole, _ = build(lambda _: sa.true())
    return whole, *build(_within)


def _within(column: sa.ColumnElement[UUID]) -> Condition:
    only = parameter("only_ids", ARRAY(sa.UUID()))
    besides = parameter("besides_ids", ARRAY(sa.UUID()))
    return sa.and_(sa.or_(only.is_(None), column == sa.func.any(only)), column != sa.func.all(besides))
