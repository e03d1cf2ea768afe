"""Temporary files in memory: the data of servers, which are gone at the end of a run.

Databases are made and dropped by the hundred, and servers by the dozen. In memory that costs a third of the time of a
processor that it does on a disk, whose file system allocates each block.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

_MEMORY = Path("/dev/shm")  # of Linux
_NEEDED = 4 << 30
"""Bytes that must be free: ten times what a run was seen to need."""


def use() -> None:
    """Let this process, and those that it starts, make temporary files in memory, if there is enough.

    Not the directories of `tmp_path`, of which pytest keeps those of three runs, and nothing where TMPDIR says where.
    """
    if "TMPDIR" in os.environ or not _is_usable():
        return
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = str(_MEMORY)
    tempfile.tempdir = None


def _is_usable() -> bool:
    if not os.access(_MEMORY, os.W_OK) or os.statvfs(_MEMORY).f_flag & os.ST_NOEXEC:
        return False  # programs of servers are copied there
    return min(shutil.disk_usage(_MEMORY).free, _available()) > _NEEDED


def _available() -> int:
    """Return how many bytes of memory are free, or used for what is also on a disk."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(each.split()[1]) for each in lines if each.startswith("MemAvailable:"))
