"""Attacks on what is around the secure sum: requests, ranges, rounding, weights and answers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from crowd import Crowd, Manifests, changes, request_of

from client.secure_site import SecureSite
from common.codec.packing import bits_for
from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.errors import (
    ChecksumMismatch,
    CoadaptError,
    MessageError,
    OutOfTurn,
    RoundError,
)
from common.messages import Envelope, Evaluate, RoundDone, RoundStart, decode, encode
from common.metrics import count_names
from common.progress import SumOpened
from common.randomness import seeded
from common.summed import sum_number
from server.collection import Collected

VALUES = 4000


@pytest.fixture(scope="module")
def manifest(manifest_for: Manifests) -> Manifest:
    return agreed(manifest_for)


def agreed(manifest_for: Manifests, weighting: str = "uniform", **tables: Any) -> Manifest:
    training = {"rounds": 4, "local_steps": 4, "learning_rate": 0.02, "weight_decay": 0.0, **tables.pop("training", {})}
    aggregation = {"method": "separate", "weighting": weighting}
    return manifest_for(training=training, aggregation=aggregation, **tables)


def zeros(values: int = VALUES) -> AdapterState:
    return {"w": np.zeros(values, np.float32)}


def crowd_of(manifest: Manifest, count: int = 4, values: int = 40, size: float = 0.01) -> Crowd:
    return Crowd(manifest, changes(count, values, size), zeros(values))


def opened(crowd: Crowd) -> int:
    return len([event for event in crowd.events if isinstance(event, SumOpened)])


def measured(crowd: Crowd, number: int, names: tuple[str, ...]) -> Collected:
    return crowd.sums_over(names).measured(Evaluate(**crowd.spoken_of(number)), crowd.adapter)


# What a coordinator could learn.


def test_the_coordinator_does_not_know_how_a_site_rounds(manifest: Manifest) -> None:
    """Values far below a step: each level is the middle one or the next, so the sum says how many were rounded up. Who
    knows how the others round knows whether the value of one site is above a threshold, and which."""
    most = crowd_of(manifest, 3, VALUES)
    most.round()
    header = request_of(most).header
    assert isinstance(header, RoundStart)
    step = 2 * header.ranges["w"] / (2 ** bits_for(3) - 1)
    crowd = crowd_of(manifest, 3, VALUES, size=step / 4)
    for name, site in crowd.consortium.sites.items():  # as in the field, not as in a simulation
        crowd.secure.sites[name] = SecureSite(site.site, site.store, manifest)
    ups = np.rint(3 * crowd.round().mean["w"] / step + 1.5)
    draws = [
        np.frombuffer(
            seeded(manifest.training.seed, "rounding", site, sum_number(crowd.start())).bytes(4 * VALUES), "<u4"
        )
        / 2**32
        for site in range(3)
    ]
    sure = np.logical_and.reduce([np.abs(draw - 0.5) > 0.25 for draw in draws[1:]])
    guess = ups - sum((draw >= 0.5).astype(float) for draw in draws[1:])
    truth = (crowd.made["s0"].change["w"] / step >= 0.5 - draws[0]).astype(float)
    right = float((guess == truth)[sure].mean())
    # Two fair coins fall as two others did with chance 3/8; with rounding that can be foreseen it is 1.
    assert abs(right - 0.375) < 5 * np.sqrt(0.375 * 0.625 / sure.sum()) + 0.05


def test_rounding_is_repeated_with_the_sites_key_alone(manifest: Manifest) -> None:
    def mean(keys: list[bytes | None]) -> np.ndarray:
        crowd = crowd_of(manifest, 3)
        for key, (name, site) in zip(keys, crowd.consortium.sites.items(), strict=True):
            crowd.secure.sites[name] = SecureSite(site.site, site.store, manifest, rounding=key)
        return crowd.round().mean["w"]

    keys: list[bytes | None] = [bytes([site]) * 32 for site in range(3)]
    assert np.array_equal(mean(keys), mean(keys))
    assert not np.array_equal(mean(keys), mean(keys[::-1]))
    assert not np.array_equal(mean([None, None, None]), mean([None, None, None]))
    simulated = [crowd_of(manifest, 3).round().mean["w"] for _ in range(2)]
    assert np.array_equal(*simulated)  # a simulation can be repeated


def with_counts(crowd: Crowd) -> dict[str, float]:
    """Different counts for every site; the last one's are returned."""
    names = count_names(crowd.manifest)
    for place, name in enumerate(crowd.names):
        crowd.made[name] = replace(crowd.made[name], counts=dict.fromkeys(names, 10.0 + place))
    return crowd.made[crowd.names[-1]].counts


