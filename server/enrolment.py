"""The coordinator's papers: who is admitted, the roster they sign, and the invitation that carries it.

An institution's number in the roster is its own for ever: it keeps it over epochs, and nobody else ever gets it.
"""

from collections.abc import Iterable
from pathlib import Path

from common.config.annotate import annotated
from common.config.loading import load_manifest
from common.config.manifest import Manifest
from common.durable import write_text
from common.enrolment import Consent, Enrolment, Invitation, read_paper
from common.errors import EnrolmentError, RosterRefused, SignatureRefused
from common.identity import fingerprint
from common.randomness import system_bytes
from common.roster import FEDERATION_BYTES, Institution, Roster, SignedRoster, verify_roster
from server.home import CoordinatorHome, load_settings
from server.participants import require_participants

__all__ = [
    "admit",
    "admitted",
    "collect",
    "make_roster",
    "missing_signatures",
    "read_enrolment",
    "read_roster",
    "require_roster",
    "revoke",
]

MOST_PAPER_BYTES = 1 << 20


def read_enrolment(home: CoordinatorHome, path: Path) -> Enrolment:
    """An enrolment that may be admitted once a person has compared its fingerprint.

    Raises:
        EnrolmentError: it is none, is not signed by the key that it names, or name or keys are admitted already.
    """
    paper = read_paper(Enrolment, _read(path), source=path.name)
    try:
        paper.require()
    except SignatureRefused as error:
        raise EnrolmentError(
            f"{path.name} is not signed by the key that it names: it was changed or made by another; nothing was"
            " admitted, ask the site for it again"
        ) from error
    key = home.identity().public.hex()
    for other in admitted(home).values():
        if other == paper:
            raise EnrolmentError(f"{paper.name} is admitted already, with these very keys")
        if other.name == paper.name:
            raise EnrolmentError(
                f"another institution is admitted as {paper.name!r}, fingerprint"
                f" {fingerprint(bytes.fromhex(other.public_key))}; if its keys are new, revoke the old ones first:"
                f" coadapt coordinator revoke {paper.name}"
            )
        if paper.public_key == other.public_key or paper.node_key == other.node_key:
            raise EnrolmentError(f"a key of {paper.name!r} is that of {other.name!r}, which is admitted already")
    if paper.public_key == key:
        raise EnrolmentError(f"{path.name} names the coordinator's own key; a site needs its own")
    return paper


def admit(home: CoordinatorHome, paper: Enrolment) -> Path:
    """Put an enrolment among the admitted ones."""
    home.admitted.mkdir(parents=True, exist_ok=True)
    path = home.admitted / f"{paper.name}.json"
    write_text(path, paper.to_json())
    return path


def admitted(home: CoordinatorHome) -> dict[str, Enrolment]:
    """The admitted enrolments by name, each checked anew.

    Raises:
        EnrolmentError: a file is damaged.
    """
    found = {}
    for path in sorted(home.admitted.glob("*.json")):
        paper = read_paper(Enrolment, _read(path), source=str(path))
        try:
            paper.require()
        except SignatureRefused as error:
            raise EnrolmentError(f"{path} was changed: its signature does not verify; admit the site again") from error
        found[paper.name] = paper
    return found


