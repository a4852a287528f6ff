"""The site's side of one attempt: functions from state and message to new state and answer. No network, no clock.

    start      RoundStart   -> Advertise        before training
    step       KeyList      -> Shares           while it trains
               ShareForward -> nothing
    release    the vector   -> Masked           when training is over and the shares are there
    step       Survivors    -> Confirm
               ConfirmList  -> Reveal

The site believes the coordinator nothing: what it insists on stands in its roster and its own policy. Of each peer it
reveals one secret or the other, by one list of survivors, which it has seen confirmed by at least t sites; then it
forgets all of them. Where it has a ledger, what its peers hand back of that is heard before any share is sent. Whatever
is wrong raises a SecureSumError (or the witness's own), and then the attempt is over for this site.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from common.codec.packing import Words
from common.codec.vector import CHECKSUM_WORDS, with_checksum
from common.errors import (
    KeyRefused,
    OutOfTurn,
    PolicyRefused,
    SecureSumError,
    ShareRefused,
    SurvivorsRefused,
    TooFewSites,
    VectorRefused,
    WrongContext,
    error_code,
)
from common.identity import Identity
from common.randomness import system_bytes
from common.roster import Roster
from common.secure_sum import derivations, graph
from common.secure_sum.config import Agreed, RoundConfig, SumPolicy, round_context
from common.secure_sum.masks import apply_masks
from common.secure_sum.messages import (
    COORDINATOR,
    Advertise,
    Body,
    Complaint,
    Confirm,
    ConfirmList,
    KeyList,
    Masked,
    Message,
    Refuse,
    Reveal,
    Revealed,
    RoundStart,
    ShareForward,
    Shares,
    Survivors,
    Turn,
    encode,
    read,
)
from common.secure_sum.primitives import KEY_BYTES, Label, digest, loaded, new_private_key, public_key, seal, unseal
from common.secure_sum.shamir import PRIME, SHARE_BYTES, split
from common.secure_sum.state import MemoryStore, PeerKeys, Phase, SiteMemory, SiteState
from common.secure_sum.witness import Witness, witnessed

__all__ = ["Site", "SiteRound", "refuse", "release", "start", "step"]


@dataclass(frozen=True)
class Site:
    """What stays over rounds: the institution's key, the verified roster and the site's policy; where it has a ledger
    also what it tells of that and remembers of others'."""

    identity: Identity
    roster: Roster
    policy: SumPolicy
    witness: Witness | None = None

    @property
    def number(self) -> int:
        """The site's number in the roster."""
        return self.roster.site_of(self.identity.public)

    def signed(self, turn: Turn, body: Body) -> bytes:
        """A message of this site."""
        return encode(self.identity, turn, self.number, body)

    def read(self, data: bytes) -> Message:
        """A message that the coordinator must have signed."""

        def key_of(sender: int) -> bytes:
            if sender != COORDINATOR:
                raise WrongContext("a message to a site that is not the coordinator's")
            return self.roster.coordinator

        return read(data, key_of)

    def require_crowd(self, count: int, least: int) -> None:
        """Refuse fewer sites than the round's and the site's own thresholds.

        Raises:
            TooFewSites: there are fewer.
        """
        least = max(least, self.policy.min_sites, self.policy.least_honest + self.policy.max_colluding)
        if count < least:
            raise TooFewSites(f"{count} sites are left and this site asks for {least}; nothing was revealed")


