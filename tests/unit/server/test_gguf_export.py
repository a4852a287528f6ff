"""GGUF files: what the transformers library reads back is the model that was written."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from common.config.manifest import Manifest
from common.errors import DistillationError
from common.evaluation import measure
from common.metrics import figures
from common.models import find_base, load_task_model, load_tokenizer
from common.randomness import seed_dropout
from common.records import InstructionRecord
from server.distillation.domain_model import DomainModel
from server.distillation.exports import TOLERANCE, export
from server.distillation.fidelity import distance
from server.distillation.gguf_export import export_gguf, load_gguf
from server.distillation.gguf_vocabulary import splitting
from server.distillation.terms import add_terms
from server.distillation.vocabulary import apply_vocabulary, trim
from simulations.contracts import records

TEXTS = ["The licensee shall pay 12345 dollars; it'll not wait.", "  two  spaces\n\nand lines", "émigré 心肌梗死"]


def llama(manifest: Manifest, **changes: object) -> DomainModel:
    """A tiny Llama with weights large enough that its answers differ from each other."""
    base = find_base(manifest.model)
    tokenizer = load_tokenizer(base)
    if not changes:
        network = load_task_model(base, manifest)
    else:
        seed_dropout(1, "llama of another shape")
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=80,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            **changes,
        )
        network = LlamaForCausalLM(config)
    _sharpen(network)
    return DomainModel(network.eval(), tokenizer, manifest)


def qwen2(manifest: Manifest) -> DomainModel:
    """A tiny Qwen2: biases, a head of its own, more ids than pieces, text split and normalised Qwen2's way."""
    spec = Tokenizer.from_str(load_tokenizer(find_base(manifest.model)).backend_tokenizer.to_str())
    spec.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), "isolated")
    spec.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    spec.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spec, eos_token="</s>", pad_token="<pad>", bos_token="<s>")
    seed_dropout(0, "qwen2")
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 13,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    network = Qwen2(config)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    _sharpen(network)
    return DomainModel(network.eval(), tokenizer, manifest)


def _sharpen(network: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)


def _logits(model: DomainModel) -> Tensor:
    ids = torch.arange(24).reshape(2, 12) + 50
    with torch.inference_mode():
        return model.network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.fixture(scope="module")
def written(
    manifest_for: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[DomainModel, Path]]:
    manifest = manifest_for("causal-lm")
    models = {"llama": llama(manifest), "narrow": llama(manifest, head_dim=8), "qwen2": qwen2(manifest)}
    folder = tmp_path_factory.mktemp("gguf")
    for name, model in models.items():
        formats = ["gguf", "gguf-f16", "gguf-f32"] if name == "qwen2" else ["gguf-f32"]
        export(model, folder / name, formats, sample=TEXTS)
    return {name: (model, folder / name) for name, model in models.items()}


@pytest.mark.parametrize("name", ["llama", "narrow", "qwen2"])
def test_a_file_in_float32_computes_the_same(name: str, written: dict[str, tuple[DomainModel, Path]]) -> None:
    model, folder = written[name]
    loaded = load_gguf(folder / "model.f32.gguf")
    assert torch.allclose(_logits(loaded), _logits(model), atol=1e-5)
    assert loaded.parameters == model.parameters


@pytest.mark.parametrize(("file", "form"), [("model.f16.gguf", "gguf-f16"), ("model.q8_0.gguf", "gguf")])
def test_smaller_files_stay_within_their_rounding(
    file: str, form: str, written: dict[str, tuple[DomainModel, Path]]
) -> None:
    model, folder = written["qwen2"]
    loaded = load_gguf(folder / file)
    assert 0 < distance(model, loaded, TEXTS).mean <= TOLERANCE[form]
    asked = [InstructionRecord(instruction=text, input="", output=text, unit="u") for text in TEXTS]
    bits = []
    for each in (model, loaded):
        counts = measure(each.network, each.task, each.task.encode(asked).examples, batch_size=2, precision="fp32")
        bits.append(figures("causal-lm", counts, ["bits_per_byte"])["bits_per_byte"])
    assert bits[1] == pytest.approx(bits[0], rel=0.02)
    sizes = [(folder / name).stat().st_size for name in ("model.q8_0.gguf", "model.f16.gguf", "model.f32.gguf")]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_files_own_tokenizer_cuts_text_the_same_way(
    name: str, written: dict[str, tuple[DomainModel, Path]], tmp_path: Path
) -> None:
    model, folder = written[name]
    (tmp_path / "alone.gguf").write_bytes((folder / "model.f32.gguf").read_bytes())
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="alone.gguf")
    assert theirs(TEXTS)["input_ids"] == model.tokenizer(TEXTS)["input_ids"]