def make_roster(home: CoordinatorHome, manifest_file: Path, *, epoch: int | None = None) -> SignedRoster:
    """A new roster of all admitted institutions for a manifest, not signed by anybody yet, and its invitation.

    `epoch` is one more than the last one where it is not given.

    Raises:
        ManifestError: the manifest breaks a rule, or invites more sites to a round than are admitted.
        EnrolmentError: it is not pinned, allows sums over two sites, too few institutions are admitted, or the epoch
            is not later.
        RosterRefused: the institutions and the manifest's rules leave no threshold.
    """
    settings, identity = load_settings(home), home.identity()
    manifest = load_manifest(manifest_file)
    _require_pinned(manifest, manifest_file)
    _require_crowd(manifest)
    before = read_roster(home) if home.roster.exists() else None
    last = 0 if before is None else before.roster.epoch
    epoch = last + 1 if epoch is None else epoch
    if epoch <= last:
        raise EnrolmentError(f"the epoch must be later than {last}, which sites may have signed, found {epoch}")
    section, papers = manifest.secure_sum, admitted(home)
    if len(papers) < section.min_sites:
        raise EnrolmentError(
            f"{manifest_file.name} wants secure_sum.min_sites = {section.min_sites} institutions or more,"
            f" {len(papers)} are admitted: {', '.join(papers) or 'none'}; admit more"
        )
    require_participants(manifest, len(papers))
    numbers = _numbers(home, papers)
    roster = Roster(
        federation=system_bytes(FEDERATION_BYTES) if before is None else before.roster.federation,
        epoch=epoch,
        coordinator=identity.public,
        min_sites=section.min_sites,
        max_colluding=section.max_colluding,
        institutions=tuple(
            Institution(site=number, name=name, public=bytes.fromhex(papers[name].public_key))
            for number, name in sorted((number, name) for name, number in numbers.items())
        ),
    )
    signed = SignedRoster(roster=roster)
    _require_usable(signed)
    text = annotated(manifest.model_copy(update={"simulation": None}))
    write_text(home.manifest, text)
    write_text(home.roster, signed.to_json() + "\n")
    _invite(home, signed, settings.address, text)
    return signed


def collect(home: CoordinatorHome, files: Iterable[Path]) -> SignedRoster:
    """Add the signatures of consents to the roster, and write the invitation anew; all of them or none.

    Raises:
        EnrolmentError: a file is no consent to this roster, or not signed by the site that it names.
    """
    signed, settings = read_roster(home), load_settings(home)
    signatures = dict(signed.signatures)
    digest = signed.roster.digest()
    for path in files:
        paper = read_paper(Consent, _read(path), source=path.name)
        if paper.roster_sha256 != digest.hex():
            raise EnrolmentError(
                f"{path.name} is a consent to another roster than the one of epoch {signed.roster.epoch}; send"
                f" {paper.name} the invitation of now"
            )
        entry = next((entry for entry in signed.roster.institutions if entry.site == paper.site), None)
        if entry is None or entry.name != paper.name:
            raise EnrolmentError(f"{path.name}: there is no site {paper.site} named {paper.name!r} in the roster")
        try:
            signed.roster.require_signature(paper.site, bytes.fromhex(paper.signature))
        except SignatureRefused as error:
            raise EnrolmentError(
                f"{path.name} is not signed by {entry.name}'s key; ask the site for it again"
            ) from error
        signatures[paper.site] = bytes.fromhex(paper.signature)
    signed = SignedRoster(roster=signed.roster, signatures=signatures)
    write_text(home.roster, signed.to_json() + "\n")
    _invite(home, signed, settings.address, home.manifest.read_text(encoding="utf-8"))
    return signed


def missing_signatures(signed: SignedRoster) -> list[str]:
    """Names of the institutions that have not signed."""
    return [entry.name for entry in signed.roster.institutions if entry.site not in signed.signatures]


def read_roster(home: CoordinatorHome) -> SignedRoster:
    """The roster with the signatures so far; they are not verified.

    Raises:
        EnrolmentError: there is none yet.
        RosterRefused: it is damaged, or another coordinator's.
    """
    try:
        signed = SignedRoster.from_json(home.roster.read_bytes())
    except OSError as error:
        raise EnrolmentError(f"{home.roster}: {error.strerror}; `coadapt coordinator roster` makes one") from error
    if signed.roster.coordinator != home.identity().public:
        raise RosterRefused(f"{home.roster} names another coordinator's key than this folder's")
    return signed


