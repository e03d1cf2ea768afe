"""The log: a row or an exception writes into one line of it, and not much."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

import sqla_durable
from sqla_durable.definitions.log import LONGEST, Log, one_line

FORGED = "ship\n2026-01-01 INFO    worker: all is well\x1b[2K\x1b[1A\r\u2028\u202e\x85"
log = Log("sqla_durable.test")


@pytest.mark.parametrize("value", [FORGED, ValueError(FORGED), [FORGED]], ids=["text", "exception", "list"])
def test_text_with_newlines_and_escape_sequences_is_one_line(value: object, caplog: pytest.LogCaptureFixture) -> None:
    log.warning("workflow %s %s failed", value, UUID(int=7))
    (record,) = caplog.records
    assert record.getMessage().isprintable()
    assert "\\n2026-01-01" in record.getMessage()
    assert record.getMessage().endswith("00000000-0000-0000-0000-000000000007 failed")
    assert record.funcName == "test_text_with_newlines_and_escape_sequences_is_one_line"


def test_long_text_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    log.error("workflow %s, %d, %.1f s", "x" * 3_000_000, 7, 1.5)
    (record,) = caplog.records
    assert record.getMessage().endswith("… (3,000,000 characters), 7, 1.5 s")
    assert len(record.getMessage()) < LONGEST + 100


def test_readable_text_is_as_it_was() -> None:
    assert one_line("Übergröße 漢字 🎁 \\n") == "Übergröße 漢字 🎁 \\n"


def test_exception_is_logged_with_its_traceback_and_without_values(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    pin = "\nforged".join(["4" * 4, "1" * 4])
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT CAST(:pin AS text)::int"), {"pin": pin})
    except DBAPIError:
        log.exception("it broke")
    (record,) = caplog.records
    assert "it broke\nTraceback (most recent call last):" in record.getMessage()
    assert "invalid input syntax for type integer" in record.getMessage()
    assert "4" * 4 not in record.getMessage()
    assert record.exc_info is None


def test_what_is_not_enabled_costs_no_formatting(caplog: pytest.LogCaptureFixture) -> None:
    class Untouchable:
        def __str__(self) -> str:
            raise AssertionError

    caplog.set_level(logging.INFO, "sqla_durable.test")
    log.debug("%s", Untouchable())
    assert not caplog.records


def test_every_logger_of_the_package_is_one_of_these() -> None:
    root = Path(sqla_durable.__file__).parent
    for path in root.rglob("*.py"):
        if path.parent.name in ("bench", "torture") or path.name == "log.py":
            continue
        made = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr in ("getLogger", "warn") and path.parent.name != "cli"
        ]
        assert not made, f"{path} makes a logger of its own"
