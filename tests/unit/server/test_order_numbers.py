"""Numbers of orders: above all before them, whatever the clock does and however often the coordinator is started."""

import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RunError
from server.order_numbers import OrderNumbers

CLOCKS = st.lists(st.tuples(st.integers(0, 2**62), st.booleans()), min_size=1, max_size=20)


@given(clocks=CLOCKS)
def test_they_grow_over_clocks_and_restarts(clocks: list[tuple[int, bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, given_out = Path(folder) / "numbers.txt", []
        numbers = OrderNumbers(path)
        for clock, killed in clocks:
            if killed:
                numbers = OrderNumbers(path)
            with patch("server.order_numbers.time.time_ns", lambda clock=clock: clock):
                given_out.append(numbers.next())
        assert given_out == sorted(set(given_out))
        assert given_out[-1] >= max(clock for clock, _ in clocks)  # a file that is lost would be made up for


def test_the_disk_is_written_before_a_number_is_given_out_and_not_for_each(tmp_path: Path) -> None:
    path, written = tmp_path / "numbers.txt", []
    numbers = OrderNumbers(path)
    for _ in range(1000):
        number = numbers.next()
        written.append(path.read_text())
        assert int(written[-1]) >= number
    assert len(set(written)) <= 2


def test_what_cannot_be_written_is_not_given_out(tmp_path: Path) -> None:
    numbers = OrderNumbers(tmp_path / "nowhere" / "numbers.txt")
    with pytest.raises(RunError, match="cannot write"):
        numbers.next()


@pytest.mark.parametrize("text", ["", "-1", "x", "1.5", str(2**63), "\x80"])
def test_a_damaged_file_is_not_taken_for_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "numbers.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match="damaged"):
        OrderNumbers(tmp_path / "numbers.txt")


def test_the_last_numbers_are_not_given_out(tmp_path: Path) -> None:
    (tmp_path / "numbers.txt").write_text(str(2**63 - 2))
    with pytest.raises(RunError, match="too large"):
        OrderNumbers(tmp_path / "numbers.txt").next()
