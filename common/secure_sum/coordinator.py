"""The coordinator's side of one attempt: messages in, the next message for each site out, at the end the sum.

It has no network and no clock. The caller hands in what a site's channel brought (`receive`), asks whether a phase
may end (`ready`: everybody answered; `enough`: it could), ends it (`advance`), and opens the sum (`open_sum`). A bad
message leaves its site out, with the reason in the record; a vector that comes late is thrown away unread.

Vectors are added up as they come, so memory is one vector, and no single one is kept.
"""

import enum
import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.codec.packing import Words, aligned_words
from common.errors import (
    KeyRefused,
    MalformedMessage,
    OutOfTurn,
    SecureSumError,
    ShareRefused,
    SurvivorsRefused,
    TooFewSites,
    VectorRefused,
    WrongContext,
)
from common.identity import Identity
from common.ledger_statement import LedgerStatement
from common.roster import Roster
from common.secure_sum import derivations, graph
from common.secure_sum.config import RoundConfig, round_context
from common.secure_sum.masks import Mask, apply_masks
from common.secure_sum.messages import (
    COORDINATOR,
    MOST_BYTES,
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
from common.secure_sum.opening import open_secret
from common.secure_sum.primitives import loaded, new_private_key, public_key, shared_secret
from common.secure_sum.witness import require_statements

__all__ = ["CoordinatorRound", "Opened", "Stage", "SumRecord"]


class Stage(enum.StrEnum):
    """What the coordinator collects."""

    ADVERTISE = "advertise"
    SHARES = "shares"
    MASKED = "masked"
    CONFIRM = "confirm"
    REVEAL = "reveal"


_ORDER = tuple(Stage)
_EXPECTED: dict[Stage, type[Body]] = {
    Stage.ADVERTISE: Advertise,
    Stage.SHARES: Shares,
    Stage.MASKED: Masked,
    Stage.CONFIRM: Confirm,
    Stage.REVEAL: Reveal,
}
_STAGE_OF = {kind: stage for stage, kind in _EXPECTED.items()}


@dataclass(frozen=True)
class SumRecord:
    """What may be kept of an attempt; nothing in it is secret."""

    turn: Turn
    survivors: tuple[int, ...]
    """Sites whose vectors are in the sum."""
    dropped: Mapping[int, str]
    """Every other invited site and a fixed word for the reason."""
    faults: Mapping[int, str]
    """Survivors that did something wrong afterwards, such as revealing a wrong share."""
    transcript: bytes
    """SHA-256 over the signatures of all messages that were sent and accepted, in order."""
    list_hash: bytes
    """What the survivors confirmed."""
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class Opened:
    """The sum in words, checksums not yet verified (`codec/vector.decode_words` does), and the record."""

    words: Words
    count: int
    context: bytes
    record: SumRecord


@dataclass
class _Books:
    """Counts and reasons, for the record."""

    dropped: dict[int, str] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    transcript: Any = field(default_factory=hashlib.sha256)
    bytes_in: int = 0
    bytes_out: int = 0


class CoordinatorRound:
    """One attempt. `start` gives the first messages; every method that breaks a rule raises a SecureSumError."""

    def __init__(
        self,
        identity: Identity,
        roster: Roster,
        config: RoundConfig,
        *,
        invited: Sequence[int],
        round_number: int,
        attempt: int,
        model_hash: bytes,
    ) -> None:
        self.turn = Turn(roster.federation, roster.epoch, round_number, attempt)
        self.stage = Stage.ADVERTISE
        self.context = round_context(
            roster, round_number=round_number, attempt=attempt, model_hash=model_hash, config=config
        )
        self._identity, self._roster, self._config = identity, roster, config
        self._invited = tuple(sorted(invited))
        self._model_hash = model_hash
        self._answers: dict[Stage, dict[int, Message]] = {stage: {} for stage in Stage}
        self._neighbours: dict[int, tuple[int, ...]] = {}
        self._keys_hash = self._peers_hash = self._list_hash = b""
        self._vector_hashes: dict[int, bytes] = {}
        self._sum: Words = np.zeros(0, np.uint64)
        self._books = _Books()

    def start(self) -> dict[int, bytes]:
        """RoundStart for every invited site."""
        body = RoundStart(self._model_hash, self._invited, self._config.canonical())
        return self._broadcast(self._invited, body)

    @property
    def expected(self) -> tuple[int, ...]:
        """The sites that may answer in this stage, in order."""
        place = _ORDER.index(self.stage)
        if self.stage is Stage.ADVERTISE:
            return tuple(site for site in self._invited if site not in self._books.dropped)
        before = self._answers[_ORDER[place - 1]]
        return tuple(site for site in sorted(before) if site not in self._books.dropped)

    @property
    def answered(self) -> tuple[int, ...]:
        """The sites that have answered in this stage."""
        return tuple(sorted(self._answers[self.stage]))

    @property
    def threshold(self) -> int:
        """So many sites must confirm one list of survivors."""
        return self._config.threshold

    @property
    def given(self) -> tuple[int, ...]:
        """The sites whose vectors have come."""
        return tuple(sorted(self._answers[Stage.MASKED]))

    @property
    def ready(self) -> bool:
        """Everybody who may answer has, and they are enough."""
        return self.enough and set(self.answered) >= set(self.expected) - self._books.faults.keys()

    @property
    def enough(self) -> bool:
        """So many have answered that the stage can end."""
        count = len(self._answers[self.stage])
        if self.stage is Stage.CONFIRM:
            return count >= self._config.threshold
        if self.stage is Stage.REVEAL:
            return all(
                sum(holder in self._answers[Stage.REVEAL] for holder in self._holders(site))
                >= self._config.share_threshold
                for site in self._answers[Stage.SHARES]
                if site in self._vector_hashes or set(self._neighbours[site]) & self._vector_hashes.keys()
            )
        return count >= self._config.least_survivors

    def receive(self, site: int, data: bytes) -> None:
        """Take in what the channel of `site` brought.

        Raises:
            SecureSumError: it is refused; before the vectors are complete its site is then left out, and the record
                says why.
        """
        try:
            message = self._read(site, data)
            self._accept(site, message)
        except OutOfTurn:
            raise
        except SecureSumError as error:
            self._blame(site, error.code)
            raise
        self._books.bytes_in += len(data)
        self._books.transcript.update(message.signature)

    def advance(self) -> dict[int, bytes]:
        """End the stage: the next message for each site that goes on.

        Raises:
            TooFewSites: too few have answered; the attempt is dead unless more do.
        """
        if self.stage is Stage.REVEAL:
            raise OutOfTurn("after the shares there is nothing more to send; open the sum")
        if not self.enough:
            raise TooFewSites(
                f"{len(self.answered)} sites answered in {self.stage}, too few for the round's thresholds"
            )
        if self.stage is not Stage.CONFIRM:
            for site in self.expected:
                if site not in self._answers[self.stage]:
                    self._books.dropped[site] = f"silent:{self.stage}"
        answers = self._answers[self.stage]
        out = {
            Stage.ADVERTISE: self._send_keys,
            Stage.SHARES: self._send_shares,
            Stage.MASKED: self._send_survivors,
            Stage.CONFIRM: self._send_confirmations,
        }[self.stage](answers)
        self.stage = _ORDER[_ORDER.index(self.stage) + 1]
        return out

    def open_sum(self) -> Opened:
        """The sum over the survivors.

        Every secret is verified against what its site signed. A share that disagrees is named in the record.

        Raises:
            TooFewSites: too few shares have come.
            ShareRefused: a secret does not open with any set of shares; more shares may help.
        """
        if self.stage is not Stage.REVEAL or not self.enough:
            raise TooFewSites("too few sites have revealed shares to open the sum")
        keys = {site: message.body for site, message in self._answers[Stage.ADVERTISE].items()}
        survivors = sorted(self._vector_hashes)
        masks: list[Mask] = []
        for site in survivors:
            seed = self._secret(site, Revealed.SEED, keys[site])
            masks.append((derivations.self_mask_key(seed, self._keys_hash, site), -1))
        for lost in sorted(self._answers[Stage.SHARES].keys() - self._vector_hashes.keys()):
            around = [site for site in self._neighbours[lost] if site in self._vector_hashes]
            if around:
                private = loaded(self._secret(lost, Revealed.KEY, keys[lost]))
                for site in around:
                    key = derivations.pair_mask_key(private, keys[site].masking_key, self._keys_hash, site, lost)
                    masks.append((key, -1 if site < lost else 1))
        words = aligned_words(len(self._sum))
        words[:] = self._sum
        apply_masks(words, masks)
        return Opened(words, len(survivors), self.context, self.record())

    def record(self) -> SumRecord:
        """What may be kept, also of an attempt that failed."""
        survivors = tuple(sorted(self._vector_hashes))
        return SumRecord(
            turn=self.turn,
            survivors=survivors,
            dropped={site: word for site, word in sorted(self._books.dropped.items()) if site not in survivors},
            faults=dict(sorted(self._books.faults.items())),
            transcript=self._books.transcript.digest(),
            list_hash=self._list_hash,
            bytes_in=self._books.bytes_in,
            bytes_out=self._books.bytes_out,
        )

    def _read(self, site: int, data: bytes) -> Message:
        def key_of(sender: int) -> bytes:
            if sender != site:
                raise WrongContext(f"site {site} sent a message that says it is of {sender}")
            return self._roster.public_key_of(site)

        if site not in self._invited:
            raise OutOfTurn(f"site {site} is not invited")
        message = read(data, key_of, most_bytes=max(MOST_BYTES, 8 * self._config.words + 1024))
        if message.turn != self.turn:
            raise WrongContext(f"site {site} answered another round or attempt")
        return message

    def _accept(self, site: int, message: Message) -> None:
        body = message.body
        if isinstance(body, Refuse | Complaint):
            word = f"refused:{body.code}" if isinstance(body, Refuse) else f"complaint:{body.about}"
            if site not in self.expected or site in self._answers[self.stage]:
                raise OutOfTurn(f"site {site} refuses after it answered")
            self._blame(site, word)
            return
        stage = _STAGE_OF.get(type(body))
        if stage is None:
            raise MalformedMessage(f"site {site} sent a message that only a coordinator sends")
        if stage is not self.stage:
            if stage is Stage.MASKED and site in self._answers[Stage.SHARES] and site not in self._vector_hashes:
                self._books.dropped[site] = "late"
            raise OutOfTurn(f"site {site} sent {stage} while the coordinator collects {self.stage}")
        if site not in self.expected or site in self._answers[stage]:
            raise OutOfTurn(f"site {site} sent {stage} twice or without what goes before it")
        checks: dict[Stage, Callable[[int, Any], None]] = {
            Stage.ADVERTISE: self._accept_keys,
            Stage.SHARES: self._accept_shares,
            Stage.MASKED: self._accept_vector,
            Stage.CONFIRM: self._accept_confirmation,
            Stage.REVEAL: self._accept_shares_revealed,
        }
        checks[stage](site, body)
        if isinstance(body, Masked):  # the vector is in the sum, and only there
            message = Message(message.turn, site, Masked(body.peers_hash, body.vector_hash, body.commitment, b""), b"")
            self._answers[stage][site] = message
            return
        self._answers[stage][site] = message

    def _accept_keys(self, site: int, body: Advertise) -> None:
        if body.context != self.context:
            raise WrongContext(f"site {site} knows another adapter, configuration or roster")
        require_statements(body, site, self._roster)  # every other site would refuse a false one
        every = {
            key
            for message in self._answers[Stage.ADVERTISE].values()
            for key in (message.body.sealing_key, message.body.masking_key)
        }
        if body.sealing_key == body.masking_key or {body.sealing_key, body.masking_key} & every:
            raise KeyRefused(f"a one-time key of site {site} is there already")
        for key in (body.sealing_key, body.masking_key):  # one of low order would make every other site refuse
            shared_secret(new_private_key(), key)

    def _accept_shares(self, site: int, body: Shares) -> None:
        if body.keys_hash != self._keys_hash:
            raise WrongContext(f"site {site} saw another list of keys")
        if set(body.sealed) != set(self._neighbours[site]):
            raise ShareRefused(f"site {site} sent shares for others than its neighbours", (site,))

    def _accept_vector(self, site: int, body: Masked) -> None:
        if body.peers_hash != self._peers_hash:
            raise WrongContext(f"site {site} saw other peers")
        if len(body.vector) != 8 * self._config.words:
            raise VectorRefused(f"site {site} sent {len(body.vector)} bytes and {8 * self._config.words} were agreed")
        if derivations.hash_vector(body.vector) != body.vector_hash:
            raise VectorRefused(f"site {site} sent a vector with another hash than it says")
        vector = np.frombuffer(body.vector, "<u8")
        np.add(self._sum, vector, out=self._sum)

    def _accept_confirmation(self, site: int, body: Confirm) -> None:
        if body.list_hash != self._list_hash:
            raise SurvivorsRefused(f"site {site} confirmed another list of survivors")
        if body.ledger:
            LedgerStatement.verified(body.ledger, self._roster, site)

    def _accept_shares_revealed(self, site: int, body: Reveal) -> None:
        if body.list_hash != self._list_hash:
            raise SurvivorsRefused(f"site {site} reveals for another list of survivors")
        due = {
            peer: Revealed.SEED if peer in self._vector_hashes else Revealed.KEY
            for peer in (*self._neighbours[site], site)
            if peer in self._answers[Stage.SHARES]
        }
        if {peer: which for peer, (which, _) in body.shares.items()} != due:
            raise ShareRefused(f"site {site} reveals other shares than are due", (site,))

    def _send_keys(self, answers: Mapping[int, Message]) -> dict[int, bytes]:
        sites = sorted(answers)
        advertised = tuple(answers[site].raw for site in sites)
        self._keys_hash = derivations.hash_keys(self.context, advertised)
        self._neighbours = graph.neighbours(self._keys_hash, sites, self._config.degree)
        return self._broadcast(sites, KeyList(advertised))

    def _send_shares(self, answers: Mapping[int, Message]) -> dict[int, bytes]:
        peers = tuple(sorted(answers))
        self._peers_hash = derivations.hash_peers(self._keys_hash, peers)
        self._sum = np.zeros(self._config.words, np.uint64)
        out: dict[int, bytes] = {}
        for site in peers:
            senders = (peer for peer in self._neighbours[site] if peer in answers)
            out |= self._broadcast(
                [site], ShareForward(peers, {peer: answers[peer].body.sealed[site] for peer in senders})
            )
        return out

    def _send_survivors(self, answers: Mapping[int, Message]) -> dict[int, bytes]:
        self._vector_hashes = {site: message.body.vector_hash for site, message in sorted(answers.items())}
        self._list_hash = derivations.hash_survivors(self._peers_hash, self._vector_hashes)
        return self._broadcast(sorted(answers), Survivors(self._peers_hash, self._vector_hashes))

    def _send_confirmations(self, answers: Mapping[int, Message]) -> dict[int, bytes]:
        body = ConfirmList(tuple(answers[site].raw for site in sorted(answers)))
        return self._broadcast(sorted(answers), body)

    def _secret(self, site: int, which: Revealed, keys: Advertise) -> bytes:
        """A survivor's seed or a lost site's masking key, verified."""

        def verify(secret: bytes) -> bool:
            if which is Revealed.KEY:
                return hmac.compare_digest(public_key(secret), keys.masking_key)
            return hmac.compare_digest(derivations.seed_commitment(self.context, site, secret), keys.seed_commitment)

        revealed = self._answers[Stage.REVEAL]
        shares = {holder: revealed[holder].body.shares[site][1] for holder in self._holders(site) if holder in revealed}
        secret, liars = open_secret(
            shares,
            self._config.share_threshold,
            verify,
            colluding=self._config.max_colluding,
            suspects=self._books.faults.keys(),
        )
        for liar in liars:
            self._books.faults[liar] = "share"
        if secret is None:
            raise ShareRefused(
                f"the shares of site {site} do not open what it signed; ask more sites for theirs", (site,)
            )
        return secret

    def _holders(self, site: int) -> tuple[int, ...]:
        return tuple(sorted({*self._neighbours[site], site}))

    def _blame(self, site: int, word: str) -> None:
        if site not in self._invited:
            return
        if site in self._answers[Stage.MASKED]:
            self._books.faults.setdefault(site, word)
        else:
            self._books.dropped.setdefault(site, word)
            self._answers[self.stage].pop(site, None)

    def _broadcast(self, sites: Sequence[int], body: Body) -> dict[int, bytes]:
        data = encode(self._identity, self.turn, COORDINATOR, body)
        self._books.transcript.update(data[-64:])
        self._books.bytes_out += len(data) * len(sites)
        return dict.fromkeys(sites, data)
