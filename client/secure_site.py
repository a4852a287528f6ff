"""A site's part in the secure sums of one run: a request comes in, a masked vector goes out.

    start     the coordinator's request      -> the site's one-time keys; training may begin
    receive   the protocol's next message    -> the answer, or nothing while the vector is waited for
    give      what training made of it       -> the masked vector
    refuse    an error                       -> what the coordinator is told

In the field the vault calls these; a simulation calls them for every site that it plays. What a site insists on is its
own policy: fewest sites in a sum, and that a second sum of one round is over the very sites of the first, since the two
together would otherwise tell about the site that is missing.
"""

from dataclasses import replace

from common.codec.fixed_point import ByteSource
from common.codec.vector import encode_body
from common.config.manifest import Manifest
from common.errors import CoadaptError, MessageError, OutOfTurn, SecureSumError, SurvivorsRefused
from common.factors import newest
from common.messages import Envelope, Evaluate, Evaluated, Project, Projected, RoundDone, RoundStart
from common.randomness import seeded
from common.secure_sum.config import Agreed, SumPolicy
from common.secure_sum.messages import RoundStart as SumStart
from common.secure_sum.site import Site, SiteRound
from common.secure_sum.state import MemoryStore
from common.summed import Request, agreed, extras, sum_number, weighted

__all__ = ["SecureSite", "sum_policy"]


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
    """One institution under one manifest. `store` keeps what must outlive a restart; one attempt goes on at a time."""

    def __init__(self, site: Site, store: MemoryStore, manifest: Manifest) -> None:
        self._site, self._store, self._manifest = site, store, manifest
        self._round: SiteRound | None = None
        self._request: Request | None = None
        self._agreed: Agreed | None = None
        self._accepted = self._records = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._of_round: tuple[int, tuple[int, ...]] = (
            0,
            (),
        )  # the last round whose first sum was opened, and its sites

    def start(self, request: Envelope) -> bytes:
        """Take part in the sum of a request.

        Raises:
            SecureSumError: the request is replayed, looser than this site's policy, or not signed by the coordinator.
            MessageError: it asks for no sum, or for another than the manifest's.
        """
        header = request.header
        if not isinstance(header, RoundStart | Project | Evaluate) or not header.secure_sum:
            raise MessageError(
                "the coordinator asks for a change that is not masked; this site sends masked ones alone"
            )
        self._round = None
        site, data = self._site, bytes.fromhex(header.secure_sum)
        message = site.read(data)
        if not isinstance(message.body, SumStart) or message.turn.round != sum_number(header):
            raise OutOfTurn("the secure sum that was sent along is not that of the request")
        invited = message.body.invited
        if isinstance(header, Project):
            if self._of_round != (header.round, invited):
                raise SurvivorsRefused("a second sum must be over the very sites of the round's first one")
            site = replace(site, policy=replace(site.policy, min_sites=len(invited)))
        if isinstance(header, RoundStart):
            self._accepted = header.accepted
            adapter = newest(request.tensors, self._manifest.adapter.rank)
            self._shapes = {name: array.shape for name, array in adapter.items()}
        what = agreed(self._manifest, request, self._shapes, accepted=self._accepted, sites=len(invited))
        attempt = SiteRound(site, self._store)
        answer = attempt.start(what, data)
        self._round, self._request, self._agreed = attempt, header, what
        return answer

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
        if isinstance(header, RoundDone):
            self._records = header.records
        body = encode_body(
            weighted(self._manifest, reply.tensors, self._records),
            extras(self._manifest, request, header, self._records),
            what.spec,
            source=self._rounding(request),
        )
        return attempt.release(body)

    def _rounding(self, request: Request) -> ByteSource | None:
        """Where rounding draws from: with privacy the operating system. Without, the agreed seed, so that a run can be
        repeated bit for bit: masks hide the vector, and its rounding need not."""
        private, training = self._manifest.privacy, self._manifest.training
        seed = training.seed if private is None else private.unsafe_seed
        if seed is None:
            return None
        return seeded(seed, "rounding", self._site.number, sum_number(request)).bytes

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
