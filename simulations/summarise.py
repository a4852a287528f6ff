"""From what a run did to its summary: figures only, nothing is computed by a model here."""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import psutil
import torch

from client.ledger import Ledger
from client.protection import Population, mechanism
from client.units import units_of
from common.codec.packing import Lanes, bits_for
from common.config.manifest import Manifest
from common.metrics import better, figures
from common.privacy.accounting import Steps, prv_epsilon, rdp_epsilon
from common.progress import ResourcesUsed, SumOpened, WorkersPlanned
from common.secure_sum.thresholds import least_survivors, threshold
from server.coordinator import Coordinator, SiteAnswer, StoredRound
from simulations.placing import MemoryFinds
from simulations.sites import FederationData, label_counts
from simulations.slots import Plan
from simulations.summary import (
    CleaningFacts,
    ClosedSlot,
    DataFacts,
    DeviceFacts,
    Failure,
    Halving,
    MachineFacts,
    MemoryFacts,
    PrivacyFacts,
    ResourceFacts,
    RoundFacts,
    RunSummary,
    SecureSumFacts,
    SiteFacts,
    SitePrivacy,
    TableRow,
)

__all__ = [
    "compared_row",
    "comparison",
    "data_facts",
    "failures",
    "machine_facts",
    "memory_facts",
    "overfitting",
    "planned",
    "privacy_facts",
    "resource_facts",
    "round_facts",
    "secure_sum_facts",
    "site_facts",
]

Figures = dict[str, float]

# Fewest honest sites in a sum, the one that looks among them: the protocol's default.
LEAST_HONEST = 2

# Validation loss must rise by this share over its lowest value before over-fitting is named: less is noise.
RISE = 0.02


def data_facts(data: FederationData, truncated: Mapping[str, int], partitioner: str) -> DataFacts:
    """Records, units, cleaning and truncation by split."""
    splits = data.splits()
    return DataFacts(
        records={split: len(records) for split, records in splits.items()},
        units={split: len(units_of(records)) for split, records in splits.items()},
        cleaning=CleaningFacts(**vars(data.cleaning)),
        truncated=dict(truncated),
        partitioner=partitioner,
    )


def round_facts(coordinator: Coordinator, rounds: Sequence[StoredRound]) -> list[RoundFacts]:
    """The finished rounds, from round 0; `rounds` are the coordinator's with what is known of each site."""
    return [
        RoundFacts(
            round=done.number,
            train_loss=done.train_loss,
            validation=coordinator.validation(done),
            answered=len(done.answers),
            failed=len(done.failures),
            bytes_up=sum(answer.bytes_up for answer in done.answers),
            bytes_down=done.bytes_down,
            seconds=done.seconds,
            training_seconds=max((answer.seconds or 0.0 for answer in done.answers), default=0.0),
            rejected=str(done.rejected or done.lost),
        )
        for done in rounds
    ]


def failures(rounds: Sequence[StoredRound]) -> list[Failure]:
    """Every site that sat a round out, in order."""
    return [Failure(round=done.number, site=site, code=code) for done in rounds for site, code in done.failures.items()]


def site_facts(
    manifest: Manifest,
    data: FederationData,
    rounds: Sequence[StoredRound],
    alone: Mapping[str, Figures],
    alone_held_out: Mapping[str, Figures],
) -> list[SiteFacts]:
    """One row for each site."""
    facts = []
    by_site: dict[str, dict[int, SiteAnswer]] = {}
    for done in rounds:
        for answer in done.answers:
            by_site.setdefault(answer.site, {})[done.number] = answer
    for site, records in data.train.items():
        answers = by_site.get(site, {})
        measured = [done.counts.get(site) for done in rounds]
        held_out = data.held_out.get(site, [])
        facts.append(
            SiteFacts(
                name=site,
                records=len(records),
                held_out=len(held_out),
                units=len(units_of(records)),
                labels=label_counts(records),
                train_loss=[answers[done.number].loss if done.number in answers else None for done in rounds[1:]],
                validation=[
                    figures(manifest.task.kind, counts, manifest.metrics) if counts else None for counts in measured
                ],
                seconds=sum(answer.seconds or 0.0 for answer in answers.values()),
                bytes_up=sum(answer.bytes_up for answer in answers.values()),
                bytes_down=sum(answer.bytes_down for answer in answers.values()),
                local_only=alone.get(site),
                local_only_held_out=alone_held_out.get(site),
            )
        )
    return facts


def privacy_facts(
    manifest: Manifest, populations: Mapping[str, Population], ledgers: Mapping[str, Path]
) -> PrivacyFacts | None:
    """What the sites' ledgers say that their units have paid; None without privacy.

    Raises:
        LedgerError: a ledger cannot be read or trusted.
    """
    section = manifest.privacy
    if section is None:
        return None
    sites = []
    for site, population in populations.items():
        spent = Ledger(ledgers[site], simulated=True).spent(population.name) if ledgers[site].exists() else []
        how = mechanism(manifest, population)
        sites.append(
            SitePrivacy(
                name=site,
                units=population.units,
                noise_multiplier=how.noise_multiplier,
                sampling_rate=how.sampling_rate,
                steps=sum(steps.count for steps in spent),
                epsilon=rdp_epsilon(spent, section.delta),
                epsilon_prv=_prv_epsilon(tuple(spent), section.delta),
            )
        )
    return PrivacyFacts(
        unit=section.unit,
        epsilon=section.epsilon,
        delta=section.delta,
        clip=section.clip,
        protects=section.unsafe_seed is None,
        sites=sites,
    )


