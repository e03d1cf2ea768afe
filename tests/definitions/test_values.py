"""A value comes back equal, or is refused before anything is stored."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from http import HTTPStatus
from importlib import import_module
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    PlainSerializer,
    PrivateAttr,
    RootModel,
    StringConstraints,
    computed_field,
    model_validator,
)
from pydantic.alias_generators import to_camel
from typing_extensions import TypedDict

from sqla_durable.definitions.codec import ArgumentsCodec, Codec
from sqla_durable.definitions.redaction import traceback_of
from sqla_durable.errors import ArgumentError, EncodingError
from tests.definitions.test_adapters import Hybrid, Row

T = TypeVar("T")
DriverUUID: type[UUID] = import_module("asyncpg.pgproto.pgproto").UUID


def _named(value: object) -> str:
    return value if isinstance(value, str) else str(getattr(value, "__name__", type(value).__name__))


def _codec(annotation: Any) -> Codec:
    return Codec.of(annotation, what="value")


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid")
    order_id: int
    unit_price: Decimal


class TwoAliases(BaseModel):
    number: int = Field(validation_alias="numberIn", serialization_alias="numberOut")


class Aliased(BaseModel):
    number: int = Field(alias="No.")
    below: list[Aliased] = Field(default=[], alias="children")


class SerializedByAlias(BaseModel):
    model_config = ConfigDict(serialize_by_alias=True)
    number: int = Field(alias="No.")


class Computed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    net: Decimal

    @computed_field
    def gross(self) -> Decimal:
        return self.net * 2


class Raw(BaseModel):
    body: Json[list[int]]


class Forbidding(TypedDict):
    a: int


class Float64(float):
    """As numpy has it."""


class Text(StrEnum):
    RED = "red"


class Level(IntEnum):
    LOW = 1


class Price(Enum):
    LOW = Decimal("1.0")


class Place(NamedTuple):
    x: int
    y: Decimal


@dataclass
class Base:
    x: int


@dataclass
class Sub(Base):
    y: int = 0


@dataclass
class SameFields(Base):
    pass


class Model(BaseModel):
    x: int


class SubModel(Model):
    y: int = 0


class Twin(BaseModel):
    x: int


@dataclass
class Measured:
    status: int
    weight: float = 0.0


@dataclass
class Counting:
    start: int
    count: int = field(init=False, default=0)
    seen: list[int] = field(init=False, default_factory=list[int], compare=False)

    def __post_init__(self) -> None:
        self.count = self.start + 1


@dataclass(eq=False)
class ByIdentity:
    x: int


class WithPrivate(BaseModel):
    x: int
    _token: str = PrivateAttr("")


class Excluding(BaseModel):
    x: int
    secret: str = Field(default="", exclude=True)


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    x: int = 0


class Box(BaseModel, Generic[T]):
    content: T


class Meta(BaseModel):
    meta: dict[str, Any] = {}


class Positive(BaseModel):
    x: int

    @model_validator(mode="after")
    def require_positive(self) -> Positive:
        if self.x < 0:
            raise RuntimeError("4111")
        return self


def counted(start: int) -> Counting:
    counting = Counting(start)
    counting.count = 99
    return counting


def tokened() -> WithPrivate:
    model = WithPrivate(x=1)
    model._token = "hunter2"  # pyright: ignore[reportPrivateUsage]
    return model


BERLIN = ZoneInfo("Europe/Berlin")
Stripped = Annotated[str, StringConstraints(strip_whitespace=True)]
Lowered = Annotated[str, BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)]
Raised = Annotated[int, AfterValidator(lambda value: value + 1)]
Masked = Annotated[str, PlainSerializer(lambda value: value[:1])]


# behaviour: V1, V2
@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Camel, Camel.model_validate({"orderId": 1, "unitPrice": Decimal("1.10")})),
        (TwoAliases, TwoAliases.model_validate({"numberIn": 1})),
        (Aliased, Aliased.model_validate({"No.": 1, "children": [{"No.": 2}]})),
        (SerializedByAlias, SerializedByAlias.model_validate({"No.": 1})),
        (list[Computed], [Computed(net=Decimal("1.5"))]),
        (Raw, Raw(body="[1, 2]")),  # type: ignore[arg-type]
        (Annotated[Model | Twin, Field(union_mode="left_to_right")], Model(x=1)),
        (Base | Sub, Base(1)),
        (Counting, Counting(1)),
        (ByIdentity, ByIdentity(1)),
        (set[int], {1, 2}),
        (deque[int], deque([1])),
        (Place, Place(1, Decimal("1.0"))),
        (Forbidding, {"a": 1}),
        (RootModel[dict[int, Text]], RootModel[dict[int, Text]]({1: Text.RED})),
        (Open, Open.model_validate({"x": 1, "more": {"a": [1, None]}})),
        (Box[Decimal], Box[Decimal](content=Decimal("1.10"))),
        (Box, Box(content={"a": [1]})),
        (WithPrivate, WithPrivate(x=1)),
        (Excluding, Excluding(x=1)),
        (dict[UUID | int, int], {UUID(int=1): 1, 2: 2}),
        (dict[date, int], {date(2026, 1, 1): 1}),
        (dict[Text, int], {Text.RED: 1}),
        (dict[bytes, int], {b"\xff": 1}),
        (datetime, datetime(2026, 1, 1, tzinfo=BERLIN)),
        (datetime, datetime(2026, 1, 1)),
        (datetime, datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=-3, minutes=-30)))),
        (time, time(1, 2, 3, tzinfo=UTC)),
        (Literal["a", 1], "a"),
        (complex, 1j),
        (float, 1),
        (dict[str, Any], {"a": [1, 1.5, "x", None, True, {"b": []}]}),
        (dict[str, Any], defaultdict(list, a=[1])),
        (dict[str, Any], OrderedDict(b=1, a=2)),
        (dict[str, int], Counter("aab")),
        (object, [1, {"a": None}]),
        (list[Any], []),
        (Any | None, {"a": 1}),
        (T, {"a": 1}),
        (Meta, Meta(meta={"a": [1]})),
        (Sequence[int], [1, 2]),
        (Mapping[str, int], {"a": 1}),
    ],
    ids=_named,
)
def test_value_comes_back_equal(annotation: Any, value: Any) -> None:
    codec = _codec(annotation)
    encoded = codec.encoded(value)
    for kept in (encoded.value, codec.decode(encoded.text)):
        assert repr(kept) == repr(value) or kept == value


# behaviour: V1, V2
@pytest.mark.parametrize(
    ("annotation", "value", "said"),
    [
        (Decimal, Decimal("NaN"), "finite number"),
        (Decimal, Decimal("Infinity"), "finite number"),
        (Decimal | None, Decimal("sNaN"), "finite number"),
        (str | bytes, b"\xff", "it is of type bytes and would be read back as one of type str"),
        (bytes | str, "abcd", "it is of type str and would be read back as one of type bytes"),
        (Model | Twin, Twin(x=1), "it is of type Twin and would be read back as one of type Model.*discriminator"),
        (Base, Sub(1, 2), "it is of type Sub and would be read back as one of type Base. Annotate it with Sub"),
        (Base, SameFields(1), "type SameFields"),
        (list[Model], [Model(x=1), SubModel(x=1)], r"\[1\] is of type SubModel"),
        (dict[str, Any], {"a": {"b": [Decimal("1.0")]}}, r"a.b\[0\] is of type Decimal .* type str. Annotate it with"),
        (dict[str, Any], {"a": date(2026, 1, 1)}, "a is of type date"),
        (dict[str, Any], {"a": UUID(int=1)}, "a is of type UUID"),
        (dict[str, Any], {"a": b"x"}, "a is of type bytes"),
        (dict[str, Any], {"a": Base(1)}, "a is of type Base and would be read back as one of type dict"),
        (dict[str, Any], {"a": (1, 2)}, r"a is of type tuple .* type list. Annotate it with tuple\[int, ...\]"),
        (dict[str, Any], {"a": {1}}, r"a is of type set .* Annotate it with set\[int\]"),
        (dict[str, Any], {"a": Text.RED}, "a is of type Text and would be read back as one of type str"),
        (dict[str, Any], {"a": Float64(0.5)}, "a is of type Float64 .* or pass a float"),
        (dict, {1: "a"}, r"\[key 0\] is of type int and would be read back as one of type str"),
        (dict[str, Any], {"a": {1: 2}}, r"a\[key 0\] is of type int"),
        (list, [datetime(2026, 1, 1)], r"\[0\] is of type datetime"),
        (object, Decimal(1), "it is of type Decimal"),
        (Any | None, {"a": Level.LOW}, "a is of type Level"),
        (T, Base(1), "it is of type Base"),
        (Box, Box(content=Decimal(1)), "content is of type Decimal"),
        (Meta, Meta(meta={"a": Decimal(1)}), "meta.a is of type Decimal"),
        (Open, Open.model_validate({"more": Decimal(1)}), "more is of type Decimal"),
        (Text | str, Text.RED, "type Text"),
        (int, True, "it is of type bool"),
        (date, datetime(2026, 1, 1), "does not fit its annotation"),
        (Counting, counted(1), "count would be read back as another int"),
        (WithPrivate, tokened(), "_token would be read back as another str"),
        (Excluding, Excluding(x=1, secret="hunter2"), "secret would be read back as another str"),
        (Masked, "hunter2", "it would be read back as another str"),
        (Raised, 1, "it would be read back as another int"),
        (Forbidding, {"a": 1, "b": 2}, "value cannot be stored"),
        (dict[str | None, int], {None: 1}, r"\[key 0\] is of type NoneType"),
        (Sequence[int], (1, 2), "it is of type tuple"),
        (object, Row(1), "it is of type Row. An ORM instance"),
        (dict[str, Any], {"row": Hybrid(id=1)}, "row is of type Hybrid. An ORM instance"),
        (Positive, Positive.model_construct(x=-1), "cannot read: RuntimeError"),
    ],
    ids=_named,
)
def test_value_that_would_come_back_as_another_is_refused(annotation: Any, value: Any, said: str) -> None:
    with pytest.raises(EncodingError, match=said) as caught:
        _codec(annotation).encode(value)
    assert "hunter2" not in traceback_of(caught.value)
    assert "4111" not in traceback_of(caught.value)


@pytest.mark.parametrize(
    ("annotation", "value", "kept"),
    [
        (str, Text.RED, "red"),
        (int, HTTPStatus.OK, 200),
        (int, Level.LOW, 1),
        (float, Float64(0.5), 0.5),
        (dict[str, float], {"a": Float64(0.5)}, {"a": 0.5}),
        (Measured, Measured(HTTPStatus.OK, Float64(0.5)), Measured(200, 0.5)),
        (Measured, Measured(1, 1), Measured(1, 1.0)),
        (UUID, DriverUUID(str(UUID(int=7))), UUID(int=7)),
        (Stripped, " a ", "a"),
        (list[Lowered], ["A"], ["a"]),
    ],
    ids=_named,
)
def test_value_is_what_its_annotation_makes_of_it(annotation: Any, value: Any, kept: Any) -> None:
    """A subclass of text and numbers where text and numbers are annotated, and what a validator makes normal."""
    codec = _codec(annotation)
    encoded = codec.encoded(value)
    assert repr(encoded.value) == repr(codec.decode(encoded.text)) == repr(kept)
    arguments = ArgumentsCodec.of({"given": annotation}, required=frozenset(), workflow="ship")
    assert repr(arguments.decode(arguments.encode({"given": value}))) == repr({"given": kept})


# behaviour: V1
@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Base, Sub(1, 2)),
        (Model | Twin, Twin(x=1)),
        (dict[str, Any], {"a": Decimal(1)}),
        (Any, {"a": Decimal(1)}),
        (Forbidding, {"a": 1, "b": 2}),
        (Raised, 1),
        (Decimal, Decimal("NaN")),
        (object, Row(1)),
    ],
    ids=_named,
)
def test_argument_that_would_come_back_as_another_is_refused(annotation: Any, value: Any) -> None:
    arguments = ArgumentsCodec.of({"given": annotation}, required=frozenset(), workflow="ship")
    with pytest.raises((EncodingError, ArgumentError), match="argument 'given' of workflow 'ship'"):
        arguments.encode({"given": value})


# behaviour: V1, V2
@pytest.mark.parametrize(
    "value",
    [
        {"a": [Decimal("1.0"), datetime(2026, 1, 1, tzinfo=UTC), timedelta(1), UUID(int=1), b"x", (1,), {2}]},
        {1: "a", UUID(int=1): Text.RED},
        Camel.model_validate({"orderId": 1, "unitPrice": Decimal(1)}),
        [Computed(net=Decimal(1)), Sub(1, 2), Twin(x=1), Place(1, Decimal(1))],
        {"deep": [[{"a": Base(1)}]]},
    ],
    ids=_named,
)
def test_value_is_sent_by_its_own_type(value: Any) -> None:
    codec = Codec.inferred(what="payload")
    assert codec.encode(value)
    if isinstance(value, BaseModel):
        assert Codec.of(type(value), what="payload").decode(codec.encode(value)) == value


# behaviour: V1, V2
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Decimal("NaN"), "finite number"),
        ({"a": [Decimal("NaN")]}, r"payload, at a\[0\], cannot be stored"),
        ({"a": Price.LOW}, "payload cannot be stored: .* the enum Price"),
        ({(1, 2): 3}, "tuples as the keys"),
        (tokened(), "_token would be read back as another str"),
        ([counted(1)], r"payload, at \[0\], cannot be stored as it is: count would"),
        (Meta(meta={"a": Decimal(1)}), "meta.a is of type Decimal"),
        ({"rows": [Row(1)]}, r"rows\[0\] is of type Row. An ORM instance"),
        ([Hybrid(id=1)], r"\[0\] is of type Hybrid. An ORM instance"),
    ],
    ids=_named,
)
def test_value_that_nobody_can_read_as_what_it_is_is_not_sent(value: Any, said: str) -> None:
    with pytest.raises(EncodingError, match=said) as caught:
        Codec.inferred(what="payload").encode(value)
    assert "hunter2" not in traceback_of(caught.value)


@pytest.mark.parametrize(
    ("value", "proposed"),
    [
        ({1: 2}, r"dict\[int, int\]"),
        ({"a": Decimal(1)}, r"dict\[str, Decimal\]"),
        ([(1, "a")], r"list\[tuple\[int \| str, ...\]\]"),
        (Base(1), "Base"),
    ],
    ids=_named,
)
def test_missing_annotation_is_proposed_such_that_it_keeps_the_value(value: object, proposed: str) -> None:
    with pytest.raises(EncodingError, match=f"has no annotation.*for example with '{proposed}'"):
        _codec(Any).encode(value)


def test_value_that_is_nested_too_deeply_to_be_read_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    for annotation in (Any, list[Any], object):
        with pytest.raises(EncodingError):
            _codec(annotation).encode(deep)
    with pytest.raises(EncodingError):
        Codec.inferred(what="payload").encode(deep)


class _Guard:
    def __getattribute__(self, name: str) -> Any:
        if name == "number":
            raise PermissionError
        return super().__getattribute__(name)


@dataclass
class GuardedDataclass(_Guard):
    number: int


class GuardedModel(_Guard, BaseModel):
    number: int


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (GuardedDataclass, "GuardedDataclass does not fit its annotation"),
        (GuardedModel, "value cannot be compared .*PermissionError was raised"),
    ],
)
def test_value_whose_class_raises_while_it_is_encoded_or_compared_is_refused(kind: Any, said: str) -> None:
    with pytest.raises(EncodingError, match=said):
        _codec(kind).encode(kind(number=1))


def test_what_is_given_on_is_no_part_of_what_went_in() -> None:
    value = {"a": [1]}
    encoded = _codec(dict[str, Any]).encoded(value)
    encoded.value["a"].append(2)
    assert value == {"a": [1]}


def test_random_structures_come_back_equal_or_are_refused() -> None:
    """Whatever stands where anything may stand: nothing comes back as something else."""
    chance = random.Random(7)
    leaves: list[Any] = [1, True, 1.0, "1", None, Decimal(1), UUID(int=1), date(2026, 1, 1), b"a", Text.RED, Base(1)]

    def made(depth: int) -> Any:
        inner = [made(depth - 1) for _ in range(chance.randrange(3))] if depth else []
        match chance.randrange(5) if depth else 0:
            case 1:
                return inner
            case 2:
                return tuple(inner)
            case 3:
                return {chance.choice(["a", 1, "b"]): each for each in inner}
            case _:
                return chance.choice(leaves)

    codec = _codec(dict[str, Any])
    outcomes = Counter[bool]()
    for _ in range(2_000):
        value = {"value": made(3)}
        try:
            text = codec.encode(value)
        except EncodingError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
            assert repr(codec.decode(text)) == repr(dict(sorted(value.items()))) or codec.decode(text) == value
    assert min(outcomes.values()) > 100
