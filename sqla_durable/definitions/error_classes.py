"""Which classes a recorded error may be rebuilt as, and how they are found by the name in a row.

A row never chooses the code that is executed. Nothing is imported but modules of a fixed list, and nothing is read
from a module or class in a way that could execute its code (`__getattr__`, a metaclass, a lazy module): only their
dictionaries are read.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeAlias, TypeGuard, cast

from sqla_durable.errors import DefinitionError

Find: TypeAlias = Callable[[str], type | None]
"""Returns the class of a name, `module:qualified_name`, if it may be rebuilt."""

_OWN = "sqla_durable"
_ERRORS = f"{_OWN}.errors"
_COMMON = frozenset(
    {
        "asyncio.exceptions",
        "concurrent.futures._base",
        "decimal",
        "json.decoder",
        "pydantic_core._pydantic_core",
        "socket",
        "sqlalchemy.exc",
        "sqlalchemy.orm.exc",
        "ssl",
        "subprocess",
        "tenacity",
        _ERRORS,
    }
)
"""Modules whose exceptions any application's steps can raise."""

# Python itself uses these to end iterations.
_CONTROL = (StopIteration, StopAsyncIteration)

# The real dictionaries and names, whatever a metaclass or a lazy module would return.
_class_dict: Callable[[type], Any] = type.__dict__["__dict__"].__get__
_class_name: Callable[[type], str] = type.__dict__["__qualname__"].__get__
_class_mro: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
_module_dict: Callable[[ModuleType], dict[str, Any]] = cast("Any", vars(ModuleType))["__dict__"].__get__


class KnownErrors:
    """The exception classes that the steps of one `Durable` can raise.

    Outside of workflows, where for example `handle.result()` raises an error in a web application, these are the
    builtin ones, a short list of common ones, those that the user has named, and those that the application's own
    packages define. In a workflow's own code, which catches errors of the libraries that it uses, also those of the
    packages that the modules with its workflows and steps import. What a name refers to depends on the code alone, and
    not on the history of a process, so that a replay in another process takes the same path.

    Args:
        named: classes that the user has named; their subclasses are included.
        strict: whether only the named, builtin and common ones are included.
        details: whether recorded errors show the values of SQL statements and payloads.
    """

    def __init__(self, named: Iterable[type[Exception]] = (), *, strict: bool = False, details: bool = False) -> None:
        self._named = tuple(named)
        for each in self._named:
            if not (isinstance(each, type) and issubclass(each, Exception)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise DefinitionError(f"errors=[{each!r}] is not an exception class: pass classes such as OutOfStock.")
        self._by_name = {name_of_class(each): each for each in self._named}
        self._strict = strict
        self.details = details
        self._modules: set[str] = set()

    def add_module(self, name: str) -> None:
        """Register a module that defines a workflow or a step."""
        self._modules.add(name)

    def outside(self, name: str) -> type | None:
        """Return the class with a recorded name, if it may be raised outside of workflows."""
        return self._find(name, self._is_of_application)

    def inside(self, name: str) -> type | None:
        """Return the class with a recorded name, if it may be raised in a workflow's own code."""
        return self._find(name, lambda module: self._is_of_application(module) or self._is_imported(module))

    def _find(self, name: str, is_trusted: Callable[[str], bool]) -> type | None:
        if name in self._by_name:
            return self._by_name[name]
        module, _, qualified = name.partition(":")
        if module in _COMMON:
            import_module(module)  # it may not have been used here yet: the history of this process must not matter
        if module == "builtins" or module in _COMMON:
            return find_class(module, qualified)
        if not self._strict and is_trusted(module):
            return find_class(self._here(module), qualified)
        return self._of_named_base(find_class(module, qualified)) if self._named else None

    def _of_named_base(self, found: type | None) -> type | None:
        if found is None or not any(base in self._named for base in _class_mro(found)):
            return None
        return found

    def _here(self, module: str) -> str:
        """Return the name that a module has in this process: its entry file is `__main__`."""
        return "__main__" if "__main__" in self._modules and module == entry_module() else module

    def _is_of_application(self, module: str) -> bool:
        if module in self._modules:
            return True
        root = _root(module)
        return root != _OWN and any(root == _root(_entered(each)) for each in self._modules)

    def _is_imported(self, module: str) -> bool:
        root = _root(module)
        return root != _OWN and any(root in _roots_in(each) for each in self._modules)


DEFAULT = KnownErrors()
"""Includes the builtin and the common classes, and none of an application."""


def find_class(module_name: str, qualified: str) -> type | None:
    """Return the class that a module defines under this name, if the module is imported; execute no code of either."""
    module = sys.modules.get(module_name)
    if not _is_module(module):
        return None
    found: object = None
    names = _module_dict(module)
    for part in qualified.split("."):
        found = names.get(part)
        if not _is_class(found):
            return None
        names = _class_dict(found)
    if not _is_class(found) or found in _CONTROL:
        return None
    # A class that a module only imports does not count. A builtin class has no module in its dictionary.
    is_own = _class_name(found) == qualified and names.get("__module__") == module_name
    return found if is_own or module_name == "builtins" else None


def name_of_class(kind: type) -> str:
    """Return the name that is recorded for a class; `__main__` is replaced by the name that others import it by."""
    return f"{_entered(kind.__module__)}:{kind.__qualname__}"


def is_subclass(kind: type | None, base: type) -> bool:
    """Return whether a class derives from another, without asking its metaclass."""
    return kind is not None and base in _class_mro(kind)


def native_base(kind: type) -> type[Exception]:
    """Return the builtin class that an exception class derives from first."""
    found = next(each for each in _class_mro(kind) if vars(builtins).get(each.__name__) is each)
    return cast("type[Exception]", found)


def members_of(kind: type) -> dict[str, Any]:
    """Return the members of an enum by name."""
    members: dict[str, Any] = _class_dict(kind)["_member_map_"]
    return members


def declared_by(kind: type) -> set[str]:
    """Return the attributes that an exception class declares: annotated, or set by or passed to its constructor.

    Names of methods and properties are excluded, which an instance attribute could replace.
    """
    declared: set[str] = set()
    taken: set[str] = set()
    for each in _class_mro(kind):
        names = _class_dict(each)
        taken |= {name for name, value in names.items() if _binds(value)}
        if vars(builtins).get(each.__name__) is not each:
            declared |= names.get("__dataclass_fields__", {}).keys() | names.get("__annotations__", {}).keys()
            declared |= {
                name for method in ("__init__", "__new__", "__post_init__") for name in _used(names.get(method))
            }
    return {name for name in declared - taken if not name.startswith("__")}


def _binds(value: object) -> bool:
    return callable(value) or hasattr(type(value), "__get__")


def _used(function: object) -> set[str]:
    """Return the parameters of a function and the names that it reads or sets."""
    function = getattr(function, "__func__", function)  # __new__ is a staticmethod
    while isinstance(function, FunctionType) and "__wrapped__" in function.__dict__:
        function = function.__dict__["__wrapped__"]
    if not isinstance(function, FunctionType):
        return set()
    code = function.__code__
    return {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], *code.co_names}


