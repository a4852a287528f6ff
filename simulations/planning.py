"""Plans a run's workers on this machine: devices found, a footprint, and the planner's answer. Nothing is started."""

import os
from collections.abc import Sequence
from itertools import islice

from client.resident import Resident
from client.training.physical import physical_records
from common.config.manifest import Manifest
from common.config.simulation import SimulationSection
from common.tasks.task import Example
from simulations.devices import find_devices
from simulations.footprint import estimated, footprint_for
from simulations.sites import FederationData
from simulations.slots import Footprint, Plan, on_cluster, plan_slots

__all__ = ["plan_workers", "work_of", "would_need"]

# A forward pass costs a third of what training on the record costs (Kaplan et al. 2020, section 2.1).
MEASURING = 1 / 3


def plan_workers(manifest: Manifest, section: SimulationSection, model: Resident, *, sites: int) -> Plan:
    """How many sites train at the same time, and where.

    Raises:
        RunError: devices that are asked for are not there, or hold no worker.
    """
    records = physical_records(manifest.training)
    if section.ray_address is not None:
        return on_cluster(section.ray_address, estimated(manifest, model, on_gpu=False), records=records)
    devices = find_devices(section)
    cores = os.cpu_count() or 1
    wanted = max(cores, len(devices)) if section.workers == "auto" else section.workers
    return plan_slots(
        devices,
        footprint_for(manifest, model, devices, workers=min(wanted, sites)),
        sites=sites,
        cores=cores,
        batch=records,
        workers=section.workers,
        slots_per_gpu=section.slots_per_gpu,
        would=would_need(manifest, model, on_gpu=devices[0].is_gpu),
    )


def would_need(manifest: Manifest, model: Resident, *, on_gpu: bool) -> dict[str, Footprint]:
    """Footprints by formula with settings that save memory, by these settings."""
    quantised, checkpointed = manifest.adapter.method == "qlora", manifest.training.gradient_checkpointing
    would = {}
    if not quantised:
        would['adapter.method = "qlora" (a base in 4 bit)'] = estimated(manifest, model, on_gpu=on_gpu, four_bit=True)
    if not checkpointed:
        would["training.gradient_checkpointing = true"] = estimated(manifest, model, on_gpu=on_gpu, checkpointing=True)
    if not quantised and not checkpointed:
        would["both"] = estimated(manifest, model, on_gpu=on_gpu, four_bit=True, checkpointing=True)
    return would


def work_of(manifest: Manifest, data: FederationData, examples: Sequence[Example]) -> dict[str, float]:
    """What each site does in a round, in tokens that are trained on.

    All take the same steps, so the mean length of a site's records, and what it measures on, tell them apart.
    `examples` are the training records of all sites in their order.
    """
    section, measured = manifest.training, manifest.evaluation
    trained = section.local_steps * section.batch_size
    work, rest = {}, iter(examples)
    for site, records in data.train.items():
        length = sum(len(example.tokens) for example in islice(rest, len(records))) / max(1, len(records))
        held_out = 0 if manifest.privacy is not None else min(len(data.held_out.get(site, [])), measured.max_records)
        work[site] = length * (trained + MEASURING * held_out)
    return work