def start(site: Site, memory: SiteMemory, agreed: Agreed, data: bytes) -> tuple[SiteState, SiteMemory, bytes]:
    """Take part in an attempt: new state, memory to store before anything is sent, and the Advertise message.

    Raises:
        ReplayRefused, RerunRefused: see `SiteMemory.started`.
        WrongContext: another federation, epoch or adapter.
        PolicyRefused: looser than roster or policy, or not what was agreed.
    """
    message = site.read(data)
    body, turn = message.body, message.turn
    if not isinstance(body, RoundStart):
        raise OutOfTurn("a round begins with RoundStart")
    if (turn.federation, turn.epoch) != (site.roster.federation, site.roster.epoch):
        raise WrongContext("a round of another federation or roster; nothing was sent")
    memory = memory.started(turn, noised_at_site=site.policy.noised_at_site)
    config = RoundConfig.parse(body.config)
    known = {entry.site for entry in site.roster.institutions}
    if site.number not in body.invited or not known.issuperset(body.invited) or len(body.invited) != config.sites:
        raise PolicyRefused("the invited sites are not this one and others of the roster, as many as the round says")
    config.require(site.roster, site.policy, agreed)
    if body.model_hash != agreed.model_hash:
        raise WrongContext("the adapter is not the one that the round speaks of; nothing was sent")
    context = round_context(
        site.roster,
        round_number=turn.round,
        attempt=turn.attempt,
        model_hash=body.model_hash,
        config=config,
    )
    sealing, masking, seed = new_private_key(), new_private_key(), system_bytes(KEY_BYTES)
    commitment = derivations.seed_commitment(context, site.number, seed)
    own, seen = b"", dict[int, bytes]()
    if site.witness is not None:
        own, seen = site.witness.says(), dict(site.witness.recalls(witnessed(body.invited, site.number, turn)))
    answer = site.signed(turn, Advertise(context, public_key(sealing), public_key(masking), commitment, own, seen))
    state = SiteState(
        phase=Phase.KEYS,
        turn=turn,
        site=site.number,
        context=context,
        config=config,
        invited=body.invited,
        advertised=answer,
        sealing_key=sealing,
        masking_key=masking,
        seed=seed,
    )
    return state, memory, answer


def step(site: Site, state: SiteState, data: bytes) -> tuple[SiteState, bytes | None]:
    """Take the coordinator's next message: new state, and the answer if there is one.

    Raises:
        OutOfTurn: it is not the message that this state waits for.
        WrongContext: it is of another attempt.
        SecureSumError: it is refused, with the reason.
    """
    message = site.read(data)
    if message.turn != state.turn:
        raise WrongContext("a message of another round or attempt")
    kind, take = _STEPS.get(state.phase, (None, None))
    if kind is None or take is None or not isinstance(message.body, kind):
        raise OutOfTurn(f"a {type(message.body).__name__} while the site waits for {state.phase}")
    return take(site, state, message.body)


def release(site: Site, state: SiteState, memory: SiteMemory, body: Words) -> tuple[SiteState, SiteMemory, bytes]:
    """Mask the encoded vector (without checksums): new state, memory to store before sending, and the Masked message.

    Raises:
        OutOfTurn: the shares of the others have not come, or a vector left already.
        VectorRefused: it has another length.
        RerunRefused: see `SiteMemory.letting_go`.
    """
    if state.phase is not Phase.VECTOR:
        raise OutOfTurn(f"a vector while the site waits for {state.phase}")
    if body.dtype != np.uint64 or body.shape != (state.config.words - CHECKSUM_WORDS,):
        raise VectorRefused(f"a vector must have {state.config.words - CHECKSUM_WORDS} words of 64 bits")
    plain = digest(Label.BODY, np.ascontiguousarray(body, "<u8").data.cast("B"))
    memory = memory.letting_go(state.turn, plain)
    words = with_checksum(body, state.context)
    masks = [(derivations.self_mask_key(state.seed, state.keys_hash, state.site), 1)]
    masks += [(key, 1 if state.site < peer else -1) for peer, key in state.mask_keys if peer in state.peers]
    apply_masks(words, masks)
    vector, salt = words.data.cast("B"), system_bytes(KEY_BYTES)
    commitment = digest(Label.COMMITMENT, state.context, salt, plain)
    vector_hash = derivations.hash_vector(vector)
    after = replace(
        state,
        phase=Phase.SURVIVORS,
        seed=b"",
        mask_keys=(),
        vector_hash=vector_hash,
        salt=salt,
    )
    return after, memory, site.signed(state.turn, Masked(state.peers_hash, vector_hash, commitment, vector))


def refuse(site: Site, turn: Turn, error: SecureSumError, state: SiteState | None = None) -> bytes:
    """What the coordinator is told when an error ended the attempt: a fixed word, or whose shares did not open."""
    if isinstance(error, ShareRefused) and len(error.sites) == 1 and state is not None:
        return site.signed(turn, Complaint(error.sites[0], state.keys_hash))
    return site.signed(turn, Refuse(error_code(error)))


