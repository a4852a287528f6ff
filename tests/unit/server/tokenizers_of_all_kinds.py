"""Tokenizers of every kind for tests of the vocabulary, trained in a moment on the default scenario's clauses."""

import functools
import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from simulations.contracts import records
from simulations.tiny_base import _wordpiece_tokenizer

KINDS = ("wordpiece", "byte-bpe", "character-bpe", "whole-word-bpe", "unigram", "byte-unigram")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


@functools.cache
def clauses() -> list[str]:
    return [row["text"] for row in records("train", 0)]


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer of about 1,200 pieces; its special tokens stand behind all others but for WordPiece."""
    if kind == "wordpiece":
        return _wordpiece_tokenizer()
    backend: Any = Tokenizer(models.Unigram()) if "unigram" in kind else Tokenizer(models.BPE())
    options: dict[str, Any] = {"vocab_size": 1200, "show_progress": False}
    backend.normalizer = normalizers.NFC()
    if kind in ("byte-bpe", "whole-word-bpe"):
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        trainer = trainers.UnigramTrainer(**options) if "unigram" in kind else trainers.BpeTrainer(**options)
    backend.train_from_iterator(clauses()[:600], trainer)
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if kind == "whole-word-bpe":
        model["ignore_merges"] = True
    if kind == "character-bpe":
        model["vocab"]["<unk>"] = len(model["vocab"])
        model["unk_token"] = "<unk>"
    if "unigram" in kind:
        model["vocab"].append(["<unk>", 0.0])
        model["unk_id"] = len(model["vocab"]) - 1
    if kind == "byte-unigram":
        model["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
        model["byte_fallback"] = True
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens([token for token in SPECIAL if token != "<unk>" or backend.token_to_id("<unk>")])
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.Sequence(
        [processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends)]
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    if backend.token_to_id("<unk>") is not None:
        roles["unk_token"] = "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles, model_max_length=512)
