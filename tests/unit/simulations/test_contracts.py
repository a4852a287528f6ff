"""Contract clauses: the same for a seed everywhere, disjoint between splits, and skewed at each firm."""

import hashlib
import re
from collections import Counter, defaultdict
from functools import cache

import pytest

from common.errors import DataError
from simulations import contracts_phrases as phrases
from simulations.contracts import FIRMS, LABELS, records

SPLITS = ("train", "dev", "test", "public")
# What a site's name may be in a manifest: the natural partitioner names sites for their groups.
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@cache
def split_of(split: str, seed: int = 0) -> tuple[dict[str, str], ...]:
    return tuple(records(split, seed))


def everything() -> list[dict[str, str]]:
    return [record for split in SPLITS for record in split_of(split)]


def test_a_seed_gives_the_same_records_again() -> None:
    assert tuple(records("test", 0)) == split_of("test")


def test_another_seed_gives_other_clauses() -> None:
    texts = {record["text"] for record in split_of("test")}
    others = {record["text"] for record in split_of("test", 1)}

    assert len(texts & others) < 0.1 * len(texts)


def test_the_records_are_the_same_on_every_machine() -> None:
    texts = "\n".join(record["text"] for record in split_of("train"))

    # Changes with any phrase or probability; results that were published with the old records then need a new run.
    assert (
        hashlib.sha256(texts.encode()).hexdigest() == "49c585d035df68ed63c24a115fbc24dda41ad8c3f371d90ed878a01e359822e3"
    )


def test_a_record_has_text_label_unit_and_group() -> None:
    for record in everything():
        assert set(record) == {"text", "label", "unit", "group"}
        assert record["label"] in LABELS
        assert record["group"] in FIRMS


def test_splits_share_neither_contract_nor_text() -> None:
    for field in ("unit", "text"):
        values = [{record[field] for record in split_of(split)} for split in SPLITS]

        assert len(set.union(*values)) == sum(map(len, values)), field


def test_no_text_stands_twice() -> None:
    texts = [record["text"] for record in everything()]

    assert len(set(texts)) == len(texts)


def test_there_are_six_firms_and_eighteen_types_with_names_fit_for_a_manifest() -> None:
    assert len(set(FIRMS)) == 6
    assert len(set(LABELS)) == 18
    assert all(SITE_NAME.fullmatch(firm) for firm in FIRMS)


def test_a_contract_belongs_to_one_firm_and_holds_six_to_ten_clauses() -> None:
    for split in SPLITS:
        groups: dict[str, set[str]] = defaultdict(set)
        for record in split_of(split):
            groups[record["unit"]].add(record["group"])
        clauses = Counter(record["unit"] for record in split_of(split))

        assert all(len(firms) == 1 for firms in groups.values())
        assert set(clauses.values()) <= set(range(6, 11))


@pytest.mark.parametrize(
    ("split", "low", "high"), [("train", 1350, 1650), ("dev", 150, 230), ("test", 300, 380), ("public", 1750, 2150)]
)
def test_splits_have_their_sizes(split: str, low: int, high: int) -> None:
    assert low <= len(split_of(split)) <= high


def test_firms_are_unequal_in_training() -> None:
    sizes = Counter(record["group"] for record in split_of("train"))

    assert all(150 <= sizes[firm] <= 350 for firm in FIRMS)
    assert max(sizes.values()) >= 1.3 * min(sizes.values())


@pytest.mark.parametrize("firm", FIRMS)
def test_a_firms_training_mix_is_skewed_and_lacks_types(firm: str) -> None:
    mix = Counter(record["label"] for record in split_of("train") if record["group"] == firm)
    five_most = sum(count for _, count in mix.most_common(5))

    assert 0.45 <= five_most / mix.total() <= 0.7
    assert 3 <= len(set(LABELS) - set(mix)) <= 6


def test_every_type_is_common_at_some_firm() -> None:
    assert {label for firm in phrases.FIRMS for label in firm.often} == set(LABELS)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_held_out_records_are_balanced_over_types_and_firms(split: str) -> None:
    for field, kinds in (("label", LABELS), ("group", FIRMS)):
        counts = Counter(record[field] for record in split_of(split))

        assert set(counts) == set(kinds)
        assert max(counts.values()) <= 1.5 * min(counts.values())


def test_clauses_are_of_fair_length() -> None:
    lengths = [len(record["text"].split()) for record in everything()]

    assert min(lengths) >= 15
    assert max(lengths) <= 45
    assert 25 <= sum(lengths) / len(lengths) <= 35


def test_clauses_are_finished_sentences() -> None:
    for record in everything():
        assert not re.search(r"[{}\[\]|]|  |\s[,.;:]|\.\.", record["text"]), record["text"]
        assert record["text"].endswith((".", "?")), record["text"]
        assert not record["text"][0].islower(), record["text"]


def test_the_first_word_does_not_give_the_type_away() -> None:
    first_words: dict[str, Counter[str]] = defaultdict(Counter)
    for record in split_of("test"):
        first_words[record["text"].split()[0]][record["label"]] += 1
    guessed = sum(max(labels.values()) for labels in first_words.values())

    assert guessed < 0.45 * len(split_of("test"))


@pytest.mark.parametrize("label", LABELS)
def test_every_type_has_a_dozen_cores_two_of_them_in_each_firms_habit(label: str) -> None:
    owners = Counter(line.split(": ")[0] for line in phrases.CORES[label].splitlines() if line[:1].strip())

    assert owners.total() >= 12
    assert set(owners) == {phrases.ANY_FIRM, *FIRMS}
    assert all(owners[firm] >= 2 for firm in FIRMS)


def test_neighbours_and_topics_name_types() -> None:
    assert set(phrases.TOPICS) == set(phrases.NEIGHBOURS) == set(phrases.CORES) == set(LABELS)
    assert all(set(near) <= set(LABELS) - {label} for label, near in phrases.NEIGHBOURS.items())


@pytest.mark.parametrize("split", ["validation", "", "Train"])
def test_an_unknown_split_is_refused_at_once_in_one_line(split: str) -> None:
    with pytest.raises(DataError, match=r"split must be one of train, dev, test, public, found") as caught:
        records(split, 0)

    assert "\n" not in str(caught.value)
