"""One attempt at a secure sum over a channel: five exchanges, each message journalled before anything follows from it.

After a crash the same attempt is made again. What the journal holds is handed to the protocol first, which brings it
to where it stood; then the sites that have not answered in that stage are sent their message again. A site answers one
payload once, so asking again tells it nothing, and tells the coordinator nothing more.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.errors import SecureSumError
from common.progress import EventSink, StageFinished
from common.secure_sum.coordinator import CoordinatorRound, Opened, Stage
from server.channel import Channel
from server.journal import Journal

__all__ = ["SumAttempt", "Told"]


@dataclass
class Told:
    """What sites told beside the protocol, over all attempts at one sum: failures and their reasons, bytes by site."""

    failures: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)


class SumAttempt:
    """One attempt at a sum of round `number`. `numbers` are the invited sites' numbers in the roster, by name; `told`
    is added to; `report` hears of every stage that was gone through here, and of none that is replayed."""

    def __init__(
        self,
        protocol: CoordinatorRound,
        numbers: Mapping[str, int],
        channel: Channel,
        journal: Journal,
        told: Told,
        *,
        number: int,
        report: EventSink,
    ) -> None:
        self.protocol, self._numbers, self._channel, self._journal, self._told = (
            protocol,
            dict(numbers),
            channel,
            journal,
            told,
        )
        self._names = {site: name for name, site in numbers.items()}
        self._round, self._report = number, report

    def run(self, request: bytes, *, kind: str) -> Opened:
        """Send the request, which holds the sum's first message, and go through all stages.

        Raises:
            SecureSumError: the attempt failed; `name_dropped` tells whose fault it was.
        """
        out = dict.fromkeys(self._numbers, request)
        while True:
            self._stage(out, kind)
            if self.protocol.stage is Stage.REVEAL:
                return self.protocol.open_sum()
            out = {self._names[site]: data for site, data in self.protocol.advance().items()}

    @property
    def vectors_may_have_left(self) -> bool:
        """Whether sites were sent the message to which a vector is the answer."""
        return self.protocol.stage not in (Stage.ADVERTISE, Stage.SHARES)

    def name_dropped(self) -> None:
        """Add the sites that the protocol left out; a refusal in the site's own word counts as that word."""
        for site, code in self.protocol.record().dropped.items():
            self._told.failures.setdefault(self._names[site], code.removeprefix("refused:"))

    def _stage(self, out: Mapping[str, bytes], kind: str) -> None:
        """Have every site that is still in answer, or fail; where the stage ended before a crash, nobody is asked."""
        told, waiting = self._told, dict(out)
        for name, data in out.items():
            told.down[name] = told.down.get(name, 0) + len(data)
        while (entry := self._journal.take("message")) is not None:
            waiting.pop(entry.facts["site"], None)
            self._receive(entry.facts["site"], entry.data, entry.facts["bytes_up"])
        if (ended := self._journal.take("ended")) is not None:
            told.failures.update(ended.facts["failures"])
            told.reasons.update(ended.facts["reasons"])
            return
        failures: dict[str, str] = {}
        reasons: dict[str, str] = {}
        waited: dict[str, float] = {}
        stage, began = self.protocol.stage, time.monotonic()
        for reply in self._channel.exchange(waiting, kind=kind) if waiting else ():
            waited[reply.site] = time.monotonic() - began
            if reply.code:
                failures[reply.site] = reply.code
                if reply.reason:
                    reasons[reply.site] = reply.reason
                told.up[reply.site] = told.up.get(reply.site, 0) + reply.bytes_up
                continue
            self._journal.append("message", {"site": reply.site, "bytes_up": reply.bytes_up}, reply.data)
            self._receive(reply.site, reply.data, reply.bytes_up)
        seconds = time.monotonic() - began
        told.failures.update(failures)
        told.reasons.update(reasons)
        self._report(StageFinished(round=self._round, stage=stage.value, seconds=seconds, waited=waited))
        self._journal.append("ended", {"failures": failures, "reasons": reasons})

    def _receive(self, name: str, data: bytes, bytes_up: int) -> None:
        """Hand an answer to the protocol, which leaves out whoever breaks a rule."""
        self._told.up[name] = self._told.up.get(name, 0) + bytes_up
        try:
            self.protocol.receive(self._numbers[name], data)
        except SecureSumError as error:
            self._told.failures[name] = error.code
