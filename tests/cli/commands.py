"""Commands of the command line, called in this process."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from sqla_durable.tools.cli.application import main


class Called(NamedTuple):
    """What a command has printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


class Commands:
    """Calls commands on one database."""

    def __init__(self, url: str, patch: pytest.MonkeyPatch, printed: pytest.CaptureFixture[str]) -> None:
        self._url = url
        self._patch = patch
        self._printed = printed

    def __call__(self, *arguments: object, code: int = 0) -> Called:
        """Call a command as a shell does, and require its exit code."""
        self._patch.setattr(sys, "argv", ["sqla-durable", *map(str, arguments), "--url", self._url])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = self._printed.readouterr()
        called = Called(int(ended.value.code or 0), printed.out, printed.err)
        assert called.code == code, called
        return called