def test_one_adapter_is_measured_in_one_sum_alone(manifest: Manifest) -> None:
    """Counts are exact and depend on nothing but adapter and records: two sums over the same adapter, the second with
    a site less, would tell that site's counts to the last digit."""
    crowd = crowd_of(manifest)
    with_counts(crowd)
    first = crowd.round(4, evaluate=True)
    assert first.counts["all sites"]["records"] == 10 + 11 + 12 + 13
    with pytest.raises(RoundError, match=r"s0 \(rerun\)"):
        measured(crowd, 4, crowd.names[:-1])
    again = crowd_of(manifest)
    again.round(1, evaluate=True)
    with pytest.raises(RoundError, match=r"s0 \(rerun\)"):
        again.round(2, again.sums_over(again.names[:-1]), evaluate=True)
    assert again.round(3, evaluate=False).counts == {}  # it trains on
    assert opened(crowd) == 1


def test_a_site_measures_without_training_once_at_the_end_of_a_run(manifest: Manifest) -> None:
    crowd = crowd_of(manifest)
    with_counts(crowd)
    for number in (0, 1, 5, 10**6):
        with pytest.raises(RoundError, match=r"s0 \(message\)"):
            measured(crowd, number, crowd.names)
    ranges = crowd.sums._ranges.of
    crowd.sums._ranges.of = lambda *_, **__: {"w": 0.01}  # type: ignore[method-assign]
    with pytest.raises(RoundError, match=r"s0 \(message\)"):
        crowd.round(5)
    crowd.sums._ranges.of = ranges  # type: ignore[method-assign]
    assert opened(crowd) == 0
    assert crowd.asked == []  # nobody began to train or measure
    assert measured(crowd, 4, crowd.names).counts["all sites"]["records"] == 46
    with pytest.raises(RoundError, match=r"s0 \(replay\)"):
        measured(crowd, 4, crowd.names)


@pytest.mark.parametrize(
    ("factor", "fine"), [(1e-6, False), (1 / 80, False), (1 / 50, True), (1.0, True), (1.1, False)]
)
def test_ranges_are_not_the_coordinators_to_choose(manifest: Manifest, factor: float, fine: bool) -> None:
    """A range that is far too small makes of the sum of values a sum of signs; one far too large, noise."""
    crowd = crowd_of(manifest)
    honest = crowd.sums._ranges.of

    def chosen(*args: Any, **values: Any) -> dict[str, float]:
        return {name: limit * factor for name, limit in honest(*args, **values).items()}

    crowd.sums._ranges.of = chosen  # type: ignore[method-assign]
    if fine:
        crowd.round()
        assert opened(crowd) == 1
    else:
        with pytest.raises(RoundError, match=r"s0 \(sum_policy\)"):
            crowd.round()
        assert crowd.asked == []


# What a coordinator, or whoever can reach a site, could break.


def test_a_request_that_is_refused_leaves_the_running_attempt_alone(manifest: Manifest) -> None:
    crowd = crowd_of(manifest)
    crowd.round(1)
    old = request_of(crowd)
    site = crowd.consortium.sites["s0"]
    answer = crowd.answer

    def meanwhile(name: str, request: Envelope) -> Envelope:
        if name == "s0":
            bad = old.header.model_copy(update={"secure_sum": "00" * 120})
            for request_again in (old, Envelope(header=bad, tensors=old.tensors)):
                with pytest.raises(CoadaptError):
                    site.start(request_again)
        return answer(name, request)

    crowd.answer = meanwhile  # type: ignore[method-assign]
    assert len(crowd.round(2).answers) == 4


def test_a_reply_to_another_request_is_not_masked(manifest: Manifest) -> None:
    crowd = crowd_of(manifest)
    answer, kept = crowd.answer, {}

    def stale(name: str, request: Envelope) -> Envelope:
        kept.setdefault(name, answer(name, request))
        return kept[name] if name == "s1" else answer(name, request)

    crowd.answer = stale  # type: ignore[method-assign]
    assert len(crowd.round(1).answers) == 4
    second = crowd.round(2)
    assert second.failures == {"s1": "message"}
    site = crowd.consortium.sites["s0"]
    with pytest.raises(MessageError, match="is no answer to the request"):
        site.give(Envelope(header=RoundDone.model_validate({**vars(kept["s0"].header), "run_id": "other"})))


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"x.lora_A.weight": np.zeros((), np.float32), "x.lora_B.weight": np.zeros(3, np.float32)},
        {"x.lora_A.weight": np.zeros((3, 2), np.float32), "x.lora_B.weight": np.zeros((2, 3), np.float32)},
        {"x.lora_A.weight": np.zeros((8, 2), np.float32)},
        {"w": np.zeros(0, np.float32)},
        {"w": np.full(40, np.nan, np.float32)},
    ],
)
def test_odd_adapters_are_refused_by_name(manifest: Manifest, tensors: AdapterState) -> None:
    crowd = crowd_of(manifest)

    def changed(name: str, data: bytes) -> bytes:
        return data if data[0] else encode(Envelope(header=decode(data).header, tensors=tensors))

    crowd.tamper = changed
    with pytest.raises(RoundError, match=r"s0 \((adapter|context|message|sum_policy)\)"):
        crowd.round()


