"""`coadapt site audit`: the privacy audit on the site's own records, and its words. All of it stays at the site."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from client.membership import Membership, losses_of, membership
from client.policy import SitePolicy, load_policy
from client.protection import mechanism
from client.resident import resident
from client.training.audit import AuditResult, audit
from client.vault import read_site
from common.adapters import first_state, load_adapter, set_state
from common.config.loading import load_manifest
from common.config.manifest import Manifest
from common.errors import DataError, PrivacyError

__all__ = ["print_audit"]

# Above this claim more canaries would be needed than a site has records.
MOST_CLAIM = 1.0


def print_audit(
    manifest_path: Path,
    policy_path: Path,
    *,
    overrides: Sequence[str],
    canaries: int,
    epsilon: float,
    rounds: int | None,
    adapter: Path | None,
    as_json: bool,
    unsafe_without_noise: bool,
) -> None:
    """Audit training under `manifest` at the site of `policy` against a claim of `epsilon`, and print what it showed.

    Raises:
        CoadaptError: of its tree the one that fits; nothing is charged, since nothing leaves.
    """
    policy = load_policy(policy_path)
    manifest = _claiming(load_manifest(manifest_path, overrides), epsilon, rounds)
    policy.require_unit(manifest)
    tested = (
        None if adapter is None else _membership(manifest, policy, adapter)
    )  # quick, so what it lacks is said first
    found = _audited(manifest, policy, canaries, unsafe_without_noise=unsafe_without_noise)
    if as_json:
        facts = {**asdict(found), "noise": not unsafe_without_noise, "membership": tested and asdict(tested)}
        print(json.dumps(facts, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    for line in [*_audit_lines(found), *(_membership_lines(tested) if tested else ())]:
        console.print(line)


def _claiming(manifest: Manifest, epsilon: float, rounds: int | None) -> Manifest:
    """The manifest with the claim as its epsilon, no spare rounds, and so many rounds."""
    if manifest.privacy is None:
        raise PrivacyError("the manifest has no [privacy] table, so there is no claim to test")
    if not 0 < epsilon <= MOST_CLAIM:
        raise PrivacyError(
            f"--epsilon must be above 0 and at most {MOST_CLAIM:g}, found {epsilon:g}: a larger claim would need more"
            " canaries than a site has records"
        )
    training = manifest.training if rounds is None else manifest.training.model_copy(update={"rounds": rounds})
    privacy = manifest.privacy.model_copy(update={"epsilon": epsilon, "spare_rounds": 0})
    return manifest.model_copy(update={"privacy": privacy, "training": training})


def _audited(manifest: Manifest, policy: SitePolicy, canaries: int, *, unsafe_without_noise: bool) -> AuditResult:
    how = mechanism(manifest, policy.account())
    model = resident(manifest)
    site = read_site(policy.name, manifest, train=Path(policy.data.train), held_out=None, columns=policy.data.columns)
    set_state(model.model, first_state(model.model, manifest.training.seed))
    assert manifest.privacy is not None  # noqa: S101  # _claiming has seen it
    return audit(
        model.model,
        model.task,
        list(site.units.values()),
        manifest.training,
        replace(how, noise_multiplier=0.0) if unsafe_without_noise else how,
        claim=manifest.privacy.epsilon,
        delta=manifest.privacy.delta,
        steps=manifest.training.rounds * manifest.training.local_steps,
        canaries=canaries,
        precision=model.precision,
    )


def _membership(manifest: Manifest, policy: SitePolicy, folder: Path) -> Membership:
    if policy.data.held_out is None:
        raise DataError("the membership test needs records that were never trained on: name data.held_out in site.toml")
    model = resident(manifest)
    everything = manifest.evaluation.model_copy(update={"max_records": sys.maxsize})
    site = read_site(
        policy.name,
        manifest.model_copy(update={"evaluation": everything}),
        train=Path(policy.data.train),
        held_out=Path(policy.data.held_out),
        columns=policy.data.columns,
    )
    loaded, _ = load_adapter(folder, model.base)
    size = manifest.evaluation.batch_size
    members, others = (
        losses_of(loaded.to(model.device), model.task, examples, batch_size=size, precision=model.precision)
        for examples in (site.train, site.held_out)
    )
    return membership(members, others)


def _audit_lines(found: AuditResult) -> list[str]:
    right = f"{found.correct} of {found.guesses} guesses about {found.canaries} canaries were right"
    could = f"at most {found.most:.2f} could have been shown"
    percent = f"{100 * found.confidence:g} %"
    if found.shown > found.claim:
        return [
            f"privacy is broken: training costs epsilon {found.shown:.2f} or more with {percent} confidence, the claim"
            f" is {found.claim:g}",
            f"{right}; {could}; do not train on real records before this is understood",
        ]
    return [
        f"nothing against the claim of epsilon {found.claim:g} at delta {found.delta:g}: with {percent} confidence"
        f" training costs at least {found.shown:.2f}",
        f"{right}; {could}",
    ]


def _membership_lines(found: Membership) -> list[str]:
    off = abs(found.auc - 0.5) / found.error
    verdict = "no difference is seen" if off < 2 else f"{off:.1f} standard errors from a coin's"
    return [
        f"membership by loss: AUC {found.auc:.3f} ({verdict}), advantage {found.advantage:.3f},"
        f" {100 * found.caught:.1f} % of members found at 1 % false alarms"
        f" ({found.members} training, {found.others} held-out records)"
    ]
