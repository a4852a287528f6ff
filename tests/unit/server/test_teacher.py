"""A teacher: merged equals base and adapter, and what cannot be merged is refused in one line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.adapters import attach, first_state, load_adapter, save_adapter
from common.codec.state import AdapterState
from common.config.annotate import annotated
from common.config.manifest import Manifest
from common.errors import AdapterError, DistillationError, ModelError
from common.factors import stacked
from common.models import find_base, load_task_model
from common.randomness import seeded
from server.distillation.teacher import load_teacher, merge_stored
from simulations.tiny_base import make_encoder

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Manifests = Callable[..., Manifest]
KINDS = ("text-classification", "token-classification", "causal-lm")
PAIRED = ("lora", "rslora", "dora", "qlora")


def _drawn(state: AdapterState, seed: int) -> AdapterState:
    """A trained state's stand-in: every tensor moved, so that nothing of the adapter is zero."""
    return {
        name: array + seeded(seed, name).normal(0, 0.1, array.shape).astype(np.float32) for name, array in state.items()
    }


def _finished_run(run: Path, manifest: Manifest, *, parts: int = 1) -> Path:
    """A run's folder whose result has random numbers; of low-rank pairs `parts` lie on each other."""
    full = manifest
    if manifest.adapter.method == "qlora":  # the state is that of the same pairs on a whole base
        full = manifest.model_copy(update={"adapter": manifest.adapter.model_copy(update={"method": "lora"})})
    base = find_base(manifest.model)
    model = attach(load_task_model(base, full), full.adapter)
    state = _drawn(first_state(model, 1), 1)
    for part in range(1, parts):
        more = _drawn(first_state(model, 1), 1 + part)
        state = stacked(state, more)
    (run / "rounds").mkdir(parents=True)
    (run / "federation.toml").write_text(annotated(manifest))
    (run / "adapter").mkdir()
    save_adapter(run / "adapter", model, state, base, manifest)
    return run


def _logits(network: nn.Module) -> Tensor:
    ids = torch.arange(24).reshape(2, 12) + 5
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.inference_mode():
        output = network(input_ids=ids, attention_mask=mask)
    return output if isinstance(output, Tensor) else output.logits[:, :8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [*PAIRED, "ia3", "full", "bitfit", "head"])
def test_merged_equals_base_and_adapter(method: str, kind: str, manifest_for: Manifests, tmp_path: Path) -> None:
    if (kind, method) in {("causal-lm", "head"), ("causal-lm", "bitfit")}:
        pytest.skip("a causal model has no head, and the tiny Llama no biases")
    manifest = manifest_for(kind, adapter={"method": method, "rank": 4})
    run = _finished_run(tmp_path / "run", manifest)
    adapted, _ = load_adapter(run / "adapter", find_base(manifest.model), full_precision=True)
    expected = _logits(adapted)
    plain = _logits(load_task_model(find_base(manifest.model), manifest_for(kind)).eval())
    merged = load_teacher(run)
    assert (_logits(merged.network) - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 1e-3  # there is something to merge
    assert not any("lora" in name or "ia3" in name for name, _ in merged.network.named_parameters())
    assert merged.manifest == manifest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_stacked_pairs_are_merged_too(method: str, kind: str, manifest_for: Manifests, tmp_path: Path) -> None:
    manifest = manifest_for(kind, adapter={"method": method, "rank": 2})
    run = _finished_run(tmp_path / "run", manifest, parts=3)
    adapted, _ = load_adapter(run / "adapter", find_base(manifest.model))
    assert sum(getattr(layer, "pairs_below", None) is not None for layer in adapted.modules()) > 0
    assert (_logits(load_teacher(run).network) - _logits(adapted)).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["prompt", "prefix", "p-tuning", "lora+prompt", "adapter"])
def test_what_lies_beside_the_weights_is_refused(method: str, manifest_for: Manifests, tmp_path: Path) -> None:
    run = _finished_run(tmp_path / "run", manifest_for(adapter={"method": method, "virtual_tokens": 4}))
    with pytest.raises(DistillationError, match=f"'{method}' cannot be merged.*methods that can: lora, qlora") as caught:
        load_teacher(run)
    assert "\n" not in str(caught.value)


def test_no_run_an_unfinished_one_and_a_folder_without_adapter(manifest_for: Manifests, tmp_path: Path) -> None:
    run = _finished_run(tmp_path / "run", manifest_for())
    (run / "adapter").rename(tmp_path / "away")
    with pytest.raises(DistillationError, match="is not finished"):
        load_teacher(run)
    with pytest.raises(DistillationError, match="holds no run"):
        load_teacher(tmp_path / "away")
    with pytest.raises(AdapterError, match="holds no adapter"):
        merge_stored(run)


def test_an_adapter_of_another_base_is_refused(manifest_for: Manifests, tmp_path: Path) -> None:
    run = _finished_run(tmp_path / "run", manifest_for())
    other = make_encoder(tmp_path / "other", width=32)
    with pytest.raises(ModelError, match="was trained on weights") as caught:
        load_teacher(run, base=other)
    assert "\n" not in str(caught.value)
    moved = tmp_path / "moved"
    moved.symlink_to(Path(manifest_for().model.base))
    assert torch.equal(_logits(load_teacher(run, base=moved).network), _logits(load_teacher(run).network))
