"""The round loop: invite, collect, aggregate, store. It sees adapters and counts, never records."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common.codec.state import AdapterState, state_digest
from common.config.manifest import Manifest
from common.errors import AdapterError, RoundError
from common.messages import Envelope, Evaluate, Evaluated, Refused, RoundDone, RoundStart, encode
from common.metrics import Counts, add, better, figures
from common.progress import (
    EventSink,
    PhaseStarted,
    RoundFinished,
    RoundStarted,
    RoundValidated,
    SiteFailed,
    SiteFinished,
)
from server.aggregation.mean import WeightedMean
from server.aggregation.momentum import ServerMomentum
from server.aggregation.tail import mean_adapter
from server.channel import Channel, Reply
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
    """A finished round as the coordinator knows it. `counts` are those of its adapter, by site, once they are in."""

    number: int
    answers: list[SiteAnswer] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    seconds: float = 0.0
    counts: dict[str, Counts] = field(default_factory=dict)

    @property
    def train_loss(self) -> float | None:
        """Mean of the answering sites' losses, each site counting once; None where no site tells its own."""
        losses = [answer.loss for answer in self.answers if answer.loss is not None]
        return sum(losses) / len(losses) if losses else None


class Coordinator:
    """Runs the rounds of one manifest over a channel. `rounds` grows as rounds are finished; [0] is the start.

    `public` measures an adapter on public records; then no site is asked to measure.
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
        self._manifest = manifest
        self._public = public
        self._digest = manifest.digest()
        self._run_id = run_id
        self._sites = tuple(sites)
        self._channel = channel
        self._store = store
        self._report = report
        self._step = ServerMomentum(manifest.aggregation.server_learning_rate, manifest.aggregation.server_momentum)
        self.adapter = first
        self.rounds = [StoredRound(0)]
        store.save_round(0, first)

    def run(self) -> AdapterState:
        """All rounds, and the adapter that the manifest selects.

        Raises:
            RoundError: fewer sites than the manifest's least answered. Rounds that were finished stay stored.
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
        start = RoundStart(**self._header(number), evaluate=measure and self._public is None)
        if measure and self._public is not None:
            self.rounds[-1].counts = {PUBLIC: self._public(self.adapter)}
        request = encode(Envelope(header=start, tensors=self.adapter))
        # 2. Take in the changes as they come. A site that fails sits the round out; the others go on.
        mean = WeightedMean(self.adapter)
        done = StoredRound(number)
        for reply in self._channel.exchange(dict.fromkeys(self._sites, request), kind="train"):
            self._take_in(reply, start, mean, done)
        # 3. What the sites measured belongs to the adapter that they received.
        self._validated(self.rounds[-1])
        # 4. Too few answers end the run: their mean would be the work of a few, sold as that of all.
        least = min(self._manifest.aggregation.min_sites, len(self._sites))
        if len(done.answers) < least:
            raise RoundError(
                f"round {number}: {len(done.answers)} of {len(self._sites)} sites answered, aggregation.min_sites wants"
                f" {least}; rounds before it are stored. Sites that failed: {_listed(done.failures)}"
            )
        # 5. Aggregate, and store before anyone hears of it.
        self.adapter = self._step(self.adapter, mean.result())
        if number == self._manifest.training.rounds:
            self.adapter = self._averaged(number)
        done.seconds = time.monotonic() - began
        done.bytes_down = len(request) * len(self._sites)
        self._store.save_round(number, self.adapter)
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

    def _averaged(self, number: int) -> AdapterState:
        """The mean of the adapters of the last rounds, of which `number` is the last and not stored yet."""
        before = range(number - self._manifest.aggregation.average_last + 1, number)
        return (
            mean_adapter([*(self._store.load_round(each) for each in before), self.adapter]) if before else self.adapter
        )

    def _take_in(self, reply: Reply, start: RoundStart, mean: WeightedMean, done: StoredRound) -> None:
        header = reply.envelope.header if reply.envelope else None
        code = reply.code or (header.code if isinstance(header, Refused) else "message")
        if isinstance(header, RoundDone) and _answers(header, start):
            by_records = self._manifest.aggregation.weighting == "records"
            try:
                if header.loss is not None and not math.isfinite(header.loss):
                    raise AdapterError("the loss is not finite")
                mean.add(reply.envelope.tensors if reply.envelope else {}, header.records if by_records else 1)
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
            last.counts = {PUBLIC: self._public(self.adapter)}
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


def _answers(header: RoundDone | Evaluated, request: RoundStart | Evaluate) -> bool:
    """Whether a reply speaks of the very request: same manifest, run, round and adapter."""
    same = ("manifest_sha256", "run_id", "round", "adapter_sha256")
    return all(getattr(header, name) == getattr(request, name) for name in same)


def _listed(failures: dict[str, str]) -> str:
    return ", ".join(f"{site} ({code})" for site, code in failures.items()) or "none"
