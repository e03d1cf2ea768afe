"""The words of docs/glossary.md: no retired word in names, docstrings, comments and messages, nor on the pages."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sqla_durable"
TESTS = ROOT / "tests"
GLOSSARY = ROOT / "docs" / "glossary.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Words:
    """Retired words, as the glossary lists them.

    Attributes:
        everywhere: in names and in text.
        in_names: in names only.
    """

    everywhere: frozenset[str]
    in_names: frozenset[str]


@cache
def retired() -> Words:
    _, everywhere, names = re.split(r"^\| retired \|.*\n\| --- \|.*\n", GLOSSARY.read_text(), flags=re.M)
    return Words(_first_column(everywhere), _first_column(everywhere) | _first_column(names))


def _first_column(text: str) -> frozenset[str]:
    rows = re.findall(r"^\| ([^|]+) \|", text.split("\n\n")[0], re.M)
    return frozenset(word.strip() for row in rows for word in row.split(","))


@cache
def spoken(name: str) -> str:
    """Return the words of a name: `take_over` and `TakeOver` are "take over"."""
    return " ".join(re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)).lower()


@cache
def words_in(text: str, words: frozenset[str]) -> list[str]:
    text = text.lower()
    if _beginnings(words).isdisjoint(re.findall(r"[\w-]+", text)):  # nearly always, and a fifth of the time
        return []
    return re.findall(_pattern(words), " ".join(text.split()))


@cache
def _beginnings(words: frozenset[str]) -> frozenset[str]:
    return frozenset(re.findall(r"[\w-]+", each)[0] for each in words)


@cache
def _pattern(words: frozenset[str]) -> re.Pattern[str]:
    return re.compile(
        r"(?<![\w-])(" + "|".join(re.escape(each) for each in sorted(words, key=len, reverse=True)) + r")(?![\w-])"
    )


def retired_in(module: Path) -> Iterator[str]:
    """Yield a line for each retired word in a module."""
    source = module.read_text()
    nodes = list(ast.walk(ast.parse(source)))
    for line, name in {*_names(nodes), (0, module.stem)}:
        for word in words_in(spoken(name), retired().in_names):
            yield f"{_place(module, line)}: the name {name!r} has {word!r}"
    for line, text in [*_texts(nodes), *_comments(source)]:
        for word in words_in(_without_code(text), retired().everywhere):
            yield f"{_place(module, line)}: the text has {word!r}"
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = (ast.get_docstring(node) or "").split(" ")[0].strip(".,:")
            if first in {"Give", "Gives", "Tell", "Tells"}:
                yield f"{_place(module, getattr(node, 'lineno', 1))}: the docstring begins with {first!r}"


def _names(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yield what the module defines, assigns, or names an argument or an attribute; what it only uses is elsewhere."""
    for node in nodes:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr
            case ast.alias(asname=str(name)):
                yield node.lineno, name
            case _:
                pass


def _texts(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yield all strings: docstrings, messages and SQL."""
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def _comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def _without_code(text: str) -> str:
    """Return a text without code blocks and what stands in backticks, whose names are looked at where they are made."""
    return re.sub(r"```.*?```|`[^`\n]*`", " ", text, flags=re.S)


def _place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


STORIES = {TESTS / "stories.py", TESTS / "test_stories.py"}
"""The stories of docs/architecture.md are called by this name."""


@pytest.mark.parametrize("folder", [PACKAGE, TESTS], ids=lambda folder: folder.name)
def test_no_retired_word_in_the_code(folder: Path) -> None:
    modules = set(folder.rglob("*.py")) - {Path(__file__)} - STORIES
    found = [line for each in sorted(modules) for line in retired_in(each)]
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_retired_word_in_the_docs(page: Path) -> None:
    text = page.read_text()
    if page == GLOSSARY:
        text = text.split("## Retired words")[0]
    lines = _without_code(text).splitlines()
    found = [f"{word!r} in: {line}" for line in lines for word in words_in(line, retired().everywhere)]
    assert found == []


def test_words_of_the_glossary_are_sorted_and_none_of_them_is_retired() -> None:
    words = re.findall(r"^\| ([^|]+) \|", GLOSSARY.read_text().split("## Retired words")[0], re.M)[2:]
    assert words == sorted(words, key=str.lower)
    assert not set(words) & retired().everywhere


@pytest.mark.parametrize(
    ("name", "word"),
    [("take_over", "take over"), ("TakeOver", "take over"), ("_PARKED", "parked"), ("to_look_at", "look")],
)
def test_words_of_names_are_found_in_any_spelling(name: str, word: str) -> None:
    assert words_in(spoken(name), retired().in_names) == [word]


@pytest.mark.parametrize("name", ["overtake", "sparkle", "look_up", "retold"])
def test_longer_words_are_no_retired_ones(name: str) -> None:
    assert words_in(spoken(name), retired().in_names) in ([], ["look"] if name.startswith("look") else [])
