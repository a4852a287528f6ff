"""`coadapt site join`: from an invitation to an agreement, in two passes, each of which a person decides.

    first     the roster lacks signatures: show who is in and what is asked; sign the roster; remember what was shown
    second    every institution signed: verify all of it against what was remembered; write the agreement

What is remembered (`federation/pending.json`) holds digests of the manifest's text, of the address and of the
certificate: what came first and what comes second must be the same, to the letter.
"""

import datetime
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.admission import breaches
from client.home import Agreement, SiteHome
from client.policy import SitePolicy, load_policy
from client.site_keys import require_private_keys
from common.app_bundle import app_digest
from common.config.loading import load_manifest
from common.config.manifest import Manifest
from common.durable import write_text
from common.enrolment import Consent, Invitation, read_paper
from common.errors import EnrolmentError, PolicyBreach, RosterRefused
from common.identity import Identity
from common.roster import Roster, SignedRoster, verify_roster
from common.tls import read_certificates, split_address

__all__ = ["Offer", "consent", "finish", "read_invitation"]

_DIGEST = r"^[0-9a-f]{64}$"
MOST_PAPER_BYTES = 8 << 20


class Pending(BaseModel):
    """What a person consented to, waiting for the others' signatures."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    federation: str
    epoch: int
    roster_sha256: str = Field(pattern=_DIGEST)
    manifest_text_sha256: str = Field(pattern=_DIGEST)
    address: str
    certificate_sha256: str = Field(pattern=_DIGEST)
    joined: bool = Field(False, description="whether the second pass is done")


@dataclass(frozen=True)
class Offer:
    """An invitation, read and checked as far as it can be before a person decides."""

    invitation: Invitation
    signed: SignedRoster
    manifest: Manifest
    policy: SitePolicy
    identity: Identity
    site: int
    pending: Pending | None

    @property
    def roster(self) -> Roster:
        """The roster, whose signatures are not verified yet."""
        return self.signed.roster

    @property
    def second(self) -> bool:
        """Whether this site's own signature is in it already, so that it is the answer to its consent."""
        return self.site in self.signed.signatures


def read_invitation(home: SiteHome, path: Path) -> Offer:
    """Read an invitation and hold it against policy and keys; nothing is written.

    Raises:
        EnrolmentError: it is none, is signed by another coordinator, does not fit what was consented to, or keys are
            open to others.
        RosterRefused: this institution is not in its roster, or the roster is older than the one in force.
        ManifestError: policy or manifest break a rule.
        PolicyBreach: the manifest asks for more than the policy allows; it names everything.
    """
    require_private_keys(home)
    policy, identity = load_policy(home.policy), home.identity()
    invitation = read_paper(Invitation, _paper(path), source=path.name)
    signed = SignedRoster.from_json(invitation.roster)
    invitation.require(signed.roster.coordinator, signed.roster.digest())
    split_address(invitation.address)
    if invitation.certificate:
        read_certificates(invitation.certificate.encode(), "the invitation's certificate")
    site = signed.roster.site_of(identity.public)
    manifest = _manifest(invitation.manifest)
    pending = _pending(home)
    if pending is not None:
        _require_same(pending, invitation, signed.roster)
    _require_sums(signed.roster, manifest)
    if wrong := breaches(manifest, policy, sites=len(signed.roster.institutions)):
        raise PolicyBreach(f"the manifest asks for more than {home.policy} allows: {'; '.join(wrong)}")
    return Offer(invitation, signed, manifest, policy, identity, site, pending)


def consent(home: SiteHome, offer: Offer, into: Path) -> Path:
    """First pass: sign the roster and remember what was shown; the consent's file is returned.

    Raises:
        RosterRefused: the roster could not be used even with every signature.
    """
    # What `verify_roster` refuses later, with the others' signatures alone missing, is refused before signing.
    _require_usable(offer)
    paper = Consent(
        site=offer.site,
        name=next(entry.name for entry in offer.roster.institutions if entry.site == offer.site),
        roster_sha256=offer.roster.digest().hex(),
        signature=offer.roster.sign(offer.identity).hex(),
    )
    _remember(home, offer, joined=False)
    path = into / f"{offer.policy.name}.consent.json"
    write_text(path, paper.to_json())
    return path


