"""Where the wall time of a round between institutions went, from what its processes wrote down with their times.

A round is cut at the coordinator's events into its stages and what lies between them; the parts add up to the round.
Every stage is cut again at what the gate and the vaults logged. A mark of a stage, such as "the node took its message",
is there once for each site; the mean over the sites is where the cut lies, so that nobody need know which line is
whose, and the legs add up to the stages.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean

from client.audit_log import read_audit
from common.errors import RunError
from common.progress import Event, RoundFinished, RoundStarted, StageFinished, SumOpened

__all__ = ["LEGS", "Marks", "gate_marks", "round_parts", "round_seconds", "vault_marks"]

# The cuts of a stage in their order: a message is taken by a node, its contents are there, the vault's answer is in its
# log, the node brings it to the gate, the coordinator has it, and the slowest site's has come too.
LEGS = ("until_taken", "fetching", "process_and_vault", "until_brought", "until_received", "slowest_site")

# The answer to a node that looks and finds nothing is shorter than a message's header.
EMPTY_BYTES = 64


@dataclass(frozen=True)
class Marks:
    """Moments in seconds since 1970, of whatever site, in any order."""

    taken: Sequence[float] = ()
    fetched: Sequence[float] = ()
    answered: Sequence[float] = ()
    brought: Sequence[float] = ()

    def of(self, began: float, ended: float) -> tuple[list[float], ...]:
        """The moments of each kind between two moments."""
        kinds = (self.taken, self.fetched, self.answered, self.brought)
        return tuple([moment for moment in kind if began <= moment <= ended] for kind in kinds)


def gate_marks(path: Path) -> Marks:
    """The moments in the gate's log of JSON lines; other lines are passed over."""
    taken, fetched, brought = list[float](), list[float](), list[float]()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith('{"time"'):
            continue
        facts = json.loads(line)
        match facts["path"].rsplit("/", 1)[-1]:
            case "pull-messages" if facts["bytes_out"] > EMPTY_BYTES:
                taken.append(facts["time"])
            case "confirm-message-received":
                fetched.append(facts["time"])
            case "push-messages":
                brought.append(facts["time"] - facts["seconds"])
    return Marks(taken=taken, fetched=fetched, brought=brought)


def vault_marks(paths: Iterable[Path]) -> list[float]:
    """The moments at which vaults logged an answer that was asked for in a round."""
    return [
        datetime.fromisoformat(line.time).timestamp()
        for path in paths
        for line in read_audit(path)
        if line.decision == "answered" and line.kind in ("request", "message", "poll")
    ]


def round_seconds(events: Sequence[Event], number: int) -> float:
    """Wall time of a round, from its beginning to when it is stored.

    Raises:
        RunError: it did not end.
    """
    began, ended = _edges(events, number)
    return ended - began


def round_parts(events: Sequence[Event], number: int, marks: Marks) -> dict[str, float]:
    """Seconds of each part of a round: `between_stages`, `stage_NAME`, `opening`, `storing`, which add up to it, and
    `leg_NAME` over all stages, which add up to those. A stage whose marks are not one for each site, since a message
    was sent again or a site polled, counts whole as `leg_asked_again`.

    Raises:
        RunError: the round did not end, or had no stages.
    """
    began, ended = _edges(events, number)
    stages = [event for event in events if isinstance(event, StageFinished) and event.round == number]
    stages = [stage for stage in stages if began <= stage.time <= ended]
    opened = [event.time for event in events if isinstance(event, SumOpened) and began <= event.time <= ended]
    if not stages or not opened:
        raise RunError(f"round {number} opened no secure sum, so there are no phases to name")
    parts = {"between_stages": opened[-1] - began - sum(stage.seconds for stage in stages)}
    parts["opening"] = opened[-1] - stages[-1].time
    parts["between_stages"] -= parts["opening"]
    parts["storing"] = ended - opened[-1]
    for stage in stages:
        parts[f"stage_{stage.stage}"] = parts.get(f"stage_{stage.stage}", 0.0) + stage.seconds
        for leg, seconds in _legs(stage, marks):
            parts[f"leg_{leg}"] = parts.get(f"leg_{leg}", 0.0) + seconds
    return parts


def _edges(events: Sequence[Event], number: int) -> tuple[float, float]:
    began = [event.time for event in events if isinstance(event, RoundStarted) and event.round == number]
    ended = [event.time for event in events if isinstance(event, RoundFinished) and event.round == number]
    if not began or not ended:
        raise RunError(f"round {number} did not end, so it has no length")
    return began[-1], ended[-1]


def _legs(stage: StageFinished, marks: Marks) -> Iterator[tuple[str, float]]:
    began = stage.time - stage.seconds
    kinds = marks.of(began, stage.time)
    if any(len(kind) != len(stage.waited) for kind in kinds):
        yield "asked_again", stage.seconds
        return
    cuts = [began, *map(fmean, kinds), began + fmean(stage.waited.values()), stage.time]
    for leg, start, end in zip(LEGS, cuts, cuts[1:], strict=False):
        yield leg, end - start
