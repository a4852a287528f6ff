import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.units import units_of
from common.errors import DataError, ExtensionError
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from simulations.partitioners import deal, partition, sites_of_groups

SITES = ("a", "b", "c")


def record(unit: str, label: str = "x", group: str | None = None) -> Record:
    return TextRecord(text=f"text of {unit}", label=label, unit=unit, group=group)


def parted(
    records: Sequence[Record], partitioner: str, seed: int = 0, concentration: float = 0.5
) -> dict[str, list[Record]]:
    return partition(records, sites=SITES, partitioner=partitioner, concentration=concentration, seed=seed)


def owners(dealt: dict[str, list[Record]]) -> dict[str, set[str]]:
    return {site: {record.unit for record in own} for site, own in dealt.items()}


@st.composite
def many(draw: st.DrawFn) -> list[Record]:
    """Records of 3 to 15 units of uneven size, in mixed order; at least 3 groups, each unit in one."""
    count = draw(st.integers(3, 15))
    sizes = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    labels = st.sampled_from(["x", "y", "z"])
    groups = [f"g{n % draw(st.integers(3, 6))}" if n >= 3 else f"g{n}" for n in range(count)]
    records = [record(f"u{n}", draw(labels), groups[n]) for n, size in enumerate(sizes) for _ in range(size)]
    return draw(st.permutations(records))


@pytest.mark.parametrize("partitioner", ["natural", "iid", "dirichlet", "quantity"])
def test_a_partition_is_one_of_units(partitioner: str) -> None:
    @settings(deadline=None)
    @given(records=many(), seed=st.integers(0, 99), concentration=st.sampled_from([1e-6, 0.1, 1.0, 1e6]))
    def check(records: list[Record], seed: int, concentration: float) -> None:
        dealt = parted(records, partitioner, seed, concentration)
        assert tuple(dealt) == SITES
        assert all(dealt.values())
        assert sum(map(len, dealt.values())) == len(records)
        units = owners(dealt)
        assert Counter(unit for own in units.values() for unit in own) == Counter(list(units_of(records)))
        for own in dealt.values():  # in the order given
            places = [next(n for n, r in enumerate(records) if r is item) for item in own]
            assert places == sorted(places)
        assert parted(records, partitioner, seed, concentration) == dealt

    check()


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "quantity"])
def test_the_seed_decides(partitioner: str) -> None:
    records = [record(f"u{n}", "xyz"[n % 3]) for n in range(60)]
    assert parted(records, partitioner, seed=1) == parted(records, partitioner, seed=1)
    assert parted(records, partitioner, seed=1) != parted(records, partitioner, seed=2)


@settings(deadline=None)
@given(records=many())
def test_iid_record_counts_are_as_near_as_units_allow(records: list[Record]) -> None:
    counts = [len(own) for own in parted(records, "iid").values()]
    assert max(counts) - min(counts) <= max(map(len, units_of(records).values()))


def test_small_concentration_skews_labels_and_large_does_not() -> None:
    records = [record(f"u{n}", "xyz"[n % 3]) for n in range(3000)]

    def largest_share(concentration: float) -> float:
        dealt = parted(records, "dirichlet", 3, concentration)
        counts = [Counter(r.label for r in own if isinstance(r, TextRecord)) for own in dealt.values()]
        return max(count["x"] for count in counts) / 1000

    assert largest_share(0.01) > 0.9
    # Shares of Dirichlet(1000, 1000, 1000) have sd sqrt(1/3 * 2/3 / 3001) = 0.0086; 5 sd above 1/3.
    assert largest_share(1000.0) < 1 / 3 + 0.043


def test_quantity_skews_sizes_and_not_labels() -> None:
    records = [record(f"u{n}", "xy"[n % 2]) for n in range(4000)]
    dealt = parted(records, "quantity", 5, 0.5)
    assert max(map(len, dealt.values())) > 2 * min(map(len, dealt.values()))
    for own in dealt.values():
        share = sum(isinstance(r, TextRecord) and r.label == "x" for r in own) / len(own)
        assert abs(share - 0.5) < 5 * 0.5 / len(own) ** 0.5  # 5 standard errors of a share of 1/2


