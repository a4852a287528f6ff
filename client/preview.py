"""`coadapt site preview`: one round at this site by itself, on its own records, to see what would leave.

The vault, the site's state machine and the coordinator's are those of the field; the other institutions are made up
and send zeros. The ledger is a new one in a temporary folder, so nothing is charged, and nothing leaves the process.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from client.home import SiteHome
from client.ledger import Ledger
from client.ledger_watch import LedgerWatch
from client.policy import SitePolicy, load_policy
from client.resident import resident
from client.secure_site import SecureSite, sum_policy
from client.state import SiteState
from client.vault import Vault
from common.adapters import first_state
from common.bounds import bounds
from common.codec.state import AdapterState, state_digest
from common.codec.vector import decode_words
from common.config.loading import load_manifest
from common.config.manifest import Manifest
from common.contribution import contribution_shapes
from common.errors import PolicyRefused, RoundError
from common.identity import Identity
from common.ledger_statement import LedgerStatement
from common.messages import Envelope, Refused, RoundDone, RoundStart, decode, encode
from common.randomness import system_bytes
from common.roster import FEDERATION_BYTES, Institution, Roster
from common.secure_sum.config import RoundConfig, SumPolicy
from common.secure_sum.coordinator import CoordinatorRound, Stage
from common.secure_sum.messages import read
from common.secure_sum.site import Site
from common.secure_sum.state import SiteMemory
from common.secure_sum.thresholds import least_survivors, threshold
from common.summed import agreed, mean_in, sum_number

__all__ = ["Preview", "Sent", "preview"]

RUN_ID = "preview"
MOST_SITES = 2048


@dataclass(frozen=True)
class Sent:
    """One message that would leave: its kind, its size in bytes, what anybody on its way can read in it (after TLS),
    and what is a mask or a cipher to everybody, as size and digest."""

    kind: str
    bytes: int
    clear: Mapping[str, str]
    masked: Mapping[str, str]


@dataclass(frozen=True)
class Preview:
    """`frame` is what stands in clear around every message. `error` is the largest distance between what the sum of
    this site and the zeros opened to and what this site trained, in its own unit; None without a sum."""

    site: str
    federation: str
    sites: int
    secure: bool
    private: bool
    seconds: float
    frame: Mapping[str, str]
    sent: tuple[Sent, ...]
    error: float | None


class _Memory:
    """What a state machine remembers, in memory: it is thrown away with it."""

    def __init__(self, federation: bytes) -> None:
        self._memory = SiteMemory(federation)

    def load(self) -> SiteMemory:
        return self._memory

    def save(self, memory: SiteMemory) -> None:
        self._memory = memory


def preview(home: SiteHome, manifest_file: Path | None = None) -> Preview:
    """Train once and send it to made-up sites; `manifest_file` in place of the one that was agreed on.

    Raises:
        CoadaptError: whatever would stop a round here.
    """
    policy, manifest = load_policy(home.policy), load_manifest(manifest_file or home.manifest)
    policy.require_unit(manifest)
    adapter = first_state(resident(manifest).model, manifest.training.seed)
    header = RoundStart(
        manifest_sha256=manifest.digest(),
        run_id=RUN_ID,
        round=1,
        adapter_sha256=state_digest(adapter),
        evaluate=True,
        accepted=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        throw_away = policy.model_copy(update={"ledger": str(Path(folder) / "ledger")})
        log = Path(folder) / "vault.log"
        vault = Vault.of(throw_away, manifest, log=log)
        if not manifest.secure_sum.enabled:
            return _in_clear(vault, policy, manifest, Envelope(header=header, tensors=adapter), log)
        return _summed(vault, policy, manifest, header, adapter, Path(folder))


def _in_clear(vault: Vault, policy: SitePolicy, manifest: Manifest, request: Envelope, log: Path) -> Preview:
    """Without a secure sum the coordinator reads all of it."""
    data, trained = _trained(vault, request, log)
    clear = {name: str(value) for name, value in trained.header.model_dump().items()}
    clear |= {name: _tensor(array) for name, array in trained.tensors.items()}
    sent = Sent("round_done", len(data), clear, {})
    return _preview(policy, manifest, 1, (sent,), _seconds(trained), None)


def _summed(
    vault: Vault, policy: SitePolicy, manifest: Manifest, header: RoundStart, adapter: AdapterState, folder: Path
) -> Preview:
    log = folder / "vault.log"
    own_policy = policy.sum_policy(manifest)
    count = _crowd(manifest, own_policy)
    coordinator, keys = Identity.generate(), [Identity.generate() for _ in range(count)]
    roster = Roster(
        federation=system_bytes(FEDERATION_BYTES),
        epoch=1,
        coordinator=coordinator.public,
        min_sites=own_policy.min_sites,
        max_colluding=own_policy.max_colluding,
        institutions=tuple(
            Institution(site=number, name=f"made-up-{number}" if number else policy.name, public=key.public)
            for number, key in enumerate(keys)
        ),
    )
    # 1. The request as a coordinator makes it: ranges as wide as optimiser and adapter allow.
    shapes = {name: array.shape for name, array in adapter.items()}
    sends = contribution_shapes(manifest, shapes, 0)
    most = bounds(manifest, adapter, 1)
    header = header.model_copy(update={"ranges": {name: most[name] for name in sorted(sends)}})
    request = Envelope(header=header, tensors=adapter)
    what = agreed(manifest, request, shapes, accepted=0, sites=count)
    config = RoundConfig.for_round(roster, range(count), what)
    attempt = CoordinatorRound(
        coordinator,
        roster,
        config,
        invited=range(count),
        round_number=sum_number(header),
        attempt=0,
        model_hash=what.model_hash,
    )
    (first,) = set(attempt.start().values())
    request = Envelope(header=header.model_copy(update={"secure_sum": first.hex()}), tensors=adapter)
    # 2. The sites' state machines; this one with its own policy.
    loose = sum_policy(manifest)
    sites = [SecureSite(Site(key, roster, loose), _Memory(roster.federation), manifest) for key in keys]
    ledger = Ledger(folder / "ledger") if manifest.privacy is not None else None
    watch = None if ledger is None else LedgerWatch(ledger, keys[0], roster, folder / "runs")
    sites[0] = SecureSite(
        Site(keys[0], roster, own_policy, watch),
        sites[0].store,
        manifest,
        metrics_leave=policy.secure_sum.metrics == "summed",
    )
    # 3. All five exchanges. This site trains when its vector is due; the others' are zeros.
    answers = {number: site.start(request) for number, site in enumerate(sites)}
    sent = [_sent(answers[0], keys[0].public)]
    trained: Envelope | None = None
    while True:
        for number, data in answers.items():
            attempt.receive(number, data)
        if attempt.stage is Stage.REVEAL:
            break
        answers = {}
        for number, data in attempt.advance().items():
            answer = sites[number].receive(data)
            if answer is None and number == 0:
                trained = _trained(vault, request, log)[1]
                answer = sites[0].give(trained)
            elif answer is None:
                answer = sites[number].give(_zeros(header, sends, manifest))
            answers[number] = answer
        sent.append(_sent(answers[0], keys[0].public))
    # 4. What the coordinator learns: the sum, which here is this site's own part, rounded to its grid.
    opened = attempt.open_sum()
    decoded = decode_words(opened.words, opened.count, what.spec, opened.context)
    if trained is None:
        raise RoundError("the preview ended before this site trained; nothing was sent")
    error = _distance(manifest, mean_in(manifest, decoded, opened.count), trained, count)
    return _preview(policy, manifest, count, tuple(sent), _seconds(trained), error)


def _crowd(manifest: Manifest, own: SumPolicy) -> int:
    """The smallest consortium in which the sum may be opened."""
    for count in range(max(3, own.min_sites), MOST_SITES + 1):
        try:
            required = threshold(count, own.max_colluding)
        except PolicyRefused:
            continue
        fewest = least_survivors(
            required, min_sites=own.min_sites, least_honest=own.least_honest, colluding=own.max_colluding
        )
        if fewest <= count:
            return count
    raise PolicyRefused(f"no crowd of at most {MOST_SITES} sites is enough for {manifest.name} and this policy")


def _trained(vault: Vault, request: Envelope, log: Path) -> tuple[bytes, Envelope]:
    data, _ = vault.answer(encode(request), SiteState())
    answer = decode(data)
    if isinstance(answer.header, Refused):
        lines = log.read_text(encoding="utf-8").strip().splitlines() if log.exists() else []
        raise RoundError(f"this site would refuse with {answer.header.code!r}: {lines[-1] if lines else 'no reason'}")
    return data, answer


def _zeros(header: RoundStart, sends: Mapping[str, tuple[int, ...]], manifest: Manifest) -> Envelope:
    done = RoundDone(
        **header.spoken_of(),
        records=1,
        examples=manifest.training.local_steps * manifest.training.batch_size,
        loss=None,
        counts={},
        seconds=0.0,
        noise_multiplier=None,
        sampling_rate=None,
    )
    return Envelope(header=done, tensors={name: np.zeros(shape, np.float32) for name, shape in sends.items()})


def _sent(data: bytes, public: bytes) -> Sent:
    message = read(data, lambda sender: public, most_bytes=len(data))
    clear = {"round": str(message.turn.round), "attempt": str(message.turn.attempt)}
    masked: dict[str, str] = {}
    for each in fields(message.body):
        value = getattr(message.body, each.name)
        if each.name in ("ledger", "seen"):
            clear |= _ledgers(each.name, value)
            continue
        # Public keys, hashes and sealed shares are drawn at random or by a hash; a vector is under its masks.
        text, plain = _shown(value)
        (clear if plain else masked)[each.name] = text
    return Sent(type(message.body).__name__.lower(), len(data), clear, masked)


def _ledgers(name: str, value: Any) -> dict[str, str]:
    """What a message says of ledgers, which coordinator and peers read."""
    if name == "ledger" and value:
        found = LedgerStatement.parse(value)
        return {"ledger": f"{found.number} charges, the last with keyed digest {found.digest or 'none'}; signed"}
    if name == "seen":
        return {"seen": f"what {len(value)} other sites said of their ledgers in earlier sums, handed back"}
    return {}


def _shown(value: Any) -> tuple[str, bool]:
    """A field for a person, and whether it is a plain number or word."""
    if isinstance(value, bytes | memoryview):
        data = bytes(value)
        return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}", False
    if isinstance(value, Mapping):
        return "; ".join(f"for site {site}: {_shown(inner)[0]}" for site, inner in value.items()), False
    if isinstance(value, tuple):
        return ", ".join(_shown(inner)[0] for inner in value), all(_shown(inner)[1] for inner in value)
    return str(value), True


def _tensor(array: np.ndarray) -> str:
    flat = np.asarray(array, np.float64).ravel()
    return (
        f"{flat.size} numbers of shape {list(array.shape)}, from {flat.min():.4g} to {flat.max():.4g}, length"
        f" {np.linalg.norm(flat):.4g}"
    )


def _seconds(trained: Envelope) -> float:
    return trained.header.seconds if isinstance(trained.header, RoundDone) else 0.0


def _distance(manifest: Manifest, mean: Mapping[str, np.ndarray], trained: Envelope, count: int) -> float:
    """Between the opened mean, made the sum of one again, and what this site trained."""
    header = trained.header
    records = header.records if isinstance(header, RoundDone) else 1
    most = manifest.secure_sum.most_records
    own = min(records, most)
    total = (own + count - 1) / own if manifest.aggregation.weighting == "records" else float(count)
    return max(float(np.abs(mean[name] * total - array).max(initial=0.0)) for name, array in trained.tensors.items())


def _preview(
    policy: SitePolicy, manifest: Manifest, count: int, sent: tuple[Sent, ...], seconds: float, error: float | None
) -> Preview:
    frame = {
        "federation": "the roster's random name",
        "epoch": "the roster's",
        "manifest_sha256": manifest.digest(),
        "run_id": "the run's name",
        "site": "this site's number in the roster",
        "ledger": "how many charges its ledger holds, and the digest of the last, signed; empty without privacy",
        "progress": "how far training is, 0 to 1",
        "code and reason": "a fixed word where it refuses; settings and numbers of the policy, no record",
    }
    private = manifest.privacy is not None
    return Preview(policy.name, manifest.name, count, manifest.secure_sum.enabled, private, seconds, frame, sent, error)
