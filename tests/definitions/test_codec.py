"""Values on their way to the database and back."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, GetCoreSchemaHandler, Secret, SecretBytes, SecretStr, ValidationError
from pydantic_core import CoreSchema, core_schema
from sqlalchemy import Engine, cast, literal, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import Text

from sqla_durable.definitions.codec import ArgumentsCodec, Codec
from sqla_durable.definitions.json_values import dump
from sqla_durable.definitions.redaction import traceback_of
from sqla_durable.errors import (
    ArgumentError,
    DecodingError,
    DefinitionError,
    EncodingError,
    PayloadTooLargeError,
)
from tests.support.domain import Order


@dataclass(frozen=True)
class Point:
    x: int
    weight: float = 1.0


class Model(BaseModel):
    name: str
    points: list[Point]


def _codec(annotation: Any, **options: Any) -> Codec:
    return Codec.of(annotation, what="value", **options)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, 2**70),
        (str, "\\u0000 is six characters"),
        (bytes, bytes(range(256))),
        (Decimal, Decimal("1.10")),
        (Decimal, Decimal("1E+30")),
        (UUID, UUID(int=1)),
        (date, date(2026, 2, 28)),
        (datetime, datetime(2026, 1, 1, 12, 0, 0, 1, tzinfo=UTC)),
        (timedelta, timedelta(days=-1, microseconds=1)),
        (Model, Model(name="m", points=[Point(1), Point(2, 0.1)])),
        (dict[str, tuple[Point, ...]], {"b": (Point(1),), "a": ()}),
        (dict[int, str], {1: "one"}),
        (int | None, None),
        (Point | Model, Model(name="m", points=[])),
        (Annotated[int, Field(gt=0)], 7),
        (set[int], {1, 2, 3}),
        (None, None),
        (Any, {"a": [1, None, True, "x", 1.5]}),
    ],
    ids=repr,
)
def test_value_comes_back_as_what_it_was(annotation: Any, value: object) -> None:
    codec = _codec(annotation)
    found = codec.decode(codec.encode(value))
    assert found == value
    assert type(found) is type(value)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(value=_JSON)
def test_first_execution_reads_the_text_that_jsonb_returns(engine: Engine, value: Any) -> None:
    codec = _codec(Any)
    encoded = codec.encode(value)
    with engine.connect() as connection:
        stored = connection.scalar(select(cast(cast(literal(encoded, Text()), JSONB), Text)))
    assert stored is not None
    first, replayed = codec.decode(encoded), codec.decode(stored)
    assert repr(first) == repr(replayed)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_know_are_refused(number: float) -> None:
    values: list[tuple[Any, object]] = [
        (Any, number),
        (Any, {"a": [number]}),
        (float, number),
        (list[float], [number]),
        (Point, Point(1, number)),
        (Model, Model(name="m", points=[Point(1, number)])),
    ]
    for annotation, value in values:
        with pytest.raises(EncodingError, match="the value"):
            _codec(annotation).encode(value)


@pytest.mark.parametrize("text", ["\0", "a\0b", "\\\0", "\\\\\0"])
def test_nul_is_refused_wherever_it_stands(text: str) -> None:
    for value in (text, [text], {text: 1}, {"a": {"b": text}}):
        with pytest.raises(EncodingError, match="NUL"):
            _codec(Any).encode(value)


@pytest.mark.parametrize("text", ["\\u0000", "\\\\u0000", "u0000"])
def test_text_of_a_backslash_and_u0000_is_kept(text: str) -> None:
    codec = _codec(str)
    assert codec.decode(codec.encode(text)) == text


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(EncodingError, match="surrogate"):
        _codec(str).encode("\ud83d")
    assert _codec(str).decode(_codec(str).encode("\U0001f381")) == "\U0001f381"


def test_circle_is_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(EncodingError):
        _codec(Any).encode(circle)


def test_value_of_another_type_is_refused() -> None:
    with pytest.raises(
        EncodingError,
        match="the value cannot be stored: str does not fit its annotation: Input should be",
    ):
        _codec(int).encode("seven")
    with pytest.raises(EncodingError, match="does not fit its annotation"):
        _codec(Point).encode({"x": 1})


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, {1, 2}, b"x", Decimal(1), Point(1), [Point(1)], {"a": (1,)}])
def test_value_without_annotation_must_be_what_json_knows(value: object) -> None:
    with pytest.raises(EncodingError, match="has no annotation and is"):
        _codec(Any).encode(value)


def test_limit_is_in_bytes_of_utf8() -> None:
    assert _codec(str, limit=10).encode("12345678") == '"12345678"'
    with pytest.raises(PayloadTooLargeError, match="the value is 11 bytes of JSON, over the limit of 10") as caught:
        _codec(str, limit=10).encode("123456789")
    assert (caught.value.size, caught.value.limit) == (11, 10)
    with pytest.raises(PayloadTooLargeError):
        _codec(str, limit=10).encode("öööö1")


def test_stored_value_that_no_longer_fits_says_where_and_not_what() -> None:
    with pytest.raises(
        DecodingError, match=r"does not fit the annotation that the code has now: x: .*got str"
    ) as caught:
        _codec(Point).decode('{"x": "a"}')
    assert "Restore an annotation that reads it" in str(caught.value)


def test_added_field_with_a_default_reads_old_values() -> None:
    assert _codec(Point).decode('{"x": 1}') == Point(1, 1.0)


@pytest.mark.parametrize("annotation", [Engine, Order, list[Order], dict[str, Order | None]])
def test_annotation_that_cannot_be_stored_is_refused(annotation: Any) -> None:
    with pytest.raises(DefinitionError, match="value is annotated"):
        _codec(annotation)


def test_value_is_reported_without_its_repr() -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

    with pytest.raises(EncodingError, match="is of type Hostile"):
        _codec(Any).encode(Hostile())


class Login(BaseModel):
    user: str
    password: SecretStr


class Vault(BaseModel):
    logins: dict[str, list[Login]]


@pytest.mark.parametrize(
    ("annotation", "value", "path"),
    [
        (SecretStr, SecretStr("hunter2"), "it"),
        (SecretBytes, SecretBytes(b"hunter2"), "it"),
        (Secret[int], Secret[int](7), "it"),
        (Login, Login(user="a", password=SecretStr("hunter2")), "password"),
        (list[SecretStr | None], [None, SecretStr("hunter2")], r"\[1\]"),
        (Vault, Vault(logins={"a": [Login(user="a", password=SecretStr("x"))]}), r"logins.a\[0\].password"),
        (object, {"token": SecretStr("hunter2")}, "token"),
    ],
    ids=["str", "bytes", "any", "field", "list", "nested", "inferred"],
)
def test_secret_that_would_be_stored_as_asterisks_is_refused(annotation: Any, value: object, path: str) -> None:
    with pytest.raises(EncodingError, match=f"the value cannot be stored: {path} is a pydantic secret") as caught:
        _codec(annotation).encode(value)
    assert "hunter2" not in str(caught.value)


def test_asterisks_and_no_secret_are_stored() -> None:
    assert _codec(str).encode("**********") == '"**********"'
    assert _codec(SecretStr | None).encode(None) == "null"
    assert _codec(SecretStr).decode(_codec(SecretStr).encode(SecretStr(""))) == SecretStr("")


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, "hunter2"),
        (Point, {"x": "hunter2"}),
        (list[int], [1, "hunter2"]),
        (Any, ("hunter2",)),
        (Any, {"a": ["hunter2\0"]}),
        (Any, {"a": ["hunter2\ud800"]}),
        (Any, {"a": [{"hunter2": float("nan")}]}),
        (object, {"a": [object()], "b": "hunter2"}),
        (dict[str, int], {"a": "hunter2"}),
    ],
    ids=["int", "dataclass", "list", "tuple", "nul", "surrogate", "nan", "object", "dict"],
)
def test_value_that_cannot_be_stored_is_not_in_the_error(annotation: Any, value: object) -> None:
    with pytest.raises(EncodingError) as caught:
        _codec(annotation).encode(value)
    text = traceback_of(caught.value)
    assert "hunter2" not in text.replace('"hunter2"', "").replace("a[0].hunter2", "")


def test_stored_value_that_does_not_fit_is_in_no_traceback() -> None:
    for text in ('{"x": "hunter2"}', '["hunter2"]', '{"x": 1, "weight": "hunter2"}'):
        with pytest.raises(DecodingError) as caught:
            _codec(Point).decode(text)
        assert "hunter2" not in traceback_of(caught.value)


def test_path_names_where_the_fault_is() -> None:
    for value, path in [({"a": ["x\0"]}, "a[0]"), ({"a": {"b": float("inf")}}, "a.b"), (["\ud800"], "[0]")]:
        with pytest.raises(EncodingError) as caught:
            _codec(Any).encode(value)
        assert str(caught.value).endswith(f" in {path}.")


def test_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(EncodingError) as caught:
        _codec(int).encode("x" * 10_000)
    assert len(str(caught.value)) < 2_000


@pytest.fixture
def arguments() -> ArgumentsCodec:
    annotations = {"order_id": int, "price": Decimal, "point": Point}
    return ArgumentsCodec.of(annotations, required=frozenset({"order_id"}), workflow="ship")


def test_arguments_are_an_object_by_name(arguments: ArgumentsCodec) -> None:
    encoded = arguments.encode({"order_id": 1, "price": Decimal("2.50"), "point": Point(3)})
    assert encoded == '{"order_id":1,"price":"2.50","point":{"x":3,"weight":1.0}}'
    decoded = arguments.decode(encoded)
    assert decoded == {"order_id": 1, "price": Decimal("2.50"), "point": Point(3)}


_TEXTS = ["", "a", "\u20ac\U0001f600", '"\\\n\x7f\u2028', "\\u0000", "\0", "\ud800", "x" * 2_000, "\u20ac" * 40]


@pytest.mark.parametrize(
    "value", [*_TEXTS, 0, -1, 2**63, 10**100, 10**5_000, True, False, None], ids=lambda value: type(value).__name__
)
def test_argument_that_needs_no_adapter_is_encoded_as_with_one(value: object) -> None:
    """The same text, or the same error."""
    kind, kept = type(value), Annotated[type(value), "which makes no difference to what is encoded"]
    codec, adapting = (Codec.of(each, what="value", limit=100) for each in (kind, kept))

    def encoded(codec: Codec) -> tuple[type, str]:
        try:
            return str, codec.encode_argument(value)
        except (EncodingError, ValidationError) as error:
            return type(error), str(error)

    assert encoded(codec) == encoded(adapting)


@pytest.mark.parametrize("annotation", [int, list[int], Any])
def test_integer_that_python_does_not_read_is_refused(annotation: Any) -> None:
    codec = _codec(annotation)

    def of(value: int) -> Any:
        return [0, value] if annotation == list[int] else value

    for largest in (10**4_300 - 1, 1 - 10**4_299):
        assert codec.decode(codec.encode(of(largest))) == of(largest)
    for beyond in (10**4_300, -(10**4_299)):
        for encode in (codec.encode, codec.encode_argument):
            with pytest.raises(EncodingError, match=r"an integer( in \[1\])? has more than 4,300 digits and sign"):
                encode(of(beyond))


@pytest.mark.parametrize("wrong", ["1", 1.0, True, None])
def test_argument_is_not_converted(arguments: ArgumentsCodec, wrong: object) -> None:
    with pytest.raises(ArgumentError, match="argument 'order_id' of workflow 'ship' does not fit its annotation"):
        arguments.encode({"order_id": wrong})


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ("{}", r"missing \['order_id'\], unknown \[\]"),
        ('{"order_id": 1, "colour": 2}', r"missing \[\], unknown \['colour'\]"),
        ('{"order_id": "one"}', "does not fit the annotation that the code has now"),
    ],
)
def test_stored_arguments_that_do_not_fit_are_explained(arguments: ArgumentsCodec, stored: str, said: str) -> None:
    with pytest.raises(DecodingError, match=said):
        arguments.decode(stored)


def test_plain_sql_may_write_numbers_for_decimals(arguments: ArgumentsCodec) -> None:
    assert arguments.decode('{"order_id": 1, "price": 2.50}')["price"] == Decimal("2.50")


def test_order_of_keys_is_that_of_jsonb() -> None:
    assert dump({"bb": 1, "a": 2, "ä": 3, "c": 4}, what="value") == '{"a":2,"c":4,"bb":1,"ä":3}'


class Counted:
    """A value whose adapters are counted as pydantic builds them."""

    built = 0

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        cls.built += 1
        return core_schema.int_schema()


def counted() -> type[Counted]:
    return type("Counted", (Counted,), {})


def plain(kind: Any) -> Any:
    return kind


def composed(kind: Any) -> Any:
    return list[kind] | None


def annotated(kind: Any) -> Any:
    return Annotated[dict[str, kind], Field(max_length=3)]


# behaviour: G1
@pytest.mark.parametrize("annotation", [plain, composed, annotated])
def test_a_thousand_codecs_of_an_annotation_build_one_adapter(annotation: Callable[[Any], Any]) -> None:
    kind = counted()
    for number in range(1_000):
        Codec.of(annotation(kind), what=f"payload {number}")
    assert kind.built == 1


def test_codecs_of_threads_agree_on_one_adapter() -> None:
    kind = counted()
    barrier = threading.Barrier(4)

    def build() -> None:
        barrier.wait()
        for _ in range(100):
            assert Codec.of(composed(kind), what="payload").decode("[1]") == [1]

    threads = [threading.Thread(target=build) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert 1 <= kind.built <= 4


def test_classes_of_one_name_have_codecs_of_their_own() -> None:
    def defined(kind: Any) -> Any:
        return dataclass(type("Payload", (), {"__annotations__": {"value": kind}}))

    number, text = defined(int), defined(str)
    assert Codec.of(number, what="payload").decode('{"value": 1}').value == 1
    assert Codec.of(text, what="payload").decode('{"value": "1"}').value == "1"
    with pytest.raises(DecodingError):
        Codec.of(number, what="payload").decode('{"value": "one"}')


@dataclass(frozen=True)
class Left:
    x: int


@dataclass(frozen=True)
class Right:
    x: int


@pytest.mark.parametrize(
    ("first", "second", "stored"),
    [
        (Left | Right, Right | Left, '{"x": 1}'),
        (list[Left | Right], list[Right | Left], '[{"x": 1}]'),
        (Annotated[int, Field(ge=2)], Annotated[int, Field(ge=3)], "2"),
        (Literal[1], Literal[True], "true"),
    ],
)
def test_annotations_that_are_equal_in_python_only_have_codecs_of_their_own(
    first: Any, second: Any, stored: str
) -> None:
    assert first != second or hash(first) == hash(second)  # as a dictionary would take one for the other

    def outcome(annotation: Any) -> object:
        try:
            return Codec.of(annotation, what="payload").decode(stored)
        except DecodingError:
            return DecodingError

    assert repr(outcome(first)) != repr(outcome(second))


def test_annotation_that_cannot_be_hashed_has_a_codec() -> None:
    annotation = Annotated[int, {"unit": ["cm"]}]
    with pytest.raises(TypeError):
        hash(annotation)
    assert Codec.of(annotation, what="payload").decode("1") == 1


def test_class_that_is_defined_later_is_found_then() -> None:
    globals().pop("File", None)
    folder: Any = dataclass(type("Folder", (), {"__annotations__": {"file": "File"}, "__module__": __name__}))
    with pytest.raises(Exception, match="not fully defined"):
        Codec.of(folder, what="payload").decode('{"file": 1}')
    globals()["File"] = int
    assert Codec.of(folder, what="payload").decode('{"file": 1}').file == 1
    globals().pop("File")


def kept_by_nobody() -> type:
    kind = counted()
    Codec.of(kind, what="payload")
    return kind


@pytest.mark.usefixtures("few_objects")
def test_classes_made_in_functions_are_garbage_collected() -> None:
    alive: weakref.WeakSet[type] = weakref.WeakSet()
    for _ in range(600):
        alive.add(kept_by_nobody())
    gc.collect()
    assert len(alive) <= 512
