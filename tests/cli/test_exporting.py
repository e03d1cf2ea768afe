"""The command that exports workflows with their histories."""

from __future__ import annotations

import gzip
import json
import stat
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, create_engine, delete, select, text
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable import Durable, Executor, Workflow, send_signal, set_event, start_child, wait_signal, write_stream
from tests.cli.invoking import CommandLine, log

durable = Durable()
calls: list[float] = []


@durable.workflow
def child() -> int:
    return 1


@durable.step
def double(number: float) -> float:
    calls.append(number)
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
    nobody = uuid7()
    missing = run("export", nobody, made)
    assert (missing.code, missing.err) == (1, f"no workflow {nobody} is visible here: it was not exported.\n")
    assert f"no workflow {nobody} is visible here, in postgresql" in run("show", nobody).err
    assert f"no workflow {nobody} is visible here: signal 'go' cannot be sent" in run("signal", nobody, "go").err
    assert f"no workflow {nobody} is visible here: it was not" in run("cancel", nobody, "--yes").err
    assert "No such file or directory" in run("export", "-o", tmp_path / "no" / "file").err


def test_workflows_move_to_another_database_and_go_on(
    engine: Engine, session_factory: sessionmaker[Session], database_url: str, empty_database_url: str, tmp_path: Path
) -> None:
    run, other, file = CommandLine(database_url), CommandLine(empty_database_url), tmp_path / "all.jsonl"
    calls.clear()
    with session_factory() as session:
        ended, made = child.start(session).id, parent.start(session, "a").id
        session.commit()
        Executor(session).execute(child, ended)
        Executor(session).execute_until_waiting(parent, made)
        send_signal(session, made, "other", 1.5, key="k")
        session.commit()
    before = run("export").out
    assert run("export", "-o", file).code == 0
    assert other("migrate").code == 0
    imported = other("import", file, "--reason", "we move", "--as", "ada")
    assert (imported.out, imported.err) == (
        "3 workflows imported, of which 2 were unfinished and are cancelled: `resume` lets them go on.\n",
        "",
    )
    moved = create_engine(empty_database_url)
    assert [(each[0], each[1]) for each in log(moved)] == [
        ("import", "child"),
        ("import", "parent"),
        ("import", "child"),
    ]
    was = {each["workflow"]["id"]: each for each in map(json.loads, before.splitlines())}
    for found in map(json.loads, other("export").out.splitlines()):
        expected = was[found["workflow"]["id"]]
        is_moved = found["workflow"]["status"] == "cancelled"
        changed = dict.fromkeys(("status", "finished_at", "wake_at", "awaits") if is_moved else ())
        assert {**found, "workflow": found["workflow"] | changed} == {
            **expected,
            "workflow": expected["workflow"] | changed,
        }
    assert other("resume", made, "--yes").out == "2 workflows resumed.\n"
    with Session(moved) as session:
        send_signal(session, made, "go", "gone")
        session.commit()
        assert Executor(session).execute(parent, made) == "gone"
        assert [each.name for each in session.get_one(Workflow, made).children] == ["child"]
    assert calls == [1.5]
    moved.dispose()


