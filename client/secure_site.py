"""A site's part in the secure sums of one run: a request comes in, a masked vector goes out.

    start     the coordinator's request      -> the site's one-time keys; training may begin
    receive   the protocol's next message    -> the answer, or nothing while the vector is waited for
    give      what training made of it       -> the masked vector
    repeat    the body that was let go       -> the same body, masked for a new attempt (with privacy alone)
    refuse    an error                       -> what the coordinator is told

In the field the vault calls these; a simulation calls them for every site that it plays. What a site insists on is its
own policy: fewest sites in a sum; that a second sum of one round is over the very sites of the first, and that one
adapter is measured in one sum, since two sums together would otherwise tell about a site that is missing; and ranges
that follow from optimiser and adapter.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from common.bounds import bounds, require_ranges
from common.codec.fixed_point import ByteSource
from common.codec.packing import Words
from common.codec.state import AdapterState, state_digest
from common.codec.vector import encode_body
from common.config.manifest import Manifest
from common.errors import (
    CoadaptError,
    MalformedMessage,
    MessageError,
    OutOfTurn,
    RerunRefused,
    SecureSumError,
    SurvivorsRefused,
)
from common.factors import depth, newest
from common.messages import Envelope, Evaluate, Evaluated, Project, Projected, RoundDone, RoundStart
from common.secure_sum.config import Agreed, SumPolicy
from common.secure_sum.messages import RoundStart as SumStart
from common.secure_sum.messages import Turn
from common.secure_sum.primitives import Keystream, Label, derive
from common.secure_sum.site import Site, SiteRound
from common.secure_sum.state import MemoryStore, Phase
from common.summed import Request, agreed, extras, measures, sum_number, weighted

__all__ = ["FactsStore", "SecureSite", "SumFacts", "sum_policy"]

_ANSWERS: dict[type[Request], type[RoundDone | Projected | Evaluated]] = {
    RoundStart: RoundDone,
    Project: Projected,
    Evaluate: Evaluated,
}


@dataclass(frozen=True)
class _Trained:
    """What follows from a round's start for both of its sums: accepted aggregations; shapes and bounds by name."""

    accepted: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest, header: RoundStart, tensors: AdapterState) -> "_Trained":
        """From the adapter that the round starts from.

        Raises:
            AdapterError: its low-rank pairs do not have the manifest's rank.
        """
        rank = manifest.adapter.rank
        depth({name: array.shape for name, array in tensors.items()}, rank)
        shapes = {name: array.shape for name, array in newest(tensors, rank).items()}
        return cls(header.accepted, shapes, bounds(manifest, tensors, header.round))


