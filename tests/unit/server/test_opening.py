"""Whatever a person may call a model is opened for what it is, and anything else is one line."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from assessed import Manifests, tiny
from torch import Tensor

from common.adapters import attach, first_state, save_adapter, set_state
from common.config.manifest import Manifest
from common.errors import AssessmentError, CoadaptError, DistillationError, ModelError
from common.models import find_base, load_task_model
from common.randomness import seeded
from server.assessment.opening import open_model, stored_bytes
from server.assessment.timing import latency, one_thread
from server.distillation.domain_model import DomainModel, save_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def logits(model: DomainModel) -> Tensor:
    ids = torch.arange(24).reshape(2, 12) + 5
    with torch.inference_mode():
        output = model.network(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output if isinstance(output, Tensor) else output.logits


def adapter(folder: Path, manifest: Manifest) -> DomainModel:
    """An adapter's folder, and the model that was stored in it."""
    base = find_base(manifest.model)
    network = attach(load_task_model(base, manifest), manifest.adapter)
    rng = seeded(0, "opening")
    state = {
        name: (array + 0.3 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in first_state(network, 0).items()
    }
    set_state(network, state)
    folder.mkdir(parents=True)
    save_adapter(folder, network, state, base, manifest)
    return DomainModel(network.eval(), tiny(manifest).tokenizer, manifest)


def a_run(folder: Path, manifest: Manifest) -> DomainModel:
    made = adapter(folder / "adapter", manifest)
    (folder / "rounds").mkdir()
    (folder / "federation.toml").write_text("version = 1\n")
    return made


@pytest.mark.parametrize("kind", ["text-classification", "token-classification", "causal-lm"])
def test_a_run_and_its_adapter_are_base_and_adapter_together(
    kind: str, manifest_for: Manifests, tmp_path: Path
) -> None:
    made = a_run(tmp_path / "run", manifest_for(kind))
    for path in (tmp_path / "run", tmp_path / "run" / "adapter"):
        opened = open_model(path)
        assert torch.allclose(logits(opened), logits(made), atol=1e-5)
        assert opened.manifest.task == made.manifest.task
    weights = (find_base(made.manifest.model).folder / "model.safetensors").stat().st_size
    own = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert stored_bytes(tmp_path / "run") == weights + own


def test_the_base_of_a_run_may_lie_elsewhere_and_must_be_the_same(
    manifest_for: Manifests, causal: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(find_base(manifest_for().model).folder, moved)
    made = a_run(tmp_path / "run", manifest_for(model={"base": str(moved)}))
    shutil.move(moved, tmp_path / "there")
    with pytest.raises(ModelError, match="neither a directory here nor a hub id"):
        open_model(tmp_path / "run")
    opened = open_model(tmp_path / "run", base=tmp_path / "there")
    assert torch.allclose(logits(opened), logits(made), atol=1e-5)
    assert stored_bytes(tmp_path / "run", base=tmp_path / "there") > 0
    with pytest.raises(ModelError, match="was trained on weights"):
        open_model(tmp_path / "run", base=causal)


def test_a_models_folder(manifest_for: Manifests, tmp_path: Path) -> None:
    model = tiny(manifest_for("token-classification"))
    save_model(tmp_path / "model", model, {})
    assert torch.equal(logits(open_model(tmp_path / "model")), logits(model))
    assert stored_bytes(tmp_path / "model") == (tmp_path / "model" / "model.safetensors").stat().st_size
    with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
        file.write(b"\x00" * 64)
    with pytest.raises(DistillationError, match="was changed"):
        open_model(tmp_path / "model")


def test_a_causal_base_needs_a_task_and_another_base_has_no_head(
    manifest_for: Manifests, encoder: Path, causal: Path
) -> None:
    manifest = manifest_for("causal-lm", model={"base": "elsewhere/base", "revision": "0" * 40})
    assert torch.equal(logits(open_model(causal, manifest=manifest)), logits(tiny(manifest_for("causal-lm"))))
    with pytest.raises(AssessmentError, match="has no task of its own; say which with --manifest"):
        open_model(causal)
    with pytest.raises(AssessmentError, match="its head for text-classification would be one that nobody trained"):
        open_model(encoder, manifest=manifest_for("text-classification"))


def _onnx_file(path: Path) -> None:
    """A file that gives every text the sum of its ids times 1, 2 and 3 as logits."""
    from onnx import TensorProto, helper, numpy_helper, save

    weights = [np.array([[1.0, 2.0, 3.0]], dtype=np.float32), np.array([1], dtype=np.int64)]
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["seen"]),
        helper.make_node("Cast", ["seen"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["numbers", "axis"], ["sums"], keepdims=1),
        helper.make_node("MatMul", ["sums", "weight"], ["logits"]),
    ]
    shape = ["batch", "length"]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, shape) for n in ("input_ids", "attention_mask")]
    graph = helper.make_graph(
        nodes,
        "sums",
        inputs,
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(array, name) for array, name in zip(weights, ("weight", "axis"), strict=True)],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_an_onnx_file_and_a_folder_with_one(manifest_for: Manifests, tmp_path: Path) -> None:
    model, folder = tiny(manifest_for("text-classification")), tmp_path / "out"
    save_model(folder, model, {})
    (folder / "model.safetensors").unlink()  # who copies the small file leaves the large one behind
    _onnx_file(folder / "model.onnx")
    facts = json.loads((folder / "coadapt.json").read_text())
    facts["sha256"]["model.onnx"] = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "coadapt.json").write_text(json.dumps(facts))

    total = (torch.arange(24).reshape(2, 12) + 5).sum(dim=1, keepdim=True)
    for path in (folder / "model.onnx", folder):
        with one_thread():
            opened = open_model(path)
        assert torch.equal(logits(opened), total * torch.tensor([1.0, 2.0, 3.0]))
        assert stored_bytes(path) == (folder / "model.onnx").stat().st_size
        assert latency(opened, ["notice"], repetitions=1).calls == 1
    (folder / "second.onnx").write_bytes(b"")
    with pytest.raises(AssessmentError, match="holds 2 models; name one of them"):
        open_model(folder)
    with pytest.raises(CoadaptError, match="is not among the files"):
        open_model(folder / "second.onnx")


def _nothing(path: Path) -> None:
    pass


def _text(path: Path) -> None:
    path.write_text("Zanzibar")


def _empty(path: Path) -> None:
    path.mkdir()


def _unfinished(path: Path) -> None:
    (path / "rounds").mkdir(parents=True)
    (path / "federation.toml").write_text("")


def _damaged(path: Path) -> None:
    path.mkdir()
    (path / "coadapt.json").write_text('{"manifest": "Zanzibar')


def _no_manifest(path: Path) -> None:
    path.mkdir()
    (path / "coadapt.json").write_text('{"weights_sha256": "", "manifest": {"name": "Zanzibar"}}')


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_nothing, "no such file or folder; a model is a run's folder"),
        (_text, "is a file of another kind; a model is a run's folder"),
        (_empty, "holds no model; a model is a run's folder"),
        (_unfinished, "is a run without an adapter, so it did not finish"),
        (_damaged, r"coadapt.json cannot be read \(JSONDecodeError\)"),
        (_no_manifest, r"coadapt.json cannot be read \(ValidationError\)"),
    ],
)
def test_anything_else_is_one_line(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    make(tmp_path / "it")
    for asked in (open_model, stored_bytes):
        with pytest.raises(AssessmentError, match=words) as caught:
            asked(tmp_path / "it")
        assert "\n" not in str(caught.value)
        assert "Zanzibar" not in str(caught.value)
