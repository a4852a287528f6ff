"""Whole small federations under every method of aggregation: real vaults, the real round loop, envelopes as bytes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from vaults import RANK, SITES, Federation, Manifests, agreed, folder

from client.ledger import Ledger
from client.state import SiteState
from common.adapters import load_adapter
from common.codec.state import state_digest
from common.contribution import contribution_shapes, projection_shapes
from common.errors import AdapterError, RoundError
from common.evaluation import measure
from common.factors import depth, newest, pairs_of, scale
from common.messages import Envelope, Project, RoundStart, decode, encode
from common.models import find_base, load_task_model
from common.progress import RoundRejected, SiteFailed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.mark.parametrize("method", ["alternate", "ffa", "sketch", "dense"])
def test_every_method_learns_and_sends_what_it_promises(tmp_path: Path, manifest_for: Manifests, method: str) -> None:
    manifest = agreed(manifest_for, method)
    it = Federation(tmp_path, manifest)
    final = it.coordinator.run()
    assert it.logs() == ""
    before, after = it.loss(it.first), it.loss(final)
    assert after < 0.8 * before
    shapes = {name: array.shape for name, array in it.first.items()}
    for accepted, found in enumerate(it.bytes_up()):
        wanted = 0
        for each in (contribution_shapes(manifest, shapes, accepted), projection_shapes(manifest, shapes, accepted)):
            wanted += 4 * len(SITES) * sum(int(np.prod(shape)) for shape in each.values())
        assert wanted < found < wanted + len(SITES) * 10_000  # headers and names
    starts = [request.header for site, request, _ in it.sent if isinstance(request.header, RoundStart)]
    assert [start.accepted for start in starts[:: len(SITES)]] == list(range(6))
    stored = load_adapter(tmp_path / "run" / "rounds" / "0006", it.model.base)[0]
    counts = measure(stored, it.model.task, it.public, batch_size=30, precision="fp32")
    assert counts["loss_sum"] / counts["records"] == pytest.approx(after, rel=1e-5)


def test_half_the_bytes_and_both_factors_have_moved(tmp_path: Path, manifest_for: Manifests) -> None:
    everything, half = (
        Federation(folder(tmp_path, method), agreed(manifest_for, method, rounds=2))
        for method in ("separate", "alternate")
    )
    for it in (everything, half):
        it.coordinator.run()
    # The head is small; B and A have about as many values.
    assert sum(half.bytes_up()) < 0.65 * sum(everything.bytes_up())
    final = half.coordinator.adapter
    assert all(not np.array_equal(final[name], half.first[name]) for name in final)


def test_ffa_with_refresh_ships_one_pair_that_peft_loads(tmp_path: Path, manifest_for: Manifests) -> None:
    manifest = agreed(manifest_for, "ffa", rounds=5, aggregation={"method": "ffa", "refresh_every": 2})
    it = Federation(tmp_path, manifest)
    final = it.coordinator.run()
    depths = [
        depth({n: a.shape for n, a in it.coordinator._store.load_round(number).items()}, RANK) for number in range(6)
    ]
    assert depths == [1, 1, 2, 2, 3, 3]
    # What rounds 1 and 2 made lies under the newest pair to the end.
    under = it.coordinator._store.load_round(2)
    name = next(name for name in final if "lora_B" in name)
    np.testing.assert_array_equal(final[name][:, :RANK], under[name][:, :RANK])
    base = find_base(manifest.model)
    loaded = PeftModel.from_pretrained(load_task_model(base, manifest), tmp_path / "run" / "rounds" / "0005")
    counts = measure(loaded, it.model.task, it.public, batch_size=30, precision="fp32")
    assert counts["loss_sum"] / counts["records"] == pytest.approx(it.loss(final), rel=1e-5)
    assert it.loss(final) < it.loss(newest(final, RANK))


def test_a_site_that_misses_the_second_sum_sits_the_round_out(tmp_path: Path, manifest_for: Manifests) -> None:
    manifest = agreed(manifest_for, "sketch", rounds=2)
    it = Federation(
        tmp_path,
        manifest,
        fails=lambda site, request: (
            site == "west" and isinstance(request.header, Project) and request.header.round == 1
        ),
    )
    it.coordinator.run()
    assert [(e.round, e.site, e.code) for e in it.events if isinstance(e, SiteFailed)] == [(1, "west", "timeout")]
    assert [len(done.answers) for done in it.coordinator.rounds] == [0, 2, 3]
    alone = Federation(
        folder(tmp_path, "alone"),
        manifest,
        fails=lambda site, request: isinstance(request.header, Project) and site != "west",
    )
    with pytest.raises(RoundError, match="1 of 3 sites answered"):
        alone.coordinator.run()


def test_with_privacy_a_whole_run_goes_through_the_preflight_checks(tmp_path: Path, manifest_for: Manifests) -> None:
    manifest = agreed(manifest_for, "auto", rounds=3, privacy={"epsilon": 50.0, "delta": 1e-3})
    assert manifest.aggregation_method == "alternate"
    it = Federation(tmp_path, manifest)
    it.coordinator.run()
    assert it.logs() == ""
    assert [len(done.answers) for done in it.coordinator.rounds] == [0, 3, 3, 3]
    for site in SITES:
        assert sum(steps.count for steps in Ledger(tmp_path / f"{site}.ledger").spent(site)) == 12


def test_the_acceptance_test_keeps_a_poisoned_round_out(tmp_path: Path, manifest_for: Manifests) -> None:
    # In round 3 every answer is multiplied: no single site need be known for the guard to see it.
    manifest = agreed(
        manifest_for,
        "alternate",
        rounds=4,
        aggregation={"method": "alternate", "accept_drop": 0.2},
        evaluation={"public": "public.jsonl", "metrics": ["loss", "accuracy"]},
    )
    it = Federation(tmp_path, manifest)
    honest = it.vaults["north"].answer

    def poisoned(data: bytes, state: SiteState) -> tuple[bytes, SiteState]:
        answer, state = honest(data, state)
        envelope = decode(answer)
        factor = -200.0 if envelope.header.round == 3 else 1.0
        tensors = {name: np.float32(factor) * array for name, array in envelope.tensors.items()}
        return encode(Envelope(header=envelope.header, tensors=tensors)), state

    it.vaults["north"].answer = poisoned  # type: ignore[method-assign]
    it.coordinator.run()
    assert [(e.round, e.setting) for e in it.events if isinstance(e, RoundRejected)] == [(3, "accept_drop")]
    two, three = (it.coordinator._store.load_round(number) for number in (2, 3))
    assert state_digest(two) == state_digest(three)
    starts = [request.header for _, request, _ in it.sent if isinstance(request.header, RoundStart)]
    assert [start.accepted for start in starts[:: len(SITES)]] == [0, 1, 2, 2]  # B again, which the round had trained
    facts = json.loads((tmp_path / "run" / "rounds" / "0003" / "round.json").read_text())
    assert facts["rejected"].startswith("accept_drop: ")
    assert it.coordinator.accepted == 3


def test_an_aggregation_of_ones_own_takes_part_by_import_path(tmp_path: Path, manifest_for: Manifests) -> None:
    (tmp_path / "own_median_of_a_run.py").write_text(
        "import numpy as np\n\ndef median(changes, weights):\n"
        "    return {name: np.median([change[name] for change in changes], axis=0) for name in changes[0]}\n"
    )
    sys.path.append(str(tmp_path))
    try:
        it = Federation(
            tmp_path, agreed(manifest_for, "own_median_of_a_run:median", rounds=1, secure_sum={"enabled": False})
        )
        final = it.coordinator.run()
    finally:
        sys.path.remove(str(tmp_path))
    changes = [answer.tensors for _, request, answer in it.sent if isinstance(request.header, RoundStart)]
    assert len(changes) == 3
    for name, array in final.items():
        wanted = it.first[name] + np.median([change[name] for change in changes], axis=0)
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_site_trains_its_own_smaller_rank(tmp_path: Path, manifest_for: Manifests, private: bool) -> None:
    tables = {"privacy": {"epsilon": 100.0, "delta": 1e-3, "clip": 1.0}} if private else {}
    it = Federation(tmp_path, agreed(manifest_for, "dense", **tables), ranks={"south": 1}, secure=True)
    final = it.coordinator.run()
    assert it.logs() == ""
    assert {name: array.shape for name, array in final.items()} == {n: a.shape for n, a in it.first.items()}
    if not private:
        assert it.loss(final) < 0.8 * it.loss(it.first)
    # Round 1 starts with B = 0, so what a site sends of a pair is the product that it has trained.
    sent = {site: answer.tensors for site, _, answer in it.sent[: len(SITES)]}
    for name in (name for name in sent["south"] if ".lora_BA" in name):
        ranks = {site: np.linalg.matrix_rank(tensors[name], rtol=1e-4) for site, tensors in sent.items()}
        assert ranks == {"north": RANK, "south": 1, "west": RANK}
    # Later the rest of the common pair stays as it is: what the site sends has the rank of its change.
    sites = [site for site, _, _ in it.sent]
    for site, request, answer in it.sent[sites.index("south", len(SITES)) :][:1]:
        start = {name: np.asarray(array, float) for name, array in request.tensors.items()}
        for pair in pairs_of(start):
            rest = scale(it.manifest.adapter) * start[pair.b][:, 1:] @ start[pair.a][1:]
            whole = answer.tensors[pair.name("BA")] + scale(it.manifest.adapter) * start[pair.b] @ start[pair.a]
            values = np.linalg.svd(whole - rest, compute_uv=False)
            assert site == "south"
            assert values[1] < 1e-3 * values[0]


def test_a_smaller_rank_is_refused_where_it_cannot_be(tmp_path: Path, manifest_for: Manifests) -> None:
    with pytest.raises(AdapterError, match=r"rank 1.*'separate'"):
        Federation(folder(tmp_path, "method"), agreed(manifest_for, "separate"), ranks={"south": 1})
    with pytest.raises(AdapterError, match=r"rank 3, the manifest's adapter.rank is 2"):
        Federation(folder(tmp_path, "rank"), agreed(manifest_for, "sketch"), ranks={"south": 3})
