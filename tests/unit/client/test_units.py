import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.units import require_disjoint_units, split_units, units_of
from common.errors import DataError
from common.records import Record, TextRecord

RECORDS = st.lists(
    st.builds(TextRecord, unit=st.integers(0, 12).map(str), text=st.text(max_size=3), label=st.just("a")), max_size=40
)


def of_units(*units: str) -> list[Record]:
    return [TextRecord(unit=unit, text=str(place), label="a") for place, unit in enumerate(units)]


def test_units_are_in_order_of_first_appearance() -> None:
    records = of_units("b", "a", "b", "c")
    assert units_of(records) == {"b": [records[0], records[2]], "a": [records[1]], "c": [records[3]]}


@settings(deadline=None)
@given(records=RECORDS, fraction=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 9))
def test_a_split_never_cuts_a_unit(records: list[Record], fraction: float, seed: int) -> None:
    kept, held = split_units(records, fraction, seed=seed, purpose="split")
    assert not units_of(kept).keys() & units_of(held).keys()
    assert sorted(map(id, kept + held)) == sorted(map(id, records))
    assert [r for r in records if r.unit in units_of(held)] == held  # the order given
    units = len(units_of(records))
    wanted = round(fraction * units)
    expected = 0 if fraction == 0 or units < 2 else max(1, min(wanted, units - 1))
    assert len(units_of(held)) == expected


def test_a_split_depends_on_seed_and_purpose_only() -> None:
    records = of_units(*(str(number) for number in range(200)))
    first = split_units(records, 0.5, seed=1, purpose="holdout")
    assert split_units(records, 0.5, seed=1, purpose="holdout") == first
    assert split_units(records, 0.5, seed=2, purpose="holdout") != first
    assert split_units(records, 0.5, seed=1, purpose="test") != first


def test_every_unit_is_held_out_about_as_often() -> None:
    # 400 splits of 10 units, 3 held out: a unit is held out Binomial(400, 0.3) times, mean 120, sd 9.2; 5 sd = 46.
    records = of_units(*"abcdefghij")
    counts = dict.fromkeys("abcdefghij", 0)
    for seed in range(400):
        for unit in units_of(split_units(records, 0.3, seed=seed, purpose="split")[1]):
            counts[unit] += 1
    assert all(abs(count - 120) < 46 for count in counts.values())


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_an_impossible_share_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match="at least 0 and below 1"):
        split_units(of_units("a", "b"), fraction, seed=0, purpose="split")


def test_shared_units_are_counted_and_not_named() -> None:
    require_disjoint_units({"train": of_units("a", "b"), "dev": of_units("c"), "test": []})
    with pytest.raises(DataError) as error:
        require_disjoint_units(
            {"train": of_units("u-Smith", "b"), "dev": of_units("c"), "test": of_units("u-Smith", "c")}
        )
    assert "more than one part: train and test share 1, dev and test share 1; move" in str(error.value)
    assert "Smith" not in str(error.value)
