"""Payloads: what workflows store is compressed and encrypted, wherever it is stored, and read again by its readers."""

from __future__ import annotations

import gc
import json
from collections.abc import Generator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import (
    Durable,
    Encryption,
    Executor,
    PayloadCodec,
    Worker,
    Workflow,
    WorkflowFunction,
    WorkflowStatus,
    Zstandard,
    complete_callback,
    create_callback,
    current_step,
    current_time,
    errors,
    get_event,
    heartbeat,
    manage,
    map_children,
    read_stream,
    send_signal,
    send_update,
    set_event,
    start_child,
    wait_event,
    wait_signal,
    wait_update,
    write_stream,
)
from sqla_durable.models import Base
from sqla_durable.testing import EndState, advance, export, replay
from tests.store import races

SECRET = "4929 1234"
KEY, OLD_KEY = "k" * 32, "o" * 32
SOON = timedelta(seconds=20)
TICK = timedelta(milliseconds=20)


@pytest.fixture
def session(engine: Engine) -> Generator[Session]:
    with Session(engine) as session:
        yield session


def encrypted(*more: Any, **options: Any) -> Durable:
    return Durable(payloads=[*more, Encryption({"new": KEY, "old": OLD_KEY})], **options)


def where_plain(engine: Engine, words: str = SECRET) -> list[str]:
    """Return the tables that show the words."""
    with Session(engine) as session:
        tables = [each.fullname for each in Base.metadata.sorted_tables]
        wanted = f"%{words}%"
        found = (
            (
                each,
                session.scalar(text(f"SELECT count(*) FROM {each} t WHERE t::text LIKE :wanted"), {"wanted": wanted}),
            )
            for each in tables
        )
        return [table for table, count in found if count]


def storing_everywhere(durable: Durable, session_factory: sessionmaker[Session]) -> WorkflowFunction[..., list[str]]:
    """Return a workflow that stores what it is given wherever a workflow can."""

    @durable.step
    def charge(card: str) -> str:
        heartbeat({"card": card})
        assert current_step().details == {"card": card}
        return f"{card} charged"

    @durable.step
    def note(session: Session, card: str) -> list[str]:
        set_event("noted", card, session=session)
        return [card] * 100

    @durable.workflow
    def child(card: str) -> str:
        return f"{card} in a child"

    @durable.workflow
    def checkout(card: str, *, again: bool = True) -> list[str]:
        if again:
            checkout.continue_as_new(card, again=False)
        callback = create_callback(str)
        set_event("token", callback.token)
        found = [
            charge(card),
            note(card=card)[99],
            start_child(child, card).result(),
            *map_children(child, [card, card]),
        ]
        set_event("card", card)
        write_stream("cards", card, card)
        request = wait_update("change", str)
        request.reply(f"{request.payload} changed")
        found += [wait_signal("card", str), request.payload, callback.result(), wait_event(current_id(), "card", str)]
        assert current_time().year > 2000
        return found

    def current_id() -> UUID:
        with session_factory() as inner:
            return inner.scalars(select(Workflow.id).where(Workflow.name == "checkout")).one()

    return checkout


