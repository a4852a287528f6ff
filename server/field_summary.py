"""The summary of a run between institutions, `summary.json`: what the coordinator knows, which is little by design."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from common.config.manifest import Manifest
from common.roster import Roster
from server.coordinator import Coordinator
from server.run_store import RunStore

__all__ = ["FieldRound", "FieldSummary", "first_line", "write_summary"]


class FieldRound(BaseModel):
    """One round: who is in its sum, who is not and why (fixed words), and figures over all sites together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    answered: list[str]
    failed: dict[str, str]
    rejected: str | None
    train_loss: float | None
    figures: dict[str, float]
    bytes_up: int
    bytes_down: int
    seconds: float


class FieldSummary(BaseModel):
    """A whole run. `first_line` says what the coordinator could see, before anything else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_line: str
    version: Literal[1] = 1
    run_id: str
    federation: str
    status: Literal["finished", "interrupted", "failed"]
    reason: str
    manifest_sha256: str
    roster_sha256: str
    sites: list[str]
    refusals: dict[str, str]
    """What a site's policy refused, in the site's signed words: settings and numbers."""
    rounds: list[FieldRound]
    selected_round: int


def first_line(manifest: Manifest) -> str:
    """What the coordinator saw of a single site, and what protects a record."""
    sums = (
        "The coordinator learned sums over the sites and nothing of a single one."
        if manifest.secure_sum.enabled
        else "Secure sums were OFF: the coordinator saw every site's change."
    )
    private = manifest.privacy
    promise = (
        "There was no differential privacy."
        if private is None
        else f"Each {private.unit} is protected at its site: epsilon {private.epsilon:g}, delta {private.delta:g}."
    )
    return f"{sums} {promise}"


def write_summary(
    store: RunStore,
    manifest: Manifest,
    roster: Roster,
    coordinator: Coordinator,
    status: Literal["finished", "interrupted", "failed"],
    reason: str,
    refusals: dict[str, str],
) -> None:
    """Write `summary.json`, whole or not at all."""
    rounds = [
        FieldRound(
            number=done.number,
            answered=[answer.site for answer in done.answers],
            failed=done.failures,
            rejected=str(done.rejected) if done.rejected else None,
            train_loss=done.train_loss,
            figures=coordinator.validation(done),
            bytes_up=sum(answer.bytes_up for answer in done.answers),
            bytes_down=done.bytes_down,
            seconds=done.seconds,
        )
        for done in coordinator.rounds
    ]
    summary = FieldSummary(
        first_line=first_line(manifest),
        run_id=store.folder.name,
        federation=manifest.name,
        status=status,
        reason=reason,
        manifest_sha256=manifest.digest(),
        roster_sha256=roster.digest().hex(),
        sites=[entry.name for entry in roster.institutions],
        refusals={site: words for site, words in refusals.items() if words},
        rounds=rounds,
        selected_round=coordinator.selected_round(),
    )
    store.write("summary.json", summary.model_dump_json(indent=2) + "\n")
