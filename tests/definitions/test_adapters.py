"""Annotations whose values could not be read back are refused when the code is imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from enum import Enum, IntFlag, StrEnum
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, RootModel
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from sqla_durable.definitions.json_values import adapter_of
from sqla_durable.errors import DefinitionError


class Base(MappedAsDataclass, DeclarativeBase):
    pass


class Row(Base):
    """An ORM class that is a dataclass, too."""

    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)


class Hybrid(BaseModel):
    """A model that is mapped, as those of SQLModel are."""

    __mapper__ = object()
    id: int


class Holder(BaseModel):
    rows: list[Hybrid]


class ArbitraryHolder(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    row: Row | None = None


@dataclass
class DataHolder:
    row: Row


@dataclass(frozen=True)
class Key:
    x: int


class KeyModel(BaseModel):
    model_config = ConfigDict(frozen=True)
    x: int


class Pair(NamedTuple):
    x: int


class Number(RootModel[int]):
    model_config = ConfigDict(frozen=True)


class Tree(BaseModel):
    below: list[Tree] = []
    seen: dict[tuple[int, int], int] = {}


class Price(Enum):
    LOW = Decimal("1.0")


class Orbit(Enum):
    EARTH = (1, 2)


class Word(StrEnum):
    A = "a"


class Bits(IntFlag):
    A = 1


class Forgiving(Enum):
    """Reads what it does not know itself."""

    LOW = Decimal("1.0")

    @classmethod
    def _missing_(cls, value: object) -> Forgiving:
        return cls.LOW


# behaviour: V2
@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        (dict[tuple[int, str], int], "tuples as the keys of a dict"),
        (list[dict[Key, int] | None], "dataclasses as the keys"),
        (Mapping[KeyModel, int], "models as the keys"),
        (dict[Pair, int], "named tuples as the keys"),
        (dict[frozenset[int], int], "sets as the keys"),
        (Tree, "tuples as the keys"),
        (Price, "the enum Price has members that are not text or numbers"),
        (list[Orbit], "the enum Orbit"),
        (Iterable[int], "iterator"),
        (Iterator[str], "Iterator"),
        (Row, "ORM class Row"),
        (dict[str, Row | None], "ORM class Row"),
        (Holder, "ORM class Hybrid"),
        (ArbitraryHolder, "ORM class Row"),
        (DataHolder, "Mapped"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(getattr(value, "__name__", value)),
)
def test_annotation_of_which_nothing_comes_back_is_refused(annotation: Any, said: str) -> None:
    for _ in range(2):  # the second time as the first
        with pytest.raises(DefinitionError, match=said):
            adapter_of(annotation, "value")


@pytest.mark.parametrize(
    "annotation",
    [
        dict[UUID | int | date, int],
        dict[Word, int],
        dict[Number, int],
        dict[Any, int],
        Word,
        Bits,
        Forgiving,
        Mapping[str, list[Key]],
    ],
    ids=lambda value: value if isinstance(value, str) else str(getattr(value, "__name__", value)),
)
def test_annotation_that_can_be_read_is_none_of_them(annotation: Any) -> None:
    adapter_of(annotation, "value")