def test_nothing_that_a_workflow_stores_can_be_read_in_the_tables(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    durable = encrypted(Zstandard(over=40), sessionmaker=session_factory)
    checkout = storing_everywhere(durable, session_factory)
    with Worker(durable, poll_interval=TICK):
        with session_factory.begin() as session:
            started = checkout.start(session, SECRET).id
        token = get_event(session_factory, started, "token", str, timeout=SOON)
        with session_factory.begin() as session:
            asked = send_update(session, started, "change", SECRET, reply=str)
            send_signal(session, started, "card", SECRET)
            complete_callback(session, token, SECRET)
        with session_factory.begin() as session:
            complete_callback(session, token, SECRET)  # the same answer again is seen to be the same
        assert asked.result(SOON) == f"{SECRET} changed"
        found = checkout.handle(session_factory, started).result(SOON)
    assert found == [f"{SECRET} charged", SECRET, *[f"{SECRET} in a child"] * 3, *[SECRET] * 4]
    assert get_event(session_factory, started, "noted", str) == SECRET
    assert [each.value for each in read_stream(session_factory, started, "cards", str)] == [SECRET] * 2
    assert where_plain(engine) == []
    with session_factory() as session:
        used = session.execute(
            text("SELECT DISTINCT output ->> '$as' FROM durable.step WHERE output ? '$as'")
        ).scalars()
        assert set(used) == {'["aes-siv:new"]', '["zstd", "aes-siv:new"]'}


def simple(durable: Durable) -> WorkflowFunction[[str], str]:
    @durable.step
    def repeat(card: str) -> str:
        return card

    @durable.workflow
    def checkout(card: str) -> str:
        return repeat(card) + wait_signal("more", str)

    return checkout


def run(session: Session, checkout: WorkflowFunction[[str], str], workflow: Workflow, more: str = "!") -> Any:
    session.commit()
    send_signal(session, workflow.id, "more", more)
    session.commit()
    return Executor(session).execute(checkout, workflow)


def test_a_fork_reads_what_it_has_copied_and_what_it_was_given(engine: Engine, session: Session) -> None:
    durable = encrypted()
    checkout = simple(durable)
    original = checkout.start(session, SECRET)
    assert run(session, checkout, original) == f"{SECRET}!"
    copy = manage.fork(session, original, from_step="signal:more")
    assert run(session, checkout, copy, "?") == f"{SECRET}?"
    other = manage.fork(session, copy, input={"card": "other " + SECRET}, outcomes={"repeat": "changed " + SECRET})
    assert run(session, checkout, other, "?") == f"changed {SECRET}?"
    received = manage.fork(session, original, outcomes={"signal:more": " received " + SECRET})
    session.commit()
    assert Executor(session).execute(checkout, received) == f"{SECRET} received {SECRET}"
    assert where_plain(engine) == []


def test_a_start_that_replaces_brings_an_input_that_can_be_read(engine: Engine, session: Session) -> None:
    durable = encrypted()
    checkout = simple(durable).options(key="order-1", on_conflict="replace")
    first = checkout.start(session, "first")
    session.commit()
    assert checkout.start(session, SECRET).id == first.id
    assert run(session, checkout, first) == f"{SECRET}!"
    assert where_plain(engine) == []


@pytest.mark.parametrize(
    "copied",
    [
        "UPDATE durable.workflow w SET input = o.input FROM durable.workflow o WHERE o.id = :other AND w.id = :id",
        "UPDATE durable.step s SET output = o.output FROM durable.step o "
        "WHERE o.workflow_id = :other AND s.workflow_id = :id AND s.key = 'repeat' AND o.key = 'repeat'",
        "UPDATE durable.step s SET output = o.input -> 'card' FROM durable.workflow o "
        "WHERE o.id = :id AND s.workflow_id = :id AND s.key = 'repeat'",
        "UPDATE durable.step SET output = jsonb_set(output, '{workflow}', to_jsonb(CAST(:other AS text))) "
        "WHERE workflow_id = :id AND key = 'repeat'",
        "UPDATE durable.step SET output = jsonb_set(output, '{data}', to_jsonb(encode('changed', 'base64'))) "
        "WHERE workflow_id = :id AND key = 'repeat'",
        """UPDATE durable.step SET output = '{"$as": ["aes-siv:new"]}' WHERE workflow_id = :id AND key = 'repeat'""",
        """UPDATE durable.step SET output = '{"$as": 1, "data": ""}' WHERE workflow_id = :id AND key = 'repeat'""",
    ],
)
def test_what_was_copied_from_elsewhere_or_changed_is_refused(session: Session, copied: str) -> None:
    durable = encrypted()
    checkout = simple(durable)
    one, other = checkout.start(session, "one"), checkout.start(session, "other")
    session.commit()
    for each in (one, other):
        Executor(session).execute_until_waiting(checkout, each)
    session.execute(text(copied), {"id": one.id, "other": other.id})
    with pytest.raises(errors.DecodingError, match=r"copied by hand|is none|it was stored"):
        run(session, checkout, one)


def status_of(session: Session, row: Workflow) -> WorkflowStatus:
    session.expire_all()
    status = row.status
    session.commit()
    return status


def test_a_rotated_key_is_read_and_a_missing_one_suspends(
    session: Session, session_factory: sessionmaker[Session], caplog: pytest.LogCaptureFixture
) -> None:
    old = Durable(payloads=[Encryption({"old": OLD_KEY})])
    row = simple(old).start(session, SECRET)
    session.commit()
    del old
    gc.collect()  # its functions refer to it, and it to them
    without = Durable(sessionmaker=session_factory)
    simple(without)
    with pytest.raises(errors.PayloadKeyError, match="no Durable of this process has a codec or key"):
        Executor(session).execute(simple(without), row)
    assert status_of(session, row) is WorkflowStatus.PENDING
    with Worker(without, poll_interval=TICK):
        races.wait_until(lambda: status_of(session, row) is WorkflowStatus.SUSPENDED)
    rotated = encrypted(sessionmaker=session_factory)
    checkout = simple(rotated)
    assert "'aes-siv:old', for which no Durable of this process has a codec or key" in caplog.text
    advance(session, timedelta(minutes=2))
    assert run(session, checkout, row) == f"{SECRET}!"


def test_code_that_catches_everything_does_not_end_without_the_key(session: Session) -> None:
    def defined(durable: Durable) -> tuple[WorkflowFunction[[], list[Any]], WorkflowFunction[[int], int]]:
        @durable.workflow
        def child(number: int) -> int:
            return number

        @durable.workflow
        def parent() -> list[Any]:
            try:
                return [*map_children(child, [1, 2], tolerate=2), wait_signal("more", str)]
            except Exception as error:
                return [str(error)]

        return parent, child

    old = Durable(payloads=[Encryption({"old": OLD_KEY})])
    parent, child = defined(old)
    row = parent.start(session)
    session.commit()
    Executor(session).execute_until_waiting(parent, row)
    for each in row.children:
        Executor(session).execute(child, each)
    Executor(session).execute_until_waiting(parent, row)
    del old, parent, child
    gc.collect()
    send_signal(session, row, "more", "plain")
    session.commit()
    without, _ = defined(Durable())
    with pytest.raises(errors.PayloadKeyError):
        Executor(session).execute(without, row)
    assert status_of(session, row) is WorkflowStatus.PENDING
    knowing, _ = defined(encrypted())
    assert Executor(session).execute(knowing, row) == [1, 2, "plain"]


def test_what_is_not_encrypted_is_refused_where_that_is_required(session: Session) -> None:
    durable = Durable(payloads=[Encryption({"new": KEY}, required=True)])
    checkout = simple(durable)
    assert run(session, checkout, checkout.start(session, SECRET)) == f"{SECRET}!"
    plain = checkout.start(session, SECRET)
    session.commit()
    session.execute(update(Workflow).where(Workflow.id == plain.id).values(input={"card": "forged"}))
    with pytest.raises(errors.DecodingError, match="is not encrypted"):
        run(session, checkout, plain)


@pytest.mark.parametrize("forged", [5, None, [["aes-siv:new"]]])
def test_forged_envelopes_are_refused_as_what_cannot_be_decoded(session: Session, forged: object) -> None:
    checkout = simple(Durable(payloads=[Encryption({"new": KEY}, required=True)]))
    workflow = checkout.start(session, SECRET)
    session.commit()
    session.execute(update(Workflow).where(Workflow.id == workflow.id).values(input={"card": {"$as": forged}}))
    with pytest.raises(errors.DecodingError):
        run(session, checkout, workflow)


def test_rows_from_before_and_rows_of_sql_are_read(session: Session) -> None:
    before = Durable()
    row = simple(before).start(session, SECRET)
    session.flush()
    durable = encrypted()
    checkout = simple(durable)
    assert run(session, checkout, row) == f"{SECRET}!"
    inserted = Workflow(name="checkout", input={"card": SECRET})
    session.add(inserted)
    assert run(session, checkout, inserted) == f"{SECRET}!"


def test_a_value_that_has_the_form_of_an_envelope_is_refused(session: Session) -> None:
    durable = Durable()

    @durable.workflow
    def checkout(order: dict[str, Any]) -> None: ...

    with pytest.raises(errors.EncodingError, match=r"its first key is \"\$as\""):
        checkout.start(session, {"$as": ["zstd"], "data": ""})
    checkout.start(session, {"a": {"$as": 1}, "$as": 2})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: [Encryption({})], "no key"),
        (lambda: [Encryption({"new": "short"})], "has 5 bytes, and needs 32"),
        (lambda: [Encryption({"a:b": KEY})], "without ':'"),
        (lambda: [Encryption({"new": KEY}), Zstandard()], "Encryption comes last"),
        (lambda: [Zstandard(level=99)], "level 1 to 22"),
        (lambda: ["zstd"], "no PayloadCodec"),
    ],
)
def test_wrong_codecs_are_refused(given: Any, words: str) -> None:
    with pytest.raises(errors.DefinitionError, match=words):
        Durable(payloads=given())


