"""The round loop: invite, collect, aggregate, store. It sees adapters and counts, never records."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from common.codec.state import AdapterState, state_digest
from common.config.manifest import Manifest
from common.contribution import contribution_shapes, projection_shapes
from common.errors import AdapterError, RoundError, RunError
from common.factors import newest
from common.messages import (
    Envelope,
    Evaluate,
    Evaluated,
    Project,
    Projected,
    Refused,
    RoundDone,
    RoundStart,
    encode,
)
from common.metrics import Counts, add, better, figures
from common.progress import (
    EventSink,
    PhaseStarted,
    RoundFinished,
    RoundRejected,
    RoundStarted,
    RoundValidated,
    SiteFailed,
    SiteFinished,
)
from server.aggregation.method import Collector, Mean, TwoSums
from server.aggregation.methods import method_for
from server.aggregation.optimiser import optimiser_for
from server.channel import Channel, Reply
from server.guards import Rejection, too_long, too_much_worse
from server.run_store import RunStore

__all__ = ["Coordinator", "SiteAnswer", "StoredRound"]


# In place of a site: the counts on public records. No site has a name with a blank.
PUBLIC = "public records"


@dataclass(frozen=True)
class SiteAnswer:
    """What one site sent in a round, without its tensors."""

    site: str
    records: int
    examples: int
    loss: float | None
    seconds: float
    bytes_up: int
    bytes_down: int


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

    @property
    def train_loss(self) -> float | None:
        """Mean of the answering sites' losses, each site counting once; None where no site tells its own."""
        losses = [answer.loss for answer in self.answers if answer.loss is not None]
        return sum(losses) / len(losses) if losses else None


