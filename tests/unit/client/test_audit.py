"""The audit has teeth: it finds noise that is missing or too small, and lets honest training pass."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from client.commands import site
from client.membership import losses_of, membership
from client.protection import Mechanism
from client.resident import Resident, resident
from client.training.audit import Canaries, audit
from client.training.private import train_private
from common.adapters import first_state, get_state, save_adapter, set_state
from common.config.manifest import Manifest
from common.config.training import TrainingSection
from common.errors import CoadaptError, DataError, PrivacyError
from common.privacy.accounting import calibrate
from common.randomness import SystemRandomness
from common.records import TextRecord
from common.tasks.task import Example

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Manifests = Callable[..., Manifest]
SECTION = TrainingSection(learning_rate=1e-2, micro_batch_size=16, batch_size=16)
STEPS, RATE, DELTA = 10, 0.2, 1e-5


@pytest.fixture
def ready(manifest_for: Manifests) -> Resident:
    model = resident(manifest_for(adapter={"rank": 2}))
    set_state(model.model, first_state(model.model, 0))
    return model


def units(ready: Resident, count: int) -> list[list[Example]]:
    records = [TextRecord(text=f"clause {n} of the term", label="abc"[n % 3], unit=str(n)) for n in range(count)]
    return [[example] for example in ready.task.encode(records).examples]


def audited(ready: Resident, noise: float, **options: Any) -> Any:
    how = Mechanism(noise, 1.0, RATE, 16.0, 1)
    values: dict[str, Any] = {"claim": 1.0, "delta": DELTA, "steps": STEPS, "canaries": 1000, "precision": "fp32"}
    return audit(ready.model, ready.task, units(ready, 20), SECTION, how, **{**values, **options})


def test_honest_noise_passes_and_no_noise_does_not(ready: Resident) -> None:
    noise = calibrate(1.0, DELTA, sampling_rate=RATE, steps=STEPS)
    honest = audited(ready, noise)
    assert honest.shown <= 1.0
    broken = audited(ready, 0.0)
    assert broken.shown > 3.0
    assert broken.shown <= broken.most
    assert 4.0 < broken.most < 8.0


def test_noise_that_is_a_tenth_of_what_it_should_be_is_found(ready: Resident) -> None:
    noise = calibrate(1.0, DELTA, sampling_rate=RATE, steps=STEPS)
    assert audited(ready, noise / 10).shown > 1.0


def test_a_clip_that_does_not_clip_is_found(ready: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    # Canaries come ten times too long: if they stay so, the noise is a tenth of what it should be.
    monkeypatch.setattr(
        "client.training.private.NoisedOptimizer.clip_and_accumulate",
        lambda self: [
            setattr(
                p,
                "summed_grad",
                p.grad_sample.sum(0) + (0 if getattr(p, "summed_grad", None) is None else p.summed_grad),
            )
            for p in self.params
        ],
    )
    noise = calibrate(1.0, DELTA, sampling_rate=RATE, steps=STEPS)
    assert audited(ready, noise).shown > 1.0


def test_canaries_are_clipped_to_the_clip_and_seen_where_they_are(ready: Resident) -> None:
    parameters = [p for p in ready.model.parameters() if p.requires_grad]
    own = Canaries(1000, parameters, SystemRandomness(unsafe_seed=1))
    assert len(set(own.places.tolist())) == 1000
    assert abs(own.included.sum() - 500) < 5 * np.sqrt(250)
    section = replace_rate(SECTION)
    how = Mechanism(0.0, 0.5, 1.0, 4.0, 1)
    train_private(
        ready.model,
        ready.task,
        [],
        section,
        how,
        SystemRandomness(unsafe_seed=2),
        first_step=0,
        steps=3,
        total_steps=3,
        precision="fp32",
        canaries=own,
    )
    # Every canary that is in is drawn in each of three steps and adds clip / expected units.
    assert np.allclose(own.seen, np.where(own.included, 3 * 0.5 / 4.0, 0.0), atol=1e-5)


def replace_rate(section: TrainingSection) -> TrainingSection:
    return section.model_copy(update={"learning_rate": 1e-3})


def test_too_few_canaries_or_too_small_an_adapter_is_refused(ready: Resident) -> None:
    with pytest.raises(PrivacyError, match="at least 1000 canaries, found 999"):
        audited(ready, 1.0, canaries=999)
    with pytest.raises(PrivacyError, match="has no place for 10000000 canaries"):
        audited(ready, 1.0, canaries=10_000_000)


def test_the_membership_test_counts_pairs() -> None:
    rng = np.random.Generator(np.random.PCG64(5))
    members, others = rng.normal(0, 1, 150).round(1), rng.normal(0.5, 1, 120).round(1)
    found = membership(members, others)
    pairs = [(m < o) + 0.5 * (m == o) for m in members for o in others]
    assert found.auc == pytest.approx(np.mean(pairs))
    points = np.unique(np.concatenate([members, others]))
    gaps = [(members <= t).mean() - (others <= t).mean() for t in points]
    assert found.advantage == pytest.approx(max(gaps))
    allowed = [(members <= t).mean() for t in points if (others <= t).mean() <= 0.01]
    assert found.caught == pytest.approx(max(allowed, default=0.0))


def test_membership_tells_what_was_learnt_by_heart_and_nothing_else() -> None:
    rng = np.random.Generator(np.random.PCG64(6))
    same = membership(rng.normal(size=2000), rng.normal(size=2000))
    assert abs(same.auc - 0.5) < 4 * same.error
    apart = membership(rng.normal(-5, 1, 200), rng.normal(5, 1, 200))
    assert apart.auc == pytest.approx(1.0)
    assert apart.caught == pytest.approx(1.0)
    with pytest.raises(DataError, match="at least 100 training and 100 held-out records, found 99 and 200"):
        membership(np.zeros(99), np.zeros(200))


def test_losses_come_in_the_records_order(ready: Resident) -> None:
    examples = [unit[0] for unit in units(ready, 7)][::-1]
    found = losses_of(ready.model, ready.task, examples, batch_size=3, precision="fp32")
    for example, loss in zip(examples, found, strict=True):
        batch = ready.task.collate([example], ready.device)
        with torch.no_grad():
            assert float(ready.task.losses(ready.model(**batch.inputs()), batch)) == pytest.approx(loss, rel=1e-5)


POLICY = """\
version = 1
name = "st-anna"
[data]
train = "train.jsonl"
held_out = "held_out.jsonl"
columns = { text = "note" }
[population]
name = "notes"
units = 100
epsilon = 10.0
delta = 1e-4
"""


@pytest.fixture
def house(tmp_path: Path, encoder: Path) -> Path:
    for name, start in (("train", 0), ("held_out", 1000)):
        rows = [{"note": f"clause {start + n} of the term", "label": "abc"[n % 3]} for n in range(120)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "site.toml").write_text(POLICY)
    (tmp_path / "federation.toml").write_text(
        f"""\
