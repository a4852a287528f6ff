"""What one secure sum carries."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.codec.vector import DecodedSum
from common.config.manifest import Manifest
from common.errors import MessageError
from common.messages import Envelope, Evaluate, Project, RoundDone, RoundStart
from common.metrics import count_names, figures
from common.summed import agreed, counts_in, extras, mean_in, sum_number, weighted

SPOKEN = {"manifest_sha256": "a" * 64, "run_id": "r", "adapter_sha256": "b" * 64}
SHAPES = {"head.weight": (2, 2)}
RANGES = {"head.weight": 1.0}
Manifests = Callable[..., Manifest]


def start(number: int = 1, **values: Any) -> RoundStart:
    return RoundStart(**{**SPOKEN, "round": number, "evaluate": True, "accepted": 0, "ranges": RANGES, **values})


def done(**values: Any) -> RoundDone:
    facts = {"records": 30, "examples": 8, "loss": 1.5, "counts": {"records": 4.0, "correct": 3.0}, "seconds": 1.0}
    return RoundDone(**SPOKEN, round=1, **{**facts, "noise_multiplier": None, "sampling_rate": None, **values})


def test_numbers_of_sums_only_grow() -> None:
    requests = [kind(number) for number in (1, 2, 3) for kind in (start, _project, _evaluate)]
    numbers = [sum_number(request) for request in requests]
    assert numbers == sorted(set(numbers))


def _project(number: int) -> Project:
    return Project(**SPOKEN, round=number, ranges=RANGES)


def _evaluate(number: int) -> Evaluate:
    return Evaluate(**SPOKEN, round=number)


def test_all_that_the_coordinator_says_is_bound(manifest_for: Manifests) -> None:
    manifest = manifest_for(adapter={"method": "head"})
    tensors = {"head.weight": np.float32([[1, 2], [3, 4]])}
    requests = [
        Envelope(header=start(), tensors=tensors),
        Envelope(header=start(), tensors={"head.weight": np.float32([[1, 2], [3, 5]])}),
        Envelope(header=start(evaluate=False), tensors=tensors),
        Envelope(header=start(run_id="s"), tensors=tensors),
        Envelope(header=start(number=2), tensors=tensors),
        Envelope(header=start(ranges={"head.weight": 1.5}), tensors=tensors),
    ]
    hashes = {agreed(manifest, request, SHAPES, accepted=0, sites=3).model_hash for request in requests}
    assert len(hashes) == len(requests)
    with_sum = Envelope(header=start(secure_sum="00ff"), tensors=tensors)  # the sum's own message is signed by itself
    assert agreed(manifest, with_sum, SHAPES, accepted=0, sites=3).model_hash in hashes
    tables: list[dict[str, Any]] = [{"name": "other"}, {"privacy": {"epsilon": 1.0}}]
    others = [manifest_for(adapter={"method": "head"}, **table) for table in tables]
    found = [agreed(each, requests[0], SHAPES, accepted=0, sites=3) for each in (manifest, *others)]
    assert len({each.manifest_hash for each in found}) == 3
    assert len({each.dp_digest for each in found}) == 2


def test_ranges_must_be_those_of_what_is_summed(manifest_for: Manifests) -> None:
    manifest = manifest_for(adapter={"method": "head"})
    for ranges in ({}, {"other": 1.0}, {**RANGES, "other": 1.0}):
        with pytest.raises(MessageError, match="the ranges of the request are not those"):
            agreed(manifest, Envelope(header=start(ranges=ranges)), SHAPES, accepted=0, sites=3)
    with pytest.raises(MessageError, match="nothing is summed for 'round_done'"):
        agreed(manifest, Envelope(header=done()), SHAPES, accepted=0, sites=3)


def test_with_privacy_nothing_but_the_public_weight_goes_beside(manifest_for: Manifests) -> None:
    private = manifest_for(privacy={"epsilon": 1.0})
    assert extras(private, start(), done(loss=None, counts={}), 30) == {"weight": 30.0}
    equal = manifest_for(privacy={"epsilon": 1.0}, aggregation={"weighting": "uniform"})
    assert extras(equal, start(), done(loss=None, counts={}), 30) == {}
    plain = manifest_for()
    found = extras(plain, start(), done(), 30)
    assert found.keys() == {"weight", "loss", *(f"count/{name}" for name in count_names(plain))}
    assert (found["loss"], found["count/correct"], found["count/tp/0"]) == (1.5, 3.0, 0.0)
    assert extras(plain, start(evaluate=False), done(), 30).keys() == {"weight", "loss"}
    assert extras(plain, _project(1), done(), 30).keys() == {"weight"}


@given(
    records=st.lists(st.integers(1, 100_000), min_size=1, max_size=6),
    most=st.sampled_from([1, 50, 10_000]),
    weighting=st.sampled_from(["records", "uniform"]),
)
def test_the_mean_is_weighted_as_agreed(manifest_for: Manifests, records: list[int], most: int, weighting: str) -> None:
    manifest = manifest_for(aggregation={"weighting": weighting}, secure_sum={"most_records": most})
    changes = [np.full((2, 2), float(number), np.float32) for number in range(len(records))]
    total, beside = np.zeros((2, 2)), {"weight": 0.0}
    for change, count in zip(changes, records, strict=True):
        part = weighted(manifest, {"w": change}, count)["w"]
        assert np.abs(part).max() <= np.abs(change).max()  # so the range holds
        total += part
        beside["weight"] += extras(manifest, start(evaluate=False), done(), count).get("weight", 0.0)
    weights = [min(count, most) if weighting == "records" else 1 for count in records]
    wanted = np.average([change[0, 0] for change in changes], weights=weights)
    found = mean_in(manifest, DecodedSum({"w": total}, beside), len(records))["w"]
    assert found == pytest.approx(np.full((2, 2), wanted), rel=1e-5, abs=1e-6)


def test_counts_of_nothing_are_none(manifest_for: Manifests) -> None:
    names = [f"count/{name}" for name in count_names(manifest_for())]
    assert counts_in(DecodedSum({}, dict.fromkeys(names, 0.0))) == {}
    counts = counts_in(
        DecodedSum({}, {**dict.fromkeys(names, 0.0), "count/records": 4.0, "count/correct": 3.0, "loss": 1.0})
    )
    assert figures("text-classification", counts, ["accuracy"]) == {"accuracy": 0.75}
    assert "loss" not in counts
