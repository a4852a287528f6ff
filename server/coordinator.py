"""The round loop: invite, collect, aggregate, store. It sees adapters and counts, never records."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common.codec.state import AdapterState, state_digest
from common.config.manifest import Manifest
from common.contribution import contribution_shapes, projection_shapes
from common.errors import RoundError, RunError
from common.factors import newest
from common.messages import Evaluate, RoundStart
from common.metrics import Counts, add, better, figures
from common.progress import (
    EventSink,
    PhaseStarted,
    RoundFinished,
    RoundRejected,
    RoundStarted,
    RoundValidated,
)
from server.aggregation.method import Mean, TwoSums
from server.aggregation.methods import method_for
from server.aggregation.optimiser import optimiser_for
from server.aggregation.tail import mean_adapter
from server.channel import Channel
from server.collection import Collected, Collection, PlainCollection, SiteAnswer
from server.guards import Rejection, too_long, too_much_worse
from server.run_store import RunStore

__all__ = ["Coordinator", "SiteAnswer", "StoredRound"]


# In place of a site: the counts on public records. No site has a name with a blank.
PUBLIC = "public records"


@dataclass
class StoredRound:
    """A finished round as the coordinator knows it. `counts` are those of its adapter, by site, once they are in.

    A rejected round has the adapter of the round before it; `rejected` says why.
    """

    number: int
    answers: list[SiteAnswer] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    seconds: float = 0.0
    counts: dict[str, Counts] = field(default_factory=dict)
    rejected: Rejection | None = None
    summed_loss: float | None = None

    @property
    def train_loss(self) -> float | None:
        """Mean of the answering sites' losses, each site counting once; None where no site tells its own."""
        if self.summed_loss is not None:
            return self.summed_loss
        losses = [answer.loss for answer in self.answers if answer.loss is not None]
        return sum(losses) / len(losses) if losses else None