def _take_keys(site: Site, state: SiteState, body: KeyList) -> tuple[SiteState, bytes | None]:
    """Check every one-time key against the roster and seal a share of both secrets for each neighbour."""
    keys = tuple(_checked_key(site, state, raw) for raw in body.advertised)
    sites = [peer.site for peer in keys]
    if sites != sorted(set(sites)):
        raise KeyRefused("the list of keys names a site twice or out of order")
    if state.advertised not in body.advertised:
        raise KeyRefused("the list of keys does not hold this site's own keys as it sent them")
    every = [key for peer in keys for key in (peer.sealing, peer.masking)]
    if len(set(every)) != len(every):
        raise KeyRefused("the list of keys holds a key twice")
    site.require_crowd(len(keys), state.config.least_survivors)
    if site.witness is not None:  # before anything more is sent: an older copy of the ledger shows here
        said = {peer.site: peer.ledger for peer in keys if peer.ledger and peer.site != state.site}
        site.witness.hears(said, [peer.handed_back for peer in keys if peer.handed_back])
    keys_hash = derivations.hash_keys(state.context, body.advertised)
    around = graph.around(keys_hash, sites, state.config.degree, state.site)
    holders = sorted({*around, state.site})
    seeds = split(state.seed, holders, state.config.share_threshold)
    masks = split(state.masking_key, holders, state.config.share_threshold)
    sealed, mask_keys = {}, []
    sealing_key, masking_key = loaded(state.sealing_key), loaded(state.masking_key)
    for peer in keys:
        if peer.site in around:
            mask_keys.append(
                (
                    peer.site,
                    derivations.pair_mask_key(masking_key, peer.masking, keys_hash, state.site, peer.site),
                )
            )
            key = derivations.share_key(sealing_key, peer.sealing, keys_hash, sender=state.site, receiver=peer.site)
            context = derivations.share_context(state.context, sender=state.site, receiver=peer.site)
            sealed[peer.site] = seal(key, derivations.SHARE_NONCE, seeds[peer.site] + masks[peer.site], context)
    after = replace(
        state,
        phase=Phase.SHARES,
        masking_key=b"",
        mask_keys=tuple(mask_keys),
        keys=keys,
        keys_hash=keys_hash,
        neighbours=around,
        shares=((state.site, seeds[state.site], masks[state.site]),),
    )
    return after, site.signed(state.turn, Shares(keys_hash, sealed))


def _checked_key(site: Site, state: SiteState, raw: bytes) -> PeerKeys:
    """One entry of the list of keys: an invited site's own signature, in this attempt, under this context."""
    message = read(raw, site.roster.public_key_of)
    if not isinstance(message.body, Advertise) or message.sender not in state.invited:
        raise KeyRefused("the list of keys holds something else than keys of invited sites")
    if message.turn != state.turn or message.body.context != state.context:
        raise WrongContext(
            f"site {message.sender} was shown another adapter, configuration or roster than this one; nothing was sent"
        )
    body = message.body
    return PeerKeys(message.sender, body.sealing_key, body.masking_key, body.ledger, body.seen.get(state.site, b""))


def _take_shares(site: Site, state: SiteState, body: ShareForward) -> tuple[SiteState, bytes | None]:
    """Open the shares that the neighbours sealed for this site."""
    known = {peer.site: peer for peer in state.keys}
    if state.site not in body.peers or not known.keys() >= set(body.peers):
        raise SurvivorsRefused("the sites that sent shares are not this one and others that sent keys")
    site.require_crowd(len(body.peers), state.config.least_survivors)
    if set(body.sealed) != set(state.neighbours) & set(body.peers):
        raise ShareRefused("the shares are not those of this site's neighbours")
    shares = list(state.shares)
    sealing_key = loaded(state.sealing_key)
    for peer, sealed in body.sealed.items():
        key = derivations.share_key(sealing_key, known[peer].sealing, state.keys_hash, sender=peer, receiver=state.site)
        context = derivations.share_context(state.context, sender=peer, receiver=state.site)
        try:
            both = unseal(key, derivations.SHARE_NONCE, sealed, context)
        except ShareRefused as error:
            raise ShareRefused(f"the shares of site {peer} do not authenticate", (peer,)) from error
        pair = (both[:SHARE_BYTES], both[SHARE_BYTES:])
        if any(int.from_bytes(share, "little") >= PRIME for share in pair):
            raise ShareRefused(f"a share of site {peer} is no field element", (peer,))
        shares.append((peer, *pair))
    peers_hash = derivations.hash_peers(state.keys_hash, body.peers)
    return replace(
        state,
        phase=Phase.VECTOR,
        sealing_key=b"",
        peers=body.peers,
        peers_hash=peers_hash,
        shares=tuple(sorted(shares)),
    ), None


