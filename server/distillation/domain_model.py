"""A domain model: network, tokenizer and task, whole in one folder of safetensors and JSON.

<model>/config.json         the transformer's configuration, as the transformers library writes it
<model>/model.safetensors   its weights under the library's own names: AutoModel, AutoModelForTokenClassification or
                            AutoModelForCausalLM read the folder where no heads were pruned and no words made narrow
<model>/head.safetensors    text classification: weight [labels, width] and bias [labels] of the linear head
<model>/tokenizer.json ...  the tokenizer
<model>/coadapt.json        the manifest, pooling, digests of the files above, and facts of how it was made
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from common.config.manifest import Manifest
from common.durable import new_folder, write_text
from common.errors import DistillationError
from common.models import PooledClassifier, Pooling
from common.tasks.task import Task, make_task
from server.distillation.embedding_rows import NarrowEmbedding

__all__ = ["DomainModel", "load_model", "save_model", "sha256", "stored_facts"]

FACTS = "coadapt.json"
_CLASSES: dict[str, Any] = {
    "text-classification": AutoModel,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
}


@dataclass(frozen=True)
class DomainModel:
    """A network with its tokenizer and the manifest whose task it does.

    `network(input_ids, attention_mask)`, both [records, tokens], gives logits [records, labels] for text
    classification, else an object whose `.logits` are [records, tokens, tags or words].
    """

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    manifest: Manifest

    @property
    def task(self) -> Task:
        """How records become batches and outputs become counts."""
        return make_task(self.manifest, self.tokenizer)

    @property
    def parameters(self) -> int:
        """Number of different parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.network.parameters())


def save_model(folder: Path, model: DomainModel, facts: Mapping[str, Any]) -> None:
    """Write the folder, whole or not at all; `facts` are what the model card tells of how it was made.

    Raises:
        DistillationError: the folder exists.
    """
    if folder.exists():
        raise DistillationError(f"{folder} exists already; a model never replaces another: choose another folder")
    network = model.network
    body = network.encoder if isinstance(network, PooledClassifier) else network
    with new_folder(folder) as part:
        cast(Any, body.config).save_pretrained(part)
        save_file(_own_tensors(body), part / "model.safetensors", metadata={"format": "pt"})
        # Who played which site on one machine is no fact of the model.
        manifest = model.manifest.model_copy(update={"simulation": None})
        written: dict[str, Any] = {"format": 1, "manifest": manifest.model_dump(mode="json")}
        if isinstance(network, PooledClassifier):
            save_file(_own_tensors(network.head), part / "head.safetensors", metadata={"format": "pt"})
            written["pooling"] = network.pooling
        model.tokenizer.save_pretrained(part)
        files = sorted(path.name for path in part.iterdir() if path.is_file())
        written |= {"sha256": {name: sha256(part / name) for name in files}, "facts": dict(facts)}
        write_text(part / FACTS, json.dumps(written, indent=2) + "\n")


def load_model(folder: Path) -> DomainModel:
    """The model of a folder that `save_model` wrote, on the CPU in float32, ready to measure.

    Raises:
        DistillationError: the folder holds none, or a file of it was changed or is damaged.
    """
    try:
        written = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        manifest = Manifest.model_validate_json(json.dumps(written["manifest"]))
        digests: dict[str, str] = written["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DistillationError(
            f"{folder} holds no model of Coadapt: {FACTS} cannot be read ({type(error).__name__}); give a folder that"
            " `coadapt distill` or `coadapt export` wrote"
        ) from error
    for name, digest in digests.items():
        if name.endswith((".onnx", ".gguf")):  # whole models of their own, which may be left behind
            continue
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise DistillationError(f"{folder / name} was changed or is gone since the model was stored; restore it")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        network = _network(config, manifest, written.get("pooling"))
        state = load_file(folder / "model.safetensors")
        if isinstance(network, PooledClassifier):
            state = {f"encoder.{name}": tensor for name, tensor in state.items()}
            state |= {f"head.{name}": tensor for name, tensor in load_file(folder / "head.safetensors").items()}
        _fill(network, state)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DistillationError(f"{folder} holds a model that cannot be loaded: {type(error).__name__}") from error
    return DomainModel(network.eval(), tokenizer, manifest)


def stored_facts(folder: Path) -> dict[str, Any]:
    """The facts that `save_model` stored with a model that `load_model` reads."""
    return dict(json.loads((folder / FACTS).read_text(encoding="utf-8"))["facts"])


def _network(config: Any, manifest: Manifest, pooling: Pooling | None) -> nn.Module:
    kind = _CLASSES[manifest.task.kind]
    if manifest.task.kind != "text-classification":
        return cast(nn.Module, kind.from_config(config))
    try:
        encoder = kind.from_config(config, add_pooling_layer=False)
    except TypeError:
        encoder = kind.from_config(config)
    return PooledClassifier(encoder, cast(Pooling, pooling), len(manifest.task.labels))


def _fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the tensors in; layers take the shapes of what is stored, since pruned heads have no place in a config."""
    for name, module in list(network.named_modules()):
        narrow = [state.get(f"{name}.{part}.weight") for part in ("table", "widen")]
        if isinstance(module, nn.Embedding) and narrow[0] is not None and narrow[1] is not None:
            network.set_submodule(name, NarrowEmbedding.of(narrow[0], narrow[1], module.padding_idx))
    for name, module in network.named_modules():
        weight = state.get(f"{name}.weight")
        if weight is not None and isinstance(module, nn.Linear | nn.Embedding) and weight.shape != module.weight.shape:
            module.weight = nn.Parameter(torch.empty_like(weight))
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = weight.shape
                if module.bias is not None:
                    module.bias = nn.Parameter(torch.empty(len(weight)))
            else:
                module.num_embeddings = len(weight)
    if hasattr(network, "tie_weights"):
        cast(Any, network).tie_weights()
    wanted = _own_tensors(network)
    if wanted.keys() != state.keys():
        raise ValueError(sorted(wanted.keys() ^ state.keys())[0])
    network.load_state_dict(dict(state), strict=False)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state with tied tensors once, under their first name; copies, contiguous, on the CPU."""
    seen: set[int] = set()
    own = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            own[name] = tensor.detach().to("cpu").contiguous().clone()
    return own


def sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
