"""Whether the transformers library could build a network from its configuration alone."""

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification

from common.models import PooledClassifier

__all__ = ["is_plain"]


def is_plain(network: nn.Module, kind: str) -> bool:
    """True where every tensor has the shape that the configuration says; false where heads or columns were pruned in
    a way that no configuration expresses. `kind` is the manifest's task."""
    body = network.encoder if isinstance(network, PooledClassifier) else network
    classes: dict[str, Any] = {
        "text-classification": AutoModel,
        "token-classification": AutoModelForTokenClassification,
        "causal-lm": AutoModelForCausalLM,
    }
    with torch.device("meta"):
        built = classes[kind].from_config(cast(Any, body).config)
    expected = {name: tensor.shape for name, tensor in built.state_dict().items() if not name.startswith("pooler.")}
    return expected == {name: tensor.shape for name, tensor in body.state_dict().items()}