version = 1
name = "notes"
[task]
kind = "text-classification"
labels = ["a", "b", "c"]
[model]
base = "{encoder}"
[data]
max_length = 32
[adapter]
rank = 2
[training]
rounds = 4
local_steps = 2
batch_size = 16
precision = "fp32"
[privacy]
epsilon = 8.0
delta = 1e-4
"""
    )
    return tmp_path


def said(house: Path, *options: str) -> str:
    result = CliRunner().invoke(site, ["audit", str(house / "federation.toml"), str(house / "site.toml"), *options])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_the_command_says_what_was_shown_and_what_could_have_been(house: Path) -> None:
    text = said(house)
    assert re.search(
        r"^nothing against the claim of epsilon 1 at delta 0\.0001: with 95 % confidence training costs at least \d",
        text,
    )
    assert re.search(r"guesses about 1000 canaries were right; at most \d\.\d\d could have been shown", text)
    assert not (house / "ledger").exists()


def test_the_command_notices_that_the_noise_is_off_and_tests_a_real_adapter(house: Path, tmp_path: Path) -> None:
    from common.config.loading import load_manifest

    manifest = load_manifest(house / "federation.toml")
    model = resident(manifest)
    set_state(model.model, first_state(model.model, 0))
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder, model.model, get_state(model.model), model.base, manifest)
    facts = json.loads(said(house, "--unsafe-without-noise", "--adapter", str(folder), "--json", "--rounds", "6"))
    assert facts["shown"] > facts["claim"] == 1.0
    assert facts["noise"] is False
    assert facts["membership"]["members"] == facts["membership"]["others"] == 120
    assert "privacy is broken: training costs epsilon" in said(house, "--unsafe-without-noise")


@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        ((), ["--epsilon", "8"], "--epsilon must be above 0 and at most 1, found 8"),
        (("federation.toml", "[privacy]\nepsilon = 8.0\ndelta = 1e-4\n", ""), [], r"no \[privacy\] table"),
        (("site.toml", 'name = "notes"\n', 'name = "notes"\nunit = "patient"\n'), [], "protects each 'record'"),
        (("site.toml", 'held_out = "held_out.jsonl"\n', ""), ["--adapter", "."], "name data.held_out in site.toml"),
        ((), ["--canaries", "10"], "at least 1000 canaries, found 10"),
    ],
)
def test_bad_input_is_one_line(house: Path, edit: Any, options: list[str], message: str) -> None:
    if edit:
        file, old, new = edit
        text = (house / file).read_text()
        assert old in text
        (house / file).write_text(text.replace(old, new))
    with pytest.raises(CoadaptError, match=message):
        said(house, *options)
