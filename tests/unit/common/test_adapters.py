import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict

from common.adapter_methods import add_adapter, linear_targets
from common.adapters import attach, first_state, get_state, load_adapter, save_adapter, set_state
from common.codec.state import AdapterState, state_digest
from common.config.manifest import AdapterSection, Manifest
from common.errors import AdapterError, ModelError
from common.models import Base, find_base, load_task_model

# PEFT 0.21 asks Transformers 5.23 in a way that Transformers will drop in its version 6.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Manifests = Callable[..., Manifest]
KINDS = ["text-classification", "token-classification", "causal-lm"]


def made(manifest: Manifest) -> tuple[Base, PeftModel]:
    base = find_base(manifest.model)
    return base, attach(load_task_model(base, manifest), manifest.adapter)


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(10, 70).view(3, 20)
    with torch.no_grad():
        output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output if isinstance(output, torch.Tensor) else output.logits


def moved(model: PeftModel, seed: int = 0) -> AdapterState:
    """A state in which every tensor, B and the head's bias too, differs from the first one."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return {n: rng.normal(0, 0.3, a.shape).astype(np.float32) for n, a in get_state(model).items()}


@pytest.fixture(scope="module")
def gpt2(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose linear layers are Conv1D."""
    folder = tmp_path_factory.mktemp("bases") / "gpt2"
    config = transformers.GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder / name, folder / name)
    return folder


class TestAttach:
    def test_all_linear_layers_of_the_base_are_targets_and_no_head(self, manifest_for: Manifests, gpt2: Path) -> None:
        bert = ["dense", "key", "query", "value"]
        llama = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        for manifest, expected in (
            (manifest_for("text-classification"), bert),
            (manifest_for("token-classification"), bert),
            (manifest_for("causal-lm"), llama),
            (manifest_for("causal-lm", model={"base": str(gpt2)}), ["c_attn", "c_fc", "c_proj"]),
        ):
            assert linear_targets(load_task_model(find_base(manifest.model), manifest)) == expected

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_trains_is_the_adapter_and_the_head(self, manifest_for: Manifests, kind: str) -> None:
        _, model = made(manifest_for(kind))
        trainable = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        head = {"text-classification": "head", "token-classification": "classifier", "causal-lm": "none"}[kind]
        assert all("lora_" in name or f".{head}." in name for name in trainable)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
            array.size for array in get_state(model).values()
        )

    def test_conv1d_gets_an_adapter_that_learns(self, manifest_for: Manifests, gpt2: Path) -> None:
        _, model = made(manifest_for("causal-lm", model={"base": str(gpt2)}))
        before = logits(model)
        set_state(model, moved(model))
        assert not torch.allclose(logits(model), before)

    def test_rank_scale_and_named_targets_are_the_manifests(self, manifest_for: Manifests) -> None:
        _, model = made(manifest_for(adapter={"rank": 3, "alpha": 6.0, "targets": ["query", "layer.1.output.dense"]}))
        state = get_state(model)
        lora = {name for name in state if "lora_A" in name}
        assert len(lora) == 3
        assert all(name.endswith(("query.lora_A.weight", "layer.1.output.dense.lora_A.weight")) for name in lora)
        assert {state[name].shape[0] for name in lora} == {3}
        assert model.peft_config["default"].lora_alpha == 6.0

    @pytest.mark.parametrize("target", ["nothing", "head", "word_embeddings", "nothing.query", "uery"])
    def test_an_unknown_target_is_refused_with_what_there_is(self, manifest_for: Manifests, target: str) -> None:
        manifest = manifest_for(adapter={"targets": ["query", target]})
        model = load_task_model(find_base(manifest.model), manifest)
        with pytest.raises(AdapterError) as error:
            attach(model, manifest.adapter)
        assert str(error.value) == (
            f"adapter.targets: {target!r} is no linear layer of the base; it has dense, key, query, value"
        )

    def test_a_model_without_linear_layers_is_refused(self) -> None:
        with pytest.raises(AdapterError, match="'auto' is no linear layer of the base; it has none"):
            attach(torch.nn.Embedding(3, 3), AdapterSection())


