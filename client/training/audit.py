"""The privacy audit: canaries in a training run of its own, whose adapter is thrown away.

A canary is a privacy unit whose gradient is one value of the adapter. It goes the way of every other unit: sampled,
clipped, summed, noised. Each is put in with chance one half; afterwards the noised sums, which are all that training
ever sees of a unit, are asked which canaries were in (Steinke, Nasr and Jagielski 2023). Neither the canaries nor the
answers leave the site.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from client.protection import Mechanism
from client.training.private import train_private
from common.config.training import TrainingSection
from common.errors import PrivacyError
from common.privacy.auditing import epsilon_shown
from common.randomness import SystemRandomness
from common.tasks.task import Example, Task

__all__ = ["LEAST_CANARIES", "AuditResult", "Canaries", "audit"]

LEAST_CANARIES = 1000
CONFIDENCE = 0.95

# Shares of the canaries that are guessed about: few sure guesses show a large epsilon, many unsure ones a small one.
SHARES = (0.05, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class AuditResult:
    """What the audit showed: with `confidence` training costs at least `shown`; `most` is what it could have shown."""

    claim: float
    delta: float
    canaries: int
    guesses: int
    correct: int
    shown: float
    most: float
    confidence: float


class Canaries:
    """Units of the audit: their places in the adapter, whether they are in, and what was seen at their places."""

    def __init__(self, count: int, parameters: Sequence[nn.Parameter], randomness: SystemRandomness) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        if count > sum(sizes):
            raise PrivacyError(f"an adapter of {sum(sizes)} values has no place for {count} canaries")
        self._parameters = list(parameters)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self.places = randomness.some_of(sum(sizes), count)
        self.included = np.zeros(count, dtype=bool)
        self.included[randomness.chosen(count, 0.5)] = True
        self.seen = np.zeros(count)

    def batches(self, randomness: SystemRandomness, rate: float, size: int) -> Iterator[list[int]]:
        """The canaries of one step, each that is in with chance `rate`, in physical batches of at most `size`."""
        members = np.flatnonzero(self.included)
        drawn = members[randomness.chosen(len(members), rate)].tolist()
        for start in range(0, len(drawn), size):
            yield drawn[start : start + size]

    def leave_gradients(self, drawn: Sequence[int], clip: float) -> None:
        """Put the gradients of these canaries into `grad_sample`, ten times longer than the clip lets through."""
        rows: list[list[tuple[int, int]]] = [[] for _ in self._parameters]
        for row, canary in enumerate(drawn):
            place = int(self.places[canary])
            owner = int(np.searchsorted(self._starts, place, side="right")) - 1
            rows[owner].append((row, place - int(self._starts[owner])))
        for parameter, own in zip(self._parameters, rows, strict=True):
            gradient = torch.zeros((len(drawn), parameter.numel()), dtype=torch.float32, device=parameter.device)
            for row, column in own:
                gradient[row, column] = 10 * clip
            parameter.grad_sample = gradient.view(len(drawn), *parameter.shape)  # type: ignore[attr-defined]

    def look(self, optimizer: DPOptimizer) -> None:
        """Add the step's noised sum at the canaries' places to what was seen."""
        noised = torch.cat([parameter.grad.flatten().cpu() for parameter in self._parameters])  # type: ignore[union-attr]
        self.seen += noised.double().numpy()[self.places]


def audit(
    model: nn.Module,
    task: Task,
    units: Sequence[Sequence[Example]],
    section: TrainingSection,
    mechanism: Mechanism,
    *,
    claim: float,
    delta: float,
    steps: int,
    canaries: int,
    precision: str,
) -> AuditResult:
    """Train `steps` steps with canaries among the units and guess which ones were in.

    `mechanism` is what claims to keep (claim, delta) over `steps` steps. The model's adapter is garbage afterwards.

    Raises:
        PrivacyError: too few canaries, or more than the adapter has values.
    """
    if canaries < LEAST_CANARIES:
        raise PrivacyError(f"an audit needs at least {LEAST_CANARIES} canaries, found {canaries}")
    randomness = SystemRandomness()
    own = Canaries(canaries, [p for p in model.parameters() if p.requires_grad], randomness)
    train_private(
        model,
        task,
        units,
        section,
        mechanism,
        randomness,
        first_step=0,
        steps=steps,
        total_steps=steps,
        precision=precision,
        canaries=own,
    )
    return _result(own, claim, delta)


def _result(canaries: Canaries, claim: float, delta: float) -> AuditResult:
    """The best of several ways to guess: those seen most were in, and perhaps those seen least were not.

    A canary that is in may never have been drawn, so guesses about the most seen alone are surer.
    """
    count = len(canaries.places)
    order = np.argsort(canaries.seen, kind="stable")
    ways = [(top, bottom) for share in SHARES if (top := round(count * share / 2)) for bottom in (0, top)]
    confidence = 1 - (1 - CONFIDENCE) / len(ways)  # each way gets its part of the doubt
    best, most = (-1.0, 0, 0), 0.0
    for top, bottom in ways:
        guesses = top + bottom
        correct = int(canaries.included[order[count - top :]].sum() + (~canaries.included[order[:bottom]]).sum())
        best = max(best, (epsilon_shown(count, guesses, correct, delta, confidence=confidence), guesses, correct))
        most = max(most, epsilon_shown(count, guesses, guesses, delta, confidence=confidence))
    shown, guesses, correct = best
    return AuditResult(claim, delta, count, guesses, correct, shown, most, CONFIDENCE)
