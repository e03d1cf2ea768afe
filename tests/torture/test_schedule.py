"""The schedule: what a seed repeats, and that no kind of fault is forgotten."""

from __future__ import annotations

from itertools import islice

from sqla_durable.tools.torture.schedule import Fault, Injection, is_guarded, schedule
from sqla_durable.tools.torture.traffic import batches


def first(count: int, seed: int, *, kinds: tuple[Fault, ...] = tuple(Fault), workers: int = 4) -> list[Injection]:
    return list(islice(schedule(seed, kinds=kinds, workers=workers, outage=4.0), count))


def test_same_seed_gives_the_same_faults_and_the_same_transfers() -> None:
    assert first(100, 7) == first(100, 7)
    assert list(islice(batches(7, accounts=24), 100)) == list(islice(batches(7, accounts=24), 100))


def test_another_seed_gives_others() -> None:
    assert first(20, 7) != first(20, 8)
    assert list(islice(batches(7, accounts=24), 5)) != list(islice(batches(8, accounts=24), 5))


def test_every_kind_comes_once_in_a_round() -> None:
    rounds = first(3 * len(Fault), 1)
    for number in range(3):
        kinds = [each.kind for each in rounds[number * len(Fault) : (number + 1) * len(Fault)]]
        assert sorted(kinds) == sorted(Fault)
    assert [each.number for each in rounds] == list(range(1, len(rounds) + 1))


def test_only_the_kinds_that_were_asked_for_come() -> None:
    assert {each.kind for each in first(50, 1, kinds=(Fault.KILL, Fault.CUT))} == {Fault.KILL, Fault.CUT}


def test_victims_exist_and_freezes_and_stalls_hit_the_right_workers() -> None:
    for each in first(500, 3, workers=4):
        assert each.victims
        assert set(each.victims) <= set(range(4))
        if each.kind in (Fault.FREEZE, Fault.STALL):
            assert [is_guarded(place) for place in each.victims] == [each.kind is Fault.FREEZE]
        if each.kind in (Fault.CRASH, Fault.KILL_ALL):
            assert each.victims == (0, 1, 2, 3)


def test_transfers_are_numbered_without_gaps_and_some_are_rolled_back() -> None:
    given = list(islice(batches(5, accounts=24), 200))
    numbers = [order.transfer for batch in given for order in batch.orders]
    assert numbers == list(range(1, len(numbers) + 1))
    assert {batch.rolled_back for batch in given} == {True, False}
    assert all(order.source != order.target for batch in given for order in batch.orders)