def entry_module() -> str | None:
    """Return the name by which others import the entry file of this process, if it has one."""
    main = sys.modules.get("__main__")
    if not _is_module(main):
        return None
    names = _module_dict(main)
    spec, path = names.get("__spec__"), names.get("__file__")
    if spec is not None:  # python -m app
        return str(spec.name)
    return Path(path).stem if isinstance(path, str) else None  # python app.py


def _entered(module: str) -> str:
    return (entry_module() or module) if module == "__main__" else module


def _root(module: str) -> str:
    """Return the top-level package that a module belongs to; in a namespace package, the one below it."""
    first, _, rest = module.partition(".")
    top = sys.modules.get(first)
    is_namespace = _is_module(top) and _module_dict(top).get("__file__") is None and "__path__" in _module_dict(top)
    return f"{first}.{rest.partition('.')[0]}" if rest and is_namespace else first


def _roots_in(module_name: str) -> set[str]:
    """Return the packages whose modules, classes or functions a module refers to."""
    module = sys.modules.get(module_name)
    kept = list(_module_dict(module).values()) if _is_module(module) else []
    names = {name for each in kept if (name := _module_name_of(each)) is not None}
    return {_root(each) for each in names}


def _module_name_of(value: object) -> str | None:
    if _is_module(value):
        name = _module_dict(value).get("__name__")
    elif _is_class(value):
        name = _class_dict(value).get("__module__")
    elif type(value) is FunctionType:
        name = value.__module__
    else:
        return None
    return name if isinstance(name, str) else None


# By `type()` and not `isinstance`, which reads an object's `__class__`: a lazy proxy would execute code.
def _is_class(value: object) -> TypeGuard[type]:
    return issubclass(type(value), type)


def _is_module(value: object) -> TypeGuard[ModuleType]:
    return issubclass(type(value), ModuleType)
