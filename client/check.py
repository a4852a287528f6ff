"""`coadapt site check`: everything that can be known to be wrong at a site before anything starts.

Each look is a function that yields findings; an error of Coadapt in it is a problem with the error's own line, so one
broken thing does not hide the next. Nothing is charged, trained or sent.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from client.admission import breaches
from client.home import SiteHome
from client.isolation import isolated
from client.ledger import Ledger
from client.policy import SitePolicy, load_policy
from client.reach import reach
from client.site_keys import loose_places
from common.app_bundle import app_digest
from common.config.loading import load_manifest
from common.config.manifest import Manifest
from common.errors import CoadaptError, ManifestError
from common.findings import Finding
from common.roster import SignedRoster, verify_roster

__all__ = ["check_site"]

LEAST_DISK_BYTES = 2 << 30

# A site may publish a rounded number of units: this share of the true one away is rounding, more is another number.
ROUNDING = 0.1

# What the process takes beside the model; what training takes for each byte of the base is measured roughly.
PROCESS_BYTES = 1 << 30
BYTES_PER_BASE_BYTE = 2.0


def check_site(home: SiteHome, *, offline: bool = False) -> Iterator[Finding]:
    """Findings as they are made; `offline` leaves the network out."""
    policy: SitePolicy | None = None
    try:
        policy = load_policy(home.policy)
        yield Finding("ok", "policy", f"{home.policy} is valid, site {policy.name}")
    except CoadaptError as error:
        yield from (Finding("problem", "policy", line) for line in str(error).splitlines())
    yield from _looked("keys", lambda: _keys(home))
    manifest: Manifest | None = None
    if home.agreement_file.exists():
        try:
            manifest = load_manifest(home.manifest)
        except CoadaptError as error:
            yield from (Finding("problem", "manifest", line) for line in str(error).splitlines())
    else:
        yield Finding("warning", "agreement", "this site has joined nothing yet, so less can be checked: site join")
    if manifest is not None:
        agreed = manifest
        yield from _looked("agreement", lambda: _agreement(home, agreed))
    if policy is not None:
        own = policy
        yield from _looked("ledger", lambda: _ledger(own, manifest))
        yield from _looked("machine", lambda: _disk(home))
        yield from _looked("cards", lambda: _cards(own))
    if policy is not None and manifest is not None:
        own, agreed = policy, manifest
        yield from _looked("policy", lambda: _admission(home, agreed, own))
        yield from _looked("base", lambda: _base(agreed, own))
        yield from _looked("data", lambda: _data(agreed, own))
    elif policy is not None:
        own = policy
        yield from _looked("data", lambda: _files(own))
    if manifest is not None and not offline:
        yield from _looked("network", lambda: reach(home.agreement().address, home.certificate))
    apart = isolated(home)
    yield (
        Finding("warning", "isolation", apart)
        if apart
        else Finding("ok", "isolation", "vault and relay are two users, and the relay's reads its own folder alone")
    )


def _looked(what: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except CoadaptError as error:
        yield from (Finding("problem", what, line) for line in str(error).splitlines())


def _keys(home: SiteHome) -> Iterator[Finding]:
    home.identity()
    problems = list(loose_places(home))
    yield from (Finding("problem", "keys", problem) for problem in problems)
    if not problems:
        yield Finding("ok", "keys", "signing, node and rounding key are there, and closed to others")


def _agreement(home: SiteHome, manifest: Manifest) -> Iterator[Finding]:
    agreement = home.agreement()
    signed = SignedRoster.from_json(home.roster.read_bytes())
    roster = verify_roster(
        signed,
        own_key=home.identity().public,
        pinned=bytes.fromhex(agreement.roster_sha256),
    )
    if manifest.digest() != agreement.manifest_sha256:
        yield Finding(
            "problem", "agreement", f"{home.manifest} is not the manifest that was agreed on; join again or restore it"
        )
        return
    if app_digest() != agreement.app_sha256:
        yield Finding(
            "problem", "agreement", "the installed version is not the one that joined; join again after an update"
        )
        return
    yield Finding(
        "ok", "agreement", f"{manifest.name}, epoch {roster.epoch}, {len(roster.institutions)} institutions, all signed"
    )


def _admission(home: SiteHome, manifest: Manifest, policy: SitePolicy) -> Iterator[Finding]:
    sites = len(SignedRoster.from_json(home.roster.read_bytes()).roster.institutions)
    found = breaches(manifest, policy, sites=sites)
    yield from (Finding("problem", "policy", f"{home.policy} refuses the manifest: {line}") for line in found)
    if not found:
        yield Finding("ok", "policy", "the manifest asks for nothing that it does not allow")


def _ledger(policy: SitePolicy, manifest: Manifest | None) -> Iterator[Finding]:
    from client.protection import Protection
    from common.privacy.accounting import rdp_epsilon

    folder, account = Path(policy.ledger), policy.account()
    if not folder.exists():
        yield Finding("ok", "ledger", f"nothing is spent yet of epsilon {account.epsilon:g}")
        return
    book = Ledger(folder)
    entries = book.entries()
    if entries and entries[-1].time > time.time() + 1:
        yield Finding("warning", "clock", "the clock is behind the ledger's last entry; set it")
    own = [entry.charge.steps for entry in entries if entry.charge.population == account.name]
    spent = rdp_epsilon(own, account.delta)
    yield Finding("ok", "ledger", f"{len(entries)} entries, epsilon {spent:.3f} of {account.epsilon:g} spent")
    if manifest is not None and manifest.privacy is not None:
        Protection(manifest, account, book).require()
        yield Finding("ok", "budget", "the next round can be paid")


def _cards(policy: SitePolicy) -> Iterator[Finding]:
    import torch

    from client.cards import cards

    there = torch.cuda.device_count()
    computing = cards(policy.training.gpus, there)
    text = f"{computing} of {there} GPUs will compute" if there else "no GPU is seen: the processor will compute"
    yield Finding("ok", "cards", text + (", each in a process of its own" if computing > 1 else ""))


def _base(manifest: Manifest, policy: SitePolicy) -> Iterator[Finding]:
    import psutil

    from client.cards import devices
    from common.models import find_base

    base = find_base(manifest.model)
    yield Finding("ok", "base", f"{base.folder} has the agreed digest {base.weights_sha256[:16]}...")
    size = sum(path.stat().st_size for path in base.folder.glob("*.safetensors"))
    try:
        processes = max(1, len(devices(policy.training.gpus)))
    except ManifestError:  # a finding of its own
        processes = 1
    need, free = processes * int(PROCESS_BYTES + BYTES_PER_BASE_BYTE * size), psutil.virtual_memory().available
    text = f"about {need / 2**30:.1f} GiB are needed (an estimate), {free / 2**30:.1f} GiB are free"
    yield Finding("ok" if free >= need else "warning", "memory", text)


def _data(manifest: Manifest, policy: SitePolicy) -> Iterator[Finding]:
    from client.protection import protected_units
    from common.data_files import read_records

    data = manifest.data.model_copy(update={"columns": policy.data.columns})
    names = {"train": policy.data.train, "held_out": policy.data.held_out}
    for name, file in names.items():
        if file is None:
            continue
        records, cleaned = read_records(Path(file), task=manifest.task, data=data, need_unit=manifest.need_unit)
        yield Finding("ok", "data", f"{file}: {len(records)} records for {manifest.task.kind}")
        if name == "train" and manifest.privacy is not None:
            yield _units(len(protected_units(records, manifest.privacy.unit)), policy)
        del cleaned


def _units(found: int, policy: SitePolicy) -> Finding:
    """Sampling rates follow from the published number, so a wrong one weakens what the ledger says."""
    said, unit = policy.population.units, policy.population.unit
    text = f"{found} of {unit!r} in the data, {said} are published"
    if abs(found - said) > ROUNDING * max(found, 1):
        return Finding("warning", "units", f"{text}: more than rounding; correct population.units in site.toml")
    return Finding("ok", "units", text)


def _files(policy: SitePolicy) -> Iterator[Finding]:
    for file in (policy.data.train, policy.data.held_out):
        if file is not None:
            there = Path(file).is_file()
            yield Finding("ok" if there else "problem", "data", f"{file} is {'there' if there else 'missing'}")


def _disk(home: SiteHome) -> Iterator[Finding]:
    free = shutil.disk_usage(home.folder).free
    text = f"{free / 2**30:.1f} GiB are free for {home.folder}"
    yield Finding("ok" if free >= LEAST_DISK_BYTES else "warning", "disk", text)
