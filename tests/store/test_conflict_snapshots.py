"""Starts whose key has a rule in REPEATABLE READ and SERIALIZABLE, beside what others have done since."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from sqla_durable import start_many
from sqla_durable.errors import KeyNotVisibleError, KeyTakenError
from tests.store import races
from tests.store.test_conflicts import RULES, checkout, committed, rows


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("rule", RULES)
def test_with_a_snapshot_what_others_have_done_since_is_an_error_and_the_transaction_goes_on(
    engine: Engine, rule: str, level: str
) -> None:
    keeping = create_engine(engine.url, isolation_level=level)
    changing = rule in ("replace", "debounce", "cancel_running")
    known = committed(engine, checkout.options(key="known")) if changing else None
    with Session(keeping) as session:
        session.scalar(text("SELECT count(*) FROM durable.workflow"))  # which takes the snapshot
        committed(engine)
        if known is not None:
            committed(engine, checkout.options(key="known", on_conflict="replace"), 3)
        for key in ("k", "known") if changing else ("k",):
            ruled = RULES[rule].options(key=key)
            with pytest.raises(KeyNotVisibleError) as caught:
                ruled.start(session, 2)
            with pytest.raises(KeyNotVisibleError) as of_many:
                start_many(session, [checkout.bind(5), ruled.bind(2)])
            for error in (caught.value, of_many.value):
                assert (error.is_newer, error.key) == (True, key)
        fresh = RULES[rule].options(key="fresh")
        first = fresh.start(session, 4).id
        if rule == "refuse":
            with pytest.raises(KeyTakenError):
                fresh.start(session, 5)
        else:
            assert (fresh.start(session, 5).id == first) is (rule != "cancel_running")
        session.commit()
    keeping.dispose()
    assert {key for _, key, _ in rows(engine) if key} == {"k", "fresh"} | ({"known"} if changing else set())
    assert 5 not in [cents for _, key, cents in rows(engine) if key is None]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_with_a_snapshot_a_claim_that_was_faster_is_an_error(engine: Engine, level: str) -> None:
    keeping = create_engine(engine.url, isolation_level=level)
    first = committed(engine)
    with Session(keeping) as session:
        session.scalar(text("SELECT count(*) FROM durable.workflow"))
        with Session(engine) as worker, worker.begin():
            assert races.claim(worker)
        with pytest.raises(KeyNotVisibleError, match="inserted or changed by another") as caught:
            RULES["replace"].start(session, 2)
        assert caught.value.is_newer
        session.rollback()
        assert RULES["replace"].start(session, 2).id != first
        session.commit()
    keeping.dispose()
