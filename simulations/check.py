"""`coadapt check`: validates a manifest and says what would happen, before anything happens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.protection import mechanism
from client.resident import Resident, resident
from common.adapters import first_state
from common.codec.layout import Layout
from common.codec.state import AdapterState, state_digest
from common.codec.vector import VectorSpec
from common.config.loading import load_manifest
from common.config.manifest import Manifest
from common.contribution import contribution_shapes, projection_shapes
from common.messages import Envelope, Evaluate, encode
from server.aggregation.methods import method_for
from simulations.devices import keep_to
from simulations.footprint import PROCESS_BYTES, training_bytes
from simulations.pinning import find_metrics, pinned
from simulations.planning import plan_workers, would_need
from simulations.secure_sites import require_crowd
from simulations.sites import FederationData, label_counts, populations, read_federation
from simulations.summarise import secure_sum_facts
from simulations.wording import count_text, size_text

__all__ = ["print_check", "training_bytes"]


def print_check(path: Path, *, data: Path | None, overrides: Sequence[str], console: Console) -> None:
    """Print sites, rounds, trainable parameters, bytes of a round and memory.

    Raises:
        CoadaptError: whatever would stop the run: manifest, base, data or partition.
    """
    manifest = load_manifest(path, overrides)
    folders = [folder for folder in (data, path.parent) if folder is not None]
    find_metrics(manifest, folders[-1])
    federation = read_federation(manifest, folders) if manifest.simulation else None
    everyone = len(federation.train) if federation else None
    if everyone is not None:
        require_crowd(manifest, everyone)
    sites = None if everyone is None else manifest.training.invited(everyone)
    manifest = pinned(manifest)
    if manifest.simulation:
        keep_to(manifest.simulation)
    model = resident(manifest)
    state = first_state(model.model, manifest.training.seed)
    header = Evaluate(manifest_sha256=manifest.digest(), run_id="check", round=0, adapter_sha256=state_digest(state))
    down = len(encode(Envelope(header=header, tensors=state)))
    up = [bytes_up(manifest, state, header, accepted, sites=sites) for accepted in range(manifest.training.rounds)]
    # Rounds that train other parts send other numbers of values; the last two rounds show both of `alternate`'s.
    each_up = " or ".join(dict.fromkeys(map(size_text, sorted(up[-2:]))))
    section, everything = manifest.training, sum(parameter.numel() for parameter in model.model.parameters())
    trainable = sum(array.size for array in state.values())
    examples = section.rounds * section.local_steps * section.batch_size
    most = "" if sites == everyone else "at most "
    rows = [
        ("federation", manifest.name),
        ("manifest digest", manifest.digest()),
        ("task", manifest.task.kind + (f", {len(manifest.task.labels)} labels" if manifest.task.labels else "")),
        ("base", f"{manifest.model.base}, {count_text(everything - trainable)} parameters"),
        ("weights digest", str(manifest.model.weights_sha256)),
        ("trainable", f"{count_text(trainable)} parameters, {100 * trainable / everything:.2f} % of all"),
        ("rounds", f"{section.rounds} of {section.local_steps} steps of {section.batch_size} records"),
        *([("participants", f"{sites} of {everyone} sites in a round")] if sites != everyone else []),
        ("each site sees", f"{most}{count_text(examples)} examples, repetitions counted"),
        ("aggregation", _aggregation(manifest, state)),
        ("secure sum", _secure_sum(manifest, sites)),
        ("bytes of a round", f"{size_text(down)} down and {each_up} up for each site"),
    ]
    if sites is not None:
        each = "" if sites == everyone else " a round"
        rows.append(
            ("bytes of the run", f"{size_text((down * section.rounds + sum(up)) * sites)} for {sites} sites{each}")
        )
    if federation and manifest.privacy is not None:
        rows.append(("privacy", _privacy(manifest, federation)))
    rows.extend(_memory(manifest, model, sites))
    for name, value in rows:
        console.print(f"{name:<18}{value}", soft_wrap=True, highlight=False, markup=False)
    if federation:
        console.print()
        console.print(_site_table(manifest, federation.train, federation.held_out, len(federation.test)))


def bytes_up(manifest: Manifest, state: AdapterState, header: Evaluate, accepted: int, *, sites: int | None) -> int:
    """Bytes that a site sends in the round that follows on `accepted` aggregations, of both sums where there are two.

    The metrics that a site may send beside its tensors are left out, and so are the keys and shares of a secure sum,
    about 130 bytes for each other site. Without a number of sites the sum is one of three.
    """
    shapes = {name: array.shape for name, array in state.items()}
    sent = (make(manifest, shapes, accepted) for make in (contribution_shapes, projection_shapes))
    if manifest.secure_sum.enabled:
        crowd = sites or manifest.secure_sum.min_sites
        layouts = (Layout(tuple(sorted(each.items()))) for each in sent if each)
        return sum(8 * VectorSpec.of(layout, 1.0, crowd).words for layout in layouts)
    return sum(
        len(
            encode(Envelope(header=header, tensors={name: np.zeros(shape, np.float32) for name, shape in each.items()}))
        )
        for each in sent
        if each
    )


def _memory(manifest: Manifest, model: Resident, sites: int | None) -> list[tuple[str, str]]:
    """What a site needs; in a simulation what fits where, and what would with other settings.

    Raises:
        RunError: no device has room for a worker; it says what would fit.
    """
    if manifest.simulation is None or sites is None:
        memory = training_bytes(manifest, model) + PROCESS_BYTES
        return [("memory", f"about {size_text(memory)} for a site that trains (an estimate)")]
    plan = plan_workers(manifest, manifest.simulation, model, sites=sites)
    needed = plan.footprint.at(plan.slots[0].records)
    how = "measured" if plan.footprint.measured else "an estimate"
    would = would_need(manifest, model, on_gpu=plan.devices[0].is_gpu)
    others = [f"{size_text(each.at(plan.slots[0].records))} with {name}" for name, each in would.items()]
    rows = [("memory", f"about {size_text(needed)} for a site that trains ({how})")]
    if others:
        rows.append(("would need", f"by formula {'; '.join(others)}"))
    rows.append(("workers", f"{plan.workers} with {plan.threads} {'thread' if plan.threads == 1 else 'threads'} each"))
    return [*rows, *(("", line) for line in plan.lines())]


def _secure_sum(manifest: Manifest, sites: int | None) -> str:
    if not manifest.secure_sum.enabled:
        return "off: the coordinator sees every site's change"
    crowd = sites or manifest.secure_sum.min_sites
    facts = secure_sum_facts(manifest, crowd, ())
    if facts is None or sites is None:
        return f"on, among {crowd} sites or more"
    return (
        f"over at least {facts.least_survivors} of {sites} sites; {facts.bits} bits and {facts.bytes_per_value:.2f}"
        " bytes a value"
    )


def _aggregation(manifest: Manifest, state: AdapterState) -> str:
    """The method and what it declares; an AdapterError or ExtensionError where it cannot be used."""
    facts = method_for(manifest, {name: array.shape for name, array in state.items()}).facts
    auto = " (auto)" if manifest.aggregation.method == "auto" else ""
    needs = "each site's own change" if facts.needs == "individual" else f"{facts.sums} sum{'s' * (facts.sums > 1)}"
    own = manifest.simulation.ranks if manifest.simulation else ()
    ranks = ", ".join(map(str, own)) if own else "may differ" if facts.mixed_ranks else "must be equal"
    return f"{facts.name}{auto}; needs {needs}; exact: {facts.exact}; ranks {ranks}"


def _privacy(manifest: Manifest, federation: FederationData) -> str:
    """What the noise will be; a PrivacyError where a site could not give the privacy that is asked for."""
    if manifest.privacy is None:
        return "none"
    noise = [mechanism(manifest, each).noise_multiplier for each in populations(manifest, federation).values()]
    return (
        f"epsilon {manifest.privacy.epsilon:g} at delta {manifest.privacy.delta:g} for each {manifest.privacy.unit} and"
        f" site; noise over clip {min(noise):.2f} to {max(noise):.2f}"
    )


def _site_table(manifest: Manifest, train, held_out, test: int) -> Table:  # type: ignore[no-untyped-def]
    table = Table(box=None, pad_edge=False)
    for heading in ("site", "training records", "held out", "labels"):
        table.add_column(heading, justify="left" if heading == "site" else "right")
    for site, records in train.items():
        labels = f"{len(label_counts(records))} of {len(manifest.task.labels)}" if manifest.task.labels else "-"
        table.add_row(escape(site), count_text(len(records)), count_text(len(held_out.get(site, []))), labels)
    table.caption = f"{count_text(test)} test records"
    return table
