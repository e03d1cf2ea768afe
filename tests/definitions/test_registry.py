"""What the decorators know about a function."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Callable
from itertools import combinations
from typing import Annotated, Any, NewType, TypeVar

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from typing_extensions import TypeAliasType

from sqla_durable import Durable, run_step
from sqla_durable.asyncio import AsyncStepFunction, AsyncWorkflowFunction
from sqla_durable.definitions.inspection import SessionKind
from sqla_durable.definitions.registry import Registry, StepDefinition, StepOptions, WorkflowDefinition, WorkflowOptions
from sqla_durable.errors import ArgumentError, DefinitionError, UsageError


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


class Depends:
    """What a web framework injects by."""


SessionDep = Annotated[Session, Depends()]
AsyncSessionDep = TypeAliasType("AsyncSessionDep", Annotated["AsyncSession", Depends()])
DbSession = NewType("DbSession", Session)
S = TypeVar("S", bound=Session)


def annotated(session: SessionDep, a: int) -> None: ...
async def aliased(session: AsyncSessionDep) -> None: ...
def quoted_dependency(db: "SessionDep") -> None: ...  # noqa: UP037
def renamed(session: DbSession) -> None: ...
def generic(session: S) -> None: ...  # pyright: ignore[reportInvalidTypeVarUse]
def sync_step(session: Session, a: int) -> None: ...
async def async_step(session: AsyncSession, a: int) -> None: ...
def own_session(session: MySession) -> None: ...
def postponed(session: "Session") -> None: ...  # noqa: UP037
def plain(a: int) -> None: ...
def second(a: int, session: Session) -> None: ...
def dependency_second(a: int, session: AsyncSession = Depends()) -> None: ...  # type: ignore[assignment]  # noqa: B008
def optional_second(a: int, session: Session | None = None) -> None: ...
def both(session: Session, other: AsyncSession) -> None: ...
def unannotated(session) -> None: ...  # type: ignore[no-untyped-def]  # pyright: ignore
def unresolved(session: "SessionDependency") -> None: ...  # type: ignore[name-defined]  # noqa: F821, UP037
def registry_of_sessions(session: scoped_session[Session]) -> None: ...
def async_registry(session: async_scoped_session[AsyncSession]) -> None: ...
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
        (annotated, SessionKind.SYNC),
        (aliased, SessionKind.ASYNC),
        (quoted_dependency, SessionKind.SYNC),
        (renamed, SessionKind.SYNC),
        (generic, SessionKind.SYNC),
        (functools.partial(keyword_only, session=Session()), SessionKind.NONE),
        (functools.partial(sync_step, Session()), SessionKind.NONE),
        (plain, SessionKind.NONE),
        (Client().book, SessionKind.SYNC),
        (Client().fetch, SessionKind.NONE),
        (len, SessionKind.NONE),
    ],
)
def test_first_parameter_says_which_session_a_step_takes(fn: Callable[..., Any], kind: SessionKind) -> None:
    assert StepDefinition.of(fn, StepOptions("given")).session is kind


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
        with pytest.raises(DefinitionError, match="has no name to record it by: name the step with name="):
            StepDefinition.of(fn)
    definition = StepDefinition.of(fn, StepOptions(name or "given"))
    assert definition.name == (name or "given")
    assert definition.is_async is is_async


def test_result_annotation_is_found_through_partials_methods_and_wrappers() -> None:
    def base(a: int) -> int:
        return a

    @functools.wraps(base)
    def wrapped(*args: Any) -> Any:
        return base(*args)

    for fn in (wrapped, functools.partial(base, 1), Client().fetch, Client()):
        assert StepDefinition.of(fn, StepOptions("x")).result.decode("7") == 7
        assert StepDefinition.of(fn, StepOptions("x")).result.annotation is int


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


@pytest.mark.parametrize("name", ["", " ", "a\0", "/" * 400])
def test_names_that_cannot_be_recorded_are_refused(name: str) -> None:
    with pytest.raises(DefinitionError):
        StepDefinition.of(plain, StepOptions(name))
    with pytest.raises(DefinitionError):
        WorkflowDefinition.of(lambda: None, WorkflowOptions(name))


def test_blank_queue_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"has the blank queue ' ': name a queue"):
        WorkflowDefinition.of(lambda: None, WorkflowOptions("x", queue=" "))


def test_two_functions_of_one_name_are_refused_and_named() -> None:
    durable = Durable()

    def first() -> None: ...
    def second() -> None: ...

    durable.step(first, name="same")
    durable.step(first, name="same")
    with pytest.raises(
        DefinitionError, match=r"two functions are named step 'same': .*first and .*second.*rename one of them with"
    ):
        durable.step(second, name="same")
    durable.workflow(first, name="same")
    with pytest.raises(DefinitionError, match="two functions are named workflow 'same'"):
        durable.workflow(second, name="same")


def test_unknown_workflow_is_refused_with_what_there_is() -> None:
    registry = Registry()
    with pytest.raises(UsageError, match=r"registered are \[\]"):
        registry.workflow("x")
    registry.add_workflow(WorkflowDefinition.of(lambda: None, WorkflowOptions("checkout")))
    with pytest.raises(UsageError, match="did you mean 'checkout'"):
        registry.workflow("chekout")
    assert [each.name for each in registry] == ["checkout"]


def test_arguments_are_bound_by_name() -> None:
    def fn(a: int, /, b: int, *, c: int = 3) -> None: ...

    definition = WorkflowDefinition.of(fn)
    assert definition.encode((1, 2), {}) == '{"a":1,"b":2}'
    assert definition.encode((1,), {"c": 4, "b": 2}) == '{"a":1,"b":2,"c":4}'
    with pytest.raises(ArgumentError, match=r"workflow 'fn' takes \(a: .*, /, b: .*missing a required"):
        definition.encode((1,), {})


def test_arguments_are_bound_as_python_binds_them() -> None:
    """Calls that fit are bound without `inspect.Signature`, which must make the same of each of them."""

    def plain(a: int, b: int = 2) -> None: ...
    def mixed(a: int, /, b: int, c: int = 3, *, d: int, e: int = 5) -> None: ...
    def nothing() -> None: ...
    def positional(a: int, b: int = 2, /) -> None: ...
    def keywords(*, a: int, b: int = 2) -> None: ...

    keys = [names for count in range(7) for names in combinations("abcdez", count)]
    for fn in (plain, mixed, nothing, positional, keywords):
        definition = WorkflowDefinition.of(fn)
        for args, names in ((tuple(range(count)), names) for count in range(5) for names in keys):
            kwargs = {name: 10 + number for number, name in enumerate(names)}
            try:
                expected = dict(definition.signature.bind(*args, **kwargs).arguments)
            except TypeError as error:
                with pytest.raises(ArgumentError, match=re.escape(f"{definition.signature}: {error}.")):
                    definition.encode(args, kwargs)
            else:
                assert json.loads(definition.encode(args, kwargs)) == expected


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


@pytest.mark.parametrize("key", ["", " ", "a\0", "\ud800", "#" * 400])
def test_step_key_that_is_no_name_is_refused(key: str) -> None:
    step = Durable().step(plain)
    with pytest.raises(DefinitionError, match=r"the step_key of step 'plain'"):
        step.options(step_key=key)


from dataclasses import dataclass  # noqa: E402  (below its use, which is what the test above is about)


@dataclass
class Later:
    """Defined after the function that names it."""

    x: int


def test_session_that_might_be_none_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"'session' of step 'optional' is annotated .*Session.*None"):
        Durable().step(optional)


def test_nested_workflow_may_refer_to_itself() -> None:
    durable = Durable()

    @durable.workflow
    def countdown(number: int) -> int:
        if number:
            countdown.continue_as_new(number - 1)
        return number

    assert countdown(0) == 0


@pytest.mark.parametrize(
    ("fn", "what"),
    [
        (second, r"step 'second' takes its Session as session: .*: a session is injected as the first parameter only"),
        (dependency_second, "takes its AsyncSession as .*write def dependency_second"),
        (optional_second, "the parameter 'session' of step .* is annotated .*always injected, as the first"),
        (keyword_only, r"takes its Session as .*write def keyword_only\(session: Session, ...\)"),
        (variadic, "takes its Session as .*first parameter only"),
        (both, "takes its AsyncSession as other"),
        (unannotated, "takes 'session' without an annotation, .*write session: Session"),  # pyright: ignore
        (unresolved, "whose annotation .*SessionDependency.* cannot be resolved.*import its names at run time"),
        (registry_of_sessions, "a session is injected, not a registry of sessions"),
        (async_registry, "a session is injected, not a registry of sessions"),
        (lambda session: None, "takes 'session' without an annotation"),  # pyright: ignore
        (lambda db: None, "takes 'db' without an annotation.*write db: Session"),  # pyright: ignore
    ],
)
def test_session_that_would_not_be_injected_is_refused_where_it_is_written(fn: Callable[..., Any], what: str) -> None:
    with pytest.raises(DefinitionError, match=what):
        Durable().step(fn, name=None if fn.__name__ != "<lambda>" else "lambda")
    with pytest.raises(DefinitionError, match="takes a session: a workflow lives longer than any transaction"):
        Durable().workflow(fn, name="workflow")


@pytest.mark.parametrize("name", ["step", "workflow"])
def test_decorator_of_the_class_is_refused(name: str) -> None:
    decorator: Any = getattr(Durable, name)
    with pytest.raises(DefinitionError, match=rf"write durable = Durable\(\), and @durable.{name}"):
        decorator(load)


async def fetch(url: str) -> int:
    return len(url)


def load(url: str) -> int:
    return len(url)


def asyncify(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    async def awaited(*args: Any) -> Any:
        return fn(*args)

    return awaited


def blocking(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def called(*args: Any) -> Any:
        return asyncio.run(fn(*args))

    return called


class Remote:
    """A callable whose call is a coroutine."""

    async def __call__(self, url: str) -> int:
        return len(url)


@pytest.mark.parametrize("fn", [asyncify(load), functools.partial(asyncify(load)), Remote(), asyncify(blocking(load))])
def test_what_is_called_decides_whether_it_is_async(fn: Callable[..., Any]) -> None:
    durable = Durable()
    step, workflow = durable.step(fn, name="load"), durable.workflow(fn, name="load")
    assert isinstance(step, AsyncStepFunction)
    assert isinstance(workflow, AsyncWorkflowFunction)
    assert step.definition.result.decode("7") == 7


@pytest.mark.parametrize("fn", [blocking(fetch), functools.partial(blocking(fetch)), functools.cache(fetch)])
def test_def_that_wraps_an_async_def_is_refused(fn: Callable[..., Any]) -> None:
    durable = Durable()
    decorators: list[Callable[..., object]] = [durable.step, durable.workflow]
    for decorate in decorators:
        with pytest.raises(DefinitionError, match=r"wraps an async def, .*write the wrapper as an `async def`"):
            decorate(fn, name="fetch")
    with pytest.raises(DefinitionError, match="is a def that wraps an async def"):
        _: object = run_step("fetch", fn)


def _charge(self: Any, cents: int) -> int:
    return cents


def _charge_of_class(cls: Any, cents: int) -> int:
    return cents


def _static(cents: int) -> int:
    return cents


# behaviour: R8
@pytest.mark.parametrize("kind", ["step", "workflow"])
def test_methods_are_refused_with_what_to_write(kind: str) -> None:
    durable = Durable()
    decorate: Callable[..., Any] = getattr(durable, kind)
    bound = f"make the {kind} of the bound method instead, durable.{kind}"
    for fn, what in [
        (_charge, f"is a method and takes 'self'.*{bound}"),
        (_charge_of_class, f"is a method and takes 'cls'.*{bound}"),
        (classmethod(_charge_of_class), f"decorated above @classmethod.*{bound}"),
        (staticmethod(_static), f"decorated above @staticmethod: write @staticmethod above @durable.{kind}"),
    ]:
        with pytest.raises(DefinitionError, match=what):
            decorate(fn, name="charge")


def test_methods_are_decorated_in_these_ways() -> None:
    durable = Durable()

    class Shop:
        rate = 2

        @staticmethod
        @durable.step
        def static(cents: int) -> int:
            return cents

        @staticmethod
        @durable.workflow
        def flow(cents: int) -> int:
            return cents

        @classmethod
        def of_class(cls, cents: int) -> int:
            return cents * cls.rate

        def of_instance(self, cents: int) -> int:
            return cents * self.rate

    assert (Shop.static(1), Shop().static(1), Shop.flow(1)) == (1, 1, 1)
    assert durable.step(Shop.of_class)(1) == 2
    assert durable.workflow(Shop().of_instance)(1) == 2


def ranged() -> range:
    return range(3)


def takes_range(numbers: range) -> None: ...


def test_annotation_that_cannot_be_stored_is_refused_where_it_is_written() -> None:
    durable = Durable()
    for decorate in (durable.step, durable.workflow):
        with pytest.raises(DefinitionError, match=r"'ranged' is annotated .*range.*cannot be stored as JSON"):
            decorate(ranged)
    with pytest.raises(DefinitionError, match=r"argument 'numbers' of workflow 'takes_range' is annotated .*range"):
        durable.workflow(takes_range)
    durable.step(takes_range)  # whose arguments are not stored


def test_annotation_may_name_a_class_defined_further_down_where_it_is_decorated() -> None:
    durable = Durable()
    refers: Any = _refers  # pyright: ignore[reportUnknownVariableType]
    decorators: tuple[Any, Any] = durable.step, durable.workflow
    step, workflow = (each(refers) for each in decorators)
    globals()["Referred"] = Later
    try:
        assert step.definition.result.decode('{"x": 1}') == Later(1)
        assert workflow.definition.result.decode('{"x": 1}') == Later(1)
    finally:
        del globals()["Referred"]


def _refers() -> "Referred":  # type: ignore[name-defined]  # noqa: F821, UP037  # pyright: ignore
    raise NotImplementedError
