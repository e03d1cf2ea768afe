"""Measures the floors: what pgbench, PostgreSQL's own load generator, makes of a shape on the same server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from psycopg.conninfo import make_conninfo
from sqlalchemy import URL, make_url

from sqla_durable import embedded
from sqla_durable.errors import UsageError
from sqla_durable.tools.bench.errors import BenchError
from sqla_durable.tools.bench.figures import Reference
from sqla_durable.tools.bench.place import Place
from sqla_durable.tools.bench.seeds import pending
from sqla_durable.tools.bench.shapes import Shape

MISSING = "SQL: no pgbench here"


class Floors:
    """Measures shapes in a place.

    Args:
        place: where; its workflows are removed for each shape.
        transactions: how many transactions a shape makes, about.
        program: pgbench; None measures nothing.
    """

    def __init__(self, place: Place, *, transactions: int, program: Path | None) -> None:
        self._place = place
        self._transactions = transactions
        self._program = program

    def measure(self, *shapes: Shape) -> tuple[Reference, ...]:
        """Measure each shape, in workflows or steps a second.

        Raises:
            BenchError: pgbench failed.
        """
        if self._program is None:
            return (Reference(MISSING, None),)
        return tuple(Reference(each.what, self._rate(self._program, each)) for each in shapes)

    def _rate(self, program: Path, shape: Shape) -> float:
        transactions = max(1, round(self._transactions * shape.share / shape.clients))
        self._place.empty()
        # Those that the last clients have locked must not leave the others without any.
        pending(self._place, (transactions + 1) * shape.clients * shape.claims + shape.pending)
        script = shape.script.replace("{schema}", self._place.schema)
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
            file.write(script)
            file.flush()
            options = ["-n", "-M", "prepared", "-D", "n=0", "-f", file.name, "-t", str(transactions)]
            printed = self._execute(program, *options, "-c", str(shape.clients), "-j", str(min(shape.clients, 2)))
        found = re.search(r"^tps = ([\d.]+)", printed, re.MULTILINE)
        if found is None:
            raise BenchError(f"pgbench printed no rate for {shape.what!r}: {printed[-500:]}")
        return float(found[1]) * shape.each

    def _execute(self, program: Path, *options: str) -> str:
        url = make_url(self._place.url)
        password = {"PGPASSWORD": url.password} if url.password else {}
        done = subprocess.run(  # noqa: S603 (no shell)
            [program, *options, conninfo(url)],
            check=False,
            env={**os.environ, **password},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if done.returncode != 0:
            raise BenchError(f"pgbench failed: {done.stdout[-1_000:]}")
        return done.stdout


def conninfo(url: URL) -> str:
    """Give the URL as libpq reads it, without the password, which all users of the machine would see."""
    given = url.translate_connect_args(username="user", database="dbname")
    given.pop("password", None)
    several = {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    return make_conninfo(**{**given, **several})


def pgbench() -> Path | None:
    """Find pgbench: that of the embedded server, else one on PATH."""
    try:
        return embedded.program("pgbench")
    except UsageError:
        found = shutil.which("pgbench")
        return None if found is None else Path(found)