class Coordinator:
    """Runs the rounds of one manifest over a channel. `rounds` grows as rounds are finished; [0] is the start.

    `public` measures an adapter on public records; then no site is asked to measure. `sums` are secure sums over the
    sites; without them the coordinator sees what each site sends. `accepted` is the number of
    aggregations that went into `adapter`.

    Raises:
        AdapterError: the manifest's aggregation is not for adapters as large.
        ExtensionError: a person's own aggregation cannot be loaded.
        RunError: a guard needs public records, and there are none.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        run_id: str,
        sites: Sequence[str],
        first: AdapterState,
        channel: Channel,
        store: RunStore,
        report: EventSink,
        public: Callable[[AdapterState], Counts] | None = None,
        sums: Collection | None = None,
    ) -> None:
        if manifest.aggregation.accept_drop is not None and public is None:
            raise RunError("aggregation.accept_drop needs public records to measure on, and this coordinator has none")
        self._manifest = manifest
        self._public = public
        self._digest = manifest.digest()
        self._run_id = run_id
        self._sites = tuple(sites)
        self._store = store
        self._report = report
        # Of what trains: an adapter of stacked pairs (`ffa`) is larger, and its newest pairs keep these shapes.
        self._shapes = {name: array.shape for name, array in newest(first, manifest.adapter.rank).items()}
        self._method = method_for(manifest, self._shapes)
        if (sums is not None) != manifest.secure_sum.enabled:
            raise RunError("secure_sum.enabled and the way that contributions are collected must agree")
        self._collection = sums or PlainCollection(
            manifest, sites=sites, channel=channel, collector=self._method.collector, report=report
        )
        self._step = optimiser_for(manifest.aggregation)
        self.adapter = first
        self.accepted = 0
        self.rounds = [StoredRound(0)]
        store.save_round(0, first, {"accepted": 0})

    def run(self) -> AdapterState:
        """All rounds, and the adapter that the manifest selects.

        Raises:
            RoundError: fewer sites than the manifest's least answered, or the guards rejected too many rounds one
                after the other. Rounds that were finished stay stored.
            ExtensionError: a person's own aggregation failed.
            Interrupted: the person asked to stop.
        """
        for number in range(1, self._manifest.training.rounds + 1):
            self._round(number)
        self._validate_last()
        return self._store.load_round(self.selected_round())

    def _round(self, number: int) -> None:
        began = time.monotonic()
        # 1. Invite every site with the present adapter, and take in what they make of it.
        self._report(RoundStarted(round=number, sites=self._sites))
        # An adapter that a rejected round left as it was has been measured, and sites measure none twice.
        measure = (number - 1) % self._manifest.evaluation.every == 0 and not self.rounds[-1].counts
        start = RoundStart(**self._header(number), evaluate=measure and self._public is None, accepted=self.accepted)
        if measure and self._public is not None:
            self.rounds[-1].counts = {PUBLIC: self._public(self.adapter)}
        done = StoredRound(number)
        shapes = contribution_shapes(self._manifest, self._shapes, self.accepted)
        collected = self._collection.first(start, self.adapter, shapes)
        self._take_in(collected, done)
        # 2. What the sites measured belongs to the adapter that they received.
        if self._public is None:  # else no site was asked for any
            self.rounds[-1].counts |= collected.counts
        self._validated(self.rounds[-1])
        # 3. Too few answers end the run: their mean would be the work of a few, sold as that of all.
        self._require_enough(done)
        # 4. The mean, from a second sum too where the method takes one.
        mean = collected.mean
        if isinstance(self._method, TwoSums) and (basis := self._method.basis(mean)):
            shapes = projection_shapes(self._manifest, self._shapes, self.accepted)
            second = self._collection.second(start, basis, shapes, collected)
            self._take_in(second, done)
            self._require_enough(done)
            mean = {**mean, **second.mean}
        # 5. Aggregate, where the guards let it pass, and store before anyone hears of it.
        done.rejected = self._aggregate(mean, done)
        if number == self._manifest.training.rounds:
            self.adapter = self._averaged(number)
        done.seconds = time.monotonic() - began
        self._store.save_round(
            number,
            self.adapter,
            {"accepted": self.accepted, **({"rejected": str(done.rejected)} if done.rejected else {})},
        )
        self.rounds.append(done)
        self._report(
            RoundFinished(
                round=number,
                train_loss=done.train_loss,
                answered=len(done.answers),
                failed=len(done.failures),
                bytes_up=sum(answer.bytes_up for answer in done.answers),
                bytes_down=done.bytes_down,
                seconds=done.seconds,
            )
        )
        self._require_progress()

    def _aggregate(self, mean: Mean, done: StoredRound) -> Rejection | None:
        """Make the next adapter of the mean, or leave all as it was and say why."""
        section, before = self._manifest.aggregation, self._step.state
        rejected = too_long(section, self._method.length(self.adapter, mean))
        if rejected is None:
            adapter = self._method.after(self.adapter, mean, self.accepted, self._step)
            if section.accept_drop is not None and self._public is not None:
                done.counts = {PUBLIC: self._public(adapter)}
                metric = self._manifest.metrics[0]
                figure = [self.validation(each).get(metric, math.nan) for each in (self.rounds[-1], done)]
                rejected = too_much_worse(section, metric, figure[0], figure[1])
            if rejected is None:
                self.adapter = adapter
                self.accepted += 1
                return None
        self._step.state = before
        # The adapter is the one of the round before, and so are its figures.
        done.counts = dict(self.rounds[-1].counts)
        self._report(
            RoundRejected(round=done.number, setting=rejected.setting, value=rejected.value, bound=rejected.bound)
        )
        return rejected

    def _averaged(self, number: int) -> AdapterState:
        """The mean of the adapters of the last rounds, of which `number` is the last and not stored yet."""
        before = range(number - self._manifest.aggregation.average_last + 1, number)
        return (
            mean_adapter([*(self._store.load_round(each) for each in before), self.adapter]) if before else self.adapter
        )

    def _require_enough(self, done: StoredRound) -> None:
        least = min(self._manifest.aggregation.min_sites, len(self._sites))
        if len(done.answers) < least:
            raise RoundError(
                f"round {done.number}: {len(done.answers)} of {len(self._sites)} sites answered, aggregation.min_sites"
                f" wants {least}; rounds before it are stored. Sites that failed: {_listed(done.failures)}"
            )

    def _require_progress(self) -> None:
        """End a run whose rounds are rejected one after the other: it pays, and learns nothing."""
        most = self._manifest.aggregation.max_rejected
        last = self.rounds[-most:]
        if len(self.rounds) > most and all(done.rejected for done in last):
            raise RoundError(
                f"rounds {last[0].number} to {last[-1].number} were rejected one after the other, which"
                f" aggregation.max_rejected = {most} does not allow; the last by {last[-1].rejected}; the adapter of"
                f" round {last[0].number - 1} is stored. Lower the learning rates, or give the guard more room"
            )

    def _take_in(self, collected: Collected, done: StoredRound) -> None:
        done.answers = collected.answers
        done.failures |= collected.failures
        done.bytes_down += collected.bytes_down
        done.summed_loss = done.summed_loss if collected.loss is None else collected.loss

    def _validate_last(self) -> None:
        """Have the last adapter measured, which no further round does."""
        last = self.rounds[-1]
        self._report(PhaseStarted(phase="validation"))
        if self._public is not None:
            last.counts = last.counts or {PUBLIC: self._public(self.adapter)}
            self._validated(last)
            return
        if last.counts:  # a rejected round's, which are known
            return
        last.counts |= self._collection.measured(Evaluate(**self._header(last.number)), self.adapter).counts
        self._validated(last)

    def _validated(self, done: StoredRound) -> None:
        values = self.validation(done)
        if values:
            self._report(RoundValidated(round=done.number, figures=values))

    def _header(self, number: int) -> dict[str, object]:
        return {
            "manifest_sha256": self._digest,
            "run_id": self._run_id,
            "round": number,
            "adapter_sha256": state_digest(self.adapter),
        }

    def validation(self, done: StoredRound) -> dict[str, float]:
        """Figures of a round's adapter over public or all sites' held-out records; empty where none was measured."""
        counts = [counts for counts in done.counts.values() if counts]
        return figures(self._manifest.task.kind, add(*counts), self._manifest.metrics) if counts else {}

    def selected_round(self) -> int:
        """The round whose adapter is the result: the last, or the best on held-out records (the first of equals)."""
        metric = self._manifest.metrics[0]
        best = len(self.rounds) - 1
        if self._manifest.evaluation.select == "best":
            known = [(done.number, self.validation(done).get(metric, math.nan)) for done in self.rounds]
            known = [(number, value) for number, value in known if not math.isnan(value)]
            for number, value in known:
                if number == known[0][0] or better(metric, value, dict(known)[best]):
                    best = number
        return best


def _listed(failures: dict[str, str]) -> str:
    return ", ".join(f"{site} ({code})" for site, code in failures.items()) or "none"