def test_what_cannot_be_imported_is_refused_with_its_line(database_url: str, engine: Engine, tmp_path: Path) -> None:
    run = CommandLine(database_url)
    with Session(engine) as session:
        child.options(key="k").start(session)
        session.commit()
    line = run("export").out
    again = run("import", "-", stdin=line)
    assert again.code == 2
    assert "line 1 of - cannot be imported: duplicate key value violates" in again.err
    assert "--skip-existing leaves out what is there already. 0 workflows before it were imported" in again.err
    assert run("import", "-", "--skip-existing", stdin=line).out == "0 workflows imported.\n"
    renamed = json.loads(line)
    renamed["workflow"] |= {"id": str(uuid7()), "parent_id": str(uuid7())}
    assert "workflow_name_key_key" in run("import", "-", stdin=json.dumps(renamed)).err
    renamed["workflow"] |= {"key": None, "status": "lost"}
    wrong = run("import", "-", stdin=json.dumps(renamed))
    assert ("line 1 of - cannot be imported: " in wrong.err, "--skip-existing" in wrong.err) == (True, False)
    assert (
        "0 workflows before it were imported. Its group of 50 lines and all that follow were not imported." in wrong.err
    )
    renamed["workflow"]["status"] = "pending"
    packed = tmp_path / "one.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(renamed).encode()))
    orphan = run("import", packed)
    assert orphan.err == "The parents of 1 workflow are not in this database: it has none now.\n"
    one = "1 workflow imported, of which 1 was unfinished and is cancelled: `resume` lets it go on.\n"
    assert orphan.out == one
    assert "No such file" in run("import", tmp_path / "nothing").err
    damaged = bytearray(packed.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    packed.write_bytes(damaged)
    for done in (run("import", packed), run("import", "-", stdin=b"\xff\n")):
        assert (done.code, done.err.startswith("sqla-durable: ")) == (2, True)


def test_a_line_that_export_does_not_write_is_refused(
    database_url: str, session_factory: sessionmaker[Session]
) -> None:
    run = CommandLine(database_url)
    with session_factory.begin() as session:
        child.start(session)
    line: dict[str, Any] = json.loads(run("export").out)
    with session_factory.begin() as session:
        session.execute(delete(Workflow))
    row: dict[str, Any] = line["workflow"]
    wrong: list[tuple[Any, str]] = [
        ({}, "it has no 'format'"),
        (1, "it is not a JSON object"),
        (line | {"format": 2}, "its format is 2, and this release reads 1"),
        (line | {"workflow": 1}, "workflow is not made of JSON objects"),
        (line | {"later": []}, "the line has names that this release does not know: later."),
        (
            line | {"workflow": row | {"later": 1, "more": 1}},
            "workflow has names that this release does not know: later, more.",
        ),
        (line | {"steps": [{"key": "a", "later": 1}]}, "steps has names that this release does not know: later."),
        (line | {"steps": [1]}, "steps is not made of JSON objects"),
        (line | {"events": None}, "events is not a list"),
        (line | {"workflow": row | {"parent_id": row["id"]}}, "it is its own parent"),
        ({each: line[each] for each in line.keys() - {"signals"}}, "it has no 'signals'"),
    ]
    for given, words in wrong:
        refused = run("import", "-", stdin=json.dumps(given))
        kind = "line 1 of - is not a workflow as `sqla-durable export` of this release writes it: "
        assert (refused.code, words in refused.err, kind in refused.err) == (2, True, True), refused.err
    assert "line 3 of - is not" in run("import", "-", stdin=f"\n{json.dumps(line)}\n{{").err
    assert run("list", "-q").out == ""


def test_the_same_id_twice_and_parents_in_a_circle_are_refused(
    database_url: str, session_factory: sessionmaker[Session]
) -> None:
    run = CommandLine(database_url)
    with session_factory.begin() as session:
        made = [child.start(session).id for _ in range(3)]
    lines = [json.loads(each) for each in run("export").out.splitlines()]
    with session_factory.begin() as session:
        session.execute(delete(Workflow))
    twice = run("import", "-", stdin="\n".join(json.dumps(each) for each in [*lines, lines[0]]))
    assert (twice.code, f"line 4 of - has the id of line 1, {made[2]}" in twice.err) == (2, True)
    for one, parent in zip(lines, [made[1], made[0], made[2]], strict=True):  # each is the next one's child
        one["workflow"]["parent_id"] = str(parent)
    circle = run("import", "-", stdin="\n".join(map(json.dumps, lines)))
    assert (circle.code, "in - is its own ancestor" in circle.err) == (2, True)
    assert run("list", "-q").out == ""
    lines[0]["workflow"]["parent_id"] = None
    again = lines[0] | {"workflow": lines[0]["workflow"] | {"parent_id": str(made[0])}}
    given = "\n".join(map(json.dumps, [*lines, again]))
    assert run("import", "-", "--skip-existing", stdin=given).out.startswith("3 workflows imported")
    with session_factory() as session:
        assert session.get_one(Workflow, made[2]).parent_id is None  # as the first line has it
    with session_factory.begin() as session:  # what only SQL can write
        session.get_one(Workflow, made[2]).parent_id = made[0]
    shown = run("show", made[0])
    assert (shown.code, str(made[1]) in shown.out) == (0, True)


def test_a_large_tree_is_resumed_as_a_whole_also_if_the_import_was_repeated(
    session_factory: sessionmaker[Session], database_url: str, empty_database_url: str, tmp_path: Path
) -> None:
    run, other, file = CommandLine(database_url), CommandLine(empty_database_url), tmp_path / "all.jsonl"
    with session_factory() as session:
        root = Workflow(name="parent", input={})
        session.add(root)
        session.flush()
        session.add_all(Workflow(name="child", input={}, parent_id=root.id) for _ in range(120))
        session.commit()
        made = root.id
    assert run("export", "-o", file).code == 0
    assert other("migrate").code == 0
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 121
    stopped = other("import", "-", stdin="".join([*lines[:60], "stop"]))
    assert (stopped.code, "line 61 of -" in stopped.err) == (2, True)
    assert other("import", file, "--skip-existing").out.startswith("71 workflows imported, of which 71 were unfinished")
    moved = create_engine(empty_database_url)
    with Session(moved) as session:
        assert len(session.get_one(Workflow, made).children) == 120
        assert len(set(session.scalars(select(Workflow.finished_at)))) == 2  # of two imports
    assert other("delete", "--all", "--yes").out == "121 workflows deleted.\n"
    assert other("import", file).code == 0
    assert other("resume", made, "--yes").code == 0
    with Session(moved) as session:
        assert set(session.scalars(select(Workflow.status))) == {"pending"}
    moved.dispose()
