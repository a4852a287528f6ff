"""Losses of distillation: the teacher's softened answers, and its hidden states."""

from collections.abc import Sequence

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


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of hidden states over places and layers; 0 where there is no place.

    One tensor [places, width] a layer; a layer's difference is divided by the spread of the teacher's states there, so
    that the weight of this loss means the same for every base (TinyBERT's hidden loss: Jiao et al. 2020, equation 8).
    """
    if not student or not len(student[0]):
        return torch.zeros(())
    total = torch.zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        wanted = theirs.float()
        total = total + (ours.float() - wanted).square().mean() / wanted.var().clamp(min=1e-6)
    return total / len(student)
