"""The layers of the package, read from its source: imports point down, and some things live on some floors only."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import sqla_durable

ROOT = Path(sqla_durable.__file__).parent

# From the top down. What stands on one line is a floor: none of it imports another of the same floor.
FLOORS = (
    {"__init__", "__main__"},
    {"tools", "testing"},
    {"embedded"},
    {"telemetry"},
    {"asyncio"},
    {"execution"},
    {"manage"},
    {"api"},
    {"runtime"},
    {"operations"},
    {"store", "migrations"},
    {"models", "definitions"},
    {"errors"},
    {"unwinding"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
WRITES_SQL = {"store"}
KNOWS_ASYNCIO = {"api", "execution", "runtime", "tools"}
"""With `operations.shielding`, which waits for what must not be left in the middle."""
LONGEST = 500
MODULES = sorted(ROOT.rglob("*.py"))
SOURCES = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in MODULES}


def _parts(module: str) -> list[str]:
    return module.split(".")


def _unit(module: str) -> str:
    """Return the part of the package that a module belongs to: `sqla_durable.store.steps` is of `store`."""
    parts = _parts(module)
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text())


def _imported(module: str) -> Iterator[str]:
    """Yield every name that a module imports, wherever in it, as far as the source shows it."""
    for node in ast.walk(_tree(module)):
        match node:
            case ast.Import():
                yield from (each.name for each in node.names)
            case ast.ImportFrom():
                assert node.level == 0, f"{module} imports relatively"
                yield from (f"{node.module}.{each.name}" for each in node.names)
            case _:
                pass


def _module_of(name: str) -> str | None:
    """Return the module of ours that a name of ours is in: itself, its package, or the module that defines it."""
    while name.startswith("sqla_durable."):
        for found in (name, f"{name}.__init__"):
            if found in SOURCES:
                return found
        name = name.rpartition(".")[0]
    return None


def _ours(module: str) -> set[str]:
    found = {_module_of(name) for name in _imported(module)}
    return {each for each in found if each is not None and each != module}


def _of(units: Iterable[str]) -> list[str]:
    """Return the modules of these parts of the package."""
    return [each for each in SOURCES if _unit(each) in units]


def test_imports_point_down() -> None:
    upward = {
        (module, each)
        for module in SOURCES
        for each in _ours(module)
        if _unit(each) != _unit(module) and FLOOR_OF[_unit(each)] <= FLOOR_OF[_unit(module)]
    }
    assert upward == set()


def test_every_module_has_its_floor() -> None:
    assert {_unit(module) for module in SOURCES} <= FLOOR_OF.keys()


def test_no_module_imports_itself_by_way_of_others() -> None:
    # A package's __init__ hands on what its modules have; within it they import each other directly.
    graph = {module: {each for each in _ours(module) if not each.endswith("__init__")} for module in SOURCES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def test_only_the_store_makes_statements() -> None:
    makers = {"select", "insert", "update", "delete", "text"}
    # The torture has tables of its own, and checks ours by SQL of its own: the store's statements are what it tests.
    # The bench measures them: it asks by SQL of its own, and does the same the naive way.
    allowed = {"models": {"text"}, "migrations": {"text"}, "tools": {"text", "select", "update"}}
    imported = {
        (module, name)
        for module in _of(FLOOR_OF.keys() - WRITES_SQL)
        for name in _imported(module)
        if name.startswith("sqlalchemy.") and name.rpartition(".")[2] in makers - allowed.get(_unit(module), set[str]())
    }
    called = {
        (module, name)
        for module in _of(FLOOR_OF.keys() - WRITES_SQL)
        for name in _taken_from_sqlalchemy(module) & makers - allowed.get(_unit(module), set[str]())
    }
    assert (imported, called) == (set(), set())


def _taken_from_sqlalchemy(module: str) -> set[str]:
    """Return the names that a module takes from SQLAlchemy by a dot: `select` of `sa.select`."""
    imports = (each for node in ast.walk(_tree(module)) if isinstance(node, ast.Import) for each in node.names)
    aliases = {each.asname or each.name for each in imports if each.name == "sqlalchemy"}
    nodes = (node for node in ast.walk(_tree(module)) if isinstance(node, ast.Attribute))
    return {each.attr for each in nodes if isinstance(each.value, ast.Name) and each.value.id in aliases}


def test_only_the_shells_know_asyncio() -> None:
    others = {*_of(FLOOR_OF.keys() - KNOWS_ASYNCIO)} - {"sqla_durable.operations.shielding"}
    assert {each for each in others for name in _imported(each) if _parts(name)[0] == "asyncio"} == set()


def _called(module: str) -> set[str]:
    """Return the names of the functions and methods that a module calls."""
    functions = (node.func for node in ast.walk(_tree(module)) if isinstance(node, ast.Call))
    return {
        each.id if isinstance(each, ast.Name) else f".{each.attr}"
        for each in functions
        if isinstance(each, (ast.Name, ast.Attribute))
    }


def test_below_the_executor_nothing_opens_a_session() -> None:
    opening = {"Session", "AsyncSession", "sessionmaker", "async_sessionmaker", "create_engine", "create_async_engine"}
    assert {each: found for each in _of({"store", "operations"}) if (found := opening & _called(each))} == {}


def test_the_store_never_ends_a_transaction() -> None:
    ending = {".commit", ".rollback", ".close", ".begin", ".begin_nested"}
    assert {each: found for each in _of({"store"}) if (found := ending & _called(each))} == {}


def test_errors_needs_the_standard_library_only() -> None:
    imported = {*_imported("sqla_durable.errors"), *_imported("sqla_durable.unwinding")}
    assert {_parts(name)[0] for name in imported} <= {"__future__", "datetime", "typing", "uuid"}


def test_module_is_short_and_says_what_lives_in_it() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in SOURCES.items()}
    assert {module: length for module, length in lengths.items() if length > LONGEST} == {}
    assert [module for module in SOURCES if not ast.get_docstring(_tree(module))] == []


def test_functions_are_short() -> None:
    """The yardstick of the style sheet: median 7 lines, 90th percentile 20, 99th 50, without the docstrings."""
    lengths = sorted(_body_length(node) for module in SOURCES for node in ast.walk(_tree(module)) if _is_function(node))
    assert lengths[len(lengths) // 2] <= 7
    assert lengths[len(lengths) * 90 // 100] <= 20
    assert lengths[len(lengths) * 99 // 100] <= 50


def test_public_definitions_have_docstrings() -> None:
    undocumented = [
        f"{module}.{name}"
        for module in SOURCES
        if "migrations.versions" not in module
        for name, node in _public(_tree(module), "")
        if not ast.get_docstring(node)
    ]
    assert undocumented == []


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition) and not child.name.startswith("_") and not _inherits_its_docstring(child):
            yield f"{prefix}{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from _public(child, f"{prefix}{child.name}.")


def _inherits_its_docstring(node: Definition) -> bool:
    decorators = {each.id for each in node.decorator_list if isinstance(each, ast.Name)}
    return bool(decorators & {"overload", "override"})


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not _inherits_its_docstring(node)


def _body_length(node: ast.AST) -> int:
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    documented = ast.get_docstring(node) is not None
    body = node.body[1:] if documented and len(node.body) > 1 else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1
