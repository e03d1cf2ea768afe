"""What the decorators know about a function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable import Durable
from sqla_durable.errors import ArgumentError, DefinitionError, UnknownWorkflowError
from sqla_durable.inspection import SessionKind
from sqla_durable.registry import Registry, StepDefinition, WorkflowDefinition


class MySession(Session):
    """An application's own session class."""


class Client:
    """A collaborator with methods to make steps of."""

    def fetch(self, url: str) -> int:
        return len(url)

    async def afetch(self, url: str) -> int:
        return len(url)

    def book(self, session: Session, cents: int) -> int:
        return cents

    def __call__(self, url: str) -> int:
        return len(url)


def sync_step(session: Session, a: int) -> None: ...
async def async_step(session: AsyncSession, a: int) -> None: ...
def own_session(session: MySession) -> None: ...
def postponed(session: "Session") -> None: ...  # noqa: UP037
def plain(a: int, session: Session) -> None: ...
def unannotated(session) -> None: ...  # type: ignore[no-untyped-def]  # pyright: ignore
def keyword_only(*, session: Session) -> None: ...
def variadic(*session: Session) -> None: ...
def optional(session: Session | None) -> None: ...


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (sync_step, SessionKind.SYNC),
        (async_step, SessionKind.ASYNC),
        (own_session, SessionKind.SYNC),
        (postponed, SessionKind.SYNC),
        (plain, SessionKind.NONE),
        (unannotated, SessionKind.NONE),  # pyright: ignore[reportUnknownArgumentType]
        (keyword_only, SessionKind.NONE),
        (variadic, SessionKind.NONE),
        (Client().book, SessionKind.SYNC),
        (Client().fetch, SessionKind.NONE),
        (len, SessionKind.NONE),
    ],
)
def test_first_parameter_says_which_session_a_step_takes(fn: Callable[..., Any], kind: SessionKind) -> None:
    assert StepDefinition.of(fn).session is kind


@pytest.mark.parametrize(
    ("fn", "name", "is_async"),
    [
        (Client().fetch, "fetch", False),
        (Client().afetch, "afetch", True),
        (functools.partial(Client().afetch, "url"), None, True),
        (Client(), None, False),
        (int, "int", False),
        (len, "len", False),
    ],
)
def test_step_is_made_of_any_callable(fn: Callable[..., Any], name: str | None, is_async: bool) -> None:
    if name is None:
        with pytest.raises(DefinitionError, match="has no name to record it by: give the step one with name="):
            StepDefinition.of(fn)
    definition = StepDefinition.of(fn, name=name or "given")
    assert definition.name == (name or "given")
    assert definition.is_async is is_async


def test_result_annotation_is_found_through_partials_methods_and_wrappers() -> None:
    def base(a: int) -> int:
        return a

    @functools.wraps(base)
    def wrapped(*args: Any) -> Any:
        return base(*args)

    for fn in (wrapped, functools.partial(base, 1), Client().fetch, Client()):
        assert StepDefinition.of(fn, name="x").result.decode("7") == 7
        assert StepDefinition.of(fn, name="x").result.annotation is int


def test_annotation_may_name_a_class_defined_further_down() -> None:
    definition = StepDefinition.of(forward)
    assert definition.result.decode('{"x": 1}') == Later(1)


def forward() -> Later:
    raise NotImplementedError


def test_annotation_that_cannot_be_resolved_is_explained() -> None:
    def wrong() -> Missing: ...  # type: ignore[name-defined]  # noqa: F821  # pyright: ignore

    with pytest.raises(DefinitionError, match=r"cannot be resolved: .*Missing.*Import the names at run time"):
        _ = StepDefinition.of(wrong).result  # pyright: ignore[reportUnknownArgumentType]


@pytest.mark.parametrize("fn", [None, 7, "name"])
def test_something_that_cannot_be_called_is_refused(fn: Any) -> None:
    with pytest.raises(DefinitionError, match=r"a step is made of a function, got|a workflow is made of a function"):
        StepDefinition.of(fn)


@pytest.mark.parametrize("name", ["", " ", "a#2", "a/b"])
def test_names_that_would_confuse_are_refused(name: str) -> None:
    with pytest.raises(DefinitionError):
        StepDefinition.of(plain, name=name)
    with pytest.raises(DefinitionError):
        WorkflowDefinition.of(lambda: None, name=name)


def test_blank_queue_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"has the blank queue ' ': name one"):
        WorkflowDefinition.of(lambda: None, name="x", queue=" ")


def test_two_functions_of_one_name_are_refused_and_named() -> None:
    durable = Durable()

    def first() -> None: ...
    def second() -> None: ...

    durable.step(first, name="same")
    durable.step(first, name="same")
    with pytest.raises(
        DefinitionError, match=r"two functions are named step 'same': .*first and .*second.*another with"
    ):
        durable.step(second, name="same")
    durable.workflow(first, name="same")
    with pytest.raises(DefinitionError, match="two functions are named workflow 'same'"):
        durable.workflow(second, name="same")


def test_unknown_workflow_is_refused_with_what_there_is() -> None:
    registry = Registry()
    with pytest.raises(UnknownWorkflowError, match=r"registered are \[\]"):
        registry.workflow("x")
    registry.add_workflow(WorkflowDefinition.of(lambda: None, name="checkout"))
    with pytest.raises(UnknownWorkflowError, match="did you mean 'checkout'"):
        registry.workflow("chekout")
    assert [each.name for each in registry] == ["checkout"]


def test_arguments_are_bound_by_name() -> None:
    def fn(a: int, /, b: int, *, c: int = 3) -> None: ...

    definition = WorkflowDefinition.of(fn)
    assert definition.encode((1, 2), {}) == {"a": 1, "b": 2}
    assert definition.encode((1,), {"b": 2, "c": 4}) == {"a": 1, "b": 2, "c": 4}
    with pytest.raises(ArgumentError, match=r"workflow 'fn' takes \(a: .*, /, b: .*missing a required"):
        definition.encode((1,), {})


def test_durable_function_keeps_the_name_and_the_documentation() -> None:
    durable = Durable()

    @durable.step
    def documented() -> None:
        """Say so."""

    assert documented.__doc__ == "Say so."
    assert documented.name == "documented"
    assert repr(documented) == "<StepFunction 'documented'>"


def test_step_decorated_in_a_class_is_refused() -> None:
    durable = Durable()
    with pytest.raises((DefinitionError, RuntimeError)) as caught:

        class Shop:  # pyright: ignore[reportUnusedClass]
            @durable.step
            def charge(self) -> None: ...

    error = caught.value if isinstance(caught.value, DefinitionError) else caught.value.__cause__
    assert "make the step of the bound method instead" in str(error)


@pytest.mark.parametrize("key", ["", " ", "a\0", "\ud800", "reserve#2", "1/reserve"])
def test_step_key_that_is_no_name_is_refused(key: str) -> None:
    step = Durable().step(plain)
    with pytest.raises(DefinitionError, match=r"the key of step 'plain'"):
        step.options(key=key)


from dataclasses import dataclass  # noqa: E402  (below its use, which is what the test above is about)


@dataclass
class Later:
    """Defined after the function that names it."""

    x: int


def test_session_that_might_be_none_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"the first parameter of .*optional.* is annotated .*Session.*None"):
        Durable().step(optional)


def test_nested_workflow_may_refer_to_itself() -> None:
    durable = Durable()

    @durable.workflow
    def countdown(number: int) -> int:
        if number:
            countdown.continue_as_new(number - 1)
        return number

    assert countdown(0) == 0
