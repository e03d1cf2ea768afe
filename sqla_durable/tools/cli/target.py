"""What the command line names: the `Durable` object, as `module:attribute`, and its database, as a URL."""

from __future__ import annotations

import importlib
import os
import pkgutil
import stat
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from sqlalchemy import URL, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.api.durable import Durable
from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.cli.urls import DATABASE_URL, normalised

S = TypeVar("S", Session, AsyncSession)
_POOL_SIZE = 20
_SMALLEST_POOL = 8  # two that a worker keeps, two for its other statements, and some for steps


def load(target: str) -> Durable:
    """Return the object that `module:attribute` names, imported with the current directory first on the path.

    Raises:
        CommandError: there is no such module or attribute, it does not import, it is not a `Durable`, or the
            current directory belongs to another user and everybody may write to it.
    """
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise CommandError(f"{target!r} is not module:attribute: write, for example, shop:durable.")
    if not all(each.isidentifier() for each in module_name.split(".")) or module_name.endswith(".py"):
        raise CommandError(
            f"{module_name!r} is not the name of a module, such as `import` takes: write shop:durable or "
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
        _put_first_on_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise CommandError(f"there is no module {error.name!r} {_how_to_find(error.name)}") from error
        raise _import_error(name, error) from error
    except Exception as error:
        raise _import_error(name, error) from error


def _put_first_on_path(directory: Path) -> None:
    found = directory.stat()
    is_shared = found.st_mode & stat.S_ISVTX or found.st_uid != os.geteuid()  # root owns /tmp, and is its worst victim
    if found.st_mode & stat.S_IWOTH and is_shared:
        raise CommandError(
            f"everybody may write to the current directory {str(directory)!r}, so any user can put modules there that "
            "this command would execute: run it elsewhere, or set PYTHONSAFEPATH=1 and name the directory of your "
            "modules in PYTHONPATH."
        )
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def _how_to_find(name: str) -> str:
    close = _similar_modules(name)
    if close:
        return f"to import: did you mean {_either(close)}?"
    if sys.flags.safe_path:  # PYTHONSAFEPATH or `python -P`
        return "on the path, which is without the current directory: add the directory that holds it to PYTHONPATH."
    return (
        f"in {str(Path.cwd())!r} or where Python is installed: run the command in the directory that holds it, or "
        "add that to PYTHONPATH."
    )


def _similar_modules(name: str) -> list[str]:
    """Return the modules in the same place whose names are similar to that of a missing one."""
    package, dot, _ = name.rpartition(".")
    here = [] if sys.flags.safe_path else [str(Path.cwd())]
    paths = getattr(sys.modules.get(package), "__path__", []) if package else here
    return get_close_matches(name, [f"{package}{dot}{each.name}" for each in pkgutil.iter_modules(paths)])


def _import_error(name: str, error: Exception) -> CommandError:
    """Return an error that says what the import raised, where, and how to see the whole traceback."""
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


@dataclass(frozen=True, slots=True)
class Sessionmakers:
    """The sessionmakers of a worker; either may be None."""

    sync: sessionmaker[Session] | None
    asynchronous: async_sessionmaker[AsyncSession] | None


def sessionmakers(durable: Durable, url: str | None, *, processes: int = 1) -> Sessionmakers:
    """Return the sessionmakers of the given URL, else the object's own, else those of `DATABASE_URL`.

    Args:
        durable: the object.
        url: the URL that was given.
        processes: how many processes do so; the more there are, the smaller are the pools of a URL's engines.

    Raises:
        CommandError: there is none of the three, or the URL is not one of PostgreSQL.
    """
    if url is None and (durable.sessionmaker is not None or durable.async_sessionmaker is not None):
        return Sessionmakers(durable.sessionmaker, durable.async_sessionmaker)
    wanted = url or os.environ.get(DATABASE_URL)
    if not wanted:
        raise CommandError(
            f"there is no database: give the Durable object a sessionmaker, or this command --url, or set "
            f"{DATABASE_URL}, such as postgresql://user@host/name."
        )
    return connect(durable, normalised(wanted), pool_size=max(_SMALLEST_POOL, min(_POOL_SIZE, 40 // processes)))


def connect(durable: Durable, url: URL, *, pool_size: int = _POOL_SIZE) -> Sessionmakers:
    """Return sessionmakers on two new engines of the URL, a sync and an async one."""
    # No overflow: connections beyond a pool's size would be opened and closed for each step. No `pool_pre_ping`: a
    # statement that meets a lost connection is tried again.
    pool = {"pool_size": pool_size, "max_overflow": 0}
    classes = [each.session_class for each in durable.registry.steps()]
    sync = sessionmaker(create_engine(url, **pool), class_=_narrowest(Session, classes))
    asynchronous = create_async_engine(url, **pool)
    return Sessionmakers(sync, async_sessionmaker(asynchronous, class_=_narrowest(AsyncSession, classes)))


def _narrowest(base: type[S], classes: Iterable[type[object] | None]) -> type[S]:
    """Return the narrowest session class that a step asks for, such as SQLModel's; the worker checks that it fits."""
    found = base
    for each in classes:
        if each is not None and issubclass(each, found):
            found = each
    return found
