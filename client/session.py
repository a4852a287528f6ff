"""What a vault does with an order: signed bytes in, signed bytes out, whatever the order holds.

    1. size, signature of the coordinator, this federation, roster, manifest and site
    2. newer than every order before; the very same order gets the same answer
    3. the site's ledger is not older than what the site has signed of it and others hand back
    4. the site's policy
    5. `client/site_run.py` answers

Whatever is refused is an answer too, with a fixed word; only a breach of policy says more, and that is settings and
numbers. Every order leaves a line in the audit log, a poll that was told to wait excepted.
"""

import re
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from client.admission import require_admitted, require_bytes, require_hours
from client.audit_log import AuditLog
from client.background import Trains
from client.ledger import Ledger
from client.ledger_watch import LedgerWatch
from client.policy import SitePolicy
from client.run_folder import Claim, RunFolder
from client.secure_site import SecureSite
from client.site_log import note
from client.site_run import Outcome, SiteRun
from common.config.manifest import Manifest
from common.durable import write_bytes
from common.errors import (
    AppRefused,
    CoadaptError,
    ManifestError,
    PolicyBreach,
    ReplayRefused,
    RunError,
    SnapshotRefused,
    UnknownAttempt,
    UnknownOrder,
    WrongContext,
    error_code,
)
from common.frames import Answer, Order, open_frame, payload_digest, seal_frame
from common.identity import Identity
from common.ledger_statement import LedgerStatement
from common.roster import Roster
from common.secure_sum.primitives import Label, derive
from common.secure_sum.site import Site

__all__ = ["Session", "SiteParts"]

_UNKNOWN_RUN = "unknown"
_MOST_REASON = 1000
_SEEN = ".orders.json"  # no run has a name that begins with a dot


@dataclass(frozen=True, kw_only=True)
class SiteParts:
    """What a session is made of. `vault` may be None where the policy does not admit the manifest, so that a base
    model that is not allowed is never loaded; `ledger` is None without privacy. `log` never leaves the site."""

    identity: Identity
    roster: Roster
    manifest: Manifest
    policy: SitePolicy
    rounding_key: bytes
    runs: Path
    log: Path
    vault: Trains | None
    ledger: Ledger | None
    executor: Executor
    now: Callable[[], datetime] = field(default=datetime.now)


