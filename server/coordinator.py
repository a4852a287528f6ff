"""The round loop: invite, collect, aggregate, store. It sees adapters and counts, never records."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from common.codec.state import AdapterState, state_digest
from common.config.manifest import Manifest
from common.contribution import contribution_shapes, projection_shapes
from common.errors import RoundError, RunError, SumLost
from common.factors import newest
from common.messages import Evaluate, RoundStart
from common.metrics import Counts, add, better, figures
from common.progress import (
    EventSink,
    PhaseStarted,
    RoundFinished,
    RoundLost,
    RoundRejected,
    RoundStarted,
    RoundValidated,
)
from server.aggregation.method import Mean, TwoSums
from server.aggregation.methods import method_for
from server.aggregation.optimiser import memory_of, optimiser_for, remember
from server.aggregation.tail import mean_adapter
from server.channel import Channel
from server.collection import Collected, Collection, PlainCollection, SiteAnswer, failed_sites
from server.guards import Rejection, too_long, too_much_worse
from server.participants import participants, require_participants
from server.run_store import RunStore
from server.stored_round import StoredRound, facts_of, rounds_of

__all__ = ["Coordinator", "SiteAnswer", "StoredRound"]


# In place of a site: the counts on public records. No site has a name with a blank.
PUBLIC = "public records"


class Coordinator:
    """Runs the rounds of one manifest over a channel. `rounds` grows as rounds are finished; [0] is the start.

    `public` measures an adapter on public records; then no site is asked to measure. With `public_meanwhile` it does so
    in a thread of its own while the sites train, and otherwise before they are asked. `sums` are secure sums over the
    sites; without them the coordinator sees what each site sends. `accepted` is the number of
    aggregations that went into `adapter`. A store with finished rounds (`RunStore.reopen`) is gone on with. A round
    whose secure sum is lost (`SumLost`) uses up its number and leaves the adapter; so many as `lost_rounds` one after
    the other end the run.

    Raises:
        AdapterError: the manifest's aggregation is not for adapters as large.
        ExtensionError: a person's own aggregation cannot be loaded.
        ManifestError: a round would invite more sites than there are, or too few.
        RunError: a guard needs public records, and there are none; or the stored rounds are of another manifest, run
            or sites, or were changed.
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
        public_meanwhile: bool = False,
        sums: Collection | None = None,
        lost_rounds: int = 1,
    ) -> None:
        if manifest.aggregation.accept_drop is not None and public is None:
            raise RunError("aggregation.accept_drop needs public records to measure on, and this coordinator has none")
        require_participants(manifest, len(sites))
        self._manifest = manifest
        self._public = public
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="measuring") if public_meanwhile else None
        self._measuring: Future[Counts] | None = None
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
        self._lost_rounds, self._first_here = lost_rounds, len(store.stored)
        self.adapter = first
        self.accepted = 0
        self.rounds = [StoredRound(0)]
        run: dict[str, object] = {"manifest_sha256": self._digest, "run_id": run_id, "sites": list(sites)}
        if store.stored:
            self._go_on(run)
        else:
            store.save_round(0, first, {**facts_of(self.rounds[0], None, 0), "run": run})

    @classmethod
    def resume(
        cls,
        manifest: Manifest,
        *,
        run_id: str,
        sites: Sequence[str],
        channel: Channel,
        store: RunStore,
        report: EventSink,
        public: Callable[[AdapterState], Counts] | None = None,
        public_meanwhile: bool = False,
        sums: Collection | None = None,
        lost_rounds: int = 1,
    ) -> Self:
        """Go on with a run whose store was reopened: `run` begins with the first round that is not stored.

        Raises:
            RunError: nothing is stored in it; else see the class.
        """
        if not store.stored:
            raise RunError(f"{store.folder} has no finished round, not even the first adapter; begin the run anew")
        return cls(
            manifest,
            run_id=run_id,
            sites=sites,
            first=store.load_round(0),
            channel=channel,
            store=store,
            report=report,
            public=public,
            public_meanwhile=public_meanwhile,
            sums=sums,
            lost_rounds=lost_rounds,
        )

    def _go_on(self, run: Mapping[str, object]) -> None:
        """Take over what was stored with the last round, and drop what belongs to rounds before."""
        stored, last = self._store.stored, len(self._store.stored) - 1
        for name, value in run.items():
            found = stored[0].get("run", {}).get(name)
            if found != value:
                raise RunError(f"the run in {self._store.folder} has the {name} {found}, and this one {value}")
        self.rounds = rounds_of(stored)
        self.adapter, self.accepted = self._store.load_round(last), stored[last]["accepted"]
        remember(self._step, self._store.load_memory(last))
        self._collection.remember(stored[last].get("collection", {}))
        if (measured := self._store.load_measured()) is not None:
            self.rounds[-1].counts, self.rounds[-1].measured = measured["counts"], not measured["counts"]
        self._collection.over(last, measured=measured is not None)

    def run(self) -> AdapterState:
        """All rounds, and the adapter that the manifest selects.

        Raises:
            RoundError: fewer sites than the manifest's least answered, or the guards rejected too many rounds one
                after the other. Rounds that were finished stay stored.
            ExtensionError: a person's own aggregation failed.
            Interrupted: the person asked to stop.
        """
        self._require_progress()
        for number in range(len(self.rounds), self._manifest.training.rounds + 1):
            self._round(number)
        self._validate_last()
        return self._store.load_round(self.selected_round())

    def _round(self, number: int) -> None:
        began = time.monotonic()
        done = StoredRound(number)
        # 1. Invite the round's sites with the present adapter.
        self._report(RoundStarted(round=number, sites=self._invited(number)))
        start = self._start(number)
        try:
            # 2. Take in what the sites make of it.
            mean = self._mean(start, done)
        except SumLost as error:
            # 3. Vectors left and the sum failed: the round's number is used up, and all stays as it was. The sites may
            #    have measured the adapter, and measure none twice.
            before = self.rounds[-1]
            done.lost, done.counts = str(error), dict(before.counts)
            done.measured = before.measured or start.evaluate
            self._report(RoundLost(round=number, reason=done.lost))
        else:
            # 3. Aggregate, where the guards let it pass.
            done.rejected = self._aggregate(mean, done)
        if number == self._manifest.training.rounds:
            self.adapter = self._averaged(number)
        # 4. Store before anyone hears of it; then nothing of the round is asked for again.
        done.seconds = time.monotonic() - began
        facts = {**facts_of(done, self.rounds[-1], self.accepted), "collection": self._collection.memory()}
        self._store.save_round(number, self.adapter, facts, memory_of(self._step))
        self._collection.over(number)
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

    def _start(self, number: int) -> RoundStart:
        """The round's request. An adapter that a rejected or lost round left has been measured, and none is twice."""
        before = self.rounds[-1]
        wanted = (number - 1) % self._manifest.evaluation.every == 0
        measure = wanted and not before.counts and not before.measured
        if measure and self._public is not None:
            if self._aside is None:
                before.counts = {PUBLIC: self._public(self.adapter)}
            else:  # while the sites train: none of them waits for the coordinator's figures
                self._measuring = self._aside.submit(self._public, self.adapter)
        return RoundStart(**self._header(number), evaluate=measure and self._public is None, accepted=self.accepted)

    def _mean(self, start: RoundStart, done: StoredRound) -> Mean:
        """The mean of what the sites send, in one sum or two; their counts belong to the adapter before.

        Raises:
            RoundError: too few answer.
            SumLost: a secure sum failed and must not be asked for again.
        """
        shapes = contribution_shapes(self._manifest, self._shapes, self.accepted)
        try:
            collected = self._collection.first(start, self.adapter, shapes, self._invited(start.round))
        except SumLost:
            self._take_measured()
            raise
        self._take_measured()
        self._take_in(collected, done)
        # What the sites measured belongs to the adapter that they received.
        if self._public is None:  # else no site was asked for any
            self.rounds[-1].counts |= collected.counts
        self._validated(self.rounds[-1])
        # Too few answers end the run: their mean would be the work of a few, sold as that of all.
        self._require_enough(done)
        mean = collected.mean
        if isinstance(self._method, TwoSums) and (basis := self._method.basis(mean)):
            shapes = projection_shapes(self._manifest, self._shapes, self.accepted)
            second = self._collection.second(start, basis, shapes, collected)
            self._take_in(second, done)
            self._require_enough(done)
            mean = {**mean, **second.mean}
        return mean

    def _take_measured(self) -> None:
        """The figures of the adapter before, where they were made meanwhile; an error of theirs is raised here."""
        if self._measuring is not None:
            self.rounds[-1].counts = {PUBLIC: self._measuring.result()}
            self._measuring = None

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
        invited = self._invited(done.number)
        least = min(self._manifest.aggregation.min_sites, len(invited))
        if len(done.answers) < least:
            raise RoundError(
                f"round {done.number}: {len(done.answers)} of {len(invited)} sites answered, aggregation.min_sites"
                f" wants {least}; rounds before it are stored. Sites that failed:"
                f" {failed_sites(done.failures, done.reasons)}"
            )

    def _require_progress(self) -> None:
        """End a run whose rounds are rejected one after the other: it pays, and learns nothing. Lost rounds end it too;
        those of an earlier process do not count, since whoever resumed it has seen to the sites."""
        here = self.rounds[max(1, self._first_here) :][-self._lost_rounds :]
        if len(here) == self._lost_rounds and all(done.lost for done in here):
            raise RoundError(f"{here[-1].lost}; {len(here)} rounds one after the other were lost, the last is stored")
        most = self._manifest.aggregation.max_rejected
        kept = [done for done in self.rounds if not done.lost]
        last = kept[-most:]
        if len(kept) > most and all(done.rejected for done in last):
            raise RoundError(
                f"rounds {last[0].number} to {last[-1].number} were rejected one after the other, which"
                f" aggregation.max_rejected = {most} does not allow; the last by {last[-1].rejected}; the adapter of"
                f" round {last[0].number - 1} is stored. Lower the learning rates, or give the guard more room"
            )

    def _invited(self, number: int) -> tuple[str, ...]:
        return participants(self._manifest, self._sites, number)

    def _take_in(self, collected: Collected, done: StoredRound) -> None:
        done.answers = collected.answers
        done.failures |= collected.failures
        done.reasons |= collected.reasons
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
        if not last.counts and not last.measured:  # those of a rejected round are known, a lost one's never will be
            with contextlib.suppress(SumLost):  # sites measure an adapter once; without its figures it is whole
                asked = self._invited(last.number + 1)  # as if another round began, which would measure it
                request = Evaluate(**self._header(last.number))
                last.counts |= self._collection.measured(request, self.adapter, asked).counts
            self._validated(last)
        last.measured = not last.counts
        self._store.save_measured({"round": last.number, "counts": last.counts})
        self._collection.over(last.number, measured=True)

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
