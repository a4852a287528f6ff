"""Whole domain terms as single tokens: found in text or read from a file, with the mean of their pieces' rows.

A term is an added token that stands beside the tokenizer's model, so text without it is cut as before. Latin terms
count where they stand as whole words, Chinese ones wherever they stand.
"""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken, Regex, decoders
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.errors import DistillationError
from server.distillation.domain_model import DomainModel
from server.distillation.embedding_rows import embedding_of, with_rows
from server.distillation.pieces import rewrapped
from server.distillation.term_search import cut_terms, find_terms, gain, has_han, space_sign

__all__ = ["add_terms", "find_terms", "new_terms", "read_terms", "with_terms"]


def read_terms(path: Path) -> list[str]:
    """The terms of a file in UTF-8, one a line, in their order.

    Raises:
        DistillationError: no such file, another encoding, an empty line, a term twice, or none at all.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DistillationError(f"{path} cannot be read: {error.strerror}; give a file with one term a line") from error
    except UnicodeDecodeError as error:
        raise DistillationError(f"{path} is not UTF-8 (byte {error.start}); store it as UTF-8") from error
    lines = text.split("\n")
    if lines[-1] == "":  # the end of the last line
        lines.pop()
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        term = line.strip()
        if not term:
            raise DistillationError(
                f"{path}: line {number} is empty; each line needs one term: fill it in or remove it"
            )
        if term in first:
            raise DistillationError(
                f"{path}: line {number} repeats the term {term!r} of line {first[term]}; remove one of them"
            )
        first[term] = number
    if not first:
        raise DistillationError(f"{path} holds no term; give one term a line")
    return list(first)


def new_terms(tokenizer: PreTrainedTokenizerBase, terms: Sequence[str]) -> list[str]:
    """Those of `terms` that are several tokens or unknown, each once; the others are whole already.

    Raises:
        DistillationError: a term is empty or has white space around it.
    """
    for term in terms:
        if not term or term != term.strip():
            raise DistillationError(f"a term must be text without white space around it, found {term!r}; correct it")
    normalizer: Any = cast(Any, tokenizer).backend_tokenizer.normalizer
    found: dict[str, str] = {}
    for term, cut in zip(terms, cut_terms(tokenizer, terms), strict=True):
        spelled = normalizer.normalize_str(term) if normalizer is not None else term
        if gain(tokenizer, cut) and spelled not in found:
            found[spelled] = term
    return list(found.values())


def with_terms(tokenizer: PreTrainedTokenizerBase, terms: Sequence[str]) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer in which each of `terms` is one token; ids follow after all others, in order.

    Where pieces begin with the space before a word (byte-level BPE, SentencePiece), a Latin term takes that space in,
    which would be left over as a token of its own; written out again, it always has one.
    """
    made = rewrapped(copy.deepcopy(cast(Any, tokenizer).backend_tokenizer), tokenizer)
    backend: Any = cast(Any, made).backend_tokenizer
    sign = space_sign(tokenizer)
    latin = [term for term in terms if not has_han(term)]
    # A normalizer that writes signs for spaces would hide a word's borders from the term; it is looked for before.
    plain = backend.normalizer is None or sign == "\u2581"
    tokens = [
        AddedToken(
            term,
            single_word=not has_han(term),
            lstrip=bool(sign) and not has_han(term),
            normalized=not plain and not has_han(term),
            special=False,
        )
        for term in terms
    ]
    made.add_tokens(tokens)
    if sign and latin:
        # The byte-level decoder leaves a token alone that has a plain space in it, which no piece has.
        space = " " if sign == "\u0120" else sign
        any_term = "|".join(re.escape(term) for term in latin)
        backend.decoder = decoders.Sequence([decoders.Replace(Regex(f"^(?=(?:{any_term})$)"), space), backend.decoder])
    return made


def add_terms(model: DomainModel, terms: Sequence[str]) -> DomainModel:
    """The model with each of `terms` as one token; its rows, in and out, are the mean of the rows of its pieces.

    Terms that are one token already are passed over. Untrained, whole terms cost accuracy (docs/lab-notes.md): add
    them before distillation and train in it, or train their rows (`server/distillation/extend.py`).
    """
    added = new_terms(model.tokenizer, terms)
    if not added:
        return model
    cut = cut_terms(model.tokenizer, added)
    tokenizer = with_terms(model.tokenizer, added)
    start = len(model.tokenizer)

    def grown(rows: Tensor) -> Tensor:
        means = torch.stack([rows[ids].mean(dim=0) for ids in cut])
        # Some bases have more rows than their tokenizer has pieces; the terms take the first of those.
        return torch.cat([rows[:start], means, rows[start + len(cut) :]])

    if embedding_of(model.network).num_embeddings < start:
        raise DistillationError(
            f"the model has {embedding_of(model.network).num_embeddings} rows for {start} tokens of its tokenizer; its"
            " tokenizer is another model's: give a whole model folder"
        )
    network = with_rows(model.network, grown, lambda index: index)
    return DomainModel(network.eval(), tokenizer, model.manifest)