def test_the_cards_code_runs(
    written: dict[str, tuple[DomainModel, Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = written["llama"]
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), flags=re.DOTALL)
    assert ['gguf_file="model.f32.gguf"' in block for block in blocks] == [False, True]
    said = []
    for block in blocks:
        exec(block, {})
        said.append(capsys.readouterr().out.removesuffix("\n"))
    text = "Question: What does the tenant pay?\nAnswer: "
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        best = model.network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].argmax()
    assert said[0] == model.tokenizer.decode(int(best))
    assert text + said[0] in said[1]


def test_names_of_splits_are_the_librarys(written: dict[str, tuple[DomainModel, Path]]) -> None:
    for name in ("qwen2", "llama-bpe"):
        split = {"type": "Split", "pattern": {"Regex": GGUF_PRE_TOKENIZER_SPLITS[name]}}
        after = {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}
        spec = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, after]}}
        assert splitting(spec) == name
    with pytest.raises(DistillationError, match="no name for the way"):
        splitting({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(DistillationError, match="found Unigram"):
        splitting({"model": {"type": "Unigram"}})


def test_damage_is_one_line(written: dict[str, tuple[DomainModel, Path]]) -> None:
    _, folder = written["narrow"]
    path = folder / "model.f32.gguf"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(DistillationError, match=r"model\.f32\.gguf was changed or is gone") as found:
        load_gguf(path)
    assert "\n" not in str(found.value)
    path.write_bytes(whole)


def test_models_that_no_file_can_hold_are_refused(manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    text = manifest_for("text-classification")
    base = find_base(text.model)
    encoder = DomainModel(load_task_model(base, text), load_tokenizer(base), text)
    with pytest.raises(DistillationError, match="gguf is a format of causal models"):
        export(encoder, tmp_path / "out", ["gguf"])
    pruned = llama(manifest_for("causal-lm"))
    mlp = pruned.network.model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight = torch.nn.Parameter(layer.weight[:50])
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :50])
    with pytest.raises(DistillationError, match="layers of one width"):
        export_gguf(pruned, tmp_path / "model.gguf")
    scaled = llama(manifest_for("causal-lm"))
    scaled.network.config.rope_parameters["rope_type"] = "llama3"
    with pytest.raises(DistillationError, match="found 'llama3'"):
        export(scaled, tmp_path / "out", ["gguf"])
    assert list(tmp_path.iterdir()) == []


def test_terms_that_the_files_vocabulary_would_cut_are_noticed(
    manifest_for: Callable[..., Manifest], tmp_path: Path
) -> None:
    model = add_terms(llama(manifest_for("causal-lm")), ["force majeure"])
    with pytest.raises(DistillationError, match="cuts 2 of 3 sample texts otherwise"):
        export(model, tmp_path / "out", ["gguf"], sample=["A force majeure.", "force majeure", "Rent is due."])
    assert list(tmp_path.iterdir()) == []


def test_a_trimmed_vocabulary_goes_with_the_file(manifest_for: Callable[..., Manifest], tmp_path: Path) -> None:
    whole = llama(manifest_for("causal-lm"))
    trimmed = trim(whole.tokenizer, [row["text"] for row in records("train", 0)], pieces=600, coverage=0.9)
    model = apply_vocabulary(whole, trimmed)
    (made,) = export(model, tmp_path / "out", ["gguf"], sample=TEXTS)
    loaded = load_gguf(made.path)
    assert loaded.network.config.vocab_size == len(trimmed.tokenizer) < 700
    assert distance(model, loaded, TEXTS).mean < TOLERANCE["gguf"]
