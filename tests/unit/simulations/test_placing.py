"""The longest site starts first, and one that ran out of memory is asked again, with a slot fewer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from common.messages import Envelope, Refused, RoundDone
from common.progress import BatchHalved, Event, SlotClosed
from server.channel import Reply
from simulations.placing import Placed, ran_out_of_memory
from simulations.seats import Halved, Seats
from simulations.slots import Device, Footprint, Plan, Slot

WORK = {"short": 10.0, "long": 30.0, "middle": 20.0}


def done(site: str, seconds: float) -> Reply:
    header = RoundDone(
        manifest_sha256="a" * 64, run_id="r", round=1, adapter_sha256="b" * 64, records=1, examples=1, loss=1.0,
        counts={}, seconds=seconds, noise_multiplier=None, sampling_rate=None,
    )  # fmt: skip
    return Reply(site, Envelope(header=header), "", 1, 1)


def refused(site: str, code: str) -> Reply:
    header = Refused(manifest_sha256="a" * 64, run_id="r", round=1, adapter_sha256="b" * 64, code=code)
    return Reply(site, Envelope(header=header), code, 1, 1)


@dataclass
class Sites:
    """A channel whose sites answer in their turn, each as often as `short` says that memory does not suffice."""

    seconds: dict[str, float]
    short: dict[str, int] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        self.asked.append(list(requests))
        for site in requests:
            if self.short.get(site, 0):
                self.short[site] -= 1
                yield refused(site, "out_of_memory")
            else:
                yield done(site, self.seconds[site])


@dataclass
class TwoSlots:
    """Two slots on one device."""

    left: int = 2
    halvings: list[Halved] = field(default_factory=list)

    def new_halvings(self) -> list[Halved]:
        told, self.halvings = self.halvings, []
        return told

    def close_slot(self, site: str) -> tuple[int, int] | None:
        if self.left == 1:
            return None
        self.left -= 1
        return 0, self.left


class World:
    def __init__(self, seconds: dict[str, float], *, workers: int = 2, short: dict[str, int] | None = None) -> None:
        self.free, self.paced, self.again = (Sites(seconds, short or {}) for _ in range(3))
        self.seats, self.events = TwoSlots(), list[Event]()
        slots = tuple(Slot(0, place, 8) for place in range(workers))
        plan = Plan(1, (Device("GPU 0", 8, 0),), slots, Footprint(1, 1, 1, 1))
        self.placed = Placed(
            self.free,
            self.paced,
            self.again,
            work=WORK,
            plan=plan,
            seats=cast(Seats, self.seats),
            report=self.events.append,
            number=lambda: 3,
        )

    def round(self) -> list[Reply]:
        return list(self.placed.exchange(dict.fromkeys(WORK, b"train"), kind="train"))


def test_the_most_work_goes_first_and_then_what_took_longest() -> None:
    world = World({"short": 9.0, "long": 2.0, "middle": 5.0})
    assert [reply.site for reply in world.round()] == ["long", "middle", "short"]
    world.round()
    assert world.paced.asked == [["long", "middle", "short"], ["short", "middle", "long"]]
    assert world.free.asked == []


def test_a_site_that_was_never_asked_is_reckoned_in_the_seconds_of_the_others() -> None:
    world = World({"short": 2.0, "long": 6.0, "middle": 4.0})
    list(world.placed.exchange({"short": b""}, kind="train"))
    assert world.placed.expected("short") == 2.0
    assert world.placed.expected("long") == 30.0 * (2.0 / 10.0)
    assert world.placed.expected("of no known work") == 0.0


def test_order_is_kept_only_where_it_pays() -> None:
    enough = World(dict.fromkeys(WORK, 5.0), workers=3)
    enough.round()
    assert (len(enough.free.asked), len(enough.paced.asked)) == (1, 0)  # nobody waits for a worker
    quick = World(dict.fromkeys(WORK, 0.1))
    quick.round()
    quick.round()
    assert (len(quick.paced.asked), len(quick.free.asked)) == (1, 1)  # Flower's tenth of a second would be longer


def test_a_site_short_of_memory_is_asked_once_more_after_the_others() -> None:
    world = World(dict.fromkeys(WORK, 5.0), short={"long": 1})
    replies = world.round()
    assert [(reply.site, ran_out_of_memory(reply)) for reply in replies] == [
        ("middle", False),
        ("short", False),
        ("long", False),
    ]
    assert world.again.asked == [["long"]]
    closed = [event for event in world.events if isinstance(event, SlotClosed)]
    assert [(event.round, event.site, event.device, event.left) for event in closed] == [(3, "long", "GPU 0", 1)]
    assert world.placed.finds.closed == closed


def test_nobody_is_asked_a_third_time_and_the_last_slot_stays() -> None:
    world = World(dict.fromkeys(WORK, 5.0), short={"long": 9, "middle": 1})
    replies = {reply.site: reply for reply in world.round()}
    assert {site: ran_out_of_memory(reply) for site, reply in replies.items()} == {
        "long": True,
        "middle": False,
        "short": False,
    }
    assert world.again.asked == [["long", "middle"]]
    assert [event.site for event in world.events if isinstance(event, SlotClosed)] == ["long"]


def test_halvings_are_told_in_the_round_in_which_they_happen() -> None:
    world = World(dict.fromkeys(WORK, 5.0))
    world.seats.halvings = [Halved("middle", 8, 4)]
    world.round()
    halved = [event for event in world.events if isinstance(event, BatchHalved)]
    assert [(event.round, event.site, event.before, event.after) for event in halved] == [(3, "middle", 8, 4)]
    assert world.placed.finds.halved == halved


def test_which_answers_speak_of_memory() -> None:
    assert ran_out_of_memory(refused("a", "unexpected:OutOfMemoryError"))
    assert ran_out_of_memory(Reply("a", None, "unexpected:MemoryError", 1, 0))
    assert not ran_out_of_memory(refused("a", "not_finite_loss"))
    assert not ran_out_of_memory(Reply("a", None, "timeout", 1, 0))
    assert not ran_out_of_memory(done("a", 1.0))
