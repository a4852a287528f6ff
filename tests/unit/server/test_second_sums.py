"""The round loop with two sums: what the second is taken of, with which weights, and what it costs."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from test_coordinator import header_of, store_in

from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.contribution import contribution, projection
from common.factors import scale
from common.messages import Envelope, Evaluate, Evaluated, Project, Projected, RoundDone, RoundStart, decode
from common.randomness import seeded
from server.channel import Reply
from server.coordinator import Coordinator

RANK, RECORDS = 2, {"north": 1, "south": 30, "west": 9}
SHAPES = {"x.lora_A.weight": (RANK, 12), "x.lora_B.weight": (14, RANK), "head.weight": (2, 3)}


def drawn(*labels: str, size: float = 1.0) -> AdapterState:
    rng = seeded(0, *labels)
    return {name: (size * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


class Sites:
    """Sites whose training is an addition, and which answer both messages of a round."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.asked = manifest, list[tuple[str, str]]()
        self.after: dict[str, AdapterState] = {}

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        for site, data in requests.items():
            request = decode(data)
            self.asked.append((site, request.header.kind))
            yield Reply(site, self.answer(site, request), "", 1000, len(data))

    def answer(self, site: str, request: Envelope) -> Envelope:
        header = request.header
        if isinstance(header, Evaluate):
            return Envelope(header=Evaluated(**header_of(request), counts={}))
        if isinstance(header, Project):
            sent = projection(scale(self.manifest.adapter), self.pairs(site), request.tensors)
            return Envelope(header=Projected(**header_of(request)), tensors=sent)
        assert isinstance(header, RoundStart)
        drift = drawn(site, size=0.3)
        self.after[site] = {name: array + drift[name] for name, array in request.tensors.items()}
        sent = contribution(self.manifest, request.tensors, self.after[site], header.accepted)
        facts: dict[str, Any] = {"examples": 5, "loss": 1.0, "seconds": 0.5, "counts": {}}
        facts |= {"records": RECORDS[site], "noise_multiplier": None, "sampling_rate": None}
        return Envelope(header=RoundDone(**header_of(request, **facts)), tensors=sent)

    def pairs(self, site: str) -> AdapterState:
        return {name: array for name, array in self.after[site].items() if "lora" in name}


def test_both_sums_have_the_sites_weights_and_their_bytes_count(
    tmp_path: Path, manifest_for: Callable[..., Manifest]
) -> None:
    manifest = manifest_for(
        adapter={"rank": RANK}, training={"rounds": 1}, aggregation={"method": "sketch", "weighting": "records"}
    )
    sites, first = Sites(manifest), drawn("first")
    coordinator = Coordinator(
        manifest,
        run_id="run",
        sites=list(RECORDS),
        first=first,
        channel=sites,
        store=store_in(tmp_path),
        report=lambda event: None,
    )
    final = coordinator.run()
    # The mean of three sites' products has rank 6 at most, the sketch ten columns: nothing is lost before the rank.
    total = sum(RECORDS.values())
    dense = sum(
        RECORDS[site] / total * after["x.lora_B.weight"].astype(float) @ after["x.lora_A.weight"]
        for site, after in sites.after.items()
    )
    u, s, vt = np.linalg.svd(np.asarray(dense))
    best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
    np.testing.assert_allclose(final["x.lora_B.weight"] @ final["x.lora_A.weight"], best, atol=1e-4)
    head = first["head.weight"] + sum(RECORDS[site] / total * drawn(site, size=0.3)["head.weight"] for site in RECORDS)
    np.testing.assert_allclose(final["head.weight"], head, rtol=1e-5, atol=1e-6)
    assert [kind for _, kind in sites.asked] == ["round_start"] * 3 + ["project"] * 3 + ["evaluate"] * 3
    assert [answer.bytes_up for answer in coordinator.rounds[1].answers] == [2000] * 3


def test_a_round_of_the_head_has_one_sum(tmp_path: Path, manifest_for: Callable[..., Manifest]) -> None:
    manifest = manifest_for(
        adapter={"rank": RANK}, training={"rounds": 2, "head_rounds": 1}, aggregation={"method": "sketch"}
    )
    sites = Sites(manifest)
    Coordinator(
        manifest,
        run_id="run",
        sites=list(RECORDS),
        first=drawn("first"),
        channel=sites,
        store=store_in(tmp_path),
        report=lambda event: None,
    ).run()
    assert [kind for site, kind in sites.asked if site == "west"] == [
        "round_start",
        "round_start",
        "project",
        "evaluate",
    ]
