"""What the tests of roles share: the verbs of each set of rights, and what they are about."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import Engine, delete, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import sqla_durable
import sqla_durable.asyncio as aio
from sqla_durable import Blob, Durable, Event, Queue, Schedule, Signal, Step, StreamItem, Workflow, create_blob, manage
from sqla_durable.models import Audit, BlobChunk, QueueKey, QueueUse, Retention, StoredBlob
from sqla_durable.models.base import Base
from sqla_durable.models.views import VIEWS
from sqla_durable.operations.callback import CallbackRecord
from tests.store import races
from tests.support.roles import DENIED, sqlstate_of

DAY = timedelta(days=1)
NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)
durable = Durable(version="7")
durable.queue("limited", key_rate=(10, timedelta(minutes=1)), per_key=1, weights={"a": 2})

Verb: TypeAlias = Callable[[Session, "World"], object]
Verbs: TypeAlias = dict[str, Mapping[str, Verb]]


@durable.workflow
def greet(name: str) -> str:
    return f"hello {name}"


@durable.workflow
def keep(blob: Blob) -> Blob:
    return blob


@dataclass(frozen=True)
class World:
    """What the verbs are about."""

    pending: UUID
    failed: UUID
    cancelled: UUID
    done: UUID
    owner: UUID
    token: str
    blob: Blob


def make_world(engine: Engine) -> World:
    """Make a workflow of each kind, one of which has made a callback."""
    (owner,) = races.claimed_fences(engine)
    made = CallbackRecord.new(owner.workflow_id, within=DAY, heartbeat=DAY)
    with Session(engine) as session:
        races.record(session, [races.checkpoint(owner, "create_callback", output=made.to_json())])
        pending, failed, cancelled = (greet.start(session, each).id for each in ("a", "b", "c"))
        done = greet.options(key="known").start(session, "d").id
        session.flush()
        finished = "UPDATE durable.workflow SET finished_at = statement_timestamp(), "
        error = json.dumps({"type": "builtins:ValueError"})
        session.execute(
            text(f"{finished} status = 'failed', token = id, error = :error WHERE id = :id"),
            {"id": failed, "error": error},
        )
        session.execute(text(f"{finished} status = 'cancelled' WHERE id = :id"), {"id": cancelled})
        session.execute(text(f"{finished} status = 'succeeded', output = '\"d\"' WHERE id = :id"), {"id": done})
        manage.put_schedule(session, "nightly", greet.bind("x"), cron="0 3 * * *")
        manage.put_queue(session, "fair", fair=True)
        session.add(Event(workflow_id=done, key="status", value="booked"))
        blob = upload(session)
        session.commit()
    return World(pending, failed, cancelled, done, owner.workflow_id, made.reveal_token(), blob)


def upload(session: Session) -> Blob:
    """Write a blob."""
    with create_blob(session=session, durable=durable) as writer:
        writer.write(b"x")
    return writer.blob


async def upload_async(session: Any) -> Blob:
    """Write a blob."""
    async with aio.create_blob(session=session, durable=durable) as writer:
        await writer.write(b"x")
    return writer.blob


TABLES = (
    Workflow,
    Step,
    Signal,
    Event,
    StreamItem,
    Queue,
    QueueKey,
    QueueUse,
    Schedule,
    Retention,
    Audit,
    StoredBlob,
    BlobChunk,
)


def reading(table: type[Base]) -> Verb:
    """Return what reads a table."""
    return lambda session, _: session.execute(select(table))


def viewing(view: str) -> Verb:
    """Return what reads a view."""
    return lambda session, _: session.execute(text(f"SELECT * FROM durable.{view}"))


def verbs_of(api: Any) -> Verbs:
    """Return what each role is for, by the names of one namespace, `sqla_durable` or `sqla_durable.asyncio`."""
    return _of_starters(api) | _of_callers(api) | _of_schedulers(api) | _of_operators(api) | _of_readers()


def _of_starters(api: Any) -> Verbs:
    """Return what those are for who start workflows."""
    return {
        "starter": {
            "start": lambda session, _: greet.start(session, "x"),
            "start with options": lambda session, _: greet.options(
                delay=DAY, timeout=DAY, deadline=2 * DAY, priority=1, queue="mail", by="a", tags={"tenant": "a"}
            ).start(session, "x"),
            "start under a key": lambda session, _: greet.options(key="new", delay=DAY, deadline=DAY).start(
                session, "x"
            ),
            "start under a known key": lambda session, _: greet.options(key="known").start(session, "x"),
            "start many": lambda session, _: api.start_many(session, [greet.bind("x"), greet.bind("y")]),
            "start with a blob": lambda session, world: keep.start(session, world.blob),
            "start many under keys": lambda session, _: api.start_many(
                session, [greet.options(key=each, delay=DAY).bind("x") for each in ("known", "new")]
            ),
        },
        "uploader": {
            "create a blob": lambda session, _: upload(session) if api is sqla_durable else upload_async(session),
        },
        "replacer": {
            "start one that is to be unfinished": lambda session, _: greet.options(
                key="known", unique="unfinished"
            ).start(session, "x"),
            "replace": lambda session, _: api.start_many(
                session, [greet.options(key="new", on_conflict="replace", priority=1).bind(each) for each in "xy"]
            ),
            "debounce": lambda session, _: api.start_many(
                session, [greet.options(key="new", debounce=DAY, longest_wait=DAY).bind(each) for each in "xy"]
            ),
            "throttle many": lambda session, _: api.start_many(
                session, [greet.options(key=each, throttle=timedelta.resolution).bind("x") for each in ("known", "new")]
            ),
        },
    }


def _of_callers(api: Any) -> Verbs:
    """Return what those are for who send to workflows and wait for them."""
    return {
        "caller": {
            "result": lambda session, world: greet.handle(session, world.done).result(),
            "event": lambda session, world: api.get_event(session, world.done, "status"),
            "read a blob": lambda session, world: api.open_blob(session, world.blob).read(),
        },
        "signaller": {
            "signal": lambda session, world: api.send_signal(session, world.pending, "go", 1),
            "signal a blob": lambda session, world: api.send_signal(session, world.pending, "go", world.blob),
            "signal under a key": lambda session, world: api.send_signal(
                session, [world.pending, world.owner], "go", 1, key="k"
            ),
        },
        "updater": {
            "update": lambda session, world: api.send_update(session, world.pending, "change", 1),
            "update under a key": lambda session, world: api.send_update(session, world.pending, "change", 1, key="k"),
        },
        "answerer": {
            "complete": lambda session, world: api.complete_callback(session, world.token, 1),
            "fail": lambda session, world: api.fail_callback(session, world.token, "no"),
            "keep alive": lambda session, world: api.heartbeat_callback(session, world.token),
        },
        "canceller": {
            "cancel": lambda session, world: api.manage.cancel(session, [world.pending, world.owner]),
        },
    }


def _of_schedulers(api: Any) -> Verbs:
    """Return what those are for who operate schedules."""
    return {
        "scheduler": {
            "put a schedule": lambda session, _: api.manage.put_schedule(
                session, "new", greet.options(queue="mail", by="a", priority=1, timeout=DAY).bind("x"), every=DAY
            ),
            "change a schedule": lambda session, _: api.manage.put_schedule(
                session, "nightly", greet.bind("y"), cron="0 4 * * *"
            ),
            "pause a schedule": lambda session, _: api.manage.pause_schedule(session, "nightly", reason="holiday"),
            "resume a schedule": lambda session, _: api.manage.resume_schedule(session, "nightly"),
            "run a schedule": lambda session, _: api.manage.run_schedule(session, "nightly"),
            "backfill a schedule": lambda session, _: api.manage.backfill_schedule(
                session, "nightly", since=NEW_YEAR, until=NEW_YEAR + 2 * DAY
            ),
            "delete a schedule": lambda session, _: session.execute(delete(Schedule)),
        },
    }


def _of_operators(api: Any) -> Verbs:
    """Return what operators are for, besides."""
    return {
        "operator": {
            "resume": lambda session, world: api.manage.resume(session, world.cancelled),
            "retry": lambda session, world: api.manage.retry(session, world.failed),
            "rewind": lambda session, world: api.manage.rewind(session, world.owner, to_step="create_callback"),
            "change": lambda session, world: api.manage.change(
                session, world.pending, queue="mail", priority=1, delay=DAY
            ),
            "fork": lambda session, world: api.manage.fork(session, world.owner),
            "delete": lambda session, world: api.manage.delete(
                session, select(Workflow).where(Workflow.id == world.done)
            ),
            "put a policy": lambda session, _: api.manage.put_retention(session, "all", keep=DAY),
            "drop a policy": lambda session, _: api.manage.drop_retention(session, "all"),
            "pause a queue": lambda session, _: api.manage.pause_queue(session, "mail"),
            "resume a queue": lambda session, _: api.manage.resume_queue(session, "mail"),
            "put a queue": lambda session, _: api.manage.put_queue(session, "mail", fair=True, weights={"a": 2}),
            "pause a key": lambda session, _: api.manage.pause_key(session, "fair", "a"),
            "resume a key": lambda session, _: api.manage.resume_key(session, "fair", "a"),
            "write to the audit": lambda session, world: session.add(
                Audit(who="ada", verb="cancel", workflow_id=world.pending, details={"reason": "x"})
            ),
        },
    }


def _of_readers() -> Verbs:
    """Return what readers are for."""
    return {
        "reader": {
            **{f"read {each.__tablename__}": reading(each) for each in TABLES},
            **{f"read {each}": viewing(each) for each in VIEWS},
        },
    }


VERBS = verbs_of(sqla_durable)
WITH_POLICIES = {
    "replacer": {*VERBS["starter"]},
    "caller": {"read blob_chunk"},
    "scheduler": {"read schedule", "start many"},
    "operator": {
        *VERBS["reader"],
        *VERBS["caller"],
        *VERBS["scheduler"],
        "cancel",
        "start",
        "start many",
        "start under a known key",
        "start with a blob",
    },
    "reader": {*VERBS["caller"]},
    "updater": {"event"},
}
ALSO = WITH_POLICIES | {
    "updater": {*VERBS["signaller"], "event"},
    "answerer": {*VERBS["signaller"]},
}


def expected(role: str, also: Mapping[str, set[str]] = ALSO) -> dict[str, str]:
    allowed = {*VERBS[role], *also.get(role, set())}
    return {verb: "" if verb in allowed else DENIED for verbs in VERBS.values() for verb in verbs}


def tried(engine: Engine, verb: Verb, world: World) -> str:
    """Carry a verb out and take it back; return the SQLSTATE of its error."""
    with Session(engine) as session:
        try:
            verb(session, world)
            session.flush()
        except DBAPIError as error:
            return sqlstate_of(error)
    return ""