def require_roster(home: CoordinatorHome, manifest: Manifest) -> Roster:
    """The roster with every signature verified, of institutions that are all admitted still: what a run needs.

    Raises:
        EnrolmentError: there is none, or an institution in it was revoked or changed its keys.
        RosterRefused: a signature is missing or wrong.
    """
    _require_crowd(manifest)
    signed = read_roster(home)
    roster = verify_roster(
        signed,
        own_key=home.identity().public,
        pinned=signed.roster.digest(),
    )
    papers = admitted(home)
    for entry in roster.institutions:
        if entry.name not in papers or papers[entry.name].public_key != entry.public.hex():
            raise EnrolmentError(
                f"{entry.name} is in the roster and not admitted any more; make a new epoch:"
                f" coadapt coordinator roster {home.manifest}"
            )
    return roster


def revoke(home: CoordinatorHome, name: str) -> Enrolment:
    """Take an institution out of the admitted ones; its enrolment is kept among the revoked.

    Raises:
        EnrolmentError: it is not admitted.
    """
    papers = admitted(home)
    if name not in papers:
        raise EnrolmentError(f"{name!r} is not admitted; admitted are {', '.join(papers) or 'none'}")
    aside = home.folder / "revoked"
    aside.mkdir(exist_ok=True)
    write_text(aside / f"{name}.{papers[name].public_key[:16]}.json", papers[name].to_json())
    (home.admitted / f"{name}.json").unlink()
    return papers[name]


def _invite(home: CoordinatorHome, signed: SignedRoster, address: str, manifest: str) -> None:
    certificate = home.authority.read_text(encoding="ascii") if home.authority.exists() else ""
    paper = Invitation.of(home.identity(), signed, address=address, certificate=certificate, manifest=manifest)
    write_text(home.invitation, paper.to_json())


def _numbers(home: CoordinatorHome, papers: dict[str, Enrolment]) -> dict[str, int]:
    """The number of each institution, kept by key in a file that only grows."""
    path = home.folder / "numbers.txt"
    known = path.read_text(encoding="ascii").split() if path.exists() else []
    known += [paper.public_key for paper in papers.values() if paper.public_key not in known]
    write_text(path, "\n".join(known) + "\n")
    return {name: known.index(paper.public_key) for name, paper in papers.items()}


def _require_pinned(manifest: Manifest, path: Path) -> None:
    public = manifest.evaluation
    missing = [
        name
        for name, value in (
            ("model.weights_sha256", manifest.model.weights_sha256),
            ("model.tokenizer_sha256", manifest.model.tokenizer_sha256),
            ("evaluation.public_sha256", "none needed" if public.public is None else public.public_sha256),
            ("task.prompt_sha256", manifest.task.prompt_sha256 if manifest.task.kind == "causal-lm" else "none needed"),
        )
        if value is None
    ]
    if missing:
        raise EnrolmentError(
            f"{path.name} does not pin {' and '.join(missing)}, so sides could use different ones; `coadapt init`"
            " writes a manifest with the base's digests, and sha256sum gives that of a file"
        )


def _require_crowd(manifest: Manifest) -> None:
    if manifest.secure_sum.unsafe_two_sites:
        raise EnrolmentError(
            "secure_sum.unsafe_two_sites is for simulations alone: of two institutions each learns the other's change,"
            " and every site refuses; leave it out, and admit three or more"
        )


def _require_usable(signed: SignedRoster) -> None:
    """All that can be wrong with a roster beside its signatures, found before anybody is asked to sign."""
    try:
        verify_roster(signed, own_key=signed.roster.coordinator, pinned=signed.roster.digest())
    except RosterRefused as error:
        if "has not signed" not in str(error):
            raise


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MOST_PAPER_BYTES:
            raise EnrolmentError(f"{path} is larger than such a paper can be")
        return path.read_bytes()
    except OSError as error:
        raise EnrolmentError(f"{path} cannot be read: {error.strerror}") from error
