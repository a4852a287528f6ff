import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from common.config.manifest import DEFAULT_BASE, DEFAULT_REVISION, DEFAULT_WEIGHTS_SHA256, Manifest, ModelSection
from common.errors import ModelError
from common.models import (
    PooledClassifier,
    find_base,
    head_name,
    load_task_model,
    load_tokenizer,
    pool,
    pooling_of,
    precision,
)

Manifests = Callable[..., Manifest]
TINY = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refused(section: ModelSection) -> str:
    with pytest.raises(ModelError) as error:
        find_base(section)
    assert "\n" not in str(error.value)
    return str(error.value)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def saved(folder: Path, model: Any, tokenizer_of: Path) -> Path:
    """A base made of `model` with the tokenizer of another base."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_of / name, folder / name)
    return folder


@pytest.fixture
def copy(encoder: Path, tmp_path: Path) -> Path:
    """A tiny encoder that a test may spoil."""
    return shutil.copytree(encoder, tmp_path / "copy")


class TestFinding:
    def test_the_digest_of_one_file_is_its_own(self, encoder: Path) -> None:
        base = find_base(ModelSection(base=str(encoder)))
        assert base.folder == encoder
        assert base.weights_sha256 == sha256(encoder / "model.safetensors")
        assert base.tokenizer_sha256 == sha256(encoder / "tokenizer.json")

    def test_the_digest_of_several_files_is_that_of_their_sorted_lines(self, copy: Path) -> None:
        tensors = load_file(copy / "model.safetensors")
        (copy / "model.safetensors").unlink()
        parts = {"b.safetensors": {}, "a.safetensors": {}, "c.safetensors": {}}
        for index, (name, tensor) in enumerate(tensors.items()):
            parts[sorted(parts)[index % 3]][name] = tensor
        for name, part in parts.items():
            save_file(part, copy / name)
        (copy / "tokenizer.json").unlink()
        (copy / "vocab.txt").write_text("a\nb\n")
        (copy / "merges.txt").write_text("a b\n")
        base = find_base(ModelSection(base=str(copy)))
        for digest, names in (
            (base.weights_sha256, ["a.safetensors", "b.safetensors", "c.safetensors"]),
            (base.tokenizer_sha256, ["merges.txt", "vocab.txt"]),
        ):
            lines = "\n".join([f"{name}:{sha256(copy / name)}" for name in names] + [""])
            assert digest == hashlib.sha256(lines.encode()).hexdigest()

    @pytest.mark.parametrize("pin", ["weights_sha256", "tokenizer_sha256"])
    def test_files_of_another_digest_are_refused(self, encoder: Path, pin: str) -> None:
        found = getattr(find_base(ModelSection(base=str(encoder))), pin)
        assert find_base(ModelSection.model_validate({"base": str(encoder), pin: found}))
        message = refused(ModelSection.model_validate({"base": str(encoder), pin: "0" * 64}))
        assert message.startswith(f"model.{pin}: ")
        assert found in message
        assert "0" * 64 in message

    def test_a_folder_without_safetensors_is_refused(self, copy: Path) -> None:
        (copy / "model.safetensors").rename(copy / "model.bin")
        assert "no .safetensors file" in refused(ModelSection(base=str(copy)))

    def test_pickled_weights_are_not_read(self, copy: Path, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "sprung",)

        (copy / "model.safetensors").unlink()
        torch.save({"x": Trap()}, copy / "pytorch_model.bin")
        assert "other weight formats are not read" in refused(ModelSection(base=str(copy)))
        assert not (tmp_path / "sprung").exists()

    def test_a_folder_without_tokenizer_is_refused(self, copy: Path) -> None:
        (copy / "tokenizer.json").unlink()
        assert "no tokenizer files" in refused(ModelSection(base=str(copy)))

    @pytest.mark.parametrize("base", ["./nothing", "/no/such", "~/nothing-here", "one-word", "a/b/c"])
    def test_what_is_neither_directory_nor_hub_id_is_refused(self, base: str) -> None:
        assert "neither a directory here nor a hub id" in refused(ModelSection(base=base))

    @pytest.mark.parametrize("pins", [{}, {"revision": COMMIT}, {"weights_sha256": "0" * 64}])
    def test_a_hub_id_needs_its_pins(self, pins: dict[str, str]) -> None:
        assert "needs model.revision" in refused(ModelSection.model_validate({"base": "owner/name", **pins}))


class Hub:
    """Stands for `snapshot_download`: `answers` by local_files_only, an error or a folder; remembers its calls."""

    def __init__(self, answers: dict[bool, Exception | Path]) -> None:
        self.answers = answers
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        answer = self.answers[options["local_files_only"]]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


MISSING = LocalEntryNotFoundError("not in the cache\nand of two lines")


class TestHub:
    def section(self, folder: Path) -> ModelSection:
        return ModelSection(
            base="owner/name", revision=COMMIT, weights_sha256=find_base(ModelSection(base=str(folder))).weights_sha256
        )

    def with_hub(self, monkeypatch: pytest.MonkeyPatch, cached: Exception | Path, online: Exception | Path) -> Hub:
        hub = Hub({True: cached, False: online})
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
        return hub

    @pytest.mark.parametrize(
        "error", [MISSING, ConnectionError("no route"), httpx.ProxyError("proxy"), httpx.ReadTimeout("slow")]
    )
    def test_an_unreachable_hub_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, encoder: Path, error: Exception
    ) -> None:
        self.with_hub(monkeypatch, MISSING, error)
        message = refused(self.section(encoder))
        assert f"'owner/name' at {COMMIT} is not on this machine" in message
        assert type(error).__name__ in message

    def test_a_name_that_the_hub_does_not_allow_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.with_hub(monkeypatch, HFValidationError("bad name"), MISSING)
        section = ModelSection(base="own er/na me", revision=COMMIT, weights_sha256="0" * 64)
        assert "neither a directory here nor a hub id" in refused(section)

    def test_the_cache_comes_first_and_gets_the_pinned_revision(
        self, monkeypatch: pytest.MonkeyPatch, encoder: Path
    ) -> None:
        hub = self.with_hub(monkeypatch, encoder, AssertionError("asked the network"))
        assert find_base(self.section(encoder)).folder == encoder
        assert [(call["repo_id"], call["revision"]) for call in hub.calls] == [("owner/name", COMMIT)]

    @pytest.mark.parametrize("cached", ["none", "without weights"])
    def test_then_the_hub_is_asked(
        self, monkeypatch: pytest.MonkeyPatch, encoder: Path, tmp_path: Path, cached: str
    ) -> None:
        hub = self.with_hub(monkeypatch, MISSING if cached == "none" else tmp_path, encoder)
        assert find_base(self.section(encoder)).folder == encoder
        assert [(call["revision"], call["local_files_only"]) for call in hub.calls] == [(COMMIT, True), (COMMIT, False)]
        patterns = hub.calls[1]["allow_patterns"]
        assert not any(name.endswith((".bin", ".py", ".pt")) for name in patterns)
        assert "1_Pooling/*" in patterns

    def test_what_the_hub_gives_is_checked(self, monkeypatch: pytest.MonkeyPatch, encoder: Path) -> None:
        self.with_hub(monkeypatch, MISSING, encoder)
        section = ModelSection(base="owner/name", revision=COMMIT, weights_sha256="0" * 64)
        assert refused(section).startswith("model.weights_sha256")

    def test_the_default_base_comes_from_the_wheel_without_a_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = self.with_hub(monkeypatch, MISSING, AssertionError("asked the network"))
        base = find_base(ModelSection())
        assert base.name == DEFAULT_BASE
        assert base.weights_sha256 == DEFAULT_WEIGHTS_SHA256 == sha256(base.folder / "model.safetensors")
        assert [call["revision"] for call in hub.calls] == [DEFAULT_REVISION]
        assert pooling_of(base.folder, causal=True) == "mean"  # as sentence encoders of this family are trained

    def test_the_default_base_loads_whole(self, monkeypatch: pytest.MonkeyPatch, manifest_for: Manifests) -> None:
        self.with_hub(monkeypatch, MISSING, MISSING)
        manifest = manifest_for().model_copy(update={"model": ModelSection()})
        model = load_task_model(find_base(manifest.model), manifest)
        assert isinstance(model, PooledClassifier)
        assert model.pooling == "mean"
        assert sum(parameter.numel() for parameter in model.encoder.parameters()) > 20e6

    def test_the_wheel_stands_for_the_default_revision_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.with_hub(monkeypatch, MISSING, MISSING)
        section = ModelSection(base=DEFAULT_BASE, revision=COMMIT, weights_sha256=DEFAULT_WEIGHTS_SHA256)
        assert "not on this machine" in refused(section)


@pytest.mark.parametrize(
    ("settings", "causal", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, True, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, False, "cls"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, False, "last"),
        ({"pooling_mode": "mean"}, True, "mean"),
        ({"pooling_mode": "cls"}, False, "cls"),
        ({"pooling_mode": "lasttoken"}, False, "last"),
        ({"pooling_mode": "max"}, False, "mean"),
        (None, False, "mean"),
        (None, True, "last"),
    ],
)
def test_pooling_is_read_from_the_files_of_the_base(
    tmp_path: Path, settings: dict[str, Any] | None, causal: bool, expected: str
) -> None:
    if settings is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert pooling_of(tmp_path, causal=causal) == expected


def slow_pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> list[list[float]]:
    rows = []
    for vectors, marks in zip(hidden.tolist(), mask.tolist(), strict=True):
        real = [vector for vector, mark in zip(vectors, marks, strict=True) if mark]
        means = [sum(column) / len(real) for column in zip(*real, strict=True)]
        rows.append({"cls": real[0], "last": real[-1], "mean": means}[pooling])
    return rows


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pool_equals_a_slow_loop(pooling: Any) -> None:
    hidden = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([[7], [1], [3], [6]])).long()
    torch.testing.assert_close(pool(hidden, mask, pooling), torch.tensor(slow_pool(hidden, mask, pooling)))


class TestLoading:
    @pytest.mark.parametrize("base", ["encoder", "causal"])
    @pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
    def test_padding_never_changes_logits(
        self, manifest_for: Manifests, encoder: Path, causal: Path, base: str, pooling: str
    ) -> None:
        folder = {"encoder": encoder, "causal": causal}[base]
        manifest = manifest_for(model={"base": str(folder), "pooling": pooling})
        model = load_task_model(find_base(manifest.model), manifest).eval()
        ids = torch.randint(5, 300, (3, 20), generator=torch.Generator().manual_seed(1))
        alone, other = torch.ones(3, 20, dtype=torch.long), torch.full((3, 13), 7)
        padded = model(torch.cat([ids, other], 1), torch.cat([alone, torch.zeros_like(other)], 1))
        torch.testing.assert_close(padded, model(ids, alone), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("kind", ["text-classification", "token-classification", "causal-lm"])
    def test_only_the_head_is_trainable(self, manifest_for: Manifests, kind: str) -> None:
        manifest = manifest_for(kind)
        model = load_task_model(find_base(manifest.model), manifest)
        head = {"text-classification": "head", "token-classification": "classifier", "causal-lm": None}[kind]
        assert head_name(model) == head
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == ({f"{head}.weight", f"{head}.bias"} if head else set())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        if head:
            labels = {"text-classification": 3, "token-classification": 3}[kind]
            assert model.get_parameter(f"{head}.weight").shape[0] == labels

    def test_the_dropout_of_the_base_is_off(
        self, manifest_for: Manifests, encoder: Path, causal: Path, tmp_path: Path
    ) -> None:
        configs: dict[str, Any] = {
            "bert": transformers.BertConfig(**TINY, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5),
            "llama": transformers.LlamaConfig(**TINY, num_key_value_heads=1, attention_dropout=0.5),
            "gpt2": transformers.GPT2Config(
                vocab_size=100, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5
            ),
        }
        for name, config in configs.items():
            folder = saved(tmp_path / name, transformers.AutoModel.from_config(config), encoder)
            manifest = manifest_for(model={"base": str(folder)})
            model = load_task_model(find_base(manifest.model), manifest)
            ids = torch.arange(10, 30).view(2, 10)
            still = model.eval()(ids, torch.ones_like(ids))
            torch.testing.assert_close(model.train()(ids, torch.ones_like(ids)), still)

    def test_an_encoder_cannot_write_answers(self, manifest_for: Manifests, encoder: Path) -> None:
        manifest = manifest_for("causal-lm", model={"base": str(encoder)})
        with pytest.raises(ModelError, match="reads text in both directions and cannot write answers"):
            load_task_model(find_base(manifest.model), manifest)

    def test_an_encoder_decoder_is_refused(self, manifest_for: Manifests, encoder: Path, tmp_path: Path) -> None:
        config = transformers.T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        folder = saved(tmp_path / "t5", transformers.T5ForConditionalGeneration(config), encoder)
        for kind in ("text-classification", "causal-lm"):
            manifest = manifest_for(kind, model={"base": str(folder)})
            with pytest.raises(ModelError, match="is an encoder-decoder"):
                load_task_model(find_base(manifest.model), manifest)

    def test_longer_inputs_than_the_base_reads_are_refused(self, manifest_for: Manifests) -> None:
        longest = manifest_for(data={"max_length": 512})
        load_task_model(find_base(longest.model), longest)
        manifest = manifest_for(data={"max_length": 513})
        with pytest.raises(ModelError, match=r"max_length must be at most 512, .*found 513"):
            load_task_model(find_base(manifest.model), manifest)

    def test_the_positions_of_roberta_begin_after_the_padding_token(
        self, manifest_for: Manifests, encoder: Path, tmp_path: Path
    ) -> None:
        config = transformers.RobertaConfig(**TINY, max_position_embeddings=66, pad_token_id=1)
        folder = saved(tmp_path / "roberta", transformers.RobertaModel(config), encoder)
        manifest = manifest_for(model={"base": str(folder)}, data={"max_length": 64})
        model = load_task_model(find_base(manifest.model), manifest)
        ids = torch.full((1, 64), 7)
        assert model(ids, torch.ones_like(ids)).shape == (1, 3)
        manifest = manifest_for(model={"base": str(folder)}, data={"max_length": 65})
        with pytest.raises(ModelError, match="at most 64"):
            load_task_model(find_base(manifest.model), manifest)

    def test_damaged_weights_are_one_line(self, manifest_for: Manifests, copy: Path) -> None:
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        manifest = manifest_for(model={"base": str(copy)})
        with pytest.raises(ModelError, match="cannot be loaded for text-classification") as error:
            load_task_model(find_base(manifest.model), manifest)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"intermediate_size": 96}])
    @pytest.mark.parametrize("kind", ["text-classification", "token-classification"])
    def test_weights_that_lack_a_part_of_the_base_are_refused(
        self, manifest_for: Manifests, copy: Path, kind: str, change: dict[str, int]
    ) -> None:
        # The library would fill the gap with random numbers, and every site would train on a base of its own.
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | change))
        manifest = manifest_for(kind, model={"base": str(copy)})
        with pytest.raises(ModelError, match=r"lack \d+ tensors"):
            load_task_model(find_base(manifest.model), manifest)

    def test_a_base_tuned_for_other_tags_gets_a_new_head(
        self, manifest_for: Manifests, encoder: Path, tmp_path: Path
    ) -> None:
        model = transformers.BertForTokenClassification(transformers.BertConfig(**TINY, num_labels=9))
        manifest = manifest_for("token-classification", model={"base": str(saved(tmp_path / "ner", model, encoder))})
        loaded: Any = load_task_model(find_base(manifest.model), manifest)
        assert loaded.classifier.weight.shape == (3, 16)
        assert loaded.config.id2label == {0: "O", 1: "B-Disease", 2: "I-Disease"}
        torch.testing.assert_close(
            loaded.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight.detach()
        )

    def test_the_pooling_of_the_base_is_used_unless_the_manifest_says_otherwise(
        self, manifest_for: Manifests, copy: Path, causal: Path
    ) -> None:
        (copy / "1_Pooling").mkdir()
        (copy / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
        for folder, wanted, expected in (
            (copy, "auto", "cls"),
            (copy, "last", "last"),
            (causal, "auto", "last"),
            (causal, "mean", "mean"),
        ):
            manifest = manifest_for(model={"base": str(folder), "pooling": wanted})
            model = load_task_model(find_base(manifest.model), manifest)
            assert isinstance(model, PooledClassifier)
            assert model.pooling == expected

    def test_no_pooler_is_loaded_that_no_gradient_would_reach(self, manifest_for: Manifests) -> None:
        manifest = manifest_for()
        model = load_task_model(find_base(manifest.model), manifest)
        assert not [name for name, _ in model.named_parameters() if "pooler" in name]
        ids = torch.arange(5, 25).view(1, 20)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model(ids, torch.ones_like(ids)).square().sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


class TestTokenizer:
    def test_the_end_token_pads_where_there_is_no_other(self, causal: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(causal, tmp_path / "copy")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["pad_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_tokenizer(find_base(ModelSection(base=str(folder))))
        assert tokenizer.pad_token == "</s>"
        assert load_tokenizer(find_base(ModelSection(base=str(causal)))).pad_token == "<pad>"

    def test_a_damaged_tokenizer_is_one_line(self, copy: Path) -> None:
        base = find_base(ModelSection(base=str(copy)))
        (copy / "tokenizer.json").write_text("{")
        with pytest.raises(ModelError, match="cannot be loaded") as error:
            load_tokenizer(base)
        assert "\n" not in str(error.value)


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    processor, card = torch.device("cpu"), torch.device("cuda")
    for wanted in ("bf16", "fp32"):
        assert precision(wanted, processor) == precision(wanted, card) == wanted
    for fast, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("common.models._has_fast_bf16", lambda fast=fast: fast)
        assert precision("auto", processor) == expected
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda fast=fast: fast)
        assert precision("auto", card) == expected


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True, "avx512_bf16": False}, False)],
)
def test_a_processor_is_asked_for_its_bf16(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], fast: bool
) -> None:
    from common.models import _has_fast_bf16

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    _has_fast_bf16.cache_clear()
    assert _has_fast_bf16() is fast
    _has_fast_bf16.cache_clear()


def test_a_head_of_another_name_is_refused() -> None:
    class OddForTokenClassification(nn.Module):
        pass

    with pytest.raises(ModelError, match="has no head named"):
        head_name(OddForTokenClassification())
