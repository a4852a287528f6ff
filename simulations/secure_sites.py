"""The simulated sites' side of secure sums: every site's own keys and state machine, between coordinator and workers.

The machines are those of the field, and what they hand to the coordinator's is all that it learns. They run in this
process, since one machine plays everybody: a worker trains as one site and then as another, and what it made of a
request is masked here. A researcher may look at each simulated site (`seen`); a coordinator in the field may not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from client.secure_site import SecureSite, sum_policy
from common.config.manifest import Manifest
from common.errors import CoadaptError, MessageError, PolicyRefused, SecureSumError
from common.identity import Identity
from common.messages import Envelope, Evaluated, Refused, RoundDone, decode
from common.metrics import Counts
from common.progress import EventSink, SiteFinished
from common.randomness import seeded, system_bytes
from common.roster import FEDERATION_BYTES, Institution, Roster, SignedRoster, verify_roster
from common.secure_sum.messages import VERSION
from common.secure_sum.primitives import KEY_BYTES
from common.secure_sum.site import Site
from common.secure_sum.state import SiteMemory
from common.secure_sum.thresholds import threshold
from server.channel import Channel, Reply
from server.coordinator import SiteAnswer, StoredRound
from server.participants import require_participants

__all__ = ["Consortium", "SecureSites", "found_consortium", "require_crowd"]


@dataclass(frozen=True)
class Consortium:
    """Simulated institutions that signed one roster, and their coordinator's key."""

    coordinator: Identity
    roster: Roster
    sites: Mapping[str, SecureSite]


class _Memory:
    """A site's memory for one run; in the field it lies on a disk."""

    def __init__(self, federation: bytes) -> None:
        self._memory = SiteMemory(federation)

    def load(self) -> SiteMemory:
        return self._memory

    def save(self, memory: SiteMemory) -> None:
        self._memory = memory


def found_consortium(manifest: Manifest, names: Sequence[str]) -> Consortium:
    """Keys for the coordinator and every site, and a roster that each site has signed and verified.

    Raises:
        RosterRefused: so few sites cannot form a sum.
    """
    section, coordinator = manifest.secure_sum, Identity.generate()
    keys = {name: Identity.generate() for name in names}
    roster = Roster(
        federation=system_bytes(FEDERATION_BYTES),
        epoch=1,
        coordinator=coordinator.public,
        min_sites=section.min_sites,
        max_colluding=section.max_colluding,
        institutions=tuple(
            Institution(site=number, name=name, public=key.public) for number, (name, key) in enumerate(keys.items())
        ),
    )
    signed = SignedRoster(
        roster=roster, signatures={number: roster.sign(key) for number, key in enumerate(keys.values())}
    )
    # Every site would find the same, so one looks: a thousand sites would check a million signatures.
    two = section.unsafe_two_sites
    verified = verify_roster(signed, own_key=coordinator.public, pinned=roster.digest(), unsafe_two_sites=two)
    policy = sum_policy(manifest)
    sites = {
        name: SecureSite(
            Site(key, verified, policy), _Memory(roster.federation), manifest, rounding=_rounding(manifest, number)
        )
        for number, (name, key) in enumerate(keys.items())
    }
    return Consortium(coordinator, verified, sites)


def _rounding(manifest: Manifest, site: int) -> bytes | None:
    """A simulated site's rounding key. It follows from the seed, so that a simulation can be repeated; in the field
    nobody but the site may know it. With privacy there is none, unless the noise itself is repeatable."""
    private = manifest.privacy
    seed = manifest.training.seed if private is None else private.unsafe_seed
    return None if seed is None else seeded(seed, "rounding", site).bytes(KEY_BYTES)


def require_crowd(manifest: Manifest, sites: int) -> None:
    """Refuse a federation that is too small for its secure sum, before anything begins.

    Raises:
        ManifestError: a round would invite more sites than there are, or too few.
        PolicyRefused: it is.
    """
    require_participants(manifest, sites)
    sites, section = manifest.training.invited(sites), manifest.secure_sum
    if not section.enabled:
        return
    least = section.min_sites
    if sites >= least:
        threshold(sites, section.max_colluding)
    else:
        raise PolicyRefused(
            f"a secure sum needs secure_sum.min_sites = {least} sites or more, found {sites}: among fewer the sum tells"
            " too much about each; let more join, or set secure_sum.enabled = false, with which the coordinator sees"
            " every site's change"
        )