class TestFirstState:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_depends_on_the_seed_alone(self, manifest_for: Manifests, kind: str) -> None:
        torch.manual_seed(1)
        one = made(manifest_for(kind))[1]
        torch.manual_seed(2)
        other = made(manifest_for(kind))[1]
        set_state(other, moved(other))
        assert state_digest(first_state(one, 7)) == state_digest(first_state(other, 7))
        assert state_digest(first_state(one, 7)) != state_digest(first_state(one, 8))

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_changes_nothing(self, manifest_for: Manifests, kind: str) -> None:
        manifest = manifest_for(kind)
        base, model = made(manifest)
        state = first_state(model, 0)
        set_state(model, moved(model))
        set_state(model, state)
        untuned = load_task_model(base, manifest)
        head = {name.rsplit(".", 1)[1]: array for name, array in state.items() if "lora_" not in name}
        for name, array in head.items():  # the head is new in both, so it is set to the same values
            layer = untuned.head if kind == "text-classification" else untuned.classifier
            getattr(layer, name).data = torch.from_numpy(array)
        assert set(head) == (set() if kind == "causal-lm" else {"weight", "bias"})
        torch.testing.assert_close(logits(model), logits(untuned), rtol=0, atol=1e-6)

    def test_its_values_have_the_bounds_of_a_linear_layer(self, manifest_for: Manifests) -> None:
        state = first_state(made(manifest_for())[1], 0)
        for name, array in state.items():
            if "lora_B" in name or name.endswith("bias"):
                assert not array.any()
            else:
                bound = 1 / np.sqrt(array.shape[1])
                assert np.abs(array).max() <= bound
                # Uniform on [-b, b] has deviation b/sqrt(3). Least tensor: 3 x 64 = 192 values; the variance's
                # relative standard error is sqrt(0.8/192) = 0.065, the deviation's half of it: 5 of them are 0.16.
                assert array.std() == pytest.approx(bound / np.sqrt(3), rel=0.16)
        assert len({state_digest({"x": a}) for n, a in state.items() if "lora_A" in n and a.shape == (8, 64)}) > 1


class TestState:
    @pytest.mark.parametrize("kind", KINDS)
    def test_round_trip(self, manifest_for: Manifests, kind: str) -> None:
        _, model = made(manifest_for(kind))
        state = moved(model)
        set_state(model, state)
        found = get_state(model)
        assert list(found) == sorted(state)
        assert state_digest(found) == state_digest(state)
        assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}

    def test_a_state_is_a_copy_both_ways(self, manifest_for: Manifests) -> None:
        _, model = made(manifest_for())
        state = moved(model)
        set_state(model, state)
        kept = get_state(model)
        digest = state_digest(kept)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        assert state_digest(kept) == state_digest(state) == digest
        for array in kept.values():
            array[...] = 0
        assert state_digest(get_state(model)) != state_digest(kept)

    @pytest.mark.parametrize("kind", KINDS)
    def test_peft_names_and_values_are_what_peft_itself_gives(self, manifest_for: Manifests, kind: str) -> None:
        _, model = made(manifest_for(kind))
        state = moved(model)
        set_state(model, state)
        oracle = get_peft_model_state_dict(model, save_embedding_layers=False)
        assert sorted(oracle) == list(state)
        assert all(np.array_equal(oracle[name].numpy(), state[name]) for name in state)

    def test_a_trained_parameter_that_would_not_travel_is_refused(self, manifest_for: Manifests) -> None:
        manifest = manifest_for()
        model = add_adapter(load_task_model(find_base(manifest.model), manifest), manifest.adapter)
        next(parameter for parameter in model.parameters() if not parameter.requires_grad).requires_grad_()
        with pytest.raises(AdapterError, match="parameters that its adapter does not hold"):
            get_state(model)

    def test_swapping_leaves_nothing_of_the_last_adapter(self, manifest_for: Manifests) -> None:
        _, model = made(manifest_for())
        first, second = moved(model, 1), moved(model, 2)
        set_state(model, first)
        expected = logits(model)
        set_state(model, second)
        assert not torch.allclose(logits(model), expected)
        set_state(model, first)
        assert torch.equal(logits(model), expected)

    def test_what_does_not_fit_is_refused_by_name(self, manifest_for: Manifests) -> None:
        _, model = made(manifest_for())
        state = moved(model)
        digest = state_digest(get_state(model))
        name = next(iter(state))
        rest = {other: array for other, array in state.items() if other != name}
        for wrong, shapes in (
            (rest, ("shape none", f"needs {state[name].shape}")),
            ({**rest, name: state[name].T}, (f"shape {state[name].T.shape}", f"needs {state[name].shape}")),
            ({**rest, name: state[name].ravel()}, (f"shape ({state[name].size},)", "needs")),
            ({**state, f"{name}.extra": np.zeros(2, np.float32)}, (f"{name}.extra has shape (2,)", "needs none")),
        ):
            with pytest.raises(AdapterError) as error:
                set_state(model, wrong)
            assert name in str(error.value)
            assert all(shape in str(error.value) for shape in shapes)
        assert state_digest(get_state(model)) == digest


