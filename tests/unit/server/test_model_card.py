"""The model card: what the hub reads of it, what it says of a run, and what it does not say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from summary_samples import sample

from common.config.manifest import Manifest
from common.errors import DistillationError
from common.models import find_base, load_task_model, load_tokenizer
from server.distillation.domain_model import DomainModel
from server.distillation.federation_facts import federation_facts
from server.distillation.model_card import model_card
from server.field_summary import FieldRound, FieldSummary
from simulations.summary import PrivacyFacts, SitePrivacy

STEPS = [
    {
        "name": "teacher",
        "parameters": 22_600_000,
        "bytes": 90_400_000,
        "figures": {"accuracy": 0.9156},
        "latency_ms": 15.3,
    },
    {"name": "vocabulary", "parameters": 11_600_000, "figures": {"accuracy": 0.9078, "macro_f1": 0.9}},
    {"name": "onnx | int8", "bytes": 4_710_000, "figures": {"accuracy": 0.9094}, "latency_ms": 1.31},
]
EXPORTS = [
    {
        "format": name,
        "file": file,
        "bytes": 4_710_000,
        "difference": 0.0225,
        "tolerance": 0.2,
        "agreement": 0.984,
    }
    for name, file in (("safetensors", "model.safetensors"), ("onnx-int8", "model.int8.onnx"))
]


@pytest.fixture(scope="module")
def model(manifest_for: Callable[..., Manifest]) -> DomainModel:
    manifest = manifest_for("text-classification", description="Notes of two wards")
    base = find_base(manifest.model)
    return DomainModel(load_task_model(base, manifest).eval(), load_tokenizer(base), manifest)


def private(**changes: Any) -> PrivacyFacts:
    sites = [
        SitePrivacy(
            name=f"hospital-{number + 1}",
            units=units,
            noise_multiplier=0.8,
            sampling_rate=0.1,
            steps=40,
            epsilon=epsilon,
            epsilon_prv=epsilon - 0.2,
        )
        for number, (units, epsilon) in enumerate([(1200, 7.91), (300, 6.5)])
    ]
    return PrivacyFacts(
        **{"unit": "patient", "epsilon": 8, "delta": 1e-5, "clip": 1, "protects": True, "sites": sites, **changes}
    )


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def test_the_hub_reads_the_front_matter(model: DomainModel) -> None:
    card = ModelCard(model_card(model, {"steps": STEPS, "exports": EXPORTS}))
    assert card.data.license == "unknown"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.tags == ["coadapt", "federated-learning", "onnx"]
    assert card.data.metrics == ["accuracy"]
    assert card.data.base_model is None  # a local folder has no name on the hub, and its path tells of the machine
    assert str(Path(model.manifest.model.base).parent) not in str(card)
    pinned = model.manifest.model.model_copy(update={"base": "owner/name", "revision": "a" * 40})
    named = DomainModel(model.network, model.tokenizer, model.manifest.model_copy(update={"model": pinned}))
    assert ModelCard(model_card(named, {"license": "apache-2.0"})).data.base_model == "owner/name"


def test_every_step_is_a_row_with_its_loss(model: DomainModel) -> None:
    rows = [line for line in section(model_card(model, {"steps": STEPS}), "Steps").splitlines() if line.startswith("|")]
    assert rows[0] == "| step | parameters | bytes | accuracy | macro_f1 | change of accuracy | latency, ms |"
    assert rows[2] == "| teacher | 22,600,000 | 90,400,000 | 0.9156 | - | +0.0000 | 15.3 |"
    assert rows[3] == "| vocabulary | 11,600,000 | - | 0.9078 | 0.9 | -0.0078 | - |"
    assert rows[4] == "| onnx \\| int8 | - | 4,710,000 | 0.9094 | - | -0.0062 | 1.31 |"


def test_a_private_simulation_tells_every_sites_epsilon(model: DomainModel, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(sample(sites=2, privacy=private()).model_dump_json())
    facts = federation_facts(tmp_path)
    assert json.loads(json.dumps(facts)) == facts
    card = model_card(model, {"federation": facts})
    assert "differential-privacy" in ModelCard(card).data.tags
    assert "city-hospitals" in section(card, "Federation")
    assert "2 sites (hospital-1, hospital-2), 5 rounds" in section(card, "Federation")
    assert "| hospital-1 | 7.91 | 1e-05 |\n| hospital-2 | 6.5 | 1e-05 |" in section(card, "Privacy")
    assert "known seed" not in card
    assert "| hospital-1 | 1,200 |\n| hospital-2 | 300 |" in section(card, "Data")
    (tmp_path / "summary.json").write_text(sample(sites=2, privacy=private(protects=False)).model_dump_json())
    assert "it protects nobody" in section(model_card(model, {"federation": federation_facts(tmp_path)}), "Privacy")


def test_counts_that_a_policy_keeps_are_not_told(model: DomainModel, tmp_path: Path) -> None:
    summary = sample(sites=2, privacy=private())
    (tmp_path / "summary.json").write_text(summary.model_dump_json())
    card = model_card(model, {"federation": federation_facts(tmp_path)})
    for site in summary.sites:
        for count in (site.records, site.held_out, site.units, *site.labels.values()):
            if count > 99:  # smaller numbers stand elsewhere by chance
                assert f" {count:,} " not in card


def test_a_run_between_institutions_says_what_the_coordinator_knows(model: DomainModel, tmp_path: Path) -> None:
    rounds = [
        FieldRound(
            number=number,
            answered=["north", "south"],
            failed={},
            rejected=None,
            train_loss=None,
            figures={},
            bytes_up=1,
            bytes_down=1,
            seconds=1.0,
        )
        for number in range(4)
    ]
    summary = FieldSummary(
        first_line="The coordinator learned sums. Each patient is protected at its site: epsilon 8, delta 1e-05.",
        run_id="run-1",
        federation="wards",
        status="finished",
        reason="",
        manifest_sha256="a" * 64,
        roster_sha256="b" * 64,
        sites=["north", "south"],
        refusals={},
        rounds=rounds,
        selected_round=3,
    )
    (tmp_path / "summary.json").write_text(summary.model_dump_json())
    card = model_card(model, {"federation": federation_facts(tmp_path)})
    assert "A run between institutions: federation `wards`, run `run-1`, 2 sites (north, south), 3 rounds" in card
    assert "Each patient is protected at its site: epsilon 8" in section(card, "Privacy")
    assert "publish no counts" in section(card, "Data")


def test_nothing_known_is_said_to_be_unknown(model: DomainModel, tmp_path: Path) -> None:
    card = model_card(model, {})
    for title in ("Federation", "Privacy", "Data", "How it was made"):
        assert "nknown" in section(card, title) or "does not know" in section(card, title)
    assert "## Steps" not in card
    for text in ("", "{}", '{"sites": []}', "[]"):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(DistillationError, match=r"summary\.json cannot be read"):
            federation_facts(tmp_path)


def test_vocabulary_and_limits_are_told(model: DomainModel) -> None:
    vocabulary = {"pieces": 5000, "occurrences": 0.9756, "unknown": 0.0, "length_factor": 1.033, "identical": 0.539}
    card = model_card(model, {"vocabulary": vocabulary, "exports": EXPORTS, "steps": STEPS})
    assert "| pieces | 5,000 |" in card
    assert "| occurrences of held-out text that are kept | 97.56% |" in card
    limits = section(card, "Limitations")
    assert "Its vocabulary is the domain's" in limits
    assert "dot products" in limits
    assert "llama.cpp" not in limits
