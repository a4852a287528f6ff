"""One round at a site, top to bottom: check, measure, train, reply."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from safetensors.numpy import load as tensors_from_bytes
from safetensors.numpy import save as tensors_to_bytes

from client.protection import Protection
from client.resident import Resident
from client.sampling import batches
from client.state import SiteState
from client.training.crew import Crew
from client.training.loop import train
from client.training.preflight import check_gradients, check_moved, check_randomness
from client.training.private import train_private
from common.adapters import get_state, train_only
from common.codec.state import AdapterState, state_digest
from common.config.manifest import Manifest
from common.contribution import contribution, phase_of, products, projection, projection_shapes, trained_names
from common.errors import MessageError
from common.evaluation import measure
from common.factors import scale
from common.messages import Envelope, Evaluate, Evaluated, Project, Projected, RoundDone, RoundStart
from common.metrics import Counts
from common.randomness import seed_dropout
from common.tasks.task import Example

__all__ = ["SiteData", "evaluate", "project", "train_round"]


@dataclass(frozen=True)
class SiteData:
    """A site's examples, encoded: what it trains on and what it keeps out of training.

    `units` are the training examples again, by the name of the privacy unit that owns them; empty without privacy.
    """

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    units: Mapping[str, Sequence[Example]]


def train_round(
    envelope: Envelope,
    start: RoundStart,
    manifest: Manifest,
    site: SiteData,
    resident: Resident,
    state: SiteState,
    protection: Protection | None,
    *,
    unreleased: bool = False,
    crew: Crew | None = None,
) -> tuple[Envelope, SiteState]:
    """Answer a RoundStart with what the site contributes; with privacy, what the round costs is charged before.

    `unreleased`: see `Protection.charge`. A `crew` trains together with this process.

    Raises:
        MessageError: the round came before, lies outside the run, or the adapter is not the one announced.
        AdapterError: the adapter does not fit the model.
        NotFiniteLoss: training diverged.
        BudgetError, LedgerError, PrivacyError: the site's budget or a check of the mechanism forbids to train.
    """
    section = manifest.training
    # 1. Check what came: a round is answered once, and only for the adapter it speaks of.
    if not state.last_round < start.round <= section.rounds:
        raise MessageError(f"round {start.round} must follow round {state.last_round} and be at most {section.rounds}")
    if start.accepted >= start.round:  # what trains follows from it, and privacy would pay for training the wrong part
        raise MessageError(f"round {start.round} follows on fewer aggregations than {start.accepted}")
    _check_adapter(envelope, start.adapter_sha256)
    if protection is not None:
        return _train_privately(
            envelope, start, manifest, site, resident, state, protection, unreleased=unreleased, crew=crew
        )
    # 2. Measure the adapter as it arrived, on records that are never trained on.
    resident.take(envelope.tensors)
    counts = _counts(manifest, site, resident) if start.evaluate else {}
    trained = trained_names(envelope.tensors, phase_of(manifest, start.accepted))
    train_only(resident.model, trained)
    # 3. Train the agreed number of steps, going on in the site's records where the last round ended.
    seed_dropout(section.seed, site.name, start.round)
    if crew is not None:
        crew.take(envelope.tensors, list(trained), seed=section.seed, labels=(site.name, start.round))
    outcome = train(
        resident.model,
        resident.task,
        site.train,
        batches(len(site.train), section.batch_size, seed=section.seed, site=site.name, cursor=state.cursor),
        section,
        first_step=(start.round - 1) * section.local_steps,
        steps=section.local_steps,
        total_steps=section.rounds * section.local_steps,
        precision=resident.precision,
        crew=crew,
    )
    # 4. Reply with the contribution alone.
    after = resident.made_of(envelope.tensors)
    header = RoundDone(
        **start.spoken_of(),
        records=len(site.train),
        examples=outcome.examples,
        loss=outcome.loss,
        counts=counts,
        seconds=outcome.seconds,
        noise_multiplier=None,
        sampling_rate=None,
    )
    sent = contribution(manifest, envelope.tensors, after, start.accepted)
    moved = replace(state, cursor=state.cursor + outcome.examples, last_round=start.round)
    return Envelope(header=header, tensors=sent), _keeping(moved, manifest, after, start.accepted)


def _train_privately(
    envelope: Envelope,
    start: RoundStart,
    manifest: Manifest,
    site: SiteData,
    resident: Resident,
    state: SiteState,
    protection: Protection,
    *,
    unreleased: bool,
    crew: Crew | None,
) -> tuple[Envelope, SiteState]:
    """The same with privacy: nothing in the answer but the noised change is computed from records."""
    section = manifest.training
    if crew is not None:
        crew.ready()  # a card that is not there costs nothing
    # 2. The cost is on the disk before training begins, whatever happens then.
    protection.charge(start.run_id, start.round, site.units, unreleased=unreleased)
    # 3. Train the agreed number of noised steps; before the first ones what the guarantee rests on is checked.
    resident.take(envelope.tensors)
    phase = phase_of(manifest, start.accepted)
    trained = trained_names(envelope.tensors, phase)
    train_only(resident.model, trained)
    before = get_state(resident.model)
    units = list(site.units.values())
    randomness = protection.randomness(site.name, start.run_id, start.round)
    if not state.checked & phase:  # what trains is new
        check_randomness(protection.mechanism, randomness, len(units))
        check_gradients(resident.model, resident.task, units, resident.precision)
    seed_dropout(section.seed, site.name, start.round)
    if crew is not None:
        labels = (site.name, start.round)
        crew.take(envelope.tensors, list(trained), seed=section.seed, labels=labels, mechanism=protection.mechanism)
    seconds = train_private(
        resident.model,
        resident.task,
        units,
        section,
        protection.mechanism,
        randomness,
        first_step=(start.round - 1) * section.local_steps,
        steps=section.local_steps,
        total_steps=section.rounds * section.local_steps,
        precision=resident.precision,
        crew=crew,
    )
    # 4. Reply with the change, and beside it with public numbers alone.
    after = resident.made_of(envelope.tensors)
    check_moved({name: before[name] for name in trained}, get_state(resident.model))
    header = RoundDone(
        **start.spoken_of(),
        records=protection.units,
        examples=section.local_steps * section.batch_size,
        loss=None,
        counts={},
        seconds=float(math.ceil(seconds)),
        noise_multiplier=protection.round.noise_multiplier,
        sampling_rate=protection.round.sampling_rate,
    )
    sent = contribution(manifest, envelope.tensors, after, start.accepted)
    moved = replace(state, last_round=start.round, checked=state.checked | phase)
    return Envelope(header=header, tensors=sent), _keeping(moved, manifest, after, start.accepted)


def _keeping(state: SiteState, manifest: Manifest, after: AdapterState, accepted: int) -> SiteState:
    """The state with the trained pairs where the round has a second sum, and without any where it has none."""
    second = projection_shapes(manifest, {name: array.shape for name, array in after.items()}, accepted)
    return replace(state, kept=tensors_to_bytes(products(after)) if second else b"")


def project(envelope: Envelope, request: Project, manifest: Manifest, state: SiteState) -> tuple[Envelope, SiteState]:
    """Answer a Project with the second part of the round's contribution, once.

    With privacy this costs nothing more: it is computed from the noised factors alone.

    Raises:
        MessageError: the site did not train in this round, or has answered already.
        AdapterError: the basis does not fit the pairs.
    """
    if request.round != state.last_round or not state.kept:
        raise MessageError(f"round {request.round} has no second sum to come from this site")
    sent = projection(scale(manifest.adapter), tensors_from_bytes(state.kept), envelope.tensors)
    header = Projected(**request.spoken_of())
    return Envelope(header=header, tensors=sent), replace(state, kept=b"")


def evaluate(envelope: Envelope, request: Evaluate, manifest: Manifest, site: SiteData, resident: Resident) -> Envelope:
    """Answer an Evaluate with counts on the site's held-out records; with privacy they stay at the site."""
    _check_adapter(envelope, request.adapter_sha256)
    resident.take(envelope.tensors)
    return Envelope(header=Evaluated(**request.spoken_of(), counts=_counts(manifest, site, resident)))


def _check_adapter(envelope: Envelope, announced: str) -> None:
    if state_digest(envelope.tensors) != announced:
        raise MessageError("the adapter in the envelope is not the one that its header announces")


def _counts(manifest: Manifest, site: SiteData, resident: Resident) -> Counts:
    if not site.held_out or manifest.privacy is not None:
        return {}
    return measure(
        resident.model,
        resident.task,
        site.held_out,
        batch_size=manifest.evaluation.batch_size,
        precision=resident.precision,
        metrics=manifest.metrics,
    )
