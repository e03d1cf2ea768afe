"""Tags: given at a start, stored with the workflow, and found again by an index."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, StartOptions, Worker, Workflow, manage, start_child, start_many
from sqla_durable.errors import ArgumentError
from tests.store import races

durable = Durable()


@durable.workflow
def report(tenant: str) -> str:
    return tenant


@durable.workflow
def parent() -> str:
    return start_child(report.options(tags={"tenant": "child"}), "c").result()


TAGGED = report.options(tags={"tenant": "7", "kind": "nightly"})


def tenants(session: Session, **tags: str) -> list[Any]:
    return [each.input["tenant"] for each in session.scalars(select(Workflow).where(Workflow.tags.contains(tags)))]


# behaviour: M3
def test_workflows_are_found_by_some_of_their_tags(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        TAGGED.start(session, "a")
        TAGGED.options(key="k").start(session, "b")
        start_many(session, [TAGGED.bind("c"), report.bind("d"), report.options(tags={"tenant": "8"}).bind("e")])
    with Session(engine) as session:
        assert sorted(tenants(session, tenant="7")) == ["a", "b", "c"]
        assert tenants(session, tenant="8") == ["e"]
        assert tenants(session, tenant="8", kind="nightly") == []
        assert session.scalars(select(Workflow).where(Workflow.input["tenant"].astext == "d")).one().tags is None


def test_a_fork_has_the_tags_and_a_new_start_that_replaces_has_its_own(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        first = TAGGED.options(key="k").start(session, "a")
        manage.fork(session, first)
        session.flush()
        report.options(key="k", on_conflict="replace", tags={"tenant": "9"}).start(session, "b")
    with Session(engine) as session:
        assert tenants(session, tenant="7") == ["a"]
        assert tenants(session, tenant="9") == ["b"]


def test_what_a_schedule_starts_has_its_tags(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        manage.put_schedule(session, "nightly", TAGGED.bind("a"), every=timedelta(days=1))
        assert manage.run_schedule(session, "nightly")
    with Session(engine) as session:
        assert tenants(session, tenant="7") == ["a"]


def test_a_child_has_its_own(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        parent.options(tags={"tenant": "parent"}).start(session)

    def is_found() -> bool:
        with Session(engine) as session:
            return tenants(session, tenant="child") == ["c"]

    with Worker(durable, sessionmaker=sessionmaker(engine)):
        races.wait_until(is_found)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"tenant": 7}, "is not a text"),
        ({"": "7"}, "is blank"),
        ({"tenant": "\0"}, "NUL"),
        (["tenant"], "is no mapping of at most 100 names to texts"),
        ({str(number): "x" for number in range(101)}, "is no mapping of at most 100"),
    ],
    ids=["number", "blank", "nul", "list", "many"],
)
def test_what_is_no_tag_is_refused(tags: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        StartOptions(tags=tags)


@pytest.mark.new_database
def test_they_are_found_by_their_index(engine: Engine) -> None:
    with Session(engine) as session:
        session.execute(
            text(
                "INSERT INTO durable.workflow (name, tags) SELECT 'report', "
                "jsonb_build_object('tenant', n::text) FROM generate_series(1, 5000) n"
            )
        )
        session.execute(text("ANALYZE durable.workflow"))
        query = 'EXPLAIN SELECT id FROM durable.workflow WHERE tags @> \'{"tenant": "7"}\''
        assert "workflow_tags_idx" in "\n".join(session.scalars(text(query)))
