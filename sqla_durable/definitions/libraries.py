"""cronsim, pydantic, tenacity and zoneinfo, each imported when one of its names is first used.

They are not imported with this package: pydantic and tenacity take a fifth of the time of SQLAlchemy, and a program
that only reads the tables or shows a `--help` needs none. A name is looked up once, and is an attribute from then on.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__all__ = ["cronsim", "pydantic", "pydantic_core", "pydantic_fields", "tenacity", "zoneinfo"]


class _Library(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # `inspect` and others look for these in every module
            raise AttributeError(name)
        value = getattr(import_module(self.__name__), name)
        setattr(self, name, value)
        return value


if TYPE_CHECKING:
    import zoneinfo

    import cronsim
    import pydantic
    import pydantic.fields as pydantic_fields
    import pydantic_core
    import tenacity
else:
    cronsim = _Library("cronsim")
    pydantic = _Library("pydantic")
    pydantic_core = _Library("pydantic_core")
    pydantic_fields = _Library("pydantic.fields")
    tenacity = _Library("tenacity")
    zoneinfo = _Library("zoneinfo")
