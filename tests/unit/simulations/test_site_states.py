"""What a simulated site remembers comes back as it was, whatever it was."""

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.state import SiteState
from simulations.site_states import load_state, save_state

NUMBERS = st.integers(0, 2**40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.builds(SiteState, NUMBERS, NUMBERS, NUMBERS, st.binary(max_size=40)), min_size=1, max_size=4))
def test_the_state_that_was_saved_last_is_loaded(tmp_path: Path, states: list[SiteState]) -> None:
    for state in states:
        save_state(tmp_path, state)
        assert load_state(tmp_path) == state


def test_a_site_that_has_not_taken_part_has_a_new_state(tmp_path: Path) -> None:
    assert load_state(tmp_path) == SiteState()