class Coordinator:
    """Runs the rounds of one manifest over a channel. `rounds` grows as rounds are finished; [0] is the start.

    `public` measures an adapter on public records; then no site is asked to measure. `accepted` is the number of
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
    ) -> None:
        if manifest.aggregation.accept_drop is not None and public is None:
            raise RunError("aggregation.accept_drop needs public records to measure on, and this coordinator has none")
        self._manifest = manifest
        self._public = public
        self._digest = manifest.digest()
        self._run_id = run_id
        self._sites = tuple(sites)
        self._channel = channel
        self._store = store
        self._report = report
        # Of what trains: an adapter of stacked pairs (`ffa`) is larger, and its newest pairs keep these shapes.
        self._shapes = {name: array.shape for name, array in newest(first, manifest.adapter.rank).items()}
        self._method = method_for(manifest, self._shapes)
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
        # 1. Invite every site with the present adapter.
        self._report(RoundStarted(round=number, sites=self._sites))
        measure = (number - 1) % self._manifest.evaluation.every == 0
        start = RoundStart(**self._header(number), evaluate=measure and self._public is None, accepted=self.accepted)
        if measure and self._public is not None and not self.rounds[-1].counts:
            self.rounds[-1].counts = {PUBLIC: self._public(self.adapter)}
        request = encode(Envelope(header=start, tensors=self.adapter))
        # 2. Take in the contributions as they come. A site that fails sits the round out; the others go on.
        collector = self._method.collector(contribution_shapes(self._manifest, self._shapes, self.accepted))
        done = StoredRound(number)
        for reply in self._channel.exchange(dict.fromkeys(self._sites, request), kind="train"):
            self._take_in(reply, start, collector, done)
        # 3. What the sites measured belongs to the adapter that they received.
        self._validated(self.rounds[-1])
        # 4. Too few answers end the run: their mean would be the work of a few, sold as that of all.
        self._require_enough(done)
        # 5. The mean, from a second sum too where the method takes one.
        mean: Mean = collector.result()
        if isinstance(self._method, TwoSums) and (basis := self._method.basis(mean)):
            mean = {**mean, **self._second_mean(start, basis, done)}
        # 6. Aggregate, where the guards let it pass, and store before anyone hears of it.
        done.rejected = self._aggregate(mean, done)
        done.seconds = time.monotonic() - began
        done.bytes_down += len(request) * len(self._sites)
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
        # The adapter is the one of the round before, and so are its figures, where they are the coordinator's own.
        done.counts = {} if self._public is None else dict(self.rounds[-1].counts)
        self._report(
            RoundRejected(round=done.number, setting=rejected.setting, value=rejected.value, bound=rejected.bound)
        )
        return rejected

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

    def _second_mean(self, start: RoundStart, basis: AdapterState, done: StoredRound) -> Mean:
        """The mean of what the sites of the first sum make of the basis; who does not answer sits the round out."""
        header = Project(**start.model_dump(include=set(_NAMES)))
        request = encode(Envelope(header=header, tensors=basis))
        collector = self._method.collector(projection_shapes(self._manifest, self._shapes, self.accepted))
        first = {answer.site: answer for answer in done.answers}
        done.bytes_down += len(request) * len(first)
        done.answers = []
        for reply in self._channel.exchange(dict.fromkeys(first, request), kind="train"):
            answer = reply.envelope.header if reply.envelope else None
            code = reply.code or (answer.code if isinstance(answer, Refused) else "message")
            if isinstance(answer, Projected) and _answers(answer, header):
                try:
                    collector.add(reply.envelope.tensors if reply.envelope else {}, self._weight(first[reply.site]))
                except AdapterError as error:
                    code = error.code
                else:
                    both = first[reply.site]
                    up, down = both.bytes_up + reply.bytes_up, both.bytes_down + reply.bytes_down
                    done.answers.append(replace(both, bytes_up=up, bytes_down=down))
                    continue
            done.failures[reply.site] = code
            self._report(SiteFailed(round=start.round, site=reply.site, code=code))
        self._require_enough(done)
        return collector.result()

    def _weight(self, answer: "RoundDone | SiteAnswer") -> float:
        return answer.records if self._manifest.aggregation.weighting == "records" else 1

    def _take_in(self, reply: Reply, start: RoundStart, collector: Collector, done: StoredRound) -> None:
        header = reply.envelope.header if reply.envelope else None
        code = reply.code or (header.code if isinstance(header, Refused) else "message")
        if isinstance(header, RoundDone) and _answers(header, start):
            try:
                if header.loss is not None and not math.isfinite(header.loss):
                    raise AdapterError("the loss is not finite")
                collector.add(reply.envelope.tensors if reply.envelope else {}, self._weight(header))
            except AdapterError as error:
                code = error.code
            else:
                done.answers.append(
                    SiteAnswer(
                        site=reply.site,
                        records=header.records,
                        examples=header.examples,
                        loss=header.loss,
                        seconds=header.seconds,
                        bytes_up=reply.bytes_up,
                        bytes_down=reply.bytes_down,
                    )
                )
                if self._public is None:  # no site was asked for any
                    self.rounds[-1].counts[reply.site] = header.counts
                self._report(
                    SiteFinished(
                        round=start.round,
                        site=reply.site,
                        train_loss=header.loss,
                        examples=header.examples,
                        seconds=header.seconds,
                        bytes_up=reply.bytes_up,
                        bytes_down=reply.bytes_down,
                    )
                )
                return
        done.failures[reply.site] = code
        self._report(SiteFailed(round=start.round, site=reply.site, code=code))

    def _validate_last(self) -> None:
        """Have the last adapter measured, which no further round does."""
        last = self.rounds[-1]
        self._report(PhaseStarted(phase="validation"))
        if self._public is not None:
            last.counts = last.counts or {PUBLIC: self._public(self.adapter)}
            self._validated(last)
            return
        header = Evaluate(**self._header(last.number))
        request = encode(Envelope(header=header, tensors=self.adapter))
        for reply in self._channel.exchange(dict.fromkeys(self._sites, request), kind="evaluate"):
            answer = reply.envelope.header if reply.envelope else None
            if isinstance(answer, Evaluated) and _answers(answer, header):
                last.counts[reply.site] = answer.counts
            else:
                code = answer.code if isinstance(answer, Refused) else reply.code or "message"
                self._report(SiteFailed(round=last.number, site=reply.site, code=code))
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


# What says what an envelope speaks of.
_NAMES = ("manifest_sha256", "run_id", "round", "adapter_sha256")


def _answers(header: RoundDone | Projected | Evaluated, request: RoundStart | Project | Evaluate) -> bool:
    """Whether a reply speaks of the very request: same manifest, run, round and adapter."""
    return all(getattr(header, name) == getattr(request, name) for name in _NAMES)


def _listed(failures: dict[str, str]) -> str:
    return ", ".join(f"{site} ({code})" for site, code in failures.items()) or "none"
