"""docs/secure-sum.md says what the code does: every number in it is computed here."""

import re
from pathlib import Path

import pytest

from common.bounds import LEAST
from common.codec.fixed_point import step_of
from common.codec.packing import DEFAULT_BITS, Lanes, bits_for
from common.codec.vector import CHECKSUM_WORDS, EXTRA_MOST, EXTRA_UNIT
from common.config.manifest import SecureSumSection
from common.errors import PolicyRefused
from common.secure_sum.config import SumPolicy
from common.secure_sum.coordinator import Stage
from common.secure_sum.graph import MOST_COMPLETE, choose_degree
from common.secure_sum.thresholds import least_survivors, threshold

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "secure-sum.md").read_text(encoding="utf-8")
FLAT = " ".join(TEXT.split())


def rows(pattern: str) -> list[list[str]]:
    """Cells of the table rows that begin with a pattern."""
    lines = [line for line in TEXT.splitlines() if re.match(rf"\| {pattern} ", line)]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def least(sites: int, colluding: int) -> int:
    section = SecureSumSection()
    return least_survivors(
        threshold(sites, colluding),
        min_sites=section.min_sites,
        least_honest=SumPolicy().least_honest,
        colluding=colluding,
    )


def same_with(sites: int, colluding: int) -> bool:
    """Whether so many colluding sites change neither threshold nor survivors."""
    try:
        found = threshold(sites, colluding), least(sites, colluding)
    except PolicyRefused:
        return False
    return found == (threshold(sites, 0), least(sites, 0))


def test_the_table_of_thresholds_is_computed() -> None:
    found = [row for row in rows(r"\d+") if len(row) == 7]
    assert [int(row[0]) for row in found] == [*range(3, 11), 32, 100]
    for row in found:
        sites = int(row[0])
        most = max(colluding for colluding in range(sites) if same_with(sites, colluding))
        lanes = Lanes(bits_for(sites), sites)
        wanted = (threshold(sites, 0), least(sites, 0), sites - least(sites, 0), most, lanes.bits)
        assert tuple(map(int, row[1:6])) == wanted
        assert row[6] == f"{lanes.bytes_per_value:.2f}"


def test_the_formula_is_the_code() -> None:
    assert "t = max(floor(2n/3) + 1, floor((n + c)/2) + 1)" in FLAT
    for sites in range(3, 200):
        for colluding in range(0, (sites - 2) // 2):
            assert threshold(sites, colluding) == max(2 * sites // 3 + 1, (sites + colluding) // 2 + 1)
    assert f"at least max(t, `min_sites`, {SumPolicy().least_honest} + c)" in FLAT
    assert f"With `min_sites = {SecureSumSection().min_sites}` and c = {SecureSumSection().max_colluding}" in FLAT


def test_the_stages_are_those_of_the_protocol() -> None:
    assert [row[0].split()[1].lower() for row in rows(r"[1-9] [A-Z]\w+")] == [stage.value for stage in Stage]


def test_numbers_of_codec_and_graph() -> None:
    (most, bits), *others = DEFAULT_BITS
    words = [f"b is {bits} up to {most} sites", *(f"{bits} up to {most}" for most, bits in others)]
    assert ", ".join(words) in FLAT
    assert "the step is 2R/(2^b - 1)" in FLAT
    assert step_of(3.0, 5) == pytest.approx(2 * 3.0 / (2**5 - 1))
    assert f"below 1/{round(1 / LEAST)} of it" in FLAT
    assert f"Up to {MOST_COMPLETE} sites everybody masks with everybody" in FLAT
    assert f"(130 sites: {choose_degree(130, 0, threshold(130, 0)).neighbours} neighbours)" in FLAT
    assert CHECKSUM_WORDS == 2
    assert "Two checksum words" in FLAT
    assert EXTRA_UNIT == 2.0**-20
    assert pytest.approx(2.0**32) == EXTRA_MOST * EXTRA_UNIT
    assert "in units of 2^-20, up to 2^32 in size" in FLAT


def test_settings_that_it_names_exist() -> None:
    named = {"enabled", "min_sites", "max_colluding", "most_records", "unsafe_two_sites"}
    assert named == set(SecureSumSection.model_fields)
    assert all(name in TEXT for name in named)


def test_there_is_no_number_that_no_test_knows() -> None:
    known = {"2017", "2.67", "130", "24", "64", "20", "32", "14", "128", "16", "11", "1024", "10", "2048", "100"}
    prose = "\n".join(line for line in TEXT.splitlines() if not re.match(r"\| \d+ ", line))
    found = set(re.findall(r"(?<![\w.])\d{2,}(?:\.\d+)?(?!\w)", prose))
    assert found <= known
