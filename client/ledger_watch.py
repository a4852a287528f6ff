"""What others have seen of a site's ledger, and what the site has seen of theirs: how a restored copy shows.

Ledger ends travel as signed statements (`common/ledger_statement.py`). The coordinator hands back this site's newest
with each order, its peers do in secure sums. One is believed if this site signed it, or this very ledger sealed it for
an earlier key of the institution. A false one is refused and changes nothing: nobody can stop a site by inventing an
end. A true one of which the ledger knows nothing stops the site, until the newest copy is back.

    .ledgers-FEDERATION.json    beside the runs: the newest end that came back, and the peers' newest statements
"""

import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.ledger import Ledger
from common.durable import write_bytes
from common.errors import MalformedMessage, RunError, SignatureRefused, SnapshotRefused, WrongContext
from common.identity import Identity
from common.ledger_statement import LedgerStatement
from common.roster import Roster

__all__ = ["LedgerWatch"]


class _End(BaseModel):
    """How many entries there were, and the digest of the last."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    number: int = Field(ge=0)
    digest: str = Field(pattern=r"^([0-9a-f]{64})?$")


class _Known(BaseModel):
    """`own` came back from others, `peers` are statements in hex by site number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    own: _End | None = None
    peers: dict[int, str] = Field(default_factory=dict)


class LedgerWatch:
    """The ledger of a site in one federation, and the others'. It is the `Witness` of its secure sums.

    Every method raises LedgerError where the ledger cannot be read or trusted, RunError where what is known of it and
    of the others cannot be read or written.
    """

    def __init__(self, ledger: Ledger, identity: Identity, roster: Roster, runs: Path) -> None:
        self._ledger, self._identity, self._roster = ledger, identity, roster
        self._number = roster.site_of(identity.public)
        self._file = runs / f".ledgers-{roster.federation.hex()}.json"
        self._known = self._load()

    def says(self) -> bytes:
        """See `Witness`."""
        number, digest = self._ledger.head()
        return LedgerStatement.of(
            self._identity,
            federation=self._roster.federation,
            site=self._number,
            number=number,
            digest=digest,
            seal=self._ledger.seal(self._roster.federation, number, digest),
        ).raw

    def recalls(self, sites: Sequence[int]) -> Mapping[int, bytes]:
        """See `Witness`."""
        return {site: bytes.fromhex(self._known.peers[site]) for site in sites if site in self._known.peers}

    def hears(self, said: Mapping[int, bytes], handed_back: Sequence[bytes]) -> None:
        """See `Witness`; what comes back is not believed for its sender's sake either."""
        peers = dict(self._known.peers)
        for site, data in said.items():
            statement = LedgerStatement.verified(data, self._roster, site)
            if site not in peers or LedgerStatement.parse(bytes.fromhex(peers[site])).number < statement.number:
                peers[site] = statement.raw.hex()
        claims = [self.believed(data) for data in handed_back]
        if peers != self._known.peers:
            self._remember(self._known.model_copy(update={"peers": peers}))
        for claim in claims:
            self.require(claim)

    def believed(self, data: bytes) -> LedgerStatement:
        """A statement of this site's own ledger that somebody hands back.

        Raises:
            MalformedMessage: it is none.
            WrongContext: it is of another federation or site.
            SignatureRefused: this site has not signed it.
        """
        found = LedgerStatement.parse(data)
        if found.federation != self._roster.federation:
            raise WrongContext("a ledger's end of another federation was handed back")
        if found.site == self._number:
            try:
                found.require_signed(self._identity.public)
            except SignatureRefused as error:
                raise SignatureRefused("a ledger's end was handed back that this site has never signed") from error
        else:
            self._require_sealed(found)
        return found

    def require(self, told: LedgerStatement | None) -> None:
        """Refuse everything while the ledger is older than what came back of it, now or ever.

        Raises:
            SnapshotRefused: it is.
        """
        if self._known.own is not None:
            self._ledger.require_at_least(self._known.own.number, self._known.own.digest)
        if told is None:
            return
        end = _End(number=told.number, digest=told.digest)
        try:
            self._ledger.require_at_least(end.number, end.digest)
        except SnapshotRefused:
            self._remember(self._known.model_copy(update={"own": end}))
            raise
        if self._known.own is None or end.number > self._known.own.number:
            self._remember(self._known.model_copy(update={"own": end}))

    def _require_sealed(self, statement: LedgerStatement) -> None:
        """Of another site's number: this institution's own, under an earlier key, if its ledger made the seal."""
        made = self._ledger.seal(self._roster.federation, statement.number, statement.digest)
        if not hmac.compare_digest(made, statement.seal):
            raise WrongContext(f"the end of another ledger was handed back, of site {statement.site}")

    def _load(self) -> _Known:
        try:
            known = _Known.model_validate_json(self._file.read_bytes())
            for site, text in known.peers.items():
                if LedgerStatement.parse(bytes.fromhex(text)).site != site:
                    raise WrongContext("a statement under another site's number")
        except FileNotFoundError:
            return _Known()
        except (OSError, ValueError, ValidationError, MalformedMessage, WrongContext) as error:
            raise RunError(
                f"{self._file} is damaged, so an older copy of the ledger would not show; restore it from a backup"
            ) from error
        return known

    def _remember(self, known: _Known) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(self._file, known.model_dump_json().encode(), private=True)
        self._known = known
