"""A site's part in the secure sums of one run: a request comes in, a masked vector goes out.

    start     the coordinator's request      -> the site's one-time keys; training may begin
    receive   the protocol's next message    -> the answer, or nothing while the vector is waited for
    give      what training made of it       -> the masked vector
    refuse    an error                       -> what the coordinator is told

In the field the vault calls these; a simulation calls them for every site that it plays. What a site insists on is its
own policy: fewest sites in a sum; that a second sum of one round is over the very sites of the first, and that one
adapter is measured in one sum, since two sums together would otherwise tell about a site that is missing; and ranges
that follow from optimiser and adapter.
"""

from dataclasses import dataclass, field, replace

from common.bounds import bounds, require_ranges
from common.codec.fixed_point import ByteSource
from common.codec.state import AdapterState, state_digest
from common.codec.vector import encode_body
from common.config.manifest import Manifest
from common.errors import CoadaptError, MessageError, OutOfTurn, RerunRefused, SecureSumError, SurvivorsRefused
from common.factors import depth, newest
from common.messages import Envelope, Evaluate, Evaluated, Project, Projected, RoundDone, RoundStart
from common.secure_sum.config import Agreed, SumPolicy
from common.secure_sum.messages import RoundStart as SumStart
from common.secure_sum.primitives import Keystream, Label, derive
from common.secure_sum.site import Site, SiteRound
from common.secure_sum.state import MemoryStore
from common.summed import Request, agreed, extras, measures, sum_number, weighted

__all__ = ["SecureSite", "sum_policy"]

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
    """One institution under one manifest. `store` keeps what must outlive a restart; one attempt goes on at a time.

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
        rounding: bytes | None = None,
        metrics_leave: bool = True,
    ) -> None:
        self.site, self.store, self._manifest = site, store, manifest
        self._rounding_key, self._metrics_leave = rounding, metrics_leave
        self._round: SiteRound | None = None
        self._request: Request | None = None
        self._agreed: Agreed | None = None
        self._records = 0
        self._trained = _Trained()
        self._adapter = ""
        self._measured: set[str] = set()
        self._of_round: tuple[int, tuple[int, ...]] = (0, ())  # the last round, and the survivors that this site saw

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
        trained, adapter = self._trained, ""
        if isinstance(header, Project):
            if self._of_round != (header.round, invited):
                raise SurvivorsRefused("a second sum must be over the very sites of the round's first one")
            site = replace(site, policy=replace(site.policy, min_sites=len(invited)))
        elif measures(self._manifest, header):
            adapter = state_digest(request.tensors)
            if adapter in self._measured:
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
        self._trained, self._adapter = trained, adapter
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
            self._of_round = (self._request.round, attempt.state.survivors)
        return answer

    def give(self, reply: Envelope) -> bytes:
        """Mask what training or measuring made of the request.

        Raises:
            SecureSumError: the vector holds what cannot be summed, or comes out of turn.
            MessageError: the reply is not one to the request.
        """
        attempt, header, what, request = self._attempt(), reply.header, self._agreed, self._request
        if what is None or request is None or not isinstance(header, RoundDone | Projected | Evaluated):
            raise MessageError(f"{header.kind!r} holds nothing to sum")
        if type(header) is not _ANSWERS[type(request)] or header.spoken_of() != request.spoken_of():
            raise MessageError(f"{header.kind!r} of round {header.round} is no answer to the request that goes on")
        if isinstance(header, RoundDone):
            self._records = header.records
        body = encode_body(
            weighted(self._manifest, reply.tensors, self._records),
            extras(self._manifest, request, header, self._records, metrics_leave=self._metrics_leave),
            what.spec,
            source=self._rounding(request),
        )
        answer = attempt.release(body)
        if self._adapter:
            self._measured.add(self._adapter)
        return answer

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