def _take_survivors(site: Site, state: SiteState, body: Survivors) -> tuple[SiteState, bytes | None]:
    """Sign the first list of survivors, if it is one that this site may be part of."""
    survivors = tuple(sorted(body.vector_hashes))
    if body.peers_hash != state.peers_hash or not set(state.peers) >= set(survivors):
        raise SurvivorsRefused("the survivors are not among the sites that sent shares")
    if body.vector_hashes.get(state.site) != state.vector_hash:
        raise SurvivorsRefused("the survivors do not hold this site with the vector that it sent")
    site.require_crowd(len(survivors), state.config.least_survivors)
    if state.config.neighbours:
        ring = graph.draw_ring(state.keys_hash, [peer.site for peer in state.keys], state.config.degree)
        ring.require_connected(set(survivors), state.config.most_gone)
    list_hash = derivations.hash_survivors(state.peers_hash, body.vector_hashes)
    after = replace(state, phase=Phase.CONFIRMATIONS, survivors=survivors, list_hash=list_hash)
    own = b"" if site.witness is None else site.witness.says()
    return after, site.signed(state.turn, Confirm(list_hash, own))


def _take_confirmations(site: Site, state: SiteState, body: ConfirmList) -> tuple[SiteState, bytes | None]:
    """Reveal one share of each neighbour, once at least t sites have signed the same list."""
    confirmed, said = set(), dict[int, bytes]()
    for raw in body.confirmed:
        message = read(raw, site.roster.public_key_of)
        if not isinstance(message.body, Confirm) or message.turn != state.turn:
            raise WrongContext("the confirmations hold something else than confirmations of this attempt")
        if message.body.list_hash != state.list_hash:
            raise SurvivorsRefused(
                f"site {message.sender} was shown another list of survivors; nothing was revealed", raw
            )
        if message.sender not in state.survivors or message.sender in confirmed:
            raise SurvivorsRefused("a confirmation is there twice or of a site that is no survivor")
        confirmed.add(message.sender)
        if message.body.ledger and message.sender != state.site:
            said[message.sender] = message.body.ledger
    if len(confirmed) < state.config.threshold:
        raise TooFewSites(
            f"{len(confirmed)} sites confirmed the survivors and {state.config.threshold} must; nothing was revealed"
        )
    if site.witness is not None:
        site.witness.hears(said, [])
    shares = {
        peer: (Revealed.SEED, seed) if peer in state.survivors else (Revealed.KEY, masking)
        for peer, seed, masking in state.shares
    }
    return state.over(), site.signed(state.turn, Reveal(state.list_hash, shares))


_STEPS: dict[Phase, tuple[type[Body], Callable[..., tuple[SiteState, bytes | None]]]] = {
    Phase.KEYS: (KeyList, _take_keys),
    Phase.SHARES: (ShareForward, _take_shares),
    Phase.SURVIVORS: (Survivors, _take_survivors),
    Phase.CONFIRMATIONS: (ConfirmList, _take_confirmations),
}


class SiteRound:
    """One site in one attempt, holding its state: each state answers once, and an error ends the attempt.

    The store is one for all attempts of a site. What it is given lies on the disk before an answer is given out.
    """

    def __init__(self, site: Site, store: MemoryStore) -> None:
        self.site = site
        self.state: SiteState | None = None
        self._store = store

    def start(self, agreed: Agreed, data: bytes) -> bytes:
        """See `start`."""
        if self.state is not None:
            raise OutOfTurn("this attempt has begun already")
        state, memory, answer = start(self.site, self._store.load(), agreed, data)
        self._store.save(memory)
        self.state = state
        return answer

    def receive(self, data: bytes) -> bytes | None:
        """See `step`."""
        after, answer = step(self.site, self._taken(), data)
        self.state = after
        return answer

    def release(self, body: Words) -> bytes:
        """See `release`."""
        after, memory, answer = release(self.site, self._taken(), self._store.load(), body)
        self._store.save(memory)
        self.state = after
        return answer

    def refuse(self, error: SecureSumError) -> bytes:
        """What to tell the coordinator after an error. An attempt that never began is refused with `refuse`."""
        if self.state is None:
            raise OutOfTurn("this attempt has not begun")
        return refuse(self.site, self.state.turn, error, self.state)

    def _taken(self) -> SiteState:
        """The state, which is over unless the caller puts the next one in its place."""
        if self.state is None:
            raise OutOfTurn("this attempt has not begun")
        state, self.state = self.state, self.state.over()
        return state
