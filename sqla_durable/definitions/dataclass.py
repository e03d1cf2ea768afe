"""`dataclass` for the values of the engine: it makes a class, and each value, in a third of the time of Python's.

Python's compiles six methods for each frozen class, which for all classes of this package takes a sixth of the time in
which SQLAlchemy is imported. This one compiles only `__init__`, which assigns plainly. Type checkers see Python's, and
refuse an assignment to a frozen value; nothing refuses it at run time. So the classes that users create or get are made
with Python's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(*, frozen: bool = False, slots: bool = False, kw_only: bool = False) -> Callable[[type], type]:
        """Make a class a dataclass, whose values are equal if their fields are."""

        def make(cls: type) -> type:
            made = dataclasses.dataclass(slots=slots, kw_only=kw_only, eq=False, repr=False)(cls)
            fields = dataclasses.fields(made)
            names, compared = [each.name for each in fields], [each.name for each in fields if each.compare]
            values = attrgetter(*compared) if compared else lambda _: ()

            def is_equal(self: Any, other: object) -> bool:
                return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

            def hashed(self: Any) -> int:
                return hash(values(self))

            def shown(self: Any) -> str:
                parts = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
                return f"{self.__class__.__qualname__}({parts})"

            made.__eq__, made.__hash__ = is_equal, hashed if frozen else None
            if "__repr__" not in vars(cls):
                made.__repr__ = shown
            return made

        return make
