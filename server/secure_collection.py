"""Contributions through secure sums: five exchanges with the sites, of which the coordinator learns the sum alone.

Every exchange asks the sites that are still in and waits for each of them, or until its time is up. A site that fails
is left out and named; too few left, and nothing is opened. Then the sum is tried again among those that still answer:
with privacy each masks the identical vector anew; without it a site whose vector left takes no part again, and where
the others are too few the sum is lost.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from common.codec.state import AdapterState
from common.codec.vector import DecodedSum, decode_words
from common.config.manifest import Manifest
from common.errors import PolicyRefused, RoundError, RunError, SecureSumError, SumLost
from common.identity import Identity
from common.messages import Envelope, Evaluate, Project, RoundStart, encode
from common.progress import EventSink, SiteFailed, SumOpened
from common.roster import Roster
from common.secure_sum.config import Agreed, RoundConfig
from common.secure_sum.coordinator import CoordinatorRound
from common.summed import Request, agreed, counts_in, loss_in, mean_in, sum_number, sum_number_of
from server.aggregation.method import Mean
from server.channel import Channel
from server.collection import Collected, Shapes, SiteAnswer, failed_sites
from server.journal import Journal
from server.ranges import Ranges
from server.sum_attempt import SumAttempt, Told

__all__ = ["SecureCollection"]

# What the sum of all sites' counts goes by, in place of a site's name, which has no blank.
ALL_SITES = "all sites"

# Words of sites that can take part in the next attempt: they lost the one-time keys, or others were at fault. Whoever
# gave another word was silent, or would refuse the same again.
_AGAIN = frozenset(
    (
        "unknown_attempt",
        "unknown_order",
        "cancelled",
        "late",
        "too_few",
        "out_of_turn",
        "key",
        "share",
        "survivors",
        "context",
        "replay",
    )
)
_AGAIN_STARTS = ("silent:", "complaint:")
# The word of a site of which a vector without noise of its own has left.
_RERUN = "rerun"


@dataclass(frozen=True)
class _Asked:
    """One sum that is asked for: request and tensors, what both sides agree on, the sites, and the kind of message."""

    header: Request
    tensors: AdapterState
    what: Agreed
    names: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class _Sum:
    """An opened sum: its numbers, the mean in it, the sites in it, and what sites told beside it."""

    decoded: DecodedSum
    mean: Mean
    survivors: tuple[str, ...]
    told: Told


class SecureCollection:
    """The coordinator's side of all secure sums of one run. `sites` are names of institutions in the roster.

    `shapes` are those of the tensors that a site's model trains. A process tries each sum up to `attempts` times. In
    the folder `journals` sums that go on outlive a crash (`server/journal.py`); without one they do not.
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
        attempts: int = 1,
        journals: Path | None = None,
    ) -> None:
        numbers = {entry.name: entry.site for entry in roster.institutions}
        self._numbers = {name: numbers[name] for name in sites}
        self._names = {number: name for name, number in self._numbers.items()}
        self._manifest, self._identity, self._roster = manifest, identity, roster
        self._shapes, self._channel, self._report = shapes, channel, report
        self._ranges = Ranges(manifest)
        self._accepted = 0
        self._adapter: AdapterState = {}
        self._attempts, self._journals = attempts, journals
        # Else a failed sum ends the run, as in a simulation, where nothing can come back.
        self._goes_on = attempts > 1 or journals is not None

    def first(
        self, start: RoundStart, adapter: AdapterState, shapes: Shapes, sites: Sequence[str] | None = None
    ) -> Collected:
        """See `Collection`."""
        self._accepted, self._adapter = start.accepted, adapter
        names = tuple(self._numbers if sites is None else sites)
        start = start.model_copy(update={"ranges": self._ranges_of(shapes, start.round, len(names))})
        opened = self._sum(start, adapter, names, kind="train")
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

    def measured(self, request: Evaluate, adapter: AdapterState, sites: Sequence[str] | None = None) -> Collected:
        """See `Collection`; with privacy nobody is asked, since nothing could be told."""
        if self._manifest.privacy is not None:
            return Collected()
        names = tuple(self._numbers if sites is None else sites)
        opened = self._sum(request, adapter, names, kind="evaluate")
        done, counts = self._collected(opened), counts_in(opened.decoded)
        done.counts = {ALL_SITES: counts} if counts else {}
        return done

    def _ranges_of(self, shapes: Shapes, number: int, sites: int) -> dict[str, float]:
        return self._ranges.of(shapes, self._adapter, round_number=number, sites=sites)

    def memory(self) -> dict[str, float]:
        """See `Collection`: how much of their bounds the last means took."""
        return self._ranges.shares

    def remember(self, memory: Mapping[str, float]) -> None:
        """See `Collection`."""
        self._ranges.shares = dict(memory)

    def over(self, number: int, *, measured: bool = False) -> None:
        """See `Collection`: the journals are removed, and the masked vectors with them."""
        if self._journals is None or not self._journals.is_dir():
            return
        most = sum_number_of(number, Evaluate if measured else Project)
        for path in self._journals.glob("*.journal"):
            if int(path.stem) <= most:
                path.unlink(missing_ok=True)

    def _collected(self, opened: _Sum) -> Collected:
        examples = self._manifest.training.local_steps * self._manifest.training.batch_size
        answers = [
            SiteAnswer(
                site=name,
                records=None,
                examples=examples,
                loss=None,
                seconds=None,
                bytes_up=opened.told.up[name],
                bytes_down=opened.told.down[name],
            )
            for name in opened.survivors
        ]
        told = opened.told
        return Collected(
            answers=answers, failures=told.failures, reasons=told.reasons, bytes_down=sum(told.down.values())
        )

    def _sum(self, header: Request, tensors: AdapterState, names: Sequence[str], *, kind: str) -> _Sum:
        """A sum over the named sites, tried as often as is allowed. What was tried before a crash is replayed first.

        Raises:
            RoundError: too few sites are left, and nothing was opened; or what was opened is no sum of what sites can
                have encoded, and it is thrown away.
            SumLost: so it is, and vectors may have left that must not leave a second time.
            RunError: the journal was changed, or is of another run.
        """
        if self._goes_on:
            header = header.model_copy(update={"sites": len(names)})
        request = Envelope(header=header, tensors=tensors)
        what = agreed(self._manifest, request, self._shapes, accepted=self._accepted, sites=len(names))
        journal = Journal(self._journals / f"{sum_number(header):06d}.journal" if self._journals else None)
        try:
            return self._tries(_Asked(header, tensors, what, tuple(names), kind), journal)
        finally:
            journal.close()

    def _tries(self, asked: _Asked, journal: Journal) -> _Sum:
        told = Told(up=dict.fromkeys(asked.names, 0), down=dict.fromkeys(asked.names, 0))
        among, gone = asked.names, set[str]()
        tries, number, left = 0, 0, False
        while True:
            # 1. One attempt among the sites that can take part.
            before = journal.written
            protocol = self._protocol(asked, among, number)
            attempt = SumAttempt(
                *(protocol, self._of(among), self._channel, journal, told),
                number=asked.header.round,
                report=self._report,
            )
            try:
                return self._opened(asked, attempt, number, journal, told)
            except SecureSumError as error:
                failed = error
            # 2. It failed. It counts, unless an earlier process made it.
            attempt.name_dropped()
            tries += journal.written > before
            number += 1
            reruns = {name for name, code in told.failures.items() if code == _RERUN}
            left = left or attempt.vectors_may_have_left or bool(reruns)
            if self._manifest.privacy is None:
                gone |= {self._names[site] for site in protocol.given}
            gone |= reruns
            # 3. Who takes part next; too few, or often enough, and the sum is given up. Without noise vectors may
            #    leave once; with it the sum can be asked for again when the run is resumed, if enough can take part.
            among = self._among(asked, gone, told.failures)
            if not among or tries >= self._attempts or journal.take("lost"):
                lost = self._goes_on and (not among or (left and self._manifest.privacy is None))
                self._give_up(asked, failed, told, journal, lost=lost)
            told.failures = {name: code for name, code in told.failures.items() if name not in among}

    def _opened(self, asked: _Asked, attempt: SumAttempt, number: int, journal: Journal, told: Told) -> _Sum:
        """The sum that an attempt opens; a SecureSumError where it fails."""
        # The request is the same for all, and is encoded once: a hundred copies of an adapter would fill the memory.
        (first,) = set(attempt.protocol.start().values())
        header = asked.header.model_copy(update={"secure_sum": first.hex()})
        whole = encode(Envelope(header=header, tensors=asked.tensors))
        began = {"attempt": number, "request": hashlib.sha256(whole).hexdigest()}
        entry = journal.take("attempt")
        if entry is None:
            journal.append("attempt", began)
        elif entry.facts != began:
            raise RunError(
                f"the journal of sum {sum_number(header)} is of another request than the stored rounds lead to; resume"
                " with the version of Coadapt that wrote it, or begin the run anew"
            )
        opened = attempt.run(whole, kind=asked.kind)
        decoded = decode_words(opened.words, opened.count, asked.what.spec, opened.context)
        mean = {} if isinstance(header, Evaluate) else mean_in(self._manifest, decoded, opened.count)
        survivors = tuple(self._names[site] for site in opened.record.survivors)
        attempt.name_dropped()
        self._report_failures(asked, told)
        self._report(
            SumOpened(
                round=header.round,
                survivors=survivors,
                dropped=tuple(name for name in asked.names if name not in survivors),
                threshold=attempt.protocol.threshold,
                transcript=opened.record.transcript.hex(),
            )
        )
        told.failures = {name: code for name, code in told.failures.items() if name not in survivors}
        return _Sum(decoded, mean, survivors, told)

    def _protocol(self, asked: _Asked, among: Sequence[str], number: int) -> CoordinatorRound:
        return CoordinatorRound(
            self._identity,
            self._roster,
            self._config(asked, among),
            invited=list(self._of(among).values()),
            round_number=sum_number(asked.header),
            attempt=number,
            model_hash=asked.what.model_hash,
        )

    def _config(self, asked: _Asked, among: Sequence[str]) -> RoundConfig:
        """Raises PolicyRefused where so few sites cannot form the sum."""
        least = len(asked.names) if isinstance(asked.header, Project) else 0
        if self._goes_on:  # a sum over fewer would be opened, and then not be used
            least = max(least, min(self._manifest.aggregation.min_sites, len(asked.names)))
        return RoundConfig.for_round(self._roster, list(self._of(among).values()), asked.what, min_sites=least)

    def _among(self, asked: _Asked, gone: set[str], failures: Mapping[str, str]) -> tuple[str, ...]:
        """The sites of the next attempt: those that answer, or where they are too few all that may come back."""
        may = tuple(name for name in asked.names if name not in gone)
        for among in (tuple(name for name in may if _takes_part_again(failures.get(name))), may):
            try:
                self._config(asked, among)
            except PolicyRefused:
                continue
            return among
        return ()

    def _give_up(self, asked: _Asked, error: SecureSumError, told: Told, journal: Journal, *, lost: bool) -> NoReturn:
        number, listed = asked.header.round, failed_sites(told.failures, told.reasons)
        said = f"round {number}: no secure sum over {len(asked.names)} sites: {error}"
        if not lost:
            raise RoundError(f"{said}; rounds before it are stored. Sites that failed: {listed}") from error
        if journal.live:
            journal.append("lost")
        self._report_failures(asked, told)
        raise SumLost(f"{said}; vectors left, so it is not asked for again. Sites that failed: {listed}") from error

    def _report_failures(self, asked: _Asked, told: Told) -> None:
        for name, code in told.failures.items():
            self._report(SiteFailed(round=asked.header.round, site=name, code=code, reason=told.reasons.get(name, "")))

    def _of(self, names: Sequence[str]) -> dict[str, int]:
        return {name: self._numbers[name] for name in names}


def _takes_part_again(code: str | None) -> bool:
    return code is None or code in _AGAIN or code.startswith(_AGAIN_STARTS)
