"""What a student learns from: the teacher's softened answers, its hidden states, and labels where there are any.

Teacher and student may cut a text into different pieces. Then places that mean the same are found by `aligned`, and
only those are compared; of text classification the pooled vectors too.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from common.models import PooledClassifier, pool
from common.tasks.task import Batch, Example
from server.distillation.blocks import block_list

__all__ = ["HiddenStates", "Pairs", "aligned", "hidden_loss", "shared_pieces", "softened_loss"]


@dataclass(frozen=True)
class Pairs:
    """Places of one text that mean the same, in the teacher's and in the student's tokens; `same`: all of them."""

    teacher: np.ndarray
    student: np.ndarray
    same: bool


def aligned(teacher: Example, student: Example, pieces: tuple[Sequence[str], Sequence[str]] | None = None) -> Pairs:
    """The pairs of one text.

    Where `pieces`, the tokens' names (of equal names for equal text), are equal these are all places. Otherwise: with
    token classification the first piece of each word, which is what is scored; else the longest equal runs of pieces.
    Both lists rise.
    """
    names = pieces or ([str(i) for i in teacher.tokens.tolist()], [str(i) for i in student.tokens.tolist()])
    if list(names[0]) == list(names[1]):
        every = np.arange(len(names[0]))
        return Pairs(every, every, True)
    if teacher.positions is not None and student.positions is not None:
        both = (teacher.positions >= 0) & (student.positions >= 0)
        return Pairs(teacher.positions[both].astype(int), student.positions[both].astype(int), False)
    blocks = difflib.SequenceMatcher(None, *names, autojunk=False).get_matching_blocks()
    first = [np.arange(block.a, block.a + block.size) for block in blocks]
    second = [np.arange(block.b, block.b + block.size) for block in blocks]
    return Pairs(np.concatenate(first), np.concatenate(second), False)


def names_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The piece of each id without the signs by which kinds of tokenizers tell starts of words from insides."""
    names = cast(list[str], tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    return [_bare(name) for name in names]


def _bare(name: str) -> str:
    return name.removeprefix("##").lstrip("\u2581\u0120") or name


def shared_pieces(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Ids of the pieces that both have, in the teacher's and in the student's numbering, in the student's order."""
    known = teacher.get_vocab()
    own = sorted((index, known[piece]) for piece, index in student.get_vocab().items() if piece in known)
    pairs = torch.tensor(own, dtype=torch.long).view(-1, 2)
    return pairs[:, 1], pairs[:, 0]


class HiddenStates:
    """Catches what the embedding and chosen blocks of a network give, each [records, tokens, width], in one forward.

    Hooks are put in here and taken out by `close`: the library's own way leaves a function behind in the model that
    cannot be copied.
    """

    def __init__(self, network: nn.Module, layers: Sequence[int]) -> None:
        self.states: dict[int, Tensor] = {}
        blocks = block_list(network)
        self._hooks = [blocks[layer].register_forward_hook(self._catch(place)) for place, layer in enumerate(layers)]
        self._hooks.append(blocks[0].register_forward_pre_hook(self._catch_input, with_kwargs=True))

    def _catch(self, place: int) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            self.states[place + 1] = output[0] if isinstance(output, tuple) else output

        return hook

    def _catch_input(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.states[0] = inputs[0] if inputs else named["hidden_states"]

    def taken(self) -> list[Tensor]:
        """The states of the last forward, from the embedding to the last chosen block."""
        states = [self.states[place] for place in sorted(self.states)]
        self.states = {}
        return states

    def close(self) -> None:
        """Take the hooks out."""
        for hook in self._hooks:
            hook.remove()


def softened_loss(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 x KL(softmax(teacher / T) || softmax(student / T)) of each row [rows], logits [rows, classes].

    The factor keeps gradients of the same size at every temperature (Hinton et al. 2015, section 2).
    """
    wanted = functional.log_softmax(teacher.float() / temperature, dim=-1)
    said = functional.log_softmax(student.float() / temperature, dim=-1)
    return functional.kl_div(said, wanted, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def hidden_loss(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the squared distance of vectors [places, width] as a share of the teacher's squares.

    As a share, so that one weight serves networks whose states have different sizes; a layer norm makes the squares
    about 1, and this Jiao et al.'s loss (2020, section 3.1, equation 8).
    """
    shares = [
        functional.mse_loss(mine.float(), wanted.float()) / wanted.float().square().mean().clamp(min=1e-6)
        for wanted, mine in zip(teacher, student, strict=True)
    ]
    return torch.stack(shares).mean()


def places(pairs: Sequence[Pairs], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the batch, the teacher's and the student's places, each [all places]."""
    rows = np.concatenate([np.full(len(pair.teacher), row) for row, pair in enumerate(pairs)])
    parts = (rows, np.concatenate([p.teacher for p in pairs]), np.concatenate([p.student for p in pairs]))
    return cast(
        tuple[Tensor, Tensor, Tensor], tuple(torch.from_numpy(part.astype(np.int64)).to(device) for part in parts)
    )


def pooled(network: nn.Module, last: Tensor, batch: Batch) -> Tensor:
    """The vectors [records, width] that a text classifier's head reads."""
    return pool(last, batch.attention_mask, cast(PooledClassifier, network).pooling)
