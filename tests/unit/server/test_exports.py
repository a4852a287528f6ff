"""Exports: every file computes what its source computes, damage is seen, and what differs is not written."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from huggingface_hub import ModelCard
from onnx import numpy_helper
from tokenizers import AddedToken
from torch import Tensor, nn
from typer.testing import CliRunner

from common.adapters import attach, first_state, save_adapter
from common.config.manifest import Manifest
from common.errors import DistillationError
from common.evaluation import measure
from common.factors import stacked
from common.models import find_base, load_task_model, load_tokenizer
from common.randomness import seeded
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from server.assessment.opening import open_model
from server.distillation import exports
from server.distillation.domain_model import DomainModel, save_model
from server.distillation.exporting import export_path
from server.distillation.exports import TOLERANCE, Exported, export
from server.distillation.fidelity import distance, sample_of
from server.distillation.onnx_network import OnnxNetwork, load_onnx
from simulations.commands import app

KINDS = ("text-classification", "token-classification", "causal-lm")
TEXTS = [
    "The tenant pays.",
    "Force majeure: neither party is liable for a delay beyond its control.",
    "Rent",
    "It ends.",
]


@dataclass(frozen=True)
class Written:
    """A model, where it was exported to, what was told, and what came onto the terminal meanwhile."""

    model: DomainModel
    folder: Path
    done: list[Exported]
    noise: str


def make(kind: str, manifest: Manifest) -> DomainModel:
    """A model of one layer whose answers differ: of the classifier a head and columns are pruned, and a term added."""
    base = find_base(manifest.model)
    network, tokenizer = load_task_model(base, manifest).eval(), load_tokenizer(base)
    if kind == "causal-lm":
        network.model.layers = network.model.layers[:1]
        network.config.num_hidden_layers = 1
    else:
        encoder = network.encoder if kind == "text-classification" else network.bert
        encoder.encoder.layer = encoder.encoder.layer[:1]
        encoder.config.num_hidden_layers = 1
    if kind == "text-classification":
        tokenizer.add_tokens([AddedToken("force majeure", single_word=True, normalized=True)])
        network.encoder.resize_token_embeddings(len(tokenizer))
        prune(network.encoder.encoder.layer[0])
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
        if kind == "text-classification":
            network.head.weight.copy_(torch.from_numpy(seeded(0, "head").normal(0, 1, network.head.weight.shape)))
    return DomainModel(network, tokenizer, manifest)


def prune(layer: Any) -> None:
    """Three of four heads and 37 columns stay."""
    attention, out = layer.attention.self, layer.attention.output.dense
    for linear in (attention.query, attention.key, attention.value):
        linear.weight, linear.bias = nn.Parameter(linear.weight[:48].clone()), nn.Parameter(linear.bias[:48].clone())
    out.weight = nn.Parameter(out.weight[:, :48].clone())
    up, down = layer.intermediate.dense, layer.output.dense
    up.weight, up.bias = nn.Parameter(up.weight[:37].clone()), nn.Parameter(up.bias[:37].clone())
    down.weight = nn.Parameter(down.weight[:, :37].clone())


@contextlib.contextmanager
def terminal(path: Path) -> Iterator[None]:
    """What any library writes to the terminal goes to `path`, whichever stream it holds."""
    before = [os.dup(1), os.dup(2)]
    with path.open("wb") as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            for number, old in zip((1, 2), before, strict=True):
                os.dup2(old, number)
                os.close(old)


@pytest.fixture(scope="module")
def written(
    manifest_for: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Written]:
    """Each kind exported once, when it is first asked for: tracing takes seconds."""
    made: dict[str, Written] = {}

    def get(kind: str) -> Written:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = make(kind, manifest_for(kind))
            formats = ["safetensors", "onnx", "onnx-int8", "onnx-int4"]
            formats += ["triton"] if kind != "token-classification" else []
            with terminal(folder / "noise"):
                done = export(model, folder / "out", formats, sample=TEXTS)
            made[kind] = Written(model, folder / "out", done, (folder / "noise").read_text())
        return made[kind]

    return get


def _logits(network: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.inference_mode():
        output = network(input_ids=ids, attention_mask=mask)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_computes_the_same_at_every_shape(kind: str, written: Callable[[str], Written]) -> None:
    made = written(kind)
    network = load_onnx(made.folder / "model.onnx").network
    for records, length in ((1, 1), (1, 17), (5, 9)):
        ids = torch.arange(records * length).reshape(records, length) + 7
        mask = torch.ones_like(ids)
        mask[-1, length // 2 + 1 :] = 0
        ours, theirs = _logits(network, ids, mask), _logits(made.model.network, ids, mask)
        seen = mask.bool() if ours.ndim == 3 else torch.ones(records, dtype=torch.bool)
        assert torch.allclose(ours[seen], theirs[seen], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_takes_an_onnx_file_as_any_model(kind: str, written: Callable[[str], Written]) -> None:
    made = written(kind)
    labels = made.model.manifest.task.labels or ("",)
    records: dict[str, list[Record]] = {
        "text-classification": [
            TextRecord(text=text, label=labels[i % len(labels)], unit="u", group=None) for i, text in enumerate(TEXTS)
        ],
        "token-classification": [
            TokensRecord(tokens=tuple(text.split()), tags=("O",) * len(text.split()), unit="u", group=None)
            for text in TEXTS
        ],
        "causal-lm": [InstructionRecord(instruction=text, input="", output=text, unit="u") for text in TEXTS],
    }
    counts = []
    for model in (made.model, open_model(made.folder / "model.onnx")):
        examples = model.task.encode(records[kind]).examples
        counts.append(measure(model.network, model.task, examples, batch_size=3, precision="fp32"))
    assert counts[1] == pytest.approx(counts[0], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_small_close_and_quiet(kind: str, written: Callable[[str], Written]) -> None:
    made = written(kind)
    assert made.noise == ""
    sizes = {item.format: item.bytes for item in made.done}
    assert sizes["onnx-int4"] < sizes["onnx-int8"] < 0.6 * sizes["onnx"]
    for item in made.done:
        assert item.difference <= TOLERANCE[item.format]
        if item.path.suffix == ".onnx":
            assert item.bytes == item.path.stat().st_size
            assert distance(made.model, load_onnx(item.path), TEXTS).mean == item.difference
    assert [item.difference > 0 for item in made.done if "int" in item.format] == [True, True]
    loaded = open_model(made.folder)
    assert distance(made.model, loaded, TEXTS).mean == 0


def test_int8_has_a_scale_for_each_output(written: Callable[[str], Written]) -> None:
    whole, small = (
        _tensors(written("text-classification").folder / name) for name in ("model.onnx", "model.int8.onnx")
    )
    matrices = {name: array for name, array in whole.items() if array.ndim == 2 and f"{name}_quantized" in small}
    linear = {name: array for name, array in matrices.items() if small[f"{name}_scale"].size > 1}
    assert len(linear) >= 6
    for name, array in linear.items():
        scale = small[f"{name}_scale"]
        assert scale == pytest.approx(np.abs(array).max(axis=0) / 127.5, rel=0.01)
        restored = small[f"{name}_quantized"].astype(np.float32) * scale
        assert (np.abs(restored - array) <= 0.51 * scale).all()


def test_four_bits_round_to_the_nearest_of_each_block(written: Callable[[str], Written]) -> None:
    whole, small = (
        _tensors(written("text-classification").folder / name) for name in ("model.onnx", "model.int4.onnx")
    )
    packed = {
        name.removesuffix("_Q4"): array for name, array in small.items() if name.endswith("_Q4") and array.ndim == 3
    }
    assert len(packed) >= 6
    for name, array in packed.items():
        columns, blocks, half = array.shape
        assert half == 16
        nibbles = np.stack([array & 15, array >> 4], axis=-1).reshape(columns, blocks * 32).astype(np.float32) - 8
        scale = small[f"{name}_scales"].reshape(columns, blocks)
        rows = whole[name].shape[0]
        restored = (nibbles * np.repeat(scale, 32, axis=1))[:, :rows].T
        step = np.repeat(np.abs(scale), 32, axis=1)[:, :rows].T
        assert (np.abs(restored - whole[name]) <= 1.01 * step).all()  # the end of the range may be cut by one step
        assert np.mean(np.abs(restored - whole[name]) <= 0.51 * step) > 0.95
    assert any(array.dtype == onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.INT4) for array in small.values())


def test_a_tied_head_is_quantised_too(written: Callable[[str], Written]) -> None:
    made = written("causal-lm")
    for name in ("model.int8.onnx", "model.int4.onnx"):
        largest = max(array.size for array in _tensors(made.folder / name).values() if array.dtype == np.float32)
        assert largest < made.model.network.lm_head.weight.numel() / 10


def _tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("damage", ["cut", "changed", "tokenizer", "gone", "no facts"])
def test_damage_is_one_line(damage: str, written: Callable[[str], Written], tmp_path: Path) -> None:
    source = written("token-classification").folder
    for path in source.iterdir():  # the others' weights are left behind, as one who copies a single file would
        if path.is_file() and (not path.name.endswith((".onnx", ".safetensors")) or path.name == "model.int8.onnx"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    model = tmp_path / "model.int8.onnx"
    assert len(load_onnx(model).manifest.task.tags) == 3
    hurt = {"tokenizer": tmp_path / "tokenizer.json", "no facts": tmp_path / "coadapt.json"}.get(damage, model)
    data = bytearray(hurt.read_bytes())
    data[len(data) // 2] ^= 1
    hurt.write_bytes(data[:-9] if damage == "cut" else data)
    if damage in ("gone", "no facts"):
        hurt.unlink()
    with pytest.raises(DistillationError) as found:
        load_onnx(model)
    assert "\n" not in str(found.value)
    assert str(hurt) in str(found.value) or damage == "no facts"


def test_what_is_no_onnx_file_of_ours_is_refused(written: Callable[[str], Written], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(DistillationError, match="cannot be read as an ONNX file"):
        OnnxNetwork(tmp_path / "model.onnx")
    graph = onnx.load(written("text-classification").folder / "model.onnx")
    graph.graph.output[0].name = graph.graph.node[-1].output[0] = "scores"
    onnx.save(graph, tmp_path / "other.onnx")
    with pytest.raises(DistillationError, match="outputs scores"):
        OnnxNetwork(tmp_path / "other.onnx")
    exported = load_onnx(written("text-classification").folder / "model.onnx")
    with pytest.raises(DistillationError, match="cannot be exported again"):
        export(exported, tmp_path / "out", ["onnx"])


def test_a_file_that_says_something_else_is_not_written(
    written: Callable[[str], Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = written("text-classification")
    true = onnx.load(made.folder / "model.onnx")

    def traced(model: DomainModel, path: Path) -> None:
        onnx.save(true, path)

    def wrong(source: Path, target: Path) -> None:
        graph = onnx.load(source)
        head = next(tensor for tensor in graph.graph.initializer if list(tensor.dims) == [3, 64])
        head.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(head), head.name))
        onnx.save(graph, target)

    monkeypatch.setattr(exports, "export_onnx", traced)
    monkeypatch.setattr(exports, "quantise_int8", wrong)
    with pytest.raises(DistillationError, match="onnx-int8 export says something else than its source"):
        export(made.model, tmp_path / "out", ["onnx-int8", "onnx"], sample=TEXTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_one_line(
    package: str, manifest_for: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("token-classification", manifest_for("token-classification"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DistillationError, match=rf"needs the package {package},.*pip install 'coadapt\[compact\]'"):
        export(model, tmp_path / "out", ["onnx"])
    assert list(tmp_path.iterdir()) == []


def test_requests_that_make_no_sense_are_refused(manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    model = make("token-classification", manifest_for("token-classification"))
    for formats, words in (
        ([], "none is given"),
        (["tflite"], "found 'tflite'"),
        (["gguf"], "format of causal models"),
        (["adapter"], "needs the folder of the run"),
    ):
        with pytest.raises(DistillationError, match=words):
            export(model, tmp_path / "out", formats)
    with pytest.raises(DistillationError, match="exists already"):
        export(model, tmp_path, ["safetensors"])
    assert list(tmp_path.iterdir()) == []


def test_distance_is_total_variation(manifest_for: Callable[..., Manifest]) -> None:
    class Fixed(nn.Module):
        def __init__(self, chances: list[float]) -> None:
            super().__init__()
            self.logits = torch.tensor(chances).log()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.logits.expand(len(input_ids), -1)

    model = make("text-classification", manifest_for("text-classification"))
    one, other = (
        DomainModel(Fixed(chances), model.tokenizer, model.manifest) for chances in ([0.5, 0.3, 0.2], [0.1, 0.3, 0.6])
    )
    found = distance(one, other, TEXTS)
    assert (found.mean, found.agreement) == (pytest.approx(0.4), 0.0)
    assert distance(one, one, TEXTS).mean == 0
    with pytest.raises(DistillationError, match="no text to compare"):
        distance(one, other, [])
    tokenizer = load_tokenizer(find_base(model.manifest.model))  # without the term that `make` adds
    with pytest.raises(DistillationError, match="another way"):
        distance(model, DomainModel(model.network, tokenizer, model.manifest), ["force majeure"])


def test_sample_texts_cover_the_vocabulary_evenly(manifest_for: Callable[..., Manifest]) -> None:
    tokenizer = load_tokenizer(find_base(manifest_for("text-classification").model))
    texts = sample_of(tokenizer)
    assert texts == sample_of(tokenizer)
    lengths = {len(tokenizer(text)["input_ids"]) for text in texts}
    assert len(lengths) > 10
    used = {piece for text in texts for piece in tokenizer(text)["input_ids"]}
    thirds = [sum(1 for piece in used if piece * 3 // len(tokenizer) == third) for third in range(3)]
    assert min(thirds) > 20


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_runs_adapter_goes_out_as_it_is(pairs: int, manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = manifest_for("text-classification", adapter={"rank": 2, "alpha": 8.0})
    base = find_base(manifest.model)
    network = attach(load_task_model(base, manifest), manifest.adapter)
    rng = seeded(0, "trained adapter")
    state, other = (
        {name: rng.normal(0, 0.1, array.shape).astype(np.float32) for name, array in first_state(network, 0).items()}
        for _ in range(2)
    )
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "rounds").mkdir()
    (run / "federation.toml").write_text("")
    save_adapter(run / "adapter", network, state if pairs == 1 else stacked(other, state), base, manifest)
    done = export_path(run, tmp_path / "out", ["adapter", "safetensors"])
    assert [item.format for item in done] == ["safetensors", "adapter"]
    for path in (run / "adapter").iterdir():
        assert (tmp_path / "out" / "adapter" / path.name).read_bytes() == path.read_bytes()
    stored, apart = open_model(tmp_path / "out"), open_model(run)
    assert distance(apart, stored, TEXTS).mean < 1e-6
    plain = DomainModel(load_task_model(base, manifest).eval(), load_tokenizer(base), manifest)
    assert distance(apart, plain, TEXTS).mean > 0.01
    with pytest.raises(DistillationError, match="needs the folder of the run"):
        export_path(tmp_path / "out", tmp_path / "again", ["adapter"])


def test_the_command_says_what_it_wrote(manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    model = make("text-classification", manifest_for("text-classification"))
    save_model(tmp_path / "model", model, {"license": "mit", "made": ["Layers were left out."]})
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    given = ["export", str(tmp_path / "model"), "--format", "safetensors", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*given, "--texts", str(tmp_path / "texts.txt")])
    assert result.exit_code == 0, result.output
    assert "mean distance from its source 0.0e+00, same first answer 100.0 %" in result.output
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert "Layers were left out." in card.text
    again = CliRunner().invoke(app, given)
    assert isinstance(again.exception, DistillationError)
    (tmp_path / "texts.txt").write_text("\n")
    with pytest.raises(DistillationError, match="holds no text"):
        export_path(tmp_path / "model", tmp_path / "other", ["safetensors"], texts=tmp_path / "texts.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_the_cards_code_runs_and_says_what_the_model_says(
    kind: str, written: Callable[[str], Written], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = written(kind)
    monkeypatch.chdir(made.folder)
    card = ModelCard.load(made.folder / "README.md")
    assert card.data.pipeline_tag == {"causal-lm": "text-generation"}.get(kind, kind)
    blocks = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    # A pruned head has no place in a configuration, so that library cannot load the first one.
    assert len(blocks) == (2 if kind == "text-classification" else 3)
    said = []
    for block in blocks:
        exec(block, {})
        said.append(capsys.readouterr().out)
    text = re.findall(r'"((?:The tenant|Question:)[^"]*)"', blocks[0])[0].replace("\\n", "\n")
    inputs = made.model.tokenizer([text], return_tensors="pt")
    best = _logits(load_onnx(made.folder / "model.int8.onnx").network, inputs["input_ids"], inputs["attention_mask"])
    match kind:
        case "text-classification":
            label = made.model.manifest.task.labels[int(best.argmax())]
            assert said[0] == f"{label}\n"
            assert said[1].startswith(f"['{label}', ")
        case "token-classification":
            tags = [made.model.manifest.task.tags[tag] for tag in best[0].argmax(-1)]
            assert said[0] == f"{tags}\n"
            assert re.findall(r"'(O|[BI]-Disease)'\)", said[2]) == tags
        case "causal-lm":
            first = made.model.tokenizer.decode(int(best[0, -1].argmax()))
            assert said[0] == f"{first}\n"
            assert text + first in said[2]


def test_a_plain_classifiers_code_for_transformers_runs(
    manifest_for: Callable[..., Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = find_base(manifest_for().model)
    for pooling in ("mean", "cls", "last"):
        manifest = manifest_for("text-classification", model={"pooling": pooling})
        network = load_task_model(base, manifest).eval()
        model = DomainModel(network, load_tokenizer(base), manifest)
        export(model, tmp_path / pooling, ["safetensors"], sample=TEXTS)
        monkeypatch.chdir(tmp_path / pooling)
        blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), flags=re.DOTALL)
        said = []
        scope: dict[str, Any] = {}
        for block in blocks:
            exec(block, scope)
            said.append(capsys.readouterr().out)
        assert len(said) == 2
        assert said[0] == said[1]
        inputs = model.tokenizer(["The tenant pays the rent."], return_tensors="pt")
        expected = _logits(network, inputs["input_ids"], inputs["attention_mask"])
        assert torch.allclose(scope["logits"], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["text-classification", "causal-lm"])
def test_tritons_configuration_fits_the_file(kind: str, written: Callable[[str], Written]) -> None:
    made = written(kind)
    folder = made.folder / "triton" / "test"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), _model_config())
    assert (config.name, config.platform, config.max_batch_size) == ("test", "onnxruntime_onnx", 32)
    session = OnnxNetwork(folder / "1" / "model.onnx").session
    names = {"tensor(int64)": 1, "tensor(float)": 2}  # as `_model_config` numbers them
    for ours, theirs in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        # The first axis is the batch, which Triton adds itself; a free axis has a name in ONNX and is -1 in Triton.
        shapes = [[axis if isinstance(axis, int) else -1 for axis in value.shape[1:]] for value in theirs]
        assert [(value.name, value.data_type, list(value.dims)) for value in ours] == [
            (value.name, names[value.type], shape) for value, shape in zip(theirs, shapes, strict=True)
        ]
    readme = (made.folder / "triton" / "README.md").read_text()
    assert "Neither Triton nor TensorRT was run" in readme
    assert "--maxShapes=input_ids:32x64,attention_mask:32x64" in readme
    assert "tritonserver --model-repository=/models" in readme


def _model_config() -> Any:
    """An empty message with the fields of Triton's model_config.proto that we write."""
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="t", syntax="proto3")
    types = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, bool, str | None]) -> None:
        entry = file.message_type.add(name=name)
        for number, (field, kind, repeated, of) in enumerate(fields, start=1):
            label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
            entry.field.add(name=field, number=number, type=kind, label=label, type_name=of and f".t.{of}")

    for name, values in (("Data", ["TYPE_INVALID", "TYPE_INT64", "TYPE_FP32"]), ("Kind", ["KIND_AUTO", "KIND_GPU"])):
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    tensor = (
        ("name", types.TYPE_STRING, False, None),
        ("data_type", types.TYPE_ENUM, False, "Data"),
        ("dims", types.TYPE_INT64, True, None),
    )
    message("Tensor", *tensor)
    message("Batching", ("max_queue_delay_microseconds", types.TYPE_UINT64, False, None))
    message("Group", ("count", types.TYPE_INT32, False, None), ("kind", types.TYPE_ENUM, False, "Kind"))
    message(
        "Config",
        ("name", types.TYPE_STRING, False, None),
        ("platform", types.TYPE_STRING, False, None),
        ("max_batch_size", types.TYPE_INT32, False, None),
        ("input", types.TYPE_MESSAGE, True, "Tensor"),
        ("output", types.TYPE_MESSAGE, True, "Tensor"),
        ("dynamic_batching", types.TYPE_MESSAGE, False, "Batching"),
        ("instance_group", types.TYPE_MESSAGE, True, "Group"),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Config"))()