def test_a_forged_size_is_refused_before_it_is_decompressed(session: Session) -> None:
    durable = Durable(payloads=[Zstandard(over=1)])
    checkout = simple(durable)
    row = checkout.start(session, "x" * 5_000)
    session.flush()
    assert len(json.dumps(row.input)) < 500
    huge = "KLUv/eAAAAAAAQAAAAEAAA=="  # a frame that says it becomes 4 GiB
    session.execute(update(Workflow).values(input={"card": {"$as": ["zstd"], "data": huge, "workflow": ""}}))
    with pytest.raises(errors.DecodingError, match="says that it becomes"):
        run(session, checkout, row)


def test_plain_values_are_only_compressed_where_that_makes_them_smaller(session: Session) -> None:
    durable = Durable(payloads=[Zstandard(over=100)])
    rows = [simple(durable).start(session, card) for card in ("x" * 98, "x" * 10_000)]
    session.flush()
    assert [list(each.input["card"]) == ["$as", "data", "workflow"] for each in rows[1:]] == [True]
    assert rows[0].input == {"card": "x" * 98}


def nothing(_session: Session, _workflow: Workflow) -> None:
    """Return no state of a domain."""


def test_tools_for_tests_read_what_is_encrypted(session: Session) -> None:
    durable = encrypted()
    checkout = simple(durable)
    row = checkout.start(session, SECRET)
    run(session, checkout, row)
    state = EndState.of(session, row, nothing)
    assert state.values == {"output": f"{SECRET}!", "step repeat": SECRET, "step signal:more": "!"}
    (history,) = export(session, row)
    assert SECRET not in json.dumps(history)
    rotated = Durable(payloads=[Encryption({"newer": "n" * 32, "new": KEY})])
    assert replay(simple(rotated), history).fits


