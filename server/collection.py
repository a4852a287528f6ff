"""How contributions are taken in: one by one, or through a secure sum; the coordinator sees a mean either way.

`PlainCollection` is what the coordinator does where the secure sum is off: it sees every site's own contribution.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.errors import AdapterError
from common.messages import Envelope, Evaluate, Evaluated, Project, Projected, Refused, RoundDone, RoundStart, encode
from common.metrics import Counts
from common.progress import EventSink, SiteFailed, SiteFinished
from server.aggregation.method import Collector, Mean
from server.channel import Channel, Reply

__all__ = ["Collected", "Collection", "PlainCollection", "Shapes", "SiteAnswer", "failed_sites"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class SiteAnswer:
    """One site that answered in a round. Records, loss and seconds are None where only the site itself knows them."""

    site: str
    records: int | None
    examples: int
    loss: float | None
    seconds: float | None
    bytes_up: int
    bytes_down: int


@dataclass
class Collected:
    """What came of asking the sites. `counts` are those of the adapter that was sent, by site or of all together.

    `loss` is the mean training loss where the sites' own are not known. `reasons` are what sites added to the words in
    `failures`.
    """

    mean: Mean = field(default_factory=dict)
    answers: list[SiteAnswer] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    loss: float | None = None
    bytes_down: int = 0


class Collection(Protocol):
    """What the round loop knows of it."""

    def first(
        self, start: RoundStart, adapter: AdapterState, shapes: Shapes, sites: Sequence[str] | None = None
    ) -> Collected:
        """Have `sites` (None: every one) train, and take in contributions of `shapes`; the mean is empty where nobody
        answered."""

    def second(self, start: RoundStart, basis: AdapterState, shapes: Shapes, before: Collected) -> Collected:
        """The round's second sum, of the sites of the first; the answers hold the bytes of both."""

    def measured(self, request: Evaluate, adapter: AdapterState, sites: Sequence[str] | None = None) -> Collected:
        """Have `sites` (None: every one) measure an adapter on their held-out records."""

    def memory(self) -> dict[str, float]:
        """What later rounds follow from, by name; stored with each round."""

    def remember(self, memory: Mapping[str, float]) -> None:
        """Put back what `memory` gave."""

    def over(self, number: int, *, measured: bool = False) -> None:
        """Round `number` is stored: drop what was kept to go on with it; with `measured` also of its measuring."""


class PlainCollection:
    """Contributions one by one, into what `collector` makes for their shapes."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        sites: Sequence[str],
        channel: Channel,
        collector: Callable[[Shapes], Collector],
        report: EventSink,
    ) -> None:
        self._by_records = manifest.aggregation.weighting == "records"
        self._measures = manifest.evaluation.public is None
        self._sites, self._channel, self._collector, self._report = tuple(sites), channel, collector, report

    def first(
        self, start: RoundStart, adapter: AdapterState, shapes: Shapes, sites: Sequence[str] | None = None
    ) -> Collected:
        """See `Collection`. A site that fails sits the round out; the others go on."""
        request = encode(Envelope(header=start, tensors=adapter))
        asked = self._sites if sites is None else sites
        collector, done = self._collector(shapes), Collected(bytes_down=len(request) * len(asked))
        for reply in self._channel.exchange(dict.fromkeys(asked, request), kind="train"):
            self._take_in(reply, start, collector, done)
        done.mean = collector.result() if done.answers else {}
        return done

    def _take_in(self, reply: Reply, start: RoundStart, collector: Collector, done: Collected) -> None:
        header = reply.envelope.header if reply.envelope else None
        code = reply.code or (header.code if isinstance(header, Refused) else "message")
        if isinstance(header, RoundDone) and _answers(header, start):
            try:
                if header.loss is not None and not math.isfinite(header.loss):
                    raise AdapterError("the loss is not finite")
                collector.add(reply.envelope.tensors if reply.envelope else {}, self._weight(header.records))
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
                if self._measures:
                    done.counts[reply.site] = header.counts
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
        self._failed(done, start.round, reply, code)

    def second(self, start: RoundStart, basis: AdapterState, shapes: Shapes, before: Collected) -> Collected:
        """See `Collection`. Who does not answer sits the round out."""
        header = Project(**start.spoken_of())
        request = encode(Envelope(header=header, tensors=basis))
        first = {answer.site: answer for answer in before.answers}
        collector, done = self._collector(shapes), Collected(bytes_down=len(request) * len(first))
        for reply in self._channel.exchange(dict.fromkeys(first, request), kind="train"):
            answer = reply.envelope.header if reply.envelope else None
            code = reply.code or (answer.code if isinstance(answer, Refused) else "message")
            both = first[reply.site]
            if isinstance(answer, Projected) and _answers(answer, header):
                try:
                    collector.add(reply.envelope.tensors if reply.envelope else {}, self._weight(both.records))
                except AdapterError as error:
                    code = error.code
                else:
                    up, down = both.bytes_up + reply.bytes_up, both.bytes_down + reply.bytes_down
                    done.answers.append(replace(both, bytes_up=up, bytes_down=down))
                    continue
            self._failed(done, start.round, reply, code)
        done.mean = collector.result() if done.answers else {}
        return done

    def measured(self, request: Evaluate, adapter: AdapterState, sites: Sequence[str] | None = None) -> Collected:
        """See `Collection`."""
        data, done = encode(Envelope(header=request, tensors=adapter)), Collected()
        asked = self._sites if sites is None else sites
        for reply in self._channel.exchange(dict.fromkeys(asked, data), kind="evaluate"):
            answer = reply.envelope.header if reply.envelope else None
            if isinstance(answer, Evaluated) and _answers(answer, request):
                done.counts[reply.site] = answer.counts
            else:
                code = answer.code if isinstance(answer, Refused) else reply.code or "message"
                self._failed(done, request.round, reply, code)
        return done

    def memory(self) -> dict[str, float]:
        """See `Collection`: there is none."""
        return {}

    def remember(self, memory: Mapping[str, float]) -> None:
        """See `Collection`."""

    def over(self, number: int, *, measured: bool = False) -> None:
        """See `Collection`. Sites are asked again after a crash, and each answers one request once: a single site's
        change is never put on the coordinator's disk."""

    def _failed(self, done: Collected, number: int, reply: Reply, code: str) -> None:
        done.failures[reply.site] = code
        if reply.reason:
            done.reasons[reply.site] = reply.reason
        self._report(SiteFailed(round=number, site=reply.site, code=code, reason=reply.reason))

    def _weight(self, records: int | None) -> float:
        return records if self._by_records and records else 1


def _answers(header: RoundDone | Projected | Evaluated, request: RoundStart | Project | Evaluate) -> bool:
    """Whether a reply speaks of the very request: same manifest, run, round and adapter."""
    return header.spoken_of() == request.spoken_of()


def failed_sites(failures: Mapping[str, str], reasons: Mapping[str, str]) -> str:
    """Sites and their words on one line, for a person."""
    listed = (f"{site} ({': '.join(filter(None, (code, reasons.get(site))))})" for site, code in failures.items())
    return ", ".join(listed) or "none"