def finish(home: SiteHome, offer: Offer) -> Agreement:
    """Second pass: verify every signature and put down what is agreed.

    Raises:
        EnrolmentError: nobody here consented to it.
        RosterRefused: a signature is missing, foreign or wrong, or the roster is not the one consented to.
    """
    if offer.pending is None:
        raise EnrolmentError(
            "this site has no record of a consent to this roster, though its signature is in it; if the folder was"
            " restored from a backup, ask the coordinator for a new epoch"
        )
    verify_roster(
        offer.signed,
        own_key=offer.identity.public,
        pinned=bytes.fromhex(offer.pending.roster_sha256),
    )
    agreement = Agreement(
        roster_sha256=offer.pending.roster_sha256,
        manifest_sha256=offer.manifest.digest(),
        app_sha256=app_digest(),
        address=offer.invitation.address,
        joined=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    # The agreement comes last: without it nothing is answered, so a crash before leaves the site where it was.
    home.agreement_file.unlink(missing_ok=True)
    write_text(home.roster, offer.signed.to_json() + "\n")
    write_text(home.manifest, offer.invitation.manifest)
    _for_relay(home.certificate, offer.invitation.certificate)
    _for_relay(home.relay / "agreement.json", agreement.model_dump_json(indent=2) + "\n")
    home.agree(agreement)
    _remember(home, offer, joined=True)
    return agreement


def _for_relay(path: Path, text: str) -> None:
    """A file that the relay's group may read: it belongs to the folder's group."""
    write_text(path, text)
    path.chmod(0o640)
    if (group := path.parent.stat().st_gid) != path.stat().st_gid:
        os.chown(path, -1, group)


def _remember(home: SiteHome, offer: Offer, *, joined: bool) -> None:
    invitation = offer.invitation
    pending = Pending(
        federation=offer.roster.federation.hex(),
        epoch=offer.roster.epoch,
        roster_sha256=offer.roster.digest().hex(),
        manifest_text_sha256=_sha256(invitation.manifest),
        address=invitation.address,
        certificate_sha256=_sha256(invitation.certificate),
        joined=joined,
    )
    write_text(_pending_file(home), pending.model_dump_json(indent=2) + "\n")


def _require_same(pending: Pending, invitation: Invitation, roster: Roster) -> None:
    """Refuse an invitation that is neither a later epoch's nor, to the letter, the one consented to."""
    same_federation = roster.federation.hex() == pending.federation
    if roster.digest().hex() != pending.roster_sha256:
        if same_federation and roster.epoch <= pending.epoch:
            raise RosterRefused(
                f"the roster is of epoch {roster.epoch}, and this site consented to another one of epoch"
                f" {pending.epoch}; a changed roster needs a later epoch"
            )
        return
    changed = [
        what
        for what, before, now in (
            ("manifest", pending.manifest_text_sha256, _sha256(invitation.manifest)),
            ("address", pending.address, invitation.address),
            ("certificate", pending.certificate_sha256, _sha256(invitation.certificate)),
        )
        if before != now
    ]
    if changed:
        raise EnrolmentError(
            f"the invitation's {' and '.join(changed)} changed since this site consented to it; nothing was accepted:"
            " ask the coordinator for a new epoch and consent to that"
        )


def _require_sums(roster: Roster, manifest: Manifest) -> None:
    section = manifest.secure_sum
    for what, in_roster, in_manifest in (
        ("min_sites", roster.min_sites, section.min_sites),
        ("max_colluding", roster.max_colluding, section.max_colluding),
    ):
        if in_roster != in_manifest:
            raise EnrolmentError(
                f"the roster says {what} = {in_roster}, the manifest secure_sum.{what} = {in_manifest}; they must"
                " agree: ask the coordinator for a new invitation"
            )


def _require_usable(offer: Offer) -> None:
    """The roster's form, by a copy of it that has our signature alone: what is missing are the others'."""
    roster, site = offer.roster, offer.site
    try:
        verify_roster(
            SignedRoster(roster=roster, signatures={site: roster.sign(offer.identity)}),
            own_key=offer.identity.public,
            pinned=roster.digest(),
        )
    except RosterRefused as error:
        if "has not signed" not in str(error):
            raise


def _manifest(text: str) -> Manifest:
    """The manifest of an invitation, read as every file is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "federation.toml"
        path.write_text(text, encoding="utf-8", newline="")
        manifest = load_manifest(path)
    if manifest.model.weights_sha256 is None or manifest.model.tokenizer_sha256 is None:
        raise EnrolmentError("the invitation's manifest does not pin its base model by digest; ask for one that does")
    if manifest.evaluation.public is not None and manifest.evaluation.public_sha256 is None:
        raise EnrolmentError(
            "the invitation's manifest does not pin evaluation.public by evaluation.public_sha256, so the coordinator"
            " could choose other records to judge by; ask for one that does"
        )
    return manifest


def _pending_file(home: SiteHome) -> Path:
    return home.federation / "pending.json"


def _pending(home: SiteHome) -> Pending | None:
    path = _pending_file(home)
    try:
        return Pending.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise EnrolmentError(f"{path} is damaged: it says what this site consented to; restore it") from error


def _paper(path: Path) -> bytes:
    try:
        if path.stat().st_size > MOST_PAPER_BYTES:
            raise EnrolmentError(f"{path} is larger than an invitation can be")
        return path.read_bytes()
    except OSError as error:
        raise EnrolmentError(f"{path} cannot be read: {error.strerror}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