def test_what_a_schedule_starts_is_encrypted(session_factory: sessionmaker[Session], engine: Engine) -> None:
    durable = encrypted(sessionmaker=session_factory)

    @durable.schedule("* * * * * *", arguments={"card": SECRET})
    @durable.workflow
    def report(card: str) -> str:
        return card

    with Worker(durable, poll_interval=TICK), session_factory() as session:
        races.wait_until(lambda: session.scalars(select(Workflow.id).where(Workflow.finished_at.is_not(None))).all())
        (done,) = session.scalars(select(Workflow.id).where(Workflow.finished_at.is_not(None)).limit(1))
    assert report.handle(session_factory, done).result() == SECRET
    assert where_plain(engine) == []


def test_a_codec_that_raises_fails_its_step(session: Session) -> None:
    class Broken(PayloadCodec):
        names = ("broken",)

        def encode(self, data: bytes, place: bytes) -> bytes | None:
            if b"\nstep" in place:
                raise OSError("the key service is away")
            return None

        def decode(self, name: str, data: bytes, place: bytes) -> bytes:
            return data

    durable = Durable(payloads=[Broken()])
    checkout = simple(durable)
    with pytest.raises(OSError, match="the key service is away"):
        run(session, checkout, checkout.start(session, "a"))


def test_values_beside_encrypted_ones_stay_as_they_are(session: Session) -> None:
    durable = encrypted()

    @durable.workflow
    def checkout(card: str, amount: float, note: dict[str, Any]) -> list[Any]:
        return [card, amount, note]

    row = checkout.start(session, SECRET, 1.0, {})
    session.commit()
    sealed = json.dumps(row.input["card"])
    given = f'{{"card": {sealed}, "amount": -1.5E+2 , "note": {{"a,}} \\"": [], "b": "{{"}}}}'
    session.execute(text("UPDATE durable.workflow SET input = :input"), {"input": given})
    session.commit()
    done = Executor(session).execute(checkout, row)
    assert done == [SECRET, -150.0, {'a,} "': [], "b": "{"}]
