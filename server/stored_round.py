"""A finished round as the coordinator knows it, and as facts for the disk and back."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from common.errors import RunError
from common.metrics import Counts
from server.collection import SiteAnswer
from server.guards import Rejection

__all__ = ["StoredRound", "facts_of", "rounds_of"]


@dataclass
class StoredRound:
    """A finished round as the coordinator knows it. `counts` are those of its adapter, by site, once they are in.

    A rejected round has the adapter of the round before it; `rejected` says why. So has a lost one, of which the
    secure sum failed after vectors left; `lost` says why. `measured` says that sites may have measured the adapter
    though no counts of it came, and must not be asked again. `seconds` are those of the process that finished it.
    """

    number: int
    answers: list[SiteAnswer] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    seconds: float = 0.0
    counts: dict[str, Counts] = field(default_factory=dict)
    rejected: Rejection | None = None
    lost: str = ""
    measured: bool = False
    summed_loss: float | None = None

    @property
    def train_loss(self) -> float | None:
        """Mean of the answering sites' losses, each site counting once; None where no site tells its own."""
        if self.summed_loss is not None:
            return self.summed_loss
        losses = [answer.loss for answer in self.answers if answer.loss is not None]
        return sum(losses) / len(losses) if losses else None


def facts_of(done: StoredRound, before: StoredRound | None, accepted: int) -> dict[str, Any]:
    """What is stored with a round: its own facts, and the counts of the adapter before it, which came in with it."""
    return {
        "accepted": accepted,
        **({"rejected": str(done.rejected)} if done.rejected else {}),
        "facts": asdict(done),
        "counts_before": before.counts if before else {},
    }


def rounds_of(stored: Sequence[Mapping[str, Any]]) -> list[StoredRound]:
    """The rounds from 0 that `facts_of` was given.

    Raises:
        RunError: another version of Coadapt wrote them.
    """
    rounds: list[StoredRound] = []
    for number, facts in enumerate(stored):
        try:
            if number:
                rounds[-1].counts = facts["counts_before"]
            own = dict(facts["facts"])
            own["answers"] = [SiteAnswer(**answer) for answer in own["answers"]]
            own["rejected"] = Rejection(**own["rejected"]) if own["rejected"] else None
            rounds.append(StoredRound(**own))
        except (KeyError, TypeError) as error:
            raise RunError(
                f"round {number} was stored by another version of Coadapt ({error}); resume with that version"
            ) from error
    return rounds
