"""docs/architecture.md names modules and functions that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import sqla_durable

ROOT = Path(sqla_durable.__file__).parent
PAGE = ROOT.parent / "docs" / "architecture.md"
# A path with a slash, from the package's folder or the repository's; a name in a module of a folder of the package.
_PATH = re.compile(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)`")
_NAME = re.compile(r"`([a-z_]+(?:\.\w+)+)`")


@cache
def _names_in(module: Path) -> frozenset[str]:
    """Return what a module defines, methods as `Class.method`."""
    found: set[str] = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = (each for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)))
            found |= {f"{node.name}.{each.name}" for each in inner}
    return frozenset(found)


def _exists(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ROOT.joinpath(*parts[:length]).with_suffix(".py")
        if module.exists():
            return ".".join(parts[length:]) in _names_in(module)
    return False


def test_every_path_on_the_page_exists() -> None:
    paths = set(_PATH.findall(PAGE.read_text()))
    assert len(paths) > 10
    assert {each for each in paths if not any((at / each).exists() for at in (ROOT, ROOT.parent))} == set()


def test_every_function_in_the_stories_exists() -> None:
    folders = {each.name for each in ROOT.iterdir()} | {each.stem for each in ROOT.iterdir()}
    stories = PAGE.read_text().split("## Six stories")[1]
    names = {
        each for each in _NAME.findall(stories) if each.split(".")[0] in folders - {"asyncio"} or "workflows" in each
    }
    assert len(names) > 50
    assert {each for each in names if not _exists(each)} == set()
