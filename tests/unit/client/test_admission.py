"""What a policy refuses: one line for each breach, with what is asked and what is allowed."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.admission import breaches, require_admitted, require_bytes, require_hours
from client.hours import Window
from client.policy import SitePolicy, load_policy
from common.config.manifest import Manifest
from common.errors import ManifestError, PolicyBreach

Manifests = Callable[..., Manifest]
TEXT = """\
version = 1
name = "st-anna"
[data]
train = "records.jsonl"
[population]
name = "patients"
unit = "record"
units = 1100
epsilon = 10.0
delta = 1e-4
"""
SECURE = {"enabled": True}
PRIVATE = {"epsilon": 4.0, "delta": 1e-5}
PINNED = "a" * 64


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[str], SitePolicy]:
    def make(more: str = "") -> SitePolicy:
        path = tmp_path / "site.toml"
        path.write_text(TEXT + more)
        return load_policy(path)

    return make


def test_a_policy_without_limits_admits_what_is_masked(
    policy: Callable[..., SitePolicy], manifest_for: Manifests
) -> None:
    assert breaches(manifest_for(secure_sum=SECURE, privacy=PRIVATE), policy(), sites=3) == []
    require_admitted(manifest_for(secure_sum=SECURE), policy(), sites=3)


@pytest.mark.parametrize(
    ("limits", "asked", "line"),
    [
        (
            f'[limits]\nbases = ["{"b" * 64}"]',
            {"model": {"weights_sha256": PINNED}},
            f"model.weights_sha256: asked {PINNED}, allowed one of 1 in limits.bases",
        ),
        (
            f'[limits]\nbases = ["{PINNED}"]',
            {},
            "model.weights_sha256: asked a base whose weights are not pinned, allowed one of 1 in limits.bases",
        ),
        (
            '[limits]\nadapter_methods = ["lora", "qlora"]',
            {"adapter": {"method": "full"}},
            "adapter.method: asked full, allowed lora, qlora",
        ),
        (
            '[limits]\ntasks = ["causal-lm"]',
            {},
            "task.kind: asked text-classification, allowed causal-lm",
        ),
        ("[limits]\nrank = 4", {"adapter": {"rank": 5}}, "adapter.rank: asked 5, allowed 4"),
        ("[limits]\nrounds = 4", {"training": {"rounds": 5}}, "training.rounds: asked 5, allowed 4"),
        ("[limits]\nepsilon = 3.5", {"privacy": PRIVATE}, "privacy.epsilon: asked 4, allowed 3.5"),
        ("[limits]\nepsilon = 3.5", {}, "privacy.epsilon: asked no privacy, allowed 3.5"),
        ("[limits]\ndelta = 1e-6", {"privacy": PRIVATE}, "privacy.delta: asked 1e-05, allowed 1e-06"),
        ("[limits]\ndelta = 1e-6", {}, "privacy.delta: asked no privacy, allowed 1e-06"),
        ("", {"privacy": {**PRIVATE, "unit": "patient"}}, "privacy.unit: asked patient, allowed record"),
        (
            "",
            {"privacy": {**PRIVATE, "unsafe_seed": 1}},
            "privacy.unsafe_seed: asked noise that can be repeated, allowed none",
        ),
        (
            "",
            {"secure_sum": {"enabled": False}},
            "secure_sum.enabled: asked false, allowed sums over 3 sites or more",
        ),
        (
            '[secure_sum]\nmetrics = "none"\nunsafe_unmasked = true',
            {"secure_sum": {"enabled": False}},
            "secure_sum.metrics: asked this site's own loss and counts, allowed none",
        ),
        ("[secure_sum]\nmin_sites = 5", {}, "secure_sum.min_sites: asked sums over 4 sites, allowed 5 or more"),
    ],
)
def test_each_breach_has_a_line_of_its_own(
    policy: Callable[..., SitePolicy], manifest_for: Manifests, limits: str, asked: dict[str, Any], line: str
) -> None:
    manifest = manifest_for(**{"secure_sum": SECURE, **asked})
    assert breaches(manifest, policy(limits), sites=4) == [line]
    with pytest.raises(PolicyBreach) as error:
        require_admitted(manifest, policy(limits), sites=4)
    assert str(error.value) == line


def test_what_is_just_allowed_is_allowed(policy: Callable[..., SitePolicy], manifest_for: Manifests) -> None:
    mine = policy(
        f'[limits]\nbases = ["{PINNED}"]\nadapter_methods = ["lora"]\ntasks = ["text-classification"]\nrank = 8\n'
        "rounds = 5\nepsilon = 4.0\ndelta = 1e-5\n[secure_sum]\nmin_sites = 4\n"
    )
    manifest = manifest_for(
        model={"weights_sha256": PINNED}, training={"rounds": 5}, privacy=PRIVATE, secure_sum=SECURE
    )
    assert breaches(manifest, mine, sites=4) == []
    assert breaches(manifest, mine) == []


def test_all_breaches_are_told_at_once(policy: Callable[..., SitePolicy], manifest_for: Manifests) -> None:
    with pytest.raises(PolicyBreach) as error:
        require_admitted(manifest_for(adapter={"rank": 9}), policy("[limits]\nrank = 8\nrounds = 1"))
    assert str(error.value).count("; ") == 2
    assert "\n" not in str(error.value)


def test_an_order_that_is_too_large(policy: Callable[..., SitePolicy]) -> None:
    mine = policy("[limits]\nmessage_bytes = 70000")
    require_bytes(mine, 70_000)
    with pytest.raises(PolicyBreach, match=r"^limits.message_bytes: asked 70001, allowed 70000$"):
        require_bytes(mine, 70_001)


class TestHours:
    def test_a_night_belongs_to_the_day_on_which_it_begins(self, policy: Callable[..., SitePolicy]) -> None:
        mine = policy('[limits]\nhours = ["mon-fri 18:00-06:00", "sun 10:30-12:00"]')
        allowed = {
            (23, 17, 59): False,  # a Monday
            (23, 18, 0): True,
            (24, 5, 59): True,
            (24, 6, 0): False,
            (28, 5, 59): True,  # Saturday, still Friday's night
            (28, 19, 0): False,
            (29, 10, 29): False,
            (29, 10, 30): True,
            (29, 12, 0): False,
            (30, 3, 0): False,  # Monday: Sunday's night is none
        }
        for (day, hour, minute), wanted in allowed.items():
            moment = datetime(2026, 11, day, hour, minute)
            if wanted:
                require_hours(mine, moment)
            else:
                with pytest.raises(PolicyBreach, match=r"^limits.hours: asked \w+ \d\d:\d\d, allowed mon-fri 18:00"):
                    require_hours(mine, moment)

    def test_without_hours_it_is_always_allowed(self, policy: Callable[..., SitePolicy]) -> None:
        require_hours(policy(), datetime(2026, 1, 1, 3, 4))

    @given(
        first=st.integers(0, 6),
        last=st.integers(0, 6),
        begin=st.integers(0, 1439),
        end=st.integers(0, 1440),
        minute=st.integers(0, 7 * 1440 - 1),
    )
    def test_a_window_holds_what_the_slow_list_of_its_minutes_holds(
        self, first: int, last: int, begin: int, end: int, minute: int
    ) -> None:
        days = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
        text = f"{days[first]}-{days[last]} {begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"
        if begin == end:
            with pytest.raises(ValueError, match="have a length"):
                Window.parse(text)
            return
        minutes = set()
        day = first
        while True:
            length = end - begin if end > begin else end + 1440 - begin
            minutes |= {(1440 * day + begin + step) % (7 * 1440) for step in range(length)}
            if day == last:
                break
            day = (day + 1) % 7
        moment = datetime(2026, 11, 23 + minute // 1440, minute % 1440 // 60, minute % 60)
        assert Window.parse(text).holds(moment) == (minute in minutes)

    @pytest.mark.parametrize("text", ["", "mon", "mon 25:00-26:00", "mon 18-20", "mo 18:00-20:00", "mon 24:00-24:00"])
    def test_what_is_written_otherwise_is_a_line_with_its_place(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "site.toml"
        path.write_text(TEXT + f'[limits]\nhours = ["{text}"]\n')
        with pytest.raises(ManifestError) as error:
            load_policy(path)
        (problem,) = error.value.problems
        assert problem.startswith("site.toml:12: limits.hours")
        assert text in problem