class TestStored:
    def stored(self, folder: Path, manifest: Manifest) -> tuple[Base, torch.Tensor, AdapterState]:
        base, model = made(manifest)
        state = moved(model)
        set_state(model, state)
        folder.mkdir()
        save_adapter(folder, model, state, base, manifest)
        return base, logits(model), state

    @pytest.mark.parametrize("kind", KINDS)
    def test_peft_alone_reads_it_head_included(self, manifest_for: Manifests, tmp_path: Path, kind: str) -> None:
        manifest = manifest_for(kind)
        base, expected, state = self.stored(tmp_path / "adapter", manifest)
        fresh = load_task_model(base, manifest)
        for parameter in fresh.parameters():
            if parameter.requires_grad:  # whatever the new head holds must not matter
                torch.nn.init.constant_(parameter, 5.0)
        model = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        assert state_digest(get_state(model)) == state_digest(state)

    @pytest.mark.parametrize("kind", KINDS)
    def test_load_adapter_gives_model_and_manifest(self, manifest_for: Manifests, tmp_path: Path, kind: str) -> None:
        simulation = {"train": "records.jsonl"}
        manifest = manifest_for(kind, adapter={"rank": 4, "alpha": 8.0}, simulation=simulation)
        base, expected, state = self.stored(tmp_path / "adapter", manifest)
        model, agreed = load_adapter(tmp_path / "adapter", base)
        assert not model.training
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        assert state_digest(get_state(model)) == state_digest(state)
        assert agreed.digest() == manifest.digest()
        assert agreed.simulation is None

    def test_conv1d_survives_storing(self, manifest_for: Manifests, tmp_path: Path, gpt2: Path) -> None:
        manifest = manifest_for("causal-lm", model={"base": str(gpt2)})
        base, expected, _ = self.stored(tmp_path / "adapter", manifest)
        model = PeftModel.from_pretrained(load_task_model(base, manifest), tmp_path / "adapter")
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)

    def test_equal_adapters_give_equal_files(self, manifest_for: Manifests, tmp_path: Path) -> None:
        for name in ("one", "other"):
            self.stored(tmp_path / name, manifest_for())
        for file in ("adapter_config.json", "adapter_model.safetensors", "coadapt.json"):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()

    def test_another_base_is_refused(self, manifest_for: Manifests, tmp_path: Path, causal: Path) -> None:
        manifest = manifest_for()
        base, _, _ = self.stored(tmp_path / "adapter", manifest)
        other = find_base(manifest_for("causal-lm").model)
        with pytest.raises(ModelError, match=f"was trained on weights {base.weights_sha256}, found"):
            load_adapter(tmp_path / "adapter", other)

    def test_what_is_no_adapter_is_refused(self, manifest_for: Manifests, tmp_path: Path) -> None:
        base, _, _ = self.stored(tmp_path / "adapter", manifest_for())
        facts = json.loads((tmp_path / "adapter" / "coadapt.json").read_text())
        weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
        spoiled: dict[str, tuple[str, Any]] = {
            "not JSON": ("coadapt.json", b"{"),
            "a list": ("coadapt.json", b"[]"),
            "no manifest": ("coadapt.json", json.dumps({"weights_sha256": "0" * 64}).encode()),
            "no digest": ("coadapt.json", json.dumps({"manifest": facts["manifest"]}).encode()),
            "another version": (
                "coadapt.json",
                json.dumps({**facts, "manifest": {**facts["manifest"], "version": 2}}).encode(),
            ),
            "cut weights": ("adapter_model.safetensors", weights[:-1]),
            "no weights": ("adapter_model.safetensors", None),
        }
        for what, (file, data) in spoiled.items():
            folder = shutil.copytree(tmp_path / "adapter", tmp_path / what)
            (folder / file).unlink()
            if data is not None:
                (folder / file).write_bytes(data)
            with pytest.raises(AdapterError, match="holds no adapter of Coadapt") as error:
                load_adapter(folder, base)
            assert "\n" not in str(error.value)
        with pytest.raises(AdapterError, match="holds no adapter"):
            load_adapter(tmp_path / "nothing", base)


class TestDigest:
    STATE: AdapterState = {  # noqa: RUF012
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(1, np.float32),
    }

    def test_order_and_memory_layout_do_not_matter(self) -> None:
        other = {"b": self.STATE["b"].astype(">f4"), "a": np.asfortranarray(self.STATE["a"])}
        assert state_digest(other) == state_digest(self.STATE)

    def test_one_bit_matters(self) -> None:
        expected = state_digest(self.STATE)
        for name, array in self.STATE.items():
            for byte in range(array.nbytes):
                changed = array.copy()
                changed.view(np.uint8).ravel()[byte] ^= 1
                assert state_digest({**self.STATE, name: changed}) != expected

    def test_names_and_shapes_matter(self) -> None:
        a, b = self.STATE["a"], self.STATE["b"]
        states = [
            self.STATE,
            {"a": a.reshape(3, 2), "b": b},
            {"a": a.ravel(), "b": b},
            {"a": a, "c": b},
            {"b": a, "a": b},
            {"a": a},
            {"a": a, "b": b, "c": np.zeros(0, np.float32)},
            {},
        ]
        assert len({state_digest(state) for state in states}) == len(states)
