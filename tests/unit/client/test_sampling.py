from collections import Counter
from itertools import chain, islice

from hypothesis import given, settings
from hypothesis import strategies as st

from client.sampling import batches

SIZES = {"records": st.integers(1, 40), "batch_size": st.integers(1, 50), "seed": st.integers(0, 3)}


def drawn(
    records: int, batch_size: int, count: int, *, seed: int = 0, site: str = "a", cursor: int = 0
) -> list[list[int]]:
    return list(islice(batches(records, batch_size, seed=seed, site=site, cursor=cursor), count))


@settings(deadline=None)
@given(**SIZES, passes=st.integers(1, 4))
def test_every_pass_holds_each_record_once(records: int, batch_size: int, seed: int, passes: int) -> None:
    count = -(-passes * records // batch_size)
    found = drawn(records, batch_size, count, seed=seed)
    assert all(len(batch) == batch_size for batch in found)
    stream = list(chain.from_iterable(found))
    for start in range(0, passes * records, records):
        assert sorted(stream[start : start + records]) == list(range(records))


@settings(deadline=None)
@given(**SIZES, rounds=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_rounds_go_on_where_the_last_one_ended(records: int, batch_size: int, seed: int, rounds: list[int]) -> None:
    whole = drawn(records, batch_size, sum(rounds), seed=seed)
    parts: list[list[int]] = []
    for steps in rounds:
        parts += drawn(records, batch_size, steps, seed=seed, cursor=len(parts) * batch_size)
    assert parts == whole


@settings(deadline=None)
@given(**SIZES, cursor=st.integers(0, 200))
def test_any_cursor_is_a_place_in_one_stream(records: int, batch_size: int, seed: int, cursor: int) -> None:
    stream = list(chain.from_iterable(drawn(records, 1, cursor + 3 * batch_size, seed=seed)))
    expected = [stream[start : start + batch_size] for start in range(cursor, len(stream), batch_size)]
    assert drawn(records, batch_size, 3, seed=seed, cursor=cursor) == expected


def test_passes_sites_and_seeds_are_shuffled_apart() -> None:
    first, second = drawn(30, 30, 2)
    orders = [first, second, drawn(30, 30, 1, seed=1)[0], drawn(30, 30, 1, site="b")[0], list(range(30))]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_each_record_comes_first_about_as_often() -> None:
    # 600 passes of 6 records: a record is first Binomial(600, 1/6) times, mean 100, deviation 9.1; five of them are 46.
    firsts = Counter(order[0] for order in drawn(6, 6, 600))
    assert all(abs(firsts[record] - 100) < 46 for record in range(6))
