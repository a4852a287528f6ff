"""Losses of distillation: the teacher's softened answers, and its hidden states.

Teacher and student may cut a text into different pieces. Answers are then compared where both have one: for a text,
for the first piece of a word, and for the next word where both read the same pieces.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["hidden_distance", "soft_cross_entropy"]


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) for each row; both are [rows, answers].

    (Hinton et al. 2015, section 2.) The factor T^2 keeps the gradient's size where T changes. Zero for equal rows.
    """
    log_student = functional.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = functional.log_softmax(teacher.float() / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1) * temperature**2


def hidden_distance(student: list[Tensor], teacher: list[Tensor], keep: Tensor) -> Tensor:
    """Mean squared difference of hidden states over the kept tokens and the layers; 0 where none is kept.

    Each is [records, tokens, width], `keep` [records, tokens]; a teacher's state is divided by its own spread, so that
    the weight of this loss means the same for every base (TinyBERT's hidden loss: Jiao et al. 2020, equation 8).
    """
    if not keep.any() or not student:
        return torch.zeros(())
    total = torch.zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        wanted = theirs[keep].float()
        total = total + (ours[keep].float() - wanted).square().mean() / wanted.var().clamp(min=1e-6)
    return total / len(student)