def test_dirichlet_keeps_units_of_a_label_together_by_their_main_label() -> None:
    tagged = [
        TokensRecord(tokens=("w", "w"), tags=tags, unit=f"{tags[0]}-{n}")
        for n in range(30)
        for tags in (("B-D", "I-D"), ("B-E", "O"), ("O", "O"))
    ]
    # Concentration near 0 gives each label to one site, but for the units that fill empty sites.
    dealt = parted(tagged, "dirichlet", 1, 1e-6)
    for kind in ("B-D", "B-E", "O"):
        sizes = [sum(r.unit.startswith(kind) for r in own) for own in dealt.values()]
        assert max(sizes) >= 28


def test_dirichlet_deals_a_unit_by_its_most_frequent_label() -> None:
    # All units are x in the main, so at concentration near 0 one site has them, but for one at each empty site.
    records = [record(f"u{n}", label) for n in range(20) for label in ("x", "yz"[n % 2], "x")]
    assert sorted(map(len, owners(parted(records, "dirichlet", 2, 1e-6)).values())) == [1, 1, 18]


def test_dirichlet_takes_the_group_of_instructions_and_needs_one() -> None:
    grouped = [
        InstructionRecord(instruction="q", input="", output="o", unit=f"u{n}", group="gh"[n % 2]) for n in range(20)
    ]
    dealt = parted(grouped, "dirichlet", 0, 1e-6)
    assert max(sum(r.group == "g" for r in own) for own in dealt.values()) >= 8
    bare = [InstructionRecord(instruction="q", input="", output="o", unit=f"u{n}") for n in range(20)]
    with pytest.raises(DataError, match="dirichlet needs labels"):
        parted(bare, "dirichlet")


def test_natural_with_as_many_groups_as_sites() -> None:
    assert sites_of_groups({"z": 1, "y": 9, "x": 5}, SITES) == {"x": "a", "y": "b", "z": "c"}
    assert sites_of_groups({"a": 1, "b": 9, "x": 5}, SITES) == {"a": "a", "b": "b", "x": "c"}
    assert sites_of_groups({"c": 1, "y": 9, "x": 5}, SITES) == {"c": "c", "x": "a", "y": "b"}


def test_natural_with_more_groups_than_sites() -> None:
    # 9 to a, 8 to b, 5 to c, then 4 to c (5), 3 to b (8), 2 to a or c (9 each): a is first
    sizes = {"g": 9, "h": 8, "i": 5, "j": 4, "k": 3, "l": 2}
    assert sites_of_groups(sizes, SITES) == {"g": "a", "h": "b", "i": "c", "j": "c", "k": "b", "l": "a"}
    assert sites_of_groups({"g": 2, "h": 1, "a": 3, "i": 1}, SITES) == {"a": "a", "g": "b", "h": "c", "i": "c"}


SECRET = "SECRET"


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ([record(f"{SECRET}{n}", SECRET, f"{SECRET}{n % 2}") for n in range(9)], "3 sites but 2 groups; use at most 2"),
        ([record(f"{SECRET}{n}", SECRET, None) for n in range(9)], "a record has no group"),
        (
            [record(f"{SECRET}{n % 4}", SECRET, f"{SECRET}{n % 3}") for n in range(9)],
            "units are in more than one group",
        ),
    ],
)
def test_natural_refuses_in_one_line_that_quotes_nothing(records: list[Record], problem: str) -> None:
    with pytest.raises(DataError) as error:
        parted(records, "natural")
    assert problem in str(error.value)
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "quantity"])
def test_fewer_units_than_sites(partitioner: str) -> None:
    with pytest.raises(DataError, match="3 sites but 2 units, so that site c would have no records"):
        parted([record("u"), record("v"), record("v")], partitioner)


def test_an_unknown_partitioner() -> None:
    with pytest.raises(DataError, match="no partitioner 'even'"):
        parted([record(unit) for unit in "uvw"], "even")


