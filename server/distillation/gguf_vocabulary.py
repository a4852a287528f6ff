"""A tokenizer's vocabulary in the form of a GGUF file."""

import json
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from common.errors import DistillationError

__all__ = ["add_vocabulary", "splitting"]

# llama.cpp's names of the ways in which byte-level tokenizers split text into words, by their expressions.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_WORDS.replace("DIGITS", r"\p{N}"): "qwen2", _WORDS.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe"}


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Add pieces, their kinds, merges and special ids to a GGUFWriter; ids up to `size` that no piece has are unused.

    Raises:
        DistillationError: the tokenizer is no byte-level BPE, or splits text in a way that llama.cpp has no name for.
    """
    import gguf

    spec = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(spec))
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for index in range(size):
        tokens.append(pieces.get(index, f"[PAD{index}]"))
        if index not in pieces:
            kinds.append(gguf.TokenType.UNUSED)
        elif index not in added:
            kinds.append(gguf.TokenType.NORMAL)
        else:
            kinds.append(gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    writer.add_token_merges(merges)
    ids = cast(list[int], tokenizer("a")["input_ids"])
    for index, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def splitting(spec: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level BPE tokenizer, as its tokenizer.json describes it, splits text."""
    if spec["model"]["type"] != "BPE" or spec["model"].get("byte_fallback"):
        raise DistillationError(
            f"gguf is written for byte-level BPE tokenizers, found {spec['model']['type']}"
            f"{' with byte fallback' if spec['model'].get('byte_fallback') else ''}; export onnx"
        )
    before = spec.get("pre_tokenizer") or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    match [step.get("type") for step in steps]:
        case ["ByteLevel"] if steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
            return "gpt-2"
        case ["Split", "ByteLevel"] if not steps[1]["use_regex"] and not steps[1]["add_prefix_space"]:
            name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
            if name is not None:
                return name
    raise DistillationError("gguf has no name for the way in which this tokenizer splits text; export onnx")
