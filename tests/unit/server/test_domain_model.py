"""A domain model's folder: what is stored comes back, and what was changed is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from common.config.manifest import Manifest
from common.errors import DistillationError
from common.models import find_base, load_task_model, load_tokenizer
from server.distillation.domain_model import DomainModel, load_model, save_model

KINDS = ("text-classification", "token-classification", "causal-lm")


def _model(manifest: Manifest) -> DomainModel:
    base = find_base(manifest.model)
    return DomainModel(load_task_model(base, manifest).eval(), load_tokenizer(base), manifest)


def _logits(model: DomainModel) -> Tensor:
    ids = torch.arange(24).reshape(2, 12) + 5
    with torch.inference_mode():
        output = model.network(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_model_computes_the_same(kind: str, manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    model = _model(manifest_for(kind, simulation={"train": "train.jsonl"}))
    save_model(tmp_path / "model", model, {"made": "here"})
    loaded = load_model(tmp_path / "model")
    assert torch.equal(_logits(loaded), _logits(model))
    assert loaded.manifest == model.manifest.model_copy(update={"simulation": None})
    assert loaded.parameters == model.parameters
    assert loaded.tokenizer("A clause.")["input_ids"] == model.tokenizer("A clause.")["input_ids"]


def test_layers_may_have_other_shapes_than_the_config_says(
    manifest_for: Callable[..., Manifest], tmp_path: Path
) -> None:
    model = _model(manifest_for("text-classification"))
    layer = model.network.encoder.encoder.layer[0].intermediate.dense
    out = model.network.encoder.encoder.layer[0].output.dense
    layer.weight, layer.bias = torch.nn.Parameter(layer.weight[:9]), torch.nn.Parameter(layer.bias[:9])
    out.weight = torch.nn.Parameter(out.weight[:, :9])
    save_model(tmp_path / "model", model, {})
    loaded = load_model(tmp_path / "model")
    assert torch.equal(_logits(loaded), _logits(model))
    assert loaded.network.encoder.encoder.layer[0].intermediate.dense.out_features == 9


def test_the_library_reads_the_folder(manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    text, causal = _model(manifest_for("text-classification")), _model(manifest_for("causal-lm"))
    save_model(tmp_path / "text", text, {})
    save_model(tmp_path / "causal", causal, {})
    encoder = AutoModel.from_pretrained(tmp_path / "text", add_pooling_layer=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "causal")
    for name, tensor in text.network.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
    ids = torch.arange(12).reshape(1, 12)
    with torch.inference_mode():
        assert torch.equal(theirs(input_ids=ids).logits, causal.network(input_ids=ids).logits)


def test_a_changed_file_is_refused(manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, _model(manifest_for("text-classification")), {})
    with (folder / "head.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(DistillationError, match="changed or is gone"):
        load_model(folder)


def test_a_folder_of_something_else_is_refused_and_none_is_replaced(
    manifest_for: Callable[..., Manifest], tmp_path: Path
) -> None:
    with pytest.raises(DistillationError, match="holds no model of Coadapt"):
        load_model(tmp_path)
    with pytest.raises(DistillationError, match="exists already"):
        save_model(tmp_path, _model(manifest_for("text-classification")), {})
