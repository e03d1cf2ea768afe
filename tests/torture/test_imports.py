"""The bench and the torture import only what is public, as a program of a user could."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

import sqla_durable

TOOLS = Path(sqla_durable.__file__).parent / "tools"
PUBLIC = {"sqla_durable", "sqla_durable.asyncio", "sqla_durable.models", "sqla_durable.errors", "sqla_durable.embedded"}


@pytest.mark.parametrize(
    "module", sorted([*TOOLS.glob("bench/*.py"), *TOOLS.glob("torture/*.py")]), ids=lambda each: each.stem
)
def test_tool_imports_only_what_is_public(module: Path) -> None:
    own = f"sqla_durable.tools.{module.parent.name}"
    for node in ast.walk(ast.parse(module.read_text())):
        assert not isinstance(node, ast.Import) or not any("sqla_durable" in each.name for each in node.names)
        if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("sqla_durable"):
            continue
        if str(node.module).startswith(own):
            continue
        assert node.module in PUBLIC, f"{module}: {node.module}"
        public = import_module(str(node.module))
        names = {each.name for each in node.names}
        assert names <= set(getattr(public, "__all__", dir(public))) | {"embedded"}, names