MINE = """
def good(units, sites, rng):
    names = list(units)
    return {site: [names[n] for n in range(len(names)) if n % len(sites) == place] for place, site in enumerate(sites)}

def random(units, sites, rng):
    return good(dict.fromkeys(list(units)[n] for n in rng.permutation(len(units))), sites, rng)

def missing(units, sites, rng):
    return {site: ids[1:] for site, ids in good(units, sites, rng).items()}

def twice(units, sites, rng):
    return {site: list(units) for site in sites}

def invented(units, sites, rng):
    return good(units, sites, rng) | {"a": ["SECRET"]}

def elsewhere(units, sites, rng):
    return {"SECRET": list(units)}

def one_site(units, sites, rng):
    return {sites[0]: list(units)}

def nothing(units, sites, rng):
    return None

def raises(units, sites, rng):
    raise ValueError("SECRET")

def breaks_units(units, sites, rng):
    dealt = good(units, sites, rng)
    units.clear()
    return dealt
"""


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "partitioner_of_mine", raising=False)
    (tmp_path / "partitioner_of_mine.py").write_text(MINE)
    return tmp_path


def mine(name: str, search: Path, seed: int = 0) -> dict[str, list[Record]]:
    records = [record(f"u{n % 7}") for n in range(21)]
    path = f"partitioner_of_mine:{name}"
    return partition(records, sites=SITES, partitioner=path, concentration=1.0, seed=seed, search=search)


def test_a_function_of_ones_own(search: Path) -> None:
    expected = {"a": {"u0", "u3", "u6"}, "b": {"u1", "u4"}, "c": {"u2", "u5"}}
    assert owners(mine("good", search)) == expected
    assert owners(mine("breaks_units", search)) == expected
    assert mine("random", search) == mine("random", search) != mine("random", search, seed=1)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing", "3 units missing, 0 unknown, 0 dealt again"),
        ("twice", "0 units missing, 0 unknown, 14 dealt again"),
        ("invented", "3 units missing, 1 unknown"),
        ("elsewhere", "deals to 1 unknown sites"),
        ("nothing", "failed with AttributeError"),
        ("raises", "failed with ValueError"),
        ("absent", "has no 'absent'"),
    ],
)
def test_a_function_of_ones_own_is_checked(search: Path, name: str, problem: str) -> None:
    with pytest.raises(ExtensionError) as error:
        mine(name, search)
    assert problem in str(error.value)
    assert SECRET not in str(error.value)


def test_an_empty_site_is_named(search: Path) -> None:
    with pytest.raises(DataError, match="site b has no records under partitioner_of_mine:one_site; use fewer sites"):
        mine("one_site", search)


def test_held_out_records_go_where_their_group_is() -> None:
    train = parted([record(f"u{n}", "x", "ghi"[n % 3]) for n in range(9)], "natural")
    held = [record("v1", group="h"), record("v2", group="new"), record("v2", group="new"), record("v3", group="other")]
    dealt = deal(held, like=train, partitioner="natural", seed=0)
    assert owners(dealt) == {"a": {"v2"}, "b": {"v1"}, "c": {"v3"}}
    with pytest.raises(DataError, match="no group"):
        deal([record("v4")], like=train, partitioner="natural", seed=0)


def test_held_out_records_are_dealt_evenly() -> None:
    train = parted([record(f"u{n}") for n in range(9)], "quantity")
    held = [record(f"v{n}") for n in range(20)]
    dealt = deal(held, like=train, partitioner="quantity", seed=0)
    assert sorted(len(own) for own in dealt.values()) == [6, 7, 7]
    assert dealt == deal(held, like=train, partitioner="quantity", seed=0)
    assert dealt != deal(held, like=train, partitioner="quantity", seed=1)
    assert [len(own) for own in deal(held[:1], like=train, partitioner="iid", seed=0).values()] == [1, 0, 0]
    assert deal([], like=train, partitioner="iid", seed=0) == {"a": [], "b": [], "c": []}


def test_partition_is_a_fixed_one() -> None:
    # Found once and pinned: results of two versions can be compared only if both deal the same.
    records = [record(f"u{n}", "xy"[n % 2]) for n in range(6)]
    assert owners(parted(records, "iid", seed=7)) == {"a": {"u1", "u5"}, "b": {"u0", "u2"}, "c": {"u3", "u4"}}