@dataclass(frozen=True)
class SumFacts:
    """What a site knows of a run's sums, beside `SiteMemory`, that a later sum of the run is held against.

    `measured` are digests of adapters, `of_round` is the last round and the survivors that this site saw, `records`
    the weight of its last answer.
    """

    measured: tuple[str, ...] = ()
    of_round: tuple[int, tuple[int, ...]] = (0, ())
    records: int = 0
    trained: _Trained = field(default_factory=_Trained)

    def to_bytes(self) -> bytes:
        """For the disk."""
        return TypeAdapter(SumFacts).dump_json(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> "SumFacts":
        """From `to_bytes`; MalformedMessage if it is damaged."""
        try:
            return TypeAdapter(SumFacts).validate_json(data)
        except ValidationError as error:
            raise MalformedMessage("stored facts of a run's sums are damaged") from error


class FactsStore(Protocol):
    """Where the facts of a run lie."""

    def load_facts(self) -> SumFacts:
        """What was saved last."""

    def save_facts(self, facts: SumFacts) -> None:
        """Return when it will survive a crash."""


class _InMemory:
    """For a run that ends with its process."""

    def __init__(self) -> None:
        self._facts = SumFacts()

    def load_facts(self) -> SumFacts:
        return self._facts

    def save_facts(self, facts: SumFacts) -> None:
        self._facts = facts


def sum_policy(manifest: Manifest) -> SumPolicy:
    """What a site insists on that has no stricter policy than the manifest."""
    section = manifest.secure_sum
    return SumPolicy(
        min_sites=section.min_sites,
        max_colluding=section.max_colluding,
        noised_at_site=manifest.privacy is not None,
        unsafe_two_sites=section.unsafe_two_sites,
    )


class SecureSite:
    """One institution under one manifest. `store` and `facts` keep what must outlive a restart.

    One attempt goes on at a time.

    `rounding` are 32 bytes that this site alone knows. Rounding is drawn from them, so that a run can be repeated bit
    for bit; without them from the operating system. A coordinator that knew how the others round could tell from a sum
    of values below a step on which side of a threshold one site's value lies. With `metrics_leave` false the site's
    loss and counts are not in the sums, which then speak of the others alone.
    """

    def __init__(
        self,
        site: Site,
        store: MemoryStore,
        manifest: Manifest,
        *,
        facts: FactsStore | None = None,
        rounding: bytes | None = None,
        metrics_leave: bool = True,
    ) -> None:
        self.site, self.store, self._manifest = site, store, manifest
        self._rounding_key, self._metrics_leave = rounding, metrics_leave
        self._round: SiteRound | None = None
        self._request: Request | None = None
        self._agreed: Agreed | None = None
        self._adapter = ""
        self._store_of_facts = facts or _InMemory()
        self._facts = self._store_of_facts.load_facts()

    @property
    def turn(self) -> Turn | None:
        """The attempt that goes on or was the last; None where none has begun since the start of this process."""
        return None if self._round is None or self._round.state is None else self._round.state.turn

    def start(self, request: Envelope) -> bytes:
        """Take part in the sum of a request. Where it is refused, an attempt that goes on is left as it was.

        Raises:
            SecureSumError: the request is replayed, looser than this site's policy, or not signed by the coordinator.
            MessageError: it asks for no sum, or for another than the manifest's.
            AdapterError: its tensors are no adapter of the manifest's.
        """
        header = request.header
        if not isinstance(header, RoundStart | Project | Evaluate) or not header.secure_sum:
            raise MessageError(
                "the coordinator asks for a change that is not masked; this site sends masked ones alone"
            )
        site, data = self.site, bytes.fromhex(header.secure_sum)
        message = site.read(data)
        if not isinstance(message.body, SumStart) or message.turn.round != sum_number(header):
            raise OutOfTurn("the secure sum that was sent along is not that of the request")
        self.store.load().started(message.turn, noised_at_site=site.policy.noised_at_site)  # an old one is called so
        self._require_place(header)
        invited = message.body.invited
        trained, adapter = self._facts.trained, ""
        if isinstance(header, Project):
            if self._facts.of_round != (header.round, invited):
                raise SurvivorsRefused("a second sum must be over the very sites of the round's first one")
            site = replace(site, policy=replace(site.policy, min_sites=len(invited)))
        elif measures(self._manifest, header):
            adapter = state_digest(request.tensors)
            if adapter in self._facts.measured:
                raise RerunRefused(
                    "this adapter has been measured in a sum already; a second sum over other sites would give single"
                    " sites' counts by subtraction"
                )
        if isinstance(header, RoundStart):
            trained = _Trained.of(self._manifest, header, request.tensors)
        room = header.sites or len(invited)
        what = agreed(self._manifest, request, trained.shapes, accepted=trained.accepted, sites=room)
        require_ranges(header.ranges, trained.bounds)
        attempt = SiteRound(site, self.store)
        answer = attempt.start(what, data)
        self._round, self._request, self._agreed = attempt, header, what
        self._adapter = adapter
        self._know(trained=trained)
        return answer

    def _require_place(self, header: Request) -> None:
        """Refuse a round that the run does not have. Adapters are measured alone once, when the last round is over: a
        coordinator could have as many adapters measured, over as many crowds, as it likes."""
        last = self._manifest.training.rounds
        if isinstance(header, Evaluate) and header.round != last:
            raise MessageError(f"adapters are measured apart from training after round {last}, not {header.round}")
        if not 1 <= header.round <= last:
            raise MessageError(f"rounds go from 1 to {last}, found {header.round}")

    def receive(self, data: bytes) -> bytes | None:
        """Answer the protocol's next message; None while the site's vector is waited for.

        Raises:
            SecureSumError: it is refused, and the attempt is over for this site.
        """
        attempt = self._attempt()
        answer = attempt.receive(data)
        if attempt.state is not None and isinstance(self._request, RoundStart):
            self._know(of_round=(self._request.round, attempt.state.survivors))
        return answer

    def give(self, reply: Envelope) -> bytes:
        """Mask what training or measuring made of the request.

        Raises:
            SecureSumError: the vector holds what cannot be summed, or comes out of turn.
            MessageError: the reply is not one to the request.
        """
        return self.repeat(self.encoded(reply))

    def repeat(self, body: Words) -> bytes:
        """Mask a body: one that `encoded` made, or the identical one again in a later attempt.

        Raises:
            SecureSumError: it comes out of turn, or another left in this round.
        """
        state = self._attempt().state
        ready = state is not None and state.phase is Phase.VECTOR
        if self._adapter and ready:  # before the vector leaves: a kill between must not have it measured again
            self._know(measured=tuple(sorted({*self._facts.measured, self._adapter})))
        return self._attempt().release(body)

    def laid_out(self) -> tuple[str, str]:
        """How the body of the sum that goes on is laid out, and what was asked: two digests in hex.

        Raises:
            OutOfTurn: no attempt has begun.
        """
        if self._agreed is None:
            raise OutOfTurn("no secure sum has begun at this site")
        spec = self._agreed.spec
        # Words are the same for as many sites as fit in one width of lane, so one that is missing changes nothing.
        same = replace(spec, sites=1 << (spec.sites - 1).bit_length())
        return same.digest().hex(), self._agreed.model_hash.hex()

    def encoded(self, reply: Envelope) -> Words:
        """The body of the vector that a reply to the request gives, before checksum and masks.

        Raises:
            NotFiniteValue: it holds what cannot be summed.
            MessageError: the reply is not one to the request.
        """
        header, what, request = reply.header, self._agreed, self._request
        if what is None or request is None or not isinstance(header, RoundDone | Projected | Evaluated):
            raise MessageError(f"{header.kind!r} holds nothing to sum")
        if type(header) is not _ANSWERS[type(request)] or header.spoken_of() != request.spoken_of():
            raise MessageError(f"{header.kind!r} of round {header.round} is no answer to the request that goes on")
        if isinstance(header, RoundDone):
            self._know(records=header.records)
        records = self._facts.records
        return encode_body(
            weighted(self._manifest, reply.tensors, records),
            extras(self._manifest, request, header, records, metrics_leave=self._metrics_leave),
            what.spec,
            source=self._rounding(request),
        )

    def _know(self, **changes: Any) -> None:
        facts = replace(self._facts, **changes)
        if facts != self._facts:
            self._store_of_facts.save_facts(facts)
            self._facts = facts

    def _rounding(self, request: Request) -> ByteSource | None:
        """Where rounding draws from: a keystream for this sum and adapter, or the operating system."""
        if self._rounding_key is None:
            return None
        place = sum_number(request).to_bytes(8, "little")
        return Keystream(derive(self._rounding_key, Label.ROUNDING, place, bytes.fromhex(request.adapter_sha256))).bytes

    def refuse(self, error: CoadaptError) -> bytes:
        """Tell the coordinator, in a fixed word, that this site sits the attempt out.

        Raises:
            OutOfTurn: no attempt has begun.
        """
        if isinstance(error, SecureSumError):
            return self._attempt().refuse(error)
        told = SecureSumError()
        told.code = error.code
        return self._attempt().refuse(told)

    def _attempt(self) -> SiteRound:
        if self._round is None:
            raise OutOfTurn("no secure sum has begun at this site")
        return self._round
