"""The loss-threshold membership test: can whoever holds an adapter tell training records from others by their loss?

Yeom, Giacomelli, Fredrikson and Jha, "Privacy risk in machine learning" (2018), section 3.2. It stays at the site.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata
from torch import nn

from common.errors import DataError
from common.tasks.task import Example, Task

__all__ = ["Membership", "losses_of", "membership"]


@dataclass(frozen=True)
class Membership:
    """How well a threshold on the loss tells members from others.

    `auc`: chance that a member has the smaller loss (.5: no better than a coin), `error` its standard error if there
    were no difference; `advantage`: largest true minus false positive rate; `caught`: members found where one in a
    hundred others is mistaken for one.
    """

    members: int
    others: int
    auc: float
    error: float
    advantage: float
    caught: float


def losses_of(
    model: nn.Module, task: Task, examples: Sequence[Example], *, batch_size: int, precision: str
) -> npt.NDArray[np.float64]:
    """The loss of every example [examples], in their order."""
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    losses = np.zeros(len(examples))
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = task.collate([examples[index] for index in places], device)
            losses[places] = task.losses(model(**batch.inputs()), batch).double().cpu().numpy()
    return losses


def membership(members: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> Membership:
    """The test on losses of members and of records that were never trained on.

    Raises:
        DataError: fewer than a hundred of either, with which no rate in a hundred can be seen.
    """
    if min(len(members), len(others)) < 100:
        raise DataError(
            f"the membership test needs at least 100 training and 100 held-out records, found {len(members)} and"
            f" {len(others)}"
        )
    ranks = rankdata(np.concatenate([members, others]))  # ties share a rank, which counts them as half
    # Mann and Whitney's statistic: pairs in which the other has the larger loss.
    larger = ranks[len(members) :].sum() - len(others) * (len(others) + 1) / 2
    thresholds = np.unique(np.concatenate([members, others]))
    true = np.searchsorted(np.sort(members), thresholds, side="right") / len(members)
    false = np.searchsorted(np.sort(others), thresholds, side="right") / len(others)
    return Membership(
        members=len(members),
        others=len(others),
        auc=float(larger / (len(members) * len(others))),
        error=math.sqrt((len(members) + len(others) + 1) / (12 * len(members) * len(others))),
        advantage=float((true - false).max()),
        caught=float(true[false <= 0.01].max(initial=0.0)),
    )