def test_empty_and_foreign_messages_are_refused_by_name(manifest: Manifest) -> None:
    crowd = crowd_of(manifest)
    crowd.round(1)
    for data in (b"", b"\x00", b"\x01", b"\x01" * 200, b"\x02" * 200):
        (reply,) = crowd.secure.exchange({"s0": data}, kind="train")
        assert reply.code in ("message", "malformed", "signature", "context", "out_of_turn") or reply.data
    with pytest.raises(OutOfTurn):
        SecureSite(crowd.consortium.sites["s0"].site, crowd.consortium.sites["s0"].store, manifest).receive(b"")


# What a site could break.


def lying(crowd: Crowd, monkeypatch: pytest.MonkeyPatch, weight: float) -> None:
    """Have s0 claim a weight of its own choice."""
    import client.secure_site

    real = client.secure_site.extras

    def false(manifest: Manifest, request: Any, reply: Any, records: int, **others: Any) -> dict[str, float]:
        values = real(manifest, request, reply, records, **others)
        return {**values, "weight": weight} if records == 1 else values

    monkeypatch.setattr(client.secure_site, "extras", false)
    crowd.made["s0"] = replace(crowd.made["s0"], records=1)


@pytest.mark.parametrize("weight", [-72.0, -1000.0, -71.9, 1e9])
def test_a_weight_that_no_site_can_have_ends_the_round(
    manifest_for: Manifests, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    """Three honest sites weigh 24 each. Without the check the mean would be infinite, turned around, a thousand times
    too long, or nothing."""
    crowd = crowd_of(agreed(manifest_for, "records"))
    lying(crowd, monkeypatch, weight)
    with pytest.raises(RoundError, match=r"round 1: .* weigh"):
        crowd.round()


def test_a_level_that_no_site_can_have_ends_the_round(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes for three sites have room for four. A site that fills the rest would move the mean out of its range."""
    import client.secure_site

    real, crowd = client.secure_site.encode_body, crowd_of(manifest, 3)

    def false(state: AdapterState, *args: Any, **values: Any) -> np.ndarray:
        body = real(state, *args, **values)
        if np.array_equal(state["w"], crowd.made["s0"].change["w"]):
            body[0] += np.uint64(2 * (2 ** bits_for(3) - 1))
        return body

    monkeypatch.setattr(client.secure_site, "encode_body", false)
    with pytest.raises(RoundError, match=r"round 1: .* levels"):
        crowd.round()


def test_a_site_whose_vector_does_not_fit_its_checksum_ends_the_round_by_number(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    import common.secure_sum.site

    real, calls = common.secure_sum.site.with_checksum, []

    def false(body: np.ndarray, context: bytes) -> np.ndarray:
        words = real(body, context)
        calls.append(1)
        words[0] += np.uint64(len(calls) == 1)
        return words

    monkeypatch.setattr(common.secure_sum.site, "with_checksum", false)
    with pytest.raises(RoundError, match=r"round 1: .* checksum") as error:
        crowd_of(manifest).round()
    assert isinstance(error.value.__cause__, ChecksumMismatch)


def test_extras_of_any_size_keep_the_sums_of_the_others(manifest: Manifest) -> None:
    crowd = crowd_of(manifest)
    crowd.made["s0"] = replace(crowd.made["s0"], loss=1e300)
    done = crowd.round()
    assert done.loss == pytest.approx((2.0**32 + 3) / 4)
    crowd.made["s0"] = replace(crowd.made["s0"], change={"w": np.full(40, np.inf, np.float32)})
    done = crowd.round(2)
    assert done.failures == {"s0": "not_finite"}
    assert len(done.answers) == 3


@pytest.mark.parametrize("name", ["", " s", "a\nb", "x" * 201, "\u202ename"])
def test_odd_names_are_refused_before_anything_begins(manifest: Manifest, name: str) -> None:
    made = changes(3, 4, 0.01)
    with pytest.raises(CoadaptError, match="name"):
        Crowd(manifest, {name: made["s0"], "s1": made["s1"], "s2": made["s2"]}, zeros(4))


def test_names_that_are_words_are_fine(manifest: Manifest) -> None:
    made = changes(3, 4, 0.01)
    names = ("St. Mary's, \u00dc-ward", "all sites", "s2")
    crowd = Crowd(manifest, dict(zip(names, made.values(), strict=True)), zeros(4))
    assert {answer.site for answer in crowd.round().answers} == set(names)
