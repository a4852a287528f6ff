"""Contributions through secure sums: five exchanges with the sites, of which the coordinator learns the sum alone.

Every exchange asks the sites that are still in and waits for each of them, or until its time is up. A site that fails
is left out and named; too few left, and nothing is opened.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from common.codec.state import AdapterState
from common.codec.vector import DecodedSum, decode_words
from common.config.manifest import Manifest
from common.errors import RoundError, SecureSumError
from common.identity import Identity
from common.messages import Envelope, Evaluate, Project, RoundStart, encode
from common.progress import EventSink, SiteFailed, SumOpened
from common.roster import Roster
from common.secure_sum.config import RoundConfig
from common.secure_sum.coordinator import CoordinatorRound, Stage
from common.summed import Request, agreed, counts_in, loss_in, mean_in, sum_number
from server.aggregation.method import Mean
from server.channel import Channel
from server.collection import Collected, Shapes, SiteAnswer
from server.ranges import Ranges

__all__ = ["SecureCollection"]

# What the sum of all sites' counts goes by, in place of a site's name, which has no blank.
ALL_SITES = "all sites"


@dataclass(frozen=True)
class _Sum:
    """An opened sum: its numbers, the mean in it, the sites in it, who failed with which word, and bytes by site."""

    decoded: DecodedSum
    mean: Mean
    survivors: tuple[str, ...]
    failures: dict[str, str]
    up: dict[str, int]
    down: dict[str, int]


class SecureCollection:
    """The coordinator's side of all secure sums of one run. `sites` are names of institutions in the roster.

    `shapes` are those of the tensors that a site's model trains.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        identity: Identity,
        roster: Roster,
        sites: Sequence[str],
        shapes: Shapes,
        channel: Channel,
        report: EventSink,
    ) -> None:
        numbers = {entry.name: entry.site for entry in roster.institutions}
        self._numbers = {name: numbers[name] for name in sites}
        self._names = {number: name for name, number in self._numbers.items()}
        self._manifest, self._identity, self._roster = manifest, identity, roster
        self._shapes, self._channel, self._report = shapes, channel, report
        self._ranges = Ranges(manifest)
        self._accepted = 0
        self._adapter: AdapterState = {}

    def first(self, start: RoundStart, adapter: AdapterState, shapes: Shapes) -> Collected:
        """See `Collection`."""
        self._accepted, self._adapter = start.accepted, adapter
        start = start.model_copy(update={"ranges": self._ranges_of(shapes, start.round, len(self._numbers))})
        opened = self._sum(start, adapter, tuple(self._numbers), kind="train")
        done = self._collected(opened)
        done.mean = opened.mean
        self._ranges.saw(done.mean)
        counts = counts_in(opened.decoded)
        done.counts = {ALL_SITES: counts} if counts else {}
        done.loss = loss_in(opened.decoded)
        return done

    def second(self, start: RoundStart, basis: AdapterState, shapes: Shapes, before: Collected) -> Collected:
        """See `Collection`. All sites of the first sum must be in it: two sums that differ by a site tell about it.

        Raises:
            RoundError: one of them did not answer.
        """
        names = tuple(answer.site for answer in before.answers)
        header = Project(
            **start.spoken_of(),
            ranges=self._ranges_of(shapes, start.round, len(names)),
        )
        opened = self._sum(header, basis, names, kind="train")
        done = self._collected(opened)
        earlier = {answer.site: answer for answer in before.answers}
        done.answers = [
            replace(answer, bytes_up=answer.bytes_up + earlier[answer.site].bytes_up) for answer in done.answers
        ]
        done.mean = opened.mean
        self._ranges.saw(done.mean)
        return done

    def measured(self, request: Evaluate, adapter: AdapterState) -> Collected:
        """See `Collection`; with privacy nobody is asked, since nothing could be told."""
        if self._manifest.privacy is not None:
            return Collected()
        opened = self._sum(request, adapter, tuple(self._numbers), kind="evaluate")
        done, counts = self._collected(opened), counts_in(opened.decoded)
        done.counts = {ALL_SITES: counts} if counts else {}
        return done

    def _ranges_of(self, shapes: Shapes, number: int, sites: int) -> dict[str, float]:
        return self._ranges.of(shapes, self._adapter, round_number=number, sites=sites)

    def _collected(self, opened: _Sum) -> Collected:
        examples = self._manifest.training.local_steps * self._manifest.training.batch_size
        answers = [
            SiteAnswer(
                site=name,
                records=None,
                examples=examples,
                loss=None,
                seconds=None,
                bytes_up=opened.up[name],
                bytes_down=opened.down[name],
            )
            for name in opened.survivors
        ]
        return Collected(answers=answers, failures=opened.failures, bytes_down=sum(opened.down.values()))

    def _sum(self, header: Request, tensors: AdapterState, names: Sequence[str], *, kind: str) -> _Sum:
        """One attempt at a sum over the named sites.

        Raises:
            RoundError: too few sites are left, and nothing was opened; or what was opened is no sum of what sites can
                have encoded, and it is thrown away.
        """
        request = Envelope(header=header, tensors=tensors)
        what = agreed(self._manifest, request, self._shapes, accepted=self._accepted, sites=len(names))
        invited = [self._numbers[name] for name in names]
        failures: dict[str, str] = {}
        up, down = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        least = len(names) if isinstance(header, Project) else 0
        config = RoundConfig.for_round(self._roster, invited, what, min_sites=least)
        attempt = CoordinatorRound(
            self._identity,
            self._roster,
            config,
            invited=invited,
            round_number=sum_number(header),
            attempt=0,
            model_hash=what.model_hash,
        )
        try:
            # 1. The request itself, with the sum's first message in it; then the sum's own messages, stage by stage.
            #    It is the same for all, and is encoded once: a hundred copies of an adapter would fill the memory.
            (first,) = set(attempt.start().values())
            whole = encode(Envelope(header=header.model_copy(update={"secure_sum": first.hex()}), tensors=tensors))
            out = dict.fromkeys(names, whole)
            while True:
                self._exchange(attempt, out, kind, failures, up, down)
                if attempt.stage is Stage.REVEAL:
                    break
                out = {self._names[site]: data for site, data in attempt.advance().items()}
            # 2. Open the sum, and see that it is one.
            opened = attempt.open_sum()
            decoded = decode_words(opened.words, opened.count, what.spec, opened.context)
            mean = {} if isinstance(header, Evaluate) else mean_in(self._manifest, decoded, opened.count)
        except SecureSumError as error:
            self._name_dropped(attempt, failures)
            raise RoundError(
                f"round {header.round}: no secure sum over {len(names)} sites: {error}; rounds before it are stored."
                f" Sites that failed: {', '.join(f'{name} ({code})' for name, code in failures.items()) or 'none'}"
            ) from error
        survivors = tuple(self._names[site] for site in opened.record.survivors)
        self._name_dropped(attempt, failures)
        for name, code in failures.items():
            self._report(SiteFailed(round=header.round, site=name, code=code))
        self._report(
            SumOpened(
                round=header.round,
                survivors=survivors,
                dropped=tuple(name for name in names if name not in survivors),
                threshold=config.threshold,
                transcript=opened.record.transcript.hex(),
            )
        )
        return _Sum(decoded, mean, survivors, {n: c for n, c in failures.items() if n not in survivors}, up, down)

    def _name_dropped(self, attempt: CoordinatorRound, failures: dict[str, str]) -> None:
        """Add the sites that the protocol left out; a refusal in the site's own word counts as that word."""
        for site, code in attempt.record().dropped.items():
            failures.setdefault(self._names[site], code.removeprefix("refused:"))

    def _exchange(
        self,
        attempt: CoordinatorRound,
        out: Mapping[str, bytes],
        kind: str,
        failures: dict[str, str],
        up: dict[str, int],
        down: dict[str, int],
    ) -> None:
        """Send each site its message and hand every answer to the protocol, which leaves out whoever breaks a rule."""
        for name, data in out.items():
            down[name] += len(data)
        for reply in self._channel.exchange(out, kind=kind):
            up[reply.site] += reply.bytes_up
            if reply.code:
                failures[reply.site] = reply.code
                continue
            try:
                attempt.receive(self._numbers[reply.site], reply.data)
            except SecureSumError as error:
                failures[reply.site] = error.code