class SecureSites:
    """A channel on which sites answer requests with keys at first, and are sent to train when their vector is due.

    `seen` is what the simulated sites know of themselves, by round: loss, seconds, and counts of what they measured.
    """

    def __init__(self, inner: Channel, sites: Mapping[str, SecureSite], report: EventSink) -> None:
        self._inner, self.sites, self._report = inner, dict(sites), report
        self._asked: dict[str, bytes] = {}
        self._kind = ""
        self.seen: dict[int, dict[str, RoundDone]] = {}
        self.counts: dict[int, dict[str, Counts]] = {}

    def as_seen(self, rounds: Sequence[StoredRound]) -> list[StoredRound]:
        """The coordinator's rounds with what only the sites know of themselves."""
        return [
            replace(
                done,
                answers=[self._as_seen(done.number, answer) for answer in done.answers],
                counts=dict(self.counts.get(done.number, done.counts)),
            )
            for done in rounds
        ]

    def _as_seen(self, number: int, answer: SiteAnswer) -> SiteAnswer:
        own = self.seen[number][answer.site]
        return replace(answer, records=own.records, examples=own.examples, loss=own.loss, seconds=own.seconds)

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        """See `Channel`."""
        due: dict[str, bytes] = {}
        if any(data[:1] != bytes([VERSION]) for data in requests.values()):
            self._asked.clear()  # else a site that is not invited again would hold an old round's adapter for ever
        for name, data in requests.items():
            if data[:1] != bytes([VERSION]):
                yield self._begun(name, data, kind)
                continue
            try:
                answer = self.sites[name].receive(data)
            except CoadaptError as error:
                yield self._refused(name, len(data), error)
                continue
            if answer is None:
                due[name] = self._asked[name]
            else:
                yield Reply(name, None, "", len(answer), len(data), answer)
        for reply in self._inner.exchange(due, kind=self._kind):
            yield self._masked(reply, len(requests[reply.site]))

    def _begun(self, name: str, data: bytes, kind: str) -> Reply:
        try:
            answer = self.sites[name].start(decode(data))
        except CoadaptError as error:  # no attempt has begun, so there is nothing to sign in its name
            return Reply(name, None, error.code, 0, len(data))
        self._asked[name], self._kind = data, kind
        return Reply(name, None, "", len(answer), len(data), answer)

    def _masked(self, reply: Reply, bytes_down: int) -> Reply:
        site, envelope = self.sites[reply.site], reply.envelope
        try:
            if envelope is None:
                raise _Declined(reply.code or MessageError.code)
            if isinstance(envelope.header, Refused):
                raise _Declined(envelope.header.code)
            answer = site.give(envelope)
        except CoadaptError as error:
            return self._refused(reply.site, bytes_down, error)
        self._look(reply, envelope, len(answer), bytes_down)
        return Reply(reply.site, None, "", len(answer), bytes_down, answer)

    def _refused(self, name: str, bytes_down: int, error: CoadaptError) -> Reply:
        try:
            answer = self.sites[name].refuse(error)
        except SecureSumError:  # no attempt has begun, so there is nothing to sign in its name
            return Reply(name, None, error.code, 0, bytes_down)
        return Reply(name, None, "", len(answer), bytes_down, answer)

    def _look(self, reply: Reply, envelope: Envelope, bytes_up: int, bytes_down: int) -> None:
        header = envelope.header
        if isinstance(header, RoundDone):
            self.seen.setdefault(header.round, {})[reply.site] = header
            self._measured(header.round - 1, reply.site, header.counts)
            self._report(
                SiteFinished(
                    round=header.round,
                    site=reply.site,
                    train_loss=header.loss,
                    examples=header.examples,
                    seconds=header.seconds,
                    bytes_up=bytes_up,
                    bytes_down=bytes_down,
                )
            )
        elif isinstance(header, Evaluated):
            self._measured(header.round, reply.site, header.counts)

    def _measured(self, number: int, site: str, counts: Counts) -> None:
        if counts:  # else it measured nothing, and what the coordinator measured on public records stands
            self.counts.setdefault(number, {})[site] = counts


class _Declined(CoadaptError):
    """A worker could not answer; its fixed word is passed on."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code