def secure_sum_facts(manifest: Manifest, sites: int, opened: Sequence[SumOpened]) -> SecureSumFacts | None:
    """What the run's secure sums were; None where they are off."""
    section = manifest.secure_sum
    if not section.enabled:
        return None
    lanes, required = Lanes(bits_for(sites), sites), threshold(sites, section.max_colluding)
    return SecureSumFacts(
        sites=sites,
        least_survivors=least_survivors(
            required, min_sites=section.min_sites, least_honest=LEAST_HONEST, colluding=section.max_colluding
        ),
        threshold=required,
        max_colluding=section.max_colluding,
        bits=lanes.bits,
        bytes_per_value=lanes.bytes_per_value,
        sums=len(opened),
        fewest=min((len(each.survivors) for each in opened), default=None),
    )


@lru_cache(maxsize=256)
def _prv_epsilon(spent: tuple[Steps, ...], delta: float) -> float:
    """Sites with equal histories paid the same, and the figure takes a second."""
    return prv_epsilon(spent, delta)


def comparison(
    manifest: Manifest,
    *,
    untuned: Figures | None,
    alone: Mapping[str, Figures],
    federated: Figures | None,
    compared: TableRow | None,
    centralised: Figures | None,
    examples: int,
) -> list[TableRow]:
    """The rows that were measured, on the same test records.

    `examples` is what the whole federation has seen; the baselines see what it sees if no site sits a round out.
    The best site is chosen by the first metric on the test records themselves: it flatters local training, and so
    cannot flatter the federation.
    """
    metric, section = manifest.metrics[0], manifest.training
    own = section.rounds * section.local_steps * section.batch_size
    rows = [TableRow(name="untuned", figures=untuned, examples_seen=0)] if untuned else []
    if alone:
        mean = {key: sum(row[key] for row in alone.values()) / len(alone) for key in next(iter(alone.values()))}
        best = next(iter(alone.values()))
        for row in alone.values():
            best = row if better(metric, row[metric], best[metric]) else best
        rows.append(TableRow(name="local only (mean)", figures=mean, examples_seen=own))
        rows.append(TableRow(name="local only (best site)", figures=best, examples_seen=own))
    if federated:
        rows.append(TableRow(name="federated", figures=federated, examples_seen=examples))
    if compared:
        rows.append(compared)
    if centralised:
        rows.append(
            TableRow(name="centralised", figures=centralised, examples_seen=own * max(1, section.invited(len(alone))))
        )
    return rows


def compared_row(ours: Manifest, other: RunSummary) -> TableRow | None:
    """The result of the second federation, named by how its privacy differs; None where it was not measured."""
    found = [row for row in other.table if row.name == "federated"]
    if not found:
        return None
    private = other.privacy is not None
    name = "compared" if private == (ours.privacy is not None) else "private" if private else "not private"
    return TableRow.model_validate({**found[0].model_dump(), "name": f"federated, {name}"})


def overfitting(rounds: Sequence[RoundFacts], selected: int) -> str:
    """A sentence that names over-fitting, or nothing: validation loss rose while training loss fell."""
    losses = [(facts, facts.validation.get("loss", math.nan)) for facts in rounds[1:] if facts.train_loss is not None]
    known = [(facts, loss) for facts, loss in losses if math.isfinite(loss)]
    if len(known) < 2:
        return ""
    lowest, least = min(known, key=lambda pair: pair[1])
    last, final = known[-1]
    falls = last.train_loss is not None and lowest.train_loss is not None and last.train_loss < lowest.train_loss
    if not falls or final <= least * (1 + RISE):
        return ""
    advice = (
        'use fewer rounds, or evaluation.select = "best"'
        if selected == last.round
        else f"the adapter of round {selected} was selected"
    )
    return (
        f"Over-fitting: validation loss was lowest after round {lowest.round} ({least:.3f}) and rose to {final:.3f} by"
        f" round {last.round} while training loss fell; {advice}."
    )


def machine_facts(workers: int, threads: int) -> MachineFacts:
    """Where this runs."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return MachineFacts(
        cores=os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        devices=names or ["cpu"],
        workers=workers,
        threads_per_worker=threads,
        python=platform.python_version(),
        torch=torch.__version__,
    )


def planned(plan: Plan) -> WorkersPlanned:
    """The plan as an event."""
    return WorkersPlanned(workers=plan.workers, plan=tuple(plan.lines()))


def resource_facts(looks: Sequence[ResourcesUsed]) -> ResourceFacts | None:
    """Means and peaks of all looks; None without any."""
    if not looks:
        return None
    with_gpus = [look for look in looks if look.gpus]
    return ResourceFacts(
        processors=sum(look.processors for look in looks) / len(looks),
        memory=max(look.memory for look in looks),
        gpus=[sum(column) / len(with_gpus) for column in zip(*(look.gpus for look in with_gpus), strict=True)],
        gpu_memory=[max(column) for column in zip(*(look.gpu_memory for look in with_gpus), strict=True)],
    )


def memory_facts(plan: Plan, peaks: Mapping[int, int], finds: MemoryFinds) -> MemoryFacts:
    """What was planned on each device that got a worker, and what came of it; `peaks` by the device's place."""
    records = {slot.device: slot.records for slot in plan.slots}
    return MemoryFacts(
        measured=plan.footprint.measured,
        devices=[
            DeviceFacts(
                name=plan.devices[device].name,
                emulated=plan.devices[device].emulated,
                free=plan.devices[device].memory,
                workers=plan.on(device),
                records=count,
                planned=plan.footprint.at(count),
                used=peaks.get(device),
            )
            for device, count in sorted(records.items())
        ],
        notes=list(plan.notes),
        halvings=[
            Halving(round=each.round, site=each.site, before=each.before, after=each.after) for each in finds.halved
        ],
        closed_slots=[
            ClosedSlot(round=each.round, site=each.site, device=each.device, left=each.left) for each in finds.closed
        ],
    )
