"""Which classes a row may name, and what looking for them executes: nothing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from sqla_durable import Durable
from sqla_durable.definitions.error_classes import DEFAULT, KnownErrors, entry_module, find_class, name_of_class
from sqla_durable.definitions.failure import Failure
from sqla_durable.errors import DefinitionError, StepFailedError

ACTED: list[str] = []


class OutOfStock(Exception):
    """An error of this application."""


class Acting(Exception):
    """Every hook that construction, copying or unpickling could call leaves a trace."""

    def __new__(cls, *args: Any, code: int = 0) -> Acting:
        ACTED.append("new")
        return super().__new__(cls, *args)

    def __init__(self, *args: Any, code: int = 0) -> None:
        ACTED.append("init")
        self.code = code

    def __setattr__(self, name: str, value: object) -> None:
        ACTED.append(f"set {name}")
        super().__setattr__(name, value)

    def __setstate__(self, state: Any) -> None:
        ACTED.append("setstate")

    def __reduce__(self) -> Any:
        ACTED.append("reduce")
        return super().__reduce__()

    def harmless(self) -> str:
        return "harmless"


class Lying(type):
    """A metaclass that answers with code, and wrongly."""

    def __getattribute__(cls, name: str) -> Any:
        ACTED.append(f"get {name}")
        return super().__getattribute__(name)

    def __instancecheck__(cls, instance: object) -> bool:
        ACTED.append("instancecheck")
        return True

    def __subclasscheck__(cls, subclass: type) -> bool:
        ACTED.append("subclasscheck")
        return True

    def mro(cls) -> list[type]:
        return super().mro()


class NotAnError(metaclass=Lying):
    pass


class Proxy:
    """A lazy object that says it is a class."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ACTED.append("class")
        return type


PROXY = Proxy()


@pytest.fixture(autouse=True)
def acted() -> list[str]:
    ACTED.clear()
    return ACTED


