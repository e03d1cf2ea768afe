"""The command that exports workflows with their histories."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from uuid import UUID

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable import Durable, Executor, send_signal, set_event, start_child, wait_signal, write_stream
from tests.cli.invoking import CommandLine

durable = Durable()


@durable.workflow
def child() -> int:
    return 1


@durable.step
def double(number: float) -> float:
    return 2 * number


@durable.workflow
def parent(line: str) -> str:
    set_event("status", line)
    write_stream("log", "one")
    write_stream("log", "two")
    double(1.5)
    start_child(child)
    return wait_signal("go", str)


def test_history_is_exported_as_it_is_in_the_database(
    engine: Engine, session_factory: sessionmaker[Session], database_url: str, tmp_path: Path
) -> None:
    run = CommandLine(database_url)
    with session_factory() as session:
        made = parent.start(session, "two\nlines").id
        session.commit()
        send_signal(session, made, "go", "gone")
        session.commit()
        Executor(session).execute(parent, made)
        session.commit()
    with engine.begin() as connection:  # what Python's floats would round
        connection.execute(text("UPDATE durable.step SET output = '1.00000000000000000001' WHERE key = 'double'"))
    done = run("export", "--name", "parent")
    line = done.out.rstrip("\n")
    assert (done.code, "\n" in line, '"output" : 1.00000000000000000001' in line) == (0, False, True)
    found = json.loads(line)
    assert (found["workflow"]["id"], found["workflow"]["input"]) == (str(made), {"line": "two\nlines"})
    assert {"token", "worker_id"} & found["workflow"].keys() == set()
    assert [each["position"] for each in found["steps"]] == list(range(1, len(found["steps"]) + 1))
    assert [each["payload"] for each in found["signals"] if each["name"] == "go"] == ["gone"]
    assert [each["value"] for each in found["events"]] == ["two\nlines"]
    assert [each["value"] for each in found["stream_items"]] == ["one", "two"]
    assert [each["name"] for each in found["children"]] == ["child"]

    file = tmp_path / "all.jsonl"
    done = run("export", "-o", file)
    assert (done.code, done.out, done.err) == (0, "", f"2 workflows exported to {file}.\n")
    ids = [UUID(json.loads(each)["workflow"]["id"]) for each in file.read_text().splitlines()]
    assert (len(ids), ids) == (2, sorted(ids, reverse=True))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["all.jsonl"]
    assert run("export", uuid7(), made).code == 1
    assert "No such file or directory" in run("export", "-o", tmp_path / "no" / "file").err
