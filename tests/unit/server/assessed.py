"""Tiny models and records for what measures and compares models."""

import itertools
from collections.abc import Callable

import torch
from torch import nn

from common.config.manifest import Manifest
from common.models import find_base, load_task_model, load_tokenizer
from common.randomness import seeded
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from server.distillation.domain_model import DomainModel

KINDS = ("text-classification", "token-classification", "causal-lm")
WORDS = ("notice", "party", "shall", "liable", "governing", "law", "terminate", "claims", "fever", "aspirin")


def tiny(manifest: Manifest) -> DomainModel:
    """An untrained model whose head says different things of different texts."""
    base = find_base(manifest.model)
    network = load_task_model(base, manifest).eval()
    generator = torch.Generator().manual_seed(1)
    for name in ("head", "classifier"):
        layer = getattr(network, name, None)
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                layer.weight.copy_(torch.empty_like(layer.weight).normal_(0, 3, generator=generator))
                layer.bias.zero_()  # where the library drew it, each model would have another
    return DomainModel(network, load_tokenizer(base), manifest)


def records(kind: str, count: int) -> list[Record]:
    """Records of the task, of different lengths."""
    rng = seeded(0, "assessed", kind)
    return [_record(kind, [str(word) for word in rng.choice(WORDS, 2 + index % 7)], index) for index in range(count)]


def _record(kind: str, words: list[str], index: int) -> Record:
    unit = f"unit-{index}"
    if kind == "text-classification":
        return TextRecord(text=" ".join(words), label="abc"[index % 3], unit=unit)
    if kind == "token-classification":
        tags = itertools.cycle(("B-Disease", "I-Disease", "O", "O"))
        return TokensRecord(tokens=tuple(words), tags=tuple(next(tags) for _ in words), unit=unit)
    return InstructionRecord(instruction=" ".join(words), input="", output=" ".join(words[:2]), unit=unit)


Manifests = Callable[..., Manifest]