@pytest.fixture
def framework(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A library that the application has imported somewhere, and not where its workflows are."""
    module = ModuleType("webframework.exceptions")
    exec(
        "class HTTPException(Exception):\n"
        "    def __init__(self, status_code, headers=None):\n"
        "        self.status_code, self.headers = status_code, headers\n",
        vars(module),
    )
    monkeypatch.setitem(sys.modules, "webframework.exceptions", module)
    return module


@pytest.fixture
def known() -> KnownErrors:
    """What an application knows whose workflows are in this module."""
    durable = Durable()
    durable.workflow(lambda: None, name="ship")
    return durable.options.errors


REDIRECT = Failure(
    type="webframework.exceptions:HTTPException",
    message="",
    args=[302],
    state={"status_code": 302, "headers": {"location": "https://evil.example", "set-cookie": "session=stolen"}},
)


def test_class_of_the_applications_own_packages_is_found(known: KnownErrors) -> None:
    name = name_of_class(OutOfStock)
    assert known.outside(name) is known.inside(name) is OutOfStock
    assert DEFAULT.outside(name) is None


@pytest.mark.usefixtures("framework")
def test_library_class_that_nobody_named_is_no_class_for_a_row(known: KnownErrors) -> None:
    assert REDIRECT.rebuild(known.outside) is None
    assert REDIRECT.rebuild(known.inside) is None


def test_library_class_that_a_module_of_steps_imports_comes_back_in_the_workflow_only(
    framework: ModuleType, known: KnownErrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "webframework", framework, raising=False)
    assert REDIRECT.rebuild(known.outside) is None
    assert type(REDIRECT.rebuild(known.inside)) is framework.HTTPException
    # The name of the module that imported it is not that of its own.
    monkeypatch.setattr(sys.modules[__name__], "HTTPException", framework.HTTPException, raising=False)
    assert known.inside(f"{__name__}:HTTPException") is None


def test_named_class_comes_back_everywhere_with_its_subclasses(framework: ModuleType) -> None:
    for named in (framework.HTTPException, Exception):
        known = Durable(errors=[named]).options.errors
        assert known.outside(REDIRECT.type) is known.inside(REDIRECT.type) is framework.HTTPException
    assert Durable(errors=[OutOfStock]).options.errors.outside(REDIRECT.type) is None


def test_named_class_may_be_local() -> None:
    class Local(Exception):
        pass

    assert Durable(errors=[Local]).options.errors.outside(name_of_class(Local)) is Local


def test_strict_knows_no_package() -> None:
    durable = Durable(errors=[StepFailedError], strict_errors=True)
    durable.workflow(lambda: None, name="ship")
    for find in (durable.options.errors.inside, durable.options.errors.outside):
        assert find(name_of_class(OutOfStock)) is None
        assert find("builtins:ValueError") is ValueError
        assert find("sqla_durable.errors:StepFailedError") is StepFailedError


@pytest.mark.parametrize("named", [[ValueError("x")], [KeyboardInterrupt], ["ValueError"]])
def test_what_is_no_exception_class_cannot_be_named(named: Any) -> None:
    with pytest.raises(DefinitionError, match="is not an exception class"):
        Durable(errors=named)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:print",
        "builtins:object",
        "builtins:KeyboardInterrupt",
        "builtins:SystemExit",
        "builtins:GeneratorExit",
        "builtins:StopIteration",
        "builtins:StopAsyncIteration",
        "builtins:__loader__",
        "asyncio.exceptions:CancelledError",
        "concurrent.futures:ProcessPoolExecutor",
        "concurrent.futures.process:ProcessPoolExecutor",
        "pydantic:BaseSettings",
        "sqla_durable.unwinding:Suspended",
        "sqla_durable.operations.step:_Again",
        f"{__name__}:NotAnError",
        f"{__name__}:PROXY",
        f"{__name__}:OutOfStock.__init__",
        f"{__name__}:OutOfStock.__class__",
        f"{__name__}:OutOfStock.__mro__",
        "no.such.module:Error",
        "",
        ":",
        "a" * 100_000,
        "builtins:" + "ValueError." * 10_000,
    ],
)
def test_row_makes_no_exception_of_what_is_none(name: str, known: KnownErrors) -> None:
    for find in (known.inside, known.outside):
        assert Failure(type=name, message="x", args=["true"], state={}).rebuild(find) is None
    assert ACTED == []


def test_row_never_asks_a_module(known: KnownErrors, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(name: str) -> Any:
        ACTED.append(name)
        return OutOfStock

    module = ModuleType("tests.lazy")
    module.__getattr__ = answer  # type: ignore[method-assign]

    class Loading(ModuleType):
        def __getattribute__(self, name: str) -> Any:
            ACTED.append(name)
            return super().__getattribute__(name)

    class NoModule:
        def __getattr__(self, name: str) -> Any:
            ACTED.append(name)
            return OutOfStock

    for each in (module, Loading("tests.lazy"), NoModule(), None):
        monkeypatch.setitem(sys.modules, "tests.lazy", each)
        assert known.inside("tests.lazy:OutOfStock") is None
    assert ACTED == []


def test_row_never_imports(known: KnownErrors) -> None:
    sys.modules.pop("wave", None)
    assert known.inside("wave:Error") is None
    assert known.inside("tests.docs.test_queries:Error") is None
    assert "wave" not in sys.modules


def test_rebuilding_runs_no_code_of_the_class(known: KnownErrors) -> None:
    forged = Failure(
        type=name_of_class(Acting),
        message="",
        args=["x"],
        state={"code": 7, "harmless": "attack", "__class__": "attack", "other": 1},
        notes=("a note",),
    )
    error = forged.rebuild(known.outside)
    assert ACTED == []
    assert isinstance(error, Acting)
    assert vars(error) == {"code": 7, "__notes__": ["a note"]}
    assert error.harmless() == "harmless"


@pytest.mark.parametrize(
    ("args", "state"),
    [
        ("text", {}),
        ([], []),
        ([{"$": ["enum", ["os:system", "x"]]}], {}),
        ([{"$": ["enum", [f"{__name__}:OutOfStock", "x"]]}], {}),
        ([{"$": ["uuid", 7]}], {}),
        ([{"$": ["nothing", 7]}], {}),
        ([{"$": ["decimal", [1]]}], {}),
        ([{"$": ["tuple", 7]}], {}),
    ],
)
def test_forged_contents_make_no_exception(args: Any, state: Any, known: KnownErrors) -> None:
    stored = {"type": "builtins:ValueError", "args": args, "state": state}
    assert Failure.from_json(stored).rebuild(known.inside) is None


def tagged_error(argument: Any) -> Any:
    described: dict[str, Any] = {"type": "builtins:ValueError", "args": [argument], "state": {}}
    return {"$": ["error", described]}


def test_deep_and_wide_rows_are_read(known: KnownErrors) -> None:
    deep = tagged_error("x")
    for _ in range(5_000):
        deep = tagged_error(deep)
    error = Failure(type="builtins:ValueError", message="", args=[deep], state={}).rebuild(known.inside)
    assert error is not None
    assert isinstance(error.args[0], StepFailedError)  # errors in errors in errors are none of ours
    state: dict[str, Any] = {"errors": [tagged_error("x")] * 10_000, "count": 10_000, "indices": [], "workflow_ids": []}
    wide = Failure(type="sqla_durable.errors:ChildrenFailedError", message="", args=["many"], state=state)
    assert len(vars(wide.rebuild(known.inside))["errors"]) == 10_000
    assert Failure.from_text("[" * 100_000).type == "unknown"


@pytest.mark.parametrize("stored", [None, 7, "x", [], {}, {"type": 7}, {"type": None, "notes": 7, "traceback": []}])
def test_row_of_any_form_is_a_failure(stored: Any) -> None:
    failure = Failure.from_json(stored)
    assert failure.type == "unknown"
    assert failure.rebuild() is None


# behaviour: V4
def test_class_of_the_entry_file_has_one_name_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    main = ModuleType("__main__")
    main.__file__ = "/srv/shop_entry.py"
    exec("class OutOfStock(Exception): pass\ndef ship(): pass", vars(main))
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert entry_module() == "shop_entry"
    name = name_of_class(main.OutOfStock)
    assert name == "shop_entry:OutOfStock"
    at_entry, imported = KnownErrors(), KnownErrors()
    at_entry.add_module("__main__")
    assert at_entry.outside(name) is main.OutOfStock
    other = ModuleType("shop_entry")
    exec("class OutOfStock(Exception): pass", vars(other))
    monkeypatch.setitem(sys.modules, "shop_entry", other)
    imported.add_module("shop_entry")
    assert imported.outside(name) is other.OutOfStock
    assert at_entry.outside(name) is main.OutOfStock


def test_module_that_is_run_by_name_is_called_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    main = ModuleType("__main__")
    main.__spec__ = importlib.util.spec_from_loader("shop.entry", None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert entry_module() == "shop.entry"
    monkeypatch.delitem(vars(main), "__spec__")
    assert entry_module() is None


def test_namespace_package_is_no_package_of_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    top = ModuleType("vendor")
    top.__path__ = []
    monkeypatch.setitem(sys.modules, "vendor", top)
    for name in ("vendor.shop", "vendor.library"):
        module = ModuleType(name)
        exec("class Failed(Exception): pass", vars(module))
        monkeypatch.setitem(sys.modules, name, module)
    known = KnownErrors()
    known.add_module("vendor.shop.workflows")
    assert known.outside("vendor.shop:Failed") is not None
    assert known.outside("vendor.library:Failed") is None


def test_nested_class_is_found() -> None:
    assert find_class("decimal", "InvalidOperation") is not None
    assert find_class(__name__, "Outer.Inner") is Outer.Inner


class Outer:
    class Inner(Exception):
        pass


@pytest.mark.parametrize("name", ["pydantic_core._pydantic_core:ValidationError", "tenacity:RetryError"])
def test_common_class_is_found_by_a_process_that_has_not_used_its_library(name: str) -> None:
    module = name.partition(".")[0].partition(":")[0]
    script = f"""
import sys
from sqla_durable.definitions.error_classes import DEFAULT
assert {module!r} not in sys.modules
assert DEFAULT.outside({name!r}).__qualname__ == {name!r}.partition(":")[2]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
