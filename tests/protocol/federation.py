"""A federation in one process for the tests: real machines, and a coordinator between them that a test can corrupt."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from common.codec.layout import Layout
from common.codec.packing import Words
from common.codec.state import AdapterState
from common.codec.vector import DecodedSum, VectorSpec, decode_words, encode_body
from common.errors import SecureSumError
from common.identity import Identity
from common.randomness import seeded
from common.roster import Institution, Roster, SignedRoster, verify_roster
from common.secure_sum.config import Agreed, RoundConfig, SumPolicy
from common.secure_sum.coordinator import CoordinatorRound, Opened, Stage
from common.secure_sum.messages import COORDINATOR, Body, Message, Turn, encode, read
from common.secure_sum.site import Site, SiteRound
from common.secure_sum.state import SiteMemory

MODEL = b"m" * 32
MANIFEST = b"f" * 32
LAYOUT = Layout((("a", (3, 5)), ("b", (7,))))


@dataclass
class Memory:
    """A store that counts how often it was written."""

    kept: SiteMemory
    saves: int = 0

    def load(self) -> SiteMemory:
        return self.kept

    def save(self, memory: SiteMemory) -> None:
        self.kept, self.saves = memory, self.saves + 1


def state_of(site: int, scale: float = 0.5) -> AdapterState:
    draws = seeded(1, "state", site)
    return {name: draws.normal(scale=scale, size=shape).astype(np.float32) for name, shape in LAYOUT.tensors}


Tamper = Callable[[int, bytes], bytes | None]


@dataclass
class Federation:
    """`count` institutions, a coordinator, and the vectors of one round."""

    count: int
    colluding: int = 0
    min_sites: int = 3
    policy: SumPolicy = field(default_factory=SumPolicy)
    layout: Layout = LAYOUT
    sites_most: int = 0

    def __post_init__(self) -> None:
        unsafe = self.count < 3
        self.identities = [Identity.generate() for _ in range(self.count)]
        self.coordinator_identity = Identity.generate()
        self.roster = Roster(
            federation=b"F" * 16,
            epoch=1,
            coordinator=self.coordinator_identity.public,
            min_sites=self.min_sites,
            max_colluding=self.colluding,
            institutions=tuple(
                Institution(site=site, name=f"Clinic {site}", public=identity.public)
                for site, identity in enumerate(self.identities)
            ),
        )
        self.signed = self.sign(self.roster)
        for identity in (self.coordinator_identity, *self.identities[:1]):
            verify_roster(self.signed, own_key=identity.public, pinned=self.roster.digest(), unsafe_two_sites=unsafe)
        self.spec = VectorSpec.of(self.layout, 2.0, self.sites_most or self.count, extras=("examples", "loss"))
        self.agreed = Agreed(spec=self.spec, model_hash=MODEL, manifest_hash=MANIFEST)
        self.sites = [Site(identity, self.roster, self.policy) for identity in self.identities]
        self.stores = [Memory(SiteMemory(self.roster.federation)) for _ in self.sites]
        self.bodies = [self.encode(site) for site in range(self.count)]

    def sign(self, roster: Roster) -> SignedRoster:
        return SignedRoster(
            roster=roster,
            signatures={site: roster.sign(identity) for site, identity in enumerate(self.identities)},
        )

    def encode(self, site: int) -> Words:
        if self.layout is not LAYOUT:
            size = dict(self.layout.tensors)
            state = {name: seeded(2, site, name).normal(size=shape).astype(np.float32) for name, shape in size.items()}
        else:
            state = state_of(site)
        return encode_body(state, {"examples": 100.0 + site, "loss": 0.25 * site}, self.spec)

    def turn(self, number: int = 1, attempt: int = 0) -> Turn:
        return Turn(self.roster.federation, self.roster.epoch, number, attempt)

    def attempt(self, number: int = 1, attempt: int = 0, invited: list[int] | None = None) -> "Attempt":
        return Attempt(self, number, attempt, list(range(self.count)) if invited is None else invited)

    def forge(self, turn: Turn, body: Body, sender: int = COORDINATOR) -> bytes:
        """What a coordinator, or a site, could sign."""
        identity = self.coordinator_identity if sender == COORDINATOR else self.identities[sender]
        return encode(identity, turn, sender, body)

    def plain_sum(self, survivors: tuple[int, ...]) -> Words:
        total = np.zeros(self.spec.body_words, np.uint64)
        for site in survivors:
            total += self.bodies[site]
        return total


def opened(data: bytes, federation: Federation) -> Message:
    """A message of the federation, its signature checked."""

    def key_of(sender: int) -> bytes:
        return federation.roster.coordinator if sender == COORDINATOR else federation.roster.public_key_of(sender)

    return read(data, key_of)


class Attempt:
    """One attempt, driven stage by stage.

    `failed` holds the error that ended a site, `refused` the one with which the coordinator refused it.
    """

    def __init__(self, federation: Federation, number: int, attempt: int, invited: list[int]) -> None:
        self.federation = federation
        self.invited = invited
        self.config = RoundConfig.for_round(federation.roster, invited, federation.agreed)
        self.coordinator = CoordinatorRound(
            federation.coordinator_identity,
            federation.roster,
            self.config,
            invited=invited,
            round_number=number,
            attempt=attempt,
            model_hash=federation.agreed.model_hash,
        )
        self.rounds = {site: SiteRound(federation.sites[site], federation.stores[site]) for site in invited}
        self.failed: dict[int, SecureSumError] = {}
        self.refused: dict[int, SecureSumError] = {}
        self.sent: dict[tuple[Stage, int], bytes] = {}
        self.to_site: Tamper = lambda site, data: data
        self.to_coordinator: Tamper = lambda site, data: data
        self.outgoing = self.coordinator.start()
        self.agreed = dict.fromkeys(invited, federation.agreed)
        self.stage = Stage.ADVERTISE

    def site_step(self, site: int, data: bytes) -> bytes | None:
        """A site takes a message, and gives its vector as soon as it may."""
        round_ = self.rounds[site]
        if self.stage is Stage.ADVERTISE:
            return round_.start(self.agreed[site], data)
        answer = round_.receive(data)
        if self.stage is Stage.MASKED:
            return round_.release(self.federation.bodies[site])
        return answer

    def exchange(self, silent: tuple[int, ...] = ()) -> None:
        """Deliver what is outgoing and bring the answers back, except those of silent sites."""
        for site, data in self.outgoing.items():
            if site in silent or site in self.failed:
                continue
            told = self.to_site(site, data)
            if told is None:
                continue
            try:
                answer = self.site_step(site, told)
            except SecureSumError as error:
                self.failed[site] = error
                continue
            if answer is None:
                continue
            self.sent[self.stage, site] = answer
            told = self.to_coordinator(site, answer)
            if told is not None:
                self.hand_in(site, told)

    def hand_in(self, site: int, data: bytes) -> None:
        try:
            self.coordinator.receive(site, data)
        except SecureSumError as error:
            self.refused[site] = error

    def advance(self) -> None:
        self.outgoing = self.coordinator.advance()
        self.stage = self.coordinator.stage

    def run_to(self, stage: Stage, silent_from: dict[int, Stage] | None = None) -> "Attempt":
        """Run until `stage` has its messages outgoing but not delivered; a site is silent from its stage on."""
        order = list(Stage)
        while self.stage is not stage:
            self.exchange(self._silent(silent_from, order))
            self.advance()
        return self

    def finish(self, silent_from: dict[int, Stage] | None = None) -> Opened:
        self.run_to(Stage.REVEAL, silent_from)
        self.exchange(self._silent(silent_from, list(Stage)))
        return self.coordinator.open_sum()

    def _silent(self, silent_from: dict[int, Stage] | None, order: list[Stage]) -> tuple[int, ...]:
        return tuple(
            site for site, since in (silent_from or {}).items() if order.index(self.stage) >= order.index(since)
        )

    def decoded(self, result: Opened) -> DecodedSum:
        return decode_words(result.words, result.count, self.federation.spec, result.context)


def with_policy(federation: Federation, site: int, policy: SumPolicy) -> None:
    federation.sites[site] = replace(federation.sites[site], policy=policy)
