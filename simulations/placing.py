"""Requests on their way to the workers: the longest first, and once more where memory ran out.

It stands between the round loop and Flower's channel. Nothing of it is known to the coordinator's rules: every site
still gives one reply to one request.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from common.messages import Refused, RoundDone
from common.progress import BatchHalved, EventSink, SlotClosed
from server.channel import Channel, Reply
from simulations.seats import Seats
from simulations.slots import Plan, longest_first

__all__ = ["MemoryFinds", "Placed", "ran_out_of_memory"]

# Codes with which a site says that memory did not suffice (`common/errors.py`), while it trained or otherwise.
CODES = frozenset({"out_of_memory", "unexpected:OutOfMemoryError", "unexpected:MemoryError"})

# Flower looks for requests ten times a second and hands out what it finds in an order of its own. To keep ours no
# more may be out than there are workers, who then wait a little for the next. That pays where sites train longer.
LONG_SECONDS = 1.0
FEW_SITES = 64


@dataclass
class MemoryFinds:
    """What a run found out of memory: halvings and closed slots, as events in their order."""

    halved: list[BatchHalved] = field(default_factory=list)
    closed: list[SlotClosed] = field(default_factory=list)


class Placed:
    """A channel for the rounds.

    `free` sends everything at once, `paced` no more than there are workers, `again` says beside each request that it
    comes a second time. `work` is what each site is expected to take, in any unit. `number` is asked for the present
    round's number.
    """

    def __init__(
        self,
        free: Channel,
        paced: Channel,
        again: Channel,
        *,
        work: Mapping[str, float],
        plan: Plan,
        seats: Seats,
        report: EventSink,
        number: Callable[[], int],
    ) -> None:
        self._free, self._paced, self._again = free, paced, again
        self._work, self._plan, self._seats = dict(work), plan, seats
        self._report, self._number = report, number
        self._seconds: dict[str, float] = {}
        self.finds = MemoryFinds()

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        """See `Channel`. A site that ran out of memory is asked once more when the others are done: on a device that
        has a slot fewer, where there was one to close, and by a worker that has halved its batch."""
        ordered = {site: requests[site] for site in longest_first({site: self.expected(site) for site in requests})}
        channel = self._paced if self._pays(ordered) else self._free
        short: dict[str, bytes] = {}
        for reply in channel.exchange(ordered, kind=kind):
            self._look()
            if ran_out_of_memory(reply):
                self._close(reply.site)
                short[reply.site] = requests[reply.site]
            else:
                yield self._learnt(reply)
        for reply in self._again.exchange(short, kind=kind) if short else ():
            self._look()
            yield self._learnt(reply)

    def expected(self, site: str) -> float:
        """Seconds that the site took last, and its work in the seconds of the others where it took none yet."""
        if site in self._seconds:
            return self._seconds[site]
        done = [self._seconds[other] / self._work[other] for other in self._seconds if self._work.get(other)]
        return self._work.get(site, 0.0) * (sum(done) / len(done) if done else 1.0)

    def _pays(self, requests: Mapping[str, bytes]) -> bool:
        if len(requests) <= self._plan.workers:
            return False
        known = [self._seconds[site] for site in requests if site in self._seconds]
        return sum(known) / len(known) >= LONG_SECONDS if known else len(requests) <= FEW_SITES

    def _learnt(self, reply: Reply) -> Reply:
        header = reply.envelope.header if reply.envelope else None
        if isinstance(header, RoundDone):
            self._seconds[reply.site] = header.seconds
        return reply

    def _look(self) -> None:
        for found in self._seats.new_halvings():
            event = BatchHalved(round=self._number(), site=found.site, before=found.before, after=found.after)
            self.finds.halved.append(event)
            self._report(event)

    def _close(self, site: str) -> None:
        if (closed := self._seats.close_slot(site)) is None:
            return
        device, left = closed
        event = SlotClosed(round=self._number(), site=site, device=self._plan.devices[device].name, left=left)
        self.finds.closed.append(event)
        self._report(event)


def ran_out_of_memory(reply: Reply) -> bool:
    """Whether a site says that memory did not suffice."""
    header = reply.envelope.header if reply.envelope else None
    return (header.code if isinstance(header, Refused) else reply.code) in CODES
