"""Sums that fail and are tried again: who takes part, what is the same, and when a round is given up."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from resuming import RANK, Clock, Crash, World

from common.codec.state import state_digest
from common.config.manifest import Manifest
from common.errors import RoundError
from common.messages import RoundStart, decode
from common.progress import RoundLost, SiteFailed, StageFinished, SumOpened
from common.secure_sum.coordinator import Stage
from common.secure_sum.messages import VERSION
from server.channel import Channel, Reply

Manifests = Callable[..., Manifest]
FOUR = ("north", "south", "west", "east")
# Exchanges in order, five a round: the request, keys, shares (answered with the vector), survivors, confirmations.
REQUEST, KEYS, SHARES = 6, 7, 8  # of the second round
PRIVATE: dict[str, Any] = {"epsilon": 50.0, "delta": 1e-3, "unsafe_seed": 7}


class Failing:
    """Sites of which some answer with a word in some exchanges, without having seen the message."""

    def __init__(self, inner: Channel, words: Mapping[int, Mapping[str, str]]) -> None:
        self.inner, self.words, self.exchanges = inner, words, 0
        self.starts: list[tuple[str, RoundStart]] = []

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        if not requests:
            return
        self.exchanges += 1
        words = self.words.get(self.exchanges, {})
        for site, data in requests.items():
            if data[0] != VERSION and isinstance(header := decode(data).header, RoundStart):
                self.starts.append((site, header))
            if site in words:
                yield Reply(site, None, words[site], 0, len(data), reason="rank 9, most 8" * (words[site] == "policy"))
        yield from self.inner.exchange({site: data for site, data in requests.items() if site not in words}, kind=kind)


def world(
    folder: Path,
    manifest_for: Manifests,
    words: Mapping[int, Mapping[str, str]],
    *,
    attempts: int = 2,
    private: bool = False,
    **aggregation: Any,
) -> tuple[World, Failing]:
    manifest = manifest_for(
        adapter={"rank": RANK},
        training={"rounds": 3},
        aggregation={"method": "separate", **aggregation},
        evaluation={"metrics": ["accuracy"]},
        secure_sum={"enabled": True},
        **({"privacy": PRIVATE} if private else {}),
    )
    folder.mkdir()
    channels: list[Failing] = []

    def between(channel: Channel) -> Channel:
        channels.append(Failing(channel, words))
        return channels[0]

    return World(folder, manifest, sites=FOUR, attempts=attempts, between=between), channels[0]


def sums(it: World) -> list[tuple[int, int]]:
    return [(event.round, len(event.survivors)) for event in it.events if isinstance(event, SumOpened)]


@pytest.mark.parametrize("exchange", [REQUEST, KEYS])
@pytest.mark.parametrize("word", ["unknown_attempt", "timeout"])
def test_before_a_vector_left_the_sum_is_tried_again(
    tmp_path: Path, manifest_for: Manifests, word: str, exchange: int
) -> None:
    plain, _ = world(tmp_path / "plain", manifest_for, {})
    it, seen = world(tmp_path / "failing", manifest_for, {exchange: dict.fromkeys(("west", "east"), word)})
    wanted, found = plain.process(), it.process()
    assert state_digest(found) == state_digest(wanted)  # the same four sites, the same words
    assert sums(it) == sums(plain) == [(1, 4), (2, 4), (3, 4), (3, 4)]
    second = [header for _, header in seen.starts if header.round == 2]
    assert len(second) == 8
    assert len({header.secure_sum for header in second}) == 2  # two attempts; all else is the same
    assert len({header.model_copy(update={"secure_sum": ""}).model_dump_json() for header in second}) == 1


def test_who_is_silent_is_left_out_of_the_next_attempt_and_invited_to_the_next_round(
    tmp_path: Path, manifest_for: Manifests
) -> None:
    words = {KEYS: {"east": "timeout", "west": "unknown_attempt"}}
    it, seen = world(tmp_path / "failing", manifest_for, words)
    it.process()
    assert sums(it) == [(1, 4), (2, 3), (3, 4), (3, 4)]
    assert it.coordinator is not None
    assert it.coordinator.rounds[2].failures == {"east": "timeout"}
    assert [site for site, header in seen.starts if header.round == 2].count("east") == 1
    assert [site for site, header in seen.starts if header.round == 3] == list(FOUR)
    # Three sites would have other lanes and ranges than four; the vector is one for both.
    assert {header.sites for _, header in seen.starts} == {4}


def test_after_a_vector_left_the_round_is_lost_and_the_next_one_begins(tmp_path: Path, manifest_for: Manifests) -> None:
    words = {SHARES: dict.fromkeys(("west", "east"), "unknown_attempt")}
    it, seen = world(tmp_path / "failing", manifest_for, words)
    it.process()
    assert it.coordinator is not None
    rounds = it.coordinator.rounds
    assert [bool(done.lost) for done in rounds] == [False, False, True, False]
    assert [event.round for event in it.events if isinstance(event, RoundLost)] == [2]
    assert sums(it) == [(1, 4), (3, 4), (3, 4)]
    assert it.coordinator.accepted == 2
    assert [done.rejected for done in rounds] == [None] * 4
    # The two sites whose vectors left have measured the adapter of round 1: nobody is asked again, and its figures stay
    # unknown.
    assert [header.evaluate for site, header in seen.starts if site == "north"] == [True, True, False]
    assert [bool(done.counts) for done in rounds] == [True, False, False, True]
    assert {header.adapter_sha256 for _, header in seen.starts if header.round > 1} == {
        next(header.adapter_sha256 for _, header in seen.starts if header.round == 2)
    }


def test_lost_rounds_one_after_the_other_end_the_run_and_it_can_be_resumed(
    tmp_path: Path, manifest_for: Manifests
) -> None:
    gone = dict.fromkeys(("west", "east"), "unknown_attempt")
    it, _ = world(tmp_path / "failing", manifest_for, {3: gone}, attempts=1)
    with pytest.raises(RoundError, match="1 rounds one after the other were lost, the last is stored") as error:
        it.process()
    assert "west (unknown_attempt), east (unknown_attempt)" in str(error.value)
    assert "\n" not in str(error.value)
    it.process()
    assert sums(it) == [(2, 4), (3, 4), (3, 4)]


@pytest.mark.parametrize(("word", "count"), [("unknown_attempt", 4), ("timeout", 3)])
def test_with_privacy_the_identical_vector_is_masked_anew(
    tmp_path: Path, manifest_for: Manifests, word: str, count: int
) -> None:
    plain, _ = world(tmp_path / "plain", manifest_for, {}, private=True)
    words = {SHARES: {"east": word, "west": "unknown_attempt"}}
    it, _ = world(tmp_path / "failing", manifest_for, words, private=True)
    wanted, found = plain.process(), it.process()
    assert sums(it) == [(1, 4), (2, count), (3, 4)]
    assert it.coordinator is not None
    assert not any(done.lost for done in it.coordinator.rounds)
    assert (state_digest(found) == state_digest(wanted)) == (count == 4)


def test_killed_between_attempts_it_ends_the_same(tmp_path: Path, manifest_for: Manifests) -> None:
    for name, private in (("lost", False), ("again", True)):
        words = {SHARES: dict.fromkeys(("west", "east"), "unknown_attempt")}
        clock, (plain, _) = Clock(), world(tmp_path / name, manifest_for, words, private=private)
        result = plain.process(clock)
        for moment in range(44, min(80, clock.now), 3):
            it, _ = world(tmp_path / f"{name} {moment}", manifest_for, words, private=private)
            with pytest.raises(Crash):
                it.process(Clock(moment))
            assert state_digest(it.process()) == state_digest(result), moment
            assert it.coordinator is not None
            assert plain.coordinator is not None
            assert [d.lost for d in it.coordinator.rounds] == [d.lost for d in plain.coordinator.rounds]


def test_refusals_are_shown_with_their_reason(tmp_path: Path, manifest_for: Manifests) -> None:
    it, _ = world(tmp_path / "failing", manifest_for, {REQUEST: {"east": "policy"}})
    it.process()
    failed = [(e.round, e.site, e.code, e.reason) for e in it.events if isinstance(e, SiteFailed)]
    assert failed == [(2, "east", "policy", "rank 9, most 8")]
    words = {REQUEST: dict.fromkeys(("east", "west"), "policy"), REQUEST + 1: dict.fromkeys(("east", "west"), "policy")}
    it, _ = world(tmp_path / "two", manifest_for, words)
    with pytest.raises(RoundError, match=r"Sites that failed: west \(policy: rank 9, most 8\), east \(policy: rank"):
        it.process()


def test_fewer_than_the_aggregation_wants_are_never_opened(tmp_path: Path, manifest_for: Manifests) -> None:
    it, _ = world(tmp_path / "failing", manifest_for, {REQUEST: {"east": "timeout"}}, min_sites=4)
    it.process()
    assert sums(it) == [(1, 4), (2, 4), (3, 4), (3, 4)]


def test_every_stage_tells_how_long_each_site_took(tmp_path: Path, manifest_for: Manifests) -> None:
    it, _ = world(tmp_path / "whole", manifest_for, {SHARES: {"east": "timeout"}}, private=True)
    it.process()
    stages = [event for event in it.events if isinstance(event, StageFinished) and event.round == 2]
    first = [event.stage for event in stages[: len(Stage)]]
    assert first == [stage.value for stage in Stage]
    assert all(set(event.waited) == set(FOUR) for event in stages[:3])
    assert set(stages[3].waited) == set(FOUR) - {"east"}
    for event in stages:
        assert max(event.waited.values()) <= event.seconds