class _Seen(BaseModel):
    """The newest order that was taken."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sequence: int = -1
    frame: str = ""


class Session:
    """A site in one federation, over all its runs. `answer` may be called from several threads."""

    def __init__(self, parts: SiteParts, audit: AuditLog) -> None:
        self._parts, self._audit = parts, audit
        self._digest, self._number = parts.manifest.digest(), parts.roster.site_of(parts.identity.public)
        self._watch = (
            LedgerWatch(parts.ledger, parts.identity, parts.roster, parts.runs) if parts.ledger is not None else None
        )
        self._lock = threading.Lock()
        self._seen = self._load_seen()
        self._last: tuple[str, bytes] = ("", b"")
        self._run: tuple[str, SiteRun] | None = None

    def answer(self, frame: bytes) -> bytes:
        """The signed answer to a signed order; never raises for what the order holds."""
        with self._lock:
            return self._answer(bytes(frame))

    def app_refused(self, digest: bytes) -> bytes:
        """Note that the relay refused an app bundle with this SHA-256 (hex). The relay says so, and nobody else can."""
        text = digest[:64].decode("ascii", "replace")
        if re.fullmatch(r"[0-9a-f]{64}", text):
            with self._lock:
                self._audit.add("refused", kind="app", payload=text, code=AppRefused.code)
        return b""

    def oversized(self, size: bytes) -> bytes:
        """The signed refusal of an order of so many bytes (decimal), which the relay could not hand over; empty where
        the policy allows as many. The relay says so, and nobody else can."""
        text = size[:20].decode("ascii", "replace")
        if not re.fullmatch(r"[1-9][0-9]{0,18}", text):
            return b""
        try:
            require_bytes(self._parts.policy, int(text))
        except PolicyBreach as error:
            with self._lock:
                outcome = Outcome("refused", code=error.code, reason=str(error), error=error)
                return self._sealed(self._logged(outcome, None, "", None, int(text)), None, "")
        return b""

    def _answer(self, frame: bytes) -> bytes:
        order: Order | None = None
        about, number, digest = "", None, ""
        try:
            require_bytes(self._parts.policy, len(frame))
            order, payload = open_frame(Order, self._parts.roster.coordinator, frame)
            digest = payload_digest(frame)
            if digest == self._last[0]:
                return self._last[1]
            about = order.about if order.kind in ("poll", "cancel") else payload_digest(payload)
            self._require_ours(order)
            told = self._told(order)
            self._take(order, digest)
            if self._watch is not None:
                self._watch.require(told)
            run = None
            if order.kind == "hello":
                self._require_policy()
                outcome = Outcome("done")
            else:
                run = self._run_of(order)
                outcome = self._dispatch(run, order, payload)
            number = run.round if run is not None else None
        except PolicyBreach as error:
            outcome = Outcome("refused", code=error.code, reason=str(error), error=error)
        except Exception as error:
            outcome = Outcome("refused", code=error_code(error), error=error)
        if outcome.error is not None:
            note(self._parts.log, outcome.error)
        if isinstance(outcome.error, SnapshotRefused) and self._run is not None:
            self._run[1].close()  # what was trained on an older copy's budget never leaves
        outcome = self._logged(outcome, order, about, number, len(frame))
        sealed = self._sealed(outcome, order, about)
        if order is not None and digest == self._seen.frame:
            self._last = (digest, sealed)
        return sealed

    def _dispatch(self, run: SiteRun, order: Order, payload: bytes) -> Outcome:
        if order.kind == "request":
            return run.request(payload)
        if order.kind == "message":
            return run.message(payload)
        return run.poll(order.about) if order.kind == "poll" else run.cancel(order.about)

    def _require_ours(self, order: Order) -> None:
        """Refuse an order for others.

        Raises:
            WrongContext: of another federation, roster or site.
            ManifestError: under another manifest than the one that was agreed to here.
        """
        roster = self._parts.roster
        if (order.federation, order.epoch) != (roster.federation.hex(), roster.epoch):
            raise WrongContext("an order in another federation or under another roster")
        if order.site != self._number and order.kind != "hello":  # a greeting asks whose node this is
            raise WrongContext(f"an order for site {order.site}, and this is site {self._number}")
        if order.manifest_sha256 != self._digest:
            raise ManifestError([f"an order under manifest {order.manifest_sha256}; agreed here is {self._digest}"])

    def _take(self, order: Order, digest: str) -> None:
        """Note an order as the newest. Polls and greetings ask nothing new, so theirs is noted in memory alone.

        Raises:
            ReplayRefused: it is not newer than the one before, nor that very one.
            RunError: it cannot be noted.
        """
        if order.sequence < self._seen.sequence or (
            order.sequence == self._seen.sequence and digest != self._seen.frame
        ):
            raise ReplayRefused(f"order {order.sequence} is not newer than {self._seen.sequence}")
        self._remember(order.kind not in ("hello", "poll"), sequence=order.sequence, frame=digest)

    def _told(self, order: Order) -> LedgerStatement | None:
        """What the order hands back of this site's ledger, believed by nothing but the site's own signature.

        Raises:
            MalformedMessage, WrongContext, SignatureRefused: this site has never said that; nothing is noted of it.
        """
        if self._watch is None or not order.seen or order.site != self._number:
            return None  # a greeting may be meant for another site
        return self._watch.believed(bytes.fromhex(order.seen))

    def _require_policy(self) -> Trains:
        """The vault, where the manifest is within the policy.

        Raises:
            PolicyBreach: it is not.
        """
        parts = self._parts
        require_admitted(parts.manifest, parts.policy, sites=len(parts.roster.institutions))
        if parts.vault is None:
            raise RunError("this vault was started without records; start it again")
        return parts.vault

    def _run_of(self, order: Order) -> SiteRun:
        """The run of an order; a request may begin one.

        Raises:
            PolicyBreach: the manifest, or another run of it, is not allowed here.
            WrongContext: the run's id was taken under another roster or manifest.
            UnknownAttempt, UnknownOrder: no request has come in this run.
        """
        vault = self._require_policy()
        if self._run is not None and self._run[0] == order.run_id:
            return self._run[1]
        parts = self._parts
        folder = RunFolder(parts.runs / order.run_id, parts.roster.federation)
        claim = Claim(federation=order.federation, epoch=order.epoch, manifest_sha256=self._digest)
        known = folder.claim()
        if known is None:
            if order.kind == "poll":
                raise UnknownOrder("a poll in a run that no request has begun here")
            if order.kind != "request":
                raise UnknownAttempt("a message in a run that no request has begun here")
            self._require_runs(claim)
        elif known != claim:
            raise WrongContext(f"run {order.run_id} was begun under another federation, roster or manifest")
        if self._run is not None:
            self._run[1].close()
        run = SiteRun(
            order.run_id,
            parts.manifest,
            folder,
            secure=self._secure_site(order.run_id, folder),
            vault=vault,
            executor=parts.executor,
            admit=lambda begins: self._admit(folder, claim, begins=begins),
        )
        self._run = (order.run_id, run)
        return run

    def _admit(self, folder: RunFolder, claim: Claim, *, begins: bool) -> None:
        """Let a request be answered, and note whose run it is, or raise a PolicyBreach. Hours are about training that
        `begins`; what it made may be asked for again at any time."""
        if begins:
            require_hours(self._parts.policy, self._parts.now())
        if folder.claim() is None:
            folder.take(claim)

    def _require_runs(self, claim: Claim) -> None:
        """Refuse a run too many of a manifest without privacy.

        Every run of it trains alike from the same adapter, and numbers of sums begin anew in each. Two runs whose sums
        are over different sites tell what lies between them, as a second sum in one round would, which no memory of a
        single run forbids.

        Raises:
            PolicyBreach: there are as many as the policy allows.
        """
        if self._parts.manifest.privacy is not None:
            return  # each run is charged, and what two of them tell together is what they cost together
        folders = [path for path in self._parts.runs.glob("[!.]*") if path.is_dir()]
        before = sum(RunFolder(path, self._parts.roster.federation).claim() == claim for path in folders)
        most = self._parts.policy.limits.plain_runs
        if before >= most:
            raise PolicyBreach(f"limits.plain_runs: asked run {before + 1} of one manifest, allowed {most}")

    def _secure_site(self, run_id: str, folder: RunFolder) -> SecureSite | None:
        parts = self._parts
        if not parts.manifest.secure_sum.enabled:
            return None
        return SecureSite(
            Site(parts.identity, parts.roster, parts.policy.sum_policy(parts.manifest), self._watch),
            folder,
            parts.manifest,
            facts=folder,
            rounding=derive(parts.rounding_key, Label.RUN_ROUNDING, run_id.encode()),
            metrics_leave=parts.policy.secure_sum.metrics != "none",
        )

    def _logged(self, outcome: Outcome, order: Order | None, about: str, number: int | None, size: int) -> Outcome:
        """Write the line; what cannot be logged is not answered."""
        refused = outcome.kind == "refused" or bool(outcome.code)
        if outcome.kind == "working" and order is not None and order.kind == "poll":
            return outcome
        try:
            self._audit.add(
                "refused" if refused else "working" if outcome.kind == "working" else "answered",
                kind=order.kind if order is not None else "",
                run_id=order.run_id if order is not None else "",
                round_number=number,
                payload=about,
                size=size,
                code=outcome.code,
                reason=outcome.reason[:_MOST_REASON],
            )
        except CoadaptError as error:
            note(self._parts.log, error)
            return Outcome("refused", code=error.code)
        return outcome

    def _sealed(self, outcome: Outcome, order: Order | None, about: str) -> bytes:
        roster = self._parts.roster
        header = Answer(
            federation=roster.federation.hex(),
            epoch=roster.epoch,
            manifest_sha256=self._digest,
            run_id=order.run_id if order is not None else _UNKNOWN_RUN,
            site=self._number,
            kind=outcome.kind,
            to=order.sequence if order is not None else 0,
            about=about,
            code=outcome.code,
            reason=outcome.reason[:_MOST_REASON],
            progress=outcome.progress,
            ledger=self._statement() if order is not None else "",
        )
        return seal_frame(self._parts.identity, header, outcome.payload)

    def _statement(self) -> str:
        """The ledger's end in hex; nothing where there is no ledger, or none that can be trusted."""
        try:
            return "" if self._watch is None else self._watch.says().hex()
        except CoadaptError as error:
            note(self._parts.log, error)
            return ""

    def _load_seen(self) -> _Seen:
        path = self._parts.runs / _SEEN
        try:
            return _Seen.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return _Seen()
        except (OSError, ValidationError) as error:
            raise RunError(f"{path} is damaged, so old orders would not show; restore it from a backup") from error

    def _remember(self, durably: bool, **changes: object) -> None:
        seen = self._seen.model_copy(update=changes)
        if durably:
            self._parts.runs.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_bytes(self._parts.runs / _SEEN, seen.model_dump_json().encode(), private=True)
        self._seen = seen
