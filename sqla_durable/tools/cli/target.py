"""Imports the application's `Durable` object that the command line names as `module:attribute`."""

from __future__ import annotations

import importlib
import os
import pkgutil
import stat
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from sqla_durable.api.durable import Durable
from sqla_durable.tools.cli.errors import CommandError


def load(target: str) -> Durable:
    """Import what `module:attribute` names, with the current directory first on the path.

    Raises:
        CommandError: there is no such module or attribute, it does not import, it is no `Durable`, or the current
            directory is another user's and everybody may write to it.
    """
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise CommandError(f"{target!r} is not module:attribute: write, for example, shop:durable.")
    if not all(each.isidentifier() for each in module_name.split(".")) or module_name.endswith(".py"):
        raise CommandError(
            f"{module_name!r} is no name of a module, such as `import` takes: write shop:durable or "
            "shop.workflows:durable, without a path and without .py, and run the command in the directory that holds "
            "it."
        )
    found: object = _import(module_name)
    for name in attribute.split("."):
        found = _attribute(found, name, target)
    if found is Durable:
        raise CommandError(f"{target!r} is the class: write durable = Durable(), and name that object.")
    if not isinstance(found, Durable):
        others = _durables_in(sys.modules[module_name])
        hint = f": did you mean {_either(others)}?" if others else ""
        raise CommandError(
            f"{target!r} is {_described(found)}, not a Durable object: name the object whose decorators make the "
            f"workflows{hint or '.'}"
        )
    return found


def _import(name: str) -> ModuleType:
    if not sys.flags.safe_path:
        _look_here_first(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise CommandError(f"there is no module {error.name!r} {_where_to_put_it(error.name)}") from error
        raise _broken(name, error) from error
    except Exception as error:
        raise _broken(name, error) from error


def _look_here_first(directory: Path) -> None:
    found = directory.stat()
    if found.st_mode & stat.S_IWOTH and found.st_uid != os.geteuid():
        raise CommandError(
            f"the current directory {str(directory)!r} is another user's and everybody may write to it, so any user "
            "can put modules there that this command would execute: run it elsewhere, or set PYTHONSAFEPATH=1 and "
            "name the directory of your modules in PYTHONPATH."
        )
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def _where_to_put_it(name: str) -> str:
    close = _like(name)
    if close:
        return f"to import: did you mean {_either(close)}?"
    if sys.flags.safe_path:  # PYTHONSAFEPATH or `python -P`
        return "on the path, which is without the current directory: add the directory that holds it to PYTHONPATH."
    return (
        f"in {str(Path.cwd())!r} or where Python is installed: run the command in the directory that holds it, or "
        "add that to PYTHONPATH."
    )


def _like(name: str) -> list[str]:
    """Return the modules beside a missing one whose names are like its own."""
    package, dot, _ = name.rpartition(".")
    here = [] if sys.flags.safe_path else [str(Path.cwd())]
    paths = getattr(sys.modules.get(package), "__path__", []) if package else here
    return get_close_matches(name, [f"{package}{dot}{each.name}" for each in pkgutil.iter_modules(paths)])


def _broken(name: str, error: Exception) -> CommandError:
    """Say what the import raised and where; the traceback is one command away."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else name
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name == "psycopg2":
        hint = "`postgresql://` means psycopg2 in SQLAlchemy 2.0: write `postgresql+psycopg://`. "
    return CommandError(
        f"module {name!r} does not import: {type(error).__name__}: {error} ({where}). {hint}"
        f"`python -c 'import {name}'` shows the whole traceback."
    )


def _attribute(holder: object, name: str, target: str) -> object:
    try:
        found: object = getattr(holder, name)
    except AttributeError:
        names = vars(holder) if hasattr(holder, "__dict__") else {}
        close = _durables_in(holder) or get_close_matches(name, [each for each in names if not each.startswith("_")])
        hint = f"did you mean {_either(close)}?" if close else "name a Durable object."
        raise CommandError(f"{target!r}: {_described(holder)} has no attribute {name!r}: {hint}") from None
    return found


def _described(value: object) -> str:
    if isinstance(value, ModuleType):
        return f"module {value.__name__!r}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _durables_in(holder: object) -> list[str]:
    names = vars(holder) if hasattr(holder, "__dict__") else {}
    return [each for each, value in names.items() if isinstance(value, Durable)]


def _either(names: list[str]) -> str:
    return " or ".join(map(repr, names))
