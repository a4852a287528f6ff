"""A whole federation on one machine: what `coadapt simulate` does, as one function.

    from pathlib import Path
    from simulations.engine import simulate

    summary = simulate(Path("federation.toml"), data=Path("data"), overrides=["training.rounds=3"])
    print(summary.table)

The order is fixed: everything that can be wrong is found before anything is written; then the run folder fills up,
round by round; at the end the test records are measured once, and summary and report are written.
"""

import contextlib
import datetime
import re
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from client.protection import mechanism
from client.resident import Resident, resident
from common.adapters import first_state, save_adapter, set_state
from common.codec.state import AdapterState, state_digest
from common.config.annotate import annotated
from common.config.loading import load_manifest
from common.config.manifest import Manifest
from common.errors import CoadaptError, ManifestError, PrivacyError, RunError
from common.evaluation import measure
from common.flower import Grid
from common.messages import Envelope, Evaluate, Evaluated, encode
from common.metrics import Counts, figures
from common.progress import (
    BaselineFinished,
    Event,
    EventLog,
    EventSink,
    PhaseStarted,
    ResourcesUsed,
    RoundStarted,
    RunStarted,
    RunStopped,
    SumOpened,
)
from server.aggregation.methods import method_for
from server.channel import Channel, FlowerChannel, Interrupted
from server.coordinator import Coordinator
from server.run_store import RunStore
from server.secure_collection import SecureCollection
from simulations import summarise
from simulations.app import client
from simulations.baselines import HELD_OUT, TEST, part_of
from simulations.devices import keep_to
from simulations.pinning import find_metrics, pinned
from simulations.placing import MemoryFinds, Placed
from simulations.planning import plan_workers, work_of
from simulations.profiling import read_profile
from simulations.report import write_report
from simulations.resources import ResourceWatch
from simulations.seats import Seats
from simulations.secure_sites import SecureSites, found_consortium, require_crowd
from simulations.sites import POOLED, FederationData, lay_out, populations, read_federation, simulation_of
from simulations.slots import Plan, more_careful
from simulations.starting import start_flower
from simulations.summary import BaseModelFacts, ComparedFacts, MemoryFacts, RunSummary, Timing
from simulations.workers import require_cluster

__all__ = ["Run", "simulate", "simulate_on"]

# How long Flower's nodes are waited for; in a simulation they are there within milliseconds.
NODES_SECONDS = 30.0

# Flower looks ten times a second for the next message to a node, so that a worker needs several nodes to be kept busy.
NODES_PER_WORKER = 16

# Folder of the second federation in that of the run.
COMPARED = "compared"

# How often answers are looked for. In one process that costs nothing, and workers wait at the end of a round.
POLL_SECONDS = 0.02


def simulate(
    manifest: Manifest | Path,
    *,
    data: Path | None = None,
    runs: Path = Path("runs"),
    run_id: str | None = None,
    overrides: Sequence[str] = (),
    baselines: bool | None = None,
    compare: Sequence[str] | None = None,
    view: EventSink | None = None,
) -> RunSummary:
    """Simulate the federation of a manifest through Flower's simulation engine, from raw files to a report.

    Args:
        manifest: a `federation.toml`, or a manifest that was loaded before.
        data: folder of the data files; the manifest's folder is looked at too (or the current one).
        runs: folder that gets a folder for this run.
        run_id: name of that folder; a new name is made of the federation's and the time.
        overrides: settings as on the command line, `training.rounds=3`.
        baselines: also train each site alone and all records in one place; None: as the manifest says.
        compare: settings of a second federation on the same records, beside `overrides`; None: as the manifest says.
        view: is called with every event.

    Returns:
        The run's summary, which also lies in `<runs>/<run_id>/summary.json`; `report.html` lies beside it. Its status
        is `interrupted` if the person pressed Ctrl-C.

    Raises:
        CoadaptError: of its tree the one that fits; what was finished before stays valid.
    """
    began = time.monotonic()
    beside = manifest.parent if isinstance(manifest, Path) else Path.cwd()
    agreed = load_manifest(manifest, overrides) if isinstance(manifest, Path) else manifest
    folders = [folder for folder in (data, beside) if folder is not None]
    run = Run.prepare(agreed, folders, began=began, baselines=baselines)
    compare = simulation_of(agreed).compare if compare is None else compare
    if compare:
        other = load_manifest(manifest, [*overrides, *compare]) if isinstance(manifest, Path) else None
        if other is None:
            raise ManifestError(
                ["simulation.compare: needs a manifest from a file, to which its settings can be applied"]
            )
        run.settings = list(compare)
        run.compared = Run.prepare(other, folders, began=began, baselines=False)
        run.compared.stop, run.compared.is_compared = run.stop, True
        run.plan = more_careful(run.plan, run.compared.plan)
    with _stop_on_signal(run.stop), run.folder(runs, run_id, view):
        with ResourceWatch(run.report, gpus=run.plan.gpu_share > 0):
            start_flower(run, client)
        return run.finish()


def simulate_on(grid: Grid, config: dict[str, str]) -> RunSummary:
    """The same inside a Flower app (`flwr run .`): `manifest`, `data` and `runs` come from the app's configuration."""
    path = Path(config["manifest"])
    folders = [Path(config["data"])] if config.get("data") else []
    run = Run.prepare(load_manifest(path), [*folders, path.parent], began=time.monotonic(), baselines=None)
    with run.folder(Path(config.get("runs") or "runs"), None, None):
        run.federate(grid)
        return run.finish()


@contextlib.contextmanager
def _stop_on_signal(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C asks the round loop to stop; a second one ends the process in the usual way."""

    def handle(number: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _Job:
    """Steps to take on a site's records from an adapter, before it is measured; none to measure it as it is."""

    site: str
    steps: int
    adapter: AdapterState


@dataclass
class Run:
    """One simulated run, from prepared data to the summary."""

    manifest: Manifest
    data: FederationData
    resident: Resident
    plan: Plan
    first: AdapterState
    truncated: dict[str, int]
    baselines: bool
    began: float
    work: dict[str, float]
    stop: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None
    alone: dict[str, dict[str, float]] = field(default_factory=dict)
    alone_held_out: dict[str, dict[str, float]] = field(default_factory=dict)
    table: dict[str, dict[str, float]] = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)
    coordinator: Coordinator | None = None
    secure_sites: SecureSites | None = None
    opened: list[SumOpened] = field(default_factory=list)
    looks: list[ResourcesUsed] = field(default_factory=list)
    seats: Seats | None = None
    placed: Placed | None = None
    sinks: list[EventSink] = field(default_factory=list)
    sites: dict[str, Path] = field(default_factory=dict)
    compared: "Run | None" = None
    round: int = 0
    is_compared: bool = False
    compared_summary: RunSummary | None = None
    settings: list[str] = field(default_factory=list)

    @classmethod
    def prepare(cls, manifest: Manifest, folders: Sequence[Path], *, began: float, baselines: bool | None) -> "Run":
        """Read and check everything; nothing is written and no process is started."""
        simulation = simulation_of(manifest)
        find_metrics(manifest, folders[-1])
        data = read_federation(manifest, folders)
        require_crowd(manifest, len(data.train))
        for site, population in populations(manifest, data).items():
            try:
                mechanism(manifest, population)
            except PrivacyError as error:
                raise PrivacyError(f"site {site!r}: {error}") from error
        if simulation.ray_address is not None:
            require_cluster(simulation.ray_address)
        manifest = pinned(manifest)
        keep_to(simulation)
        model = resident(manifest)
        encoded = {split: model.task.encode(records) for split, records in data.splits().items()}
        first = first_state(model.model, manifest.training.seed)
        method_for(manifest, {name: array.shape for name, array in first.items()})  # refuses a base too large for it
        return cls(
            manifest=manifest,
            data=data,
            resident=model,
            plan=plan_workers(manifest, simulation, model, sites=manifest.training.invited(len(data.train))),
            first=first,
            truncated={split: each.truncated for split, each in encoded.items()},
            baselines=simulation.baselines if baselines is None else baselines,
            began=began,
            work=work_of(manifest, data, encoded["train"].examples),
        )

    @contextlib.contextmanager
    def folder(self, runs: Path, run_id: str | None, view: EventSink | None) -> Iterator[None]:
        """Open the run's folder and event stream, and lay out the sites' files until the run ends."""
        self.run_id = run_id or _new_run_id(self.manifest.name)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.run_id):
            raise RunError(f"a run id is letters, digits, '.', '_' and '-', found {self.run_id!r}")
        self.store = RunStore(runs / self.run_id, self._write_adapter)
        self.store.write("federation.toml", annotated(self.manifest))
        log = EventLog(self.store.folder / "events.jsonl")
        self.sinks = [log, view] if view else [log]
        with contextlib.ExitStack() as stack:
            stack.callback(log.close)
            self.root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coadapt-sites-")))
            self.sites = lay_out(self.root, self.manifest, self.data)
            self.report(
                RunStarted(
                    run_id=self.run_id,
                    federation=self.manifest.name,
                    sites=tuple(self.data.train),
                    rounds=self.manifest.training.rounds,
                    metrics=self.manifest.metrics,
                    trainable_parameters=sum(array.size for array in self.first.values()),
                )
            )
            if self.compared is not None:
                stack.enter_context(self.compared.folder(self.store.folder, COMPARED, None))
            self.report(PhaseStarted(phase="start-up"))
            yield

    def take_places(self, plan: Plan, seats: Seats | None) -> None:
        """Learn where the workers compute, for the compared federation too: one set of workers for both."""
        for run in filter(None, (self, self.compared)):
            run.plan, run.seats = plan, seats
            run.report(summarise.planned(plan))

    def report(self, event: Event) -> None:
        """Give an event to everyone who listens; remember when the parts of the run began."""
        if isinstance(event, PhaseStarted):
            self.marks[event.phase] = time.monotonic()
        if isinstance(event, RoundStarted):
            self.round = event.round
        if isinstance(event, ResourcesUsed):
            self.looks.append(event)
        if isinstance(event, SumOpened):
            self.opened.append(event)
        for sink in self.sinks:
            sink(event)

    def _write_adapter(self, folder: Path, adapter: AdapterState) -> None:
        save_adapter(folder, self.resident.model, adapter, self.resident.base, self.manifest)

    def federate(self, grid: Grid) -> None:
        """The rounds, the trained baselines, and the test; whatever stops them is kept for `finish`."""
        try:
            self._rounds(grid)
            if self.baselines:
                self._train_baselines(grid)
            if self.compared is not None:
                self.report(PhaseStarted(phase="comparison"))
                self.compared.federate(grid)
                if self.compared.failure is not None:
                    raise self.compared.failure
            if self.data.test:
                self.report(PhaseStarted(phase="test"))
                adapters = {"federated": self.store.load_round(self._selected())}
                if not self.is_compared:  # what it is compared with has that row
                    adapters["untuned"] = self.first
                self._measure_on_test(grid, {name: _Job(POOLED, 0, adapter) for name, adapter in adapters.items()})
        except (CoadaptError, Interrupted) as error:
            self.failure = error

    def _rounds(self, grid: Grid) -> None:
        self.report(PhaseStarted(phase="rounds"))
        channel = self._placed(grid)
        sums = None
        if self.manifest.secure_sum.enabled:
            consortium = found_consortium(self.manifest, list(self.data.train))
            self.secure_sites = SecureSites(channel, consortium.sites, self.report)
            sums = SecureCollection(
                self.manifest,
                identity=consortium.coordinator,
                roster=consortium.roster,
                sites=list(self.data.train),
                shapes={name: array.shape for name, array in self.first.items()},
                channel=self.secure_sites,
                report=self.report,
            )
        self.coordinator = Coordinator(
            self.manifest,
            run_id=self.run_id,
            sites=list(self.data.train),
            first=self.first,
            channel=channel,
            sums=sums,
            store=self.store,
            report=self.report,
            public=self._measure_public if self.data.public else None,
        )
        self.store.save_result(self.coordinator.run())

    def _placed(self, grid: Grid) -> Channel:
        """The channel of the rounds, which looks after workers and memory where this run started them."""
        jobs = {site: _Job(site, 0, {}) for site in self.data.train}
        free = self._channel(grid, jobs)
        if self.seats is None:
            return free
        self.placed = Placed(
            free,
            self._channel(grid, jobs, in_flight=self.plan.workers),
            self._channel(grid, jobs, again=True),
            work=self.work,
            plan=self.plan,
            seats=self.seats,
            report=self.report,
            number=lambda: self.round,
        )
        return self.placed

    def _measure_public(self, adapter: AdapterState) -> Counts:
        """Counts of an adapter on the public records, in this process: they are nobody's secret."""
        model, section = self.resident, self.manifest.evaluation
        set_state(model.model, adapter)
        return measure(
            model.model,
            model.task,
            model.task.encode(self.data.public[: section.max_records]).examples,
            batch_size=section.batch_size,
            precision=model.precision,
            metrics=self.manifest.metrics,
        )

    def _channel(
        self, grid: Grid, jobs: Mapping[str, "_Job"], *, in_flight: int | None = None, again: bool = False
    ) -> FlowerChannel:
        """Jobs by name on Flower's nodes, so many at once: in a simulation only a job's notes tell who a node is.

        They also tell of a job that comes `again` since memory ran out before anything of it left.
        """
        nodes = self._nodes(grid)
        run = self.store.folder.resolve()
        notes = {
            name: {
                "site": job.site,
                "folder": str(self.sites[job.site]),
                "log": str(run / "site-logs" / f"{self.sites[job.site].name}.log"),
                "ledger": str(run / "ledgers" / self.sites[job.site].name),
                "steps": str(job.steps),
                **({"again": "yes"} if again else {}),
            }
            for name, job in jobs.items()
        }
        most = in_flight or len(nodes)
        return FlowerChannel(grid, nodes, stop=self.stop, notes=notes, in_flight=most, poll_seconds=POLL_SECONDS)

    @property
    def nodes(self) -> int:
        """Flower nodes, each of which plays one site at a time. Requests to more would only lie in the memory."""
        invited = self.manifest.training.invited(len(self.data.train))
        own = min(invited, NODES_PER_WORKER * self.plan.workers)
        return own if self.compared is None else max(own, self.compared.nodes)

    def _nodes(self, grid: Grid) -> list[int]:
        """Flower's nodes. It starts the rounds before it has made them all, so they are waited for."""
        deadline = time.monotonic() + NODES_SECONDS
        while len(nodes := sorted(grid.get_node_ids())) < self.nodes:
            if time.monotonic() > deadline:
                raise RunError(
                    f"the run needs {self.nodes} Flower nodes, found {len(nodes)};"
                    f" start with --federation-config num-supernodes={self.nodes}"
                )
            if self.stop.wait(0.02):
                raise Interrupted
        return nodes

    def _train_baselines(self, grid: Grid) -> None:
        """All records in one place, and every site alone; the longest training is sent off first."""
        self.report(PhaseStarted(phase="baselines"))
        own = self.manifest.training.rounds * self.manifest.training.local_steps
        invited = self.manifest.training.invited(len(self.data.train))
        jobs = {"centralised": _Job(POOLED, own * invited, self.first)}
        jobs |= {f"local:{site}": _Job(site, own, self.first) for site in self.data.train}
        self._measure_on_test(grid, jobs)

    def _measure_on_test(self, grid: Grid, jobs: Mapping[str, "_Job"]) -> None:
        """Have jobs done in the workers and keep their figures on the test records, which each job measures once."""
        channel = self._channel(grid, jobs, in_flight=self.plan.workers)
        requests = {name: self._request(job.adapter) for name, job in jobs.items()}
        for reply in channel.exchange(requests, kind="query.baseline"):
            answer = reply.envelope.header if reply.envelope else None
            if not isinstance(answer, Evaluated):
                raise RunError(
                    f"measuring {reply.site!r} on the test records failed ({reply.code or 'message'});"
                    f" the error is in {self.store.folder / 'site-logs'}"
                )
            values = self._figures(part_of(answer.counts, TEST))
            site = jobs[reply.site].site
            if reply.site == f"local:{site}":
                self.alone[site] = values
                held_out = part_of(answer.counts, HELD_OUT)
                if held_out:
                    self.alone_held_out[site] = self._figures(held_out)
            else:
                self.table[reply.site] = values
            self.report(BaselineFinished(baseline=reply.site, figures=values))

    def _request(self, adapter: AdapterState) -> bytes:
        header = Evaluate(
            manifest_sha256=self.manifest.digest(), run_id=self.run_id, round=0, adapter_sha256=state_digest(adapter)
        )
        return encode(Envelope(header=header, tensors=adapter))

    def _figures(self, counts: dict[str, float]) -> dict[str, float]:
        return figures(self.manifest.task.kind, counts, self.manifest.metrics)

    def _selected(self) -> int:
        return self.coordinator.selected_round() if self.coordinator else 0

    def finish(self) -> RunSummary:
        """Write summary and report; raise what stopped the run."""
        if self.compared is not None:
            with contextlib.suppress(CoadaptError):  # what stopped it stopped this run too, and is told below
                self.compared_summary = self.compared.finish()
        if self.failure is None:
            return self._write("finished", "")
        if isinstance(self.failure, Interrupted):
            return self._write("interrupted", "stopped by the person")
        with contextlib.suppress(RunError):  # a full disk may be what stopped the run: then say that, once
            self._write("failed", str(self.failure))
        raise self.failure

    def _write(self, status: Literal["finished", "interrupted", "failed"], reason: str) -> RunSummary:
        self.report(PhaseStarted(phase="report"))
        summary = self._summary(status, reason)
        self.store.write("summary.json", summary.model_dump_json(indent=2) + "\n")
        write_report(summary, self.store.folder / "report.html")
        self.report(RunStopped(status=status, reason=reason))
        return summary

    def _summary(self, status: Literal["finished", "interrupted", "failed"], reason: str) -> RunSummary:
        done = self.coordinator.rounds if self.coordinator else []
        done = self.secure_sites.as_seen(done) if self.secure_sites else done
        rounds = summarise.round_facts(self.coordinator, done) if self.coordinator else []
        model, manifest, other = self.resident.model, self.manifest, self.compared_summary
        trainable = sum(array.size for array in self.first.values())
        everything = sum(parameter.numel() for parameter in model.parameters())
        return RunSummary(
            run_id=self.run_id,
            federation=manifest.name,
            description=manifest.description,
            status=status,
            reason=reason,
            manifest_sha256=manifest.digest(),
            task=manifest.task.kind,
            metrics=list(manifest.metrics),
            model=BaseModelFacts(
                name=manifest.model.base,
                revision=manifest.model.revision,
                weights_sha256=self.resident.base.weights_sha256,
                parameters=everything - trainable,
                trainable_parameters=trainable,
                precision=self.resident.precision,
            ),
            data=summarise.data_facts(self.data, self.truncated, simulation_of(manifest).partitioner),
            aggregation=manifest.aggregation_method,
            measured_on="public records" if self.data.public else "the sites' held-out records",
            sites=summarise.site_facts(manifest, self.data, done, self.alone, self.alone_held_out),
            rounds=rounds,
            selected_round=self._selected(),
            table=summarise.comparison(
                manifest,
                untuned=self.table.get("untuned"),
                alone=self.alone,
                federated=self.table.get("federated"),
                compared=summarise.compared_row(manifest, other) if other else None,
                centralised=self.table.get("centralised"),
                examples=sum(answer.examples for each in done for answer in each.answers),
            ),
            compared=ComparedFacts(run=other.run_id, settings=self.settings, privacy=other.privacy) if other else None,
            failures=summarise.failures(done),
            privacy=summarise.privacy_facts(manifest, populations(manifest, self.data), self._ledgers()),
            secure_sum=summarise.secure_sum_facts(
                manifest, manifest.training.invited(len(self.data.train)), self.opened
            ),
            overfitting=summarise.overfitting(rounds, self._selected()),
            timing=self._timing(),
            resources=summarise.resource_facts(self.looks),
            machine=summarise.machine_facts(self.plan.workers, self.plan.threads),
            memory=self._memory(),
            profile=read_profile(self.store.folder),
        )

    def _memory(self) -> MemoryFacts | None:
        """None where others placed the workers: a cluster, or Flower itself."""
        if self.seats is None:
            return None
        return summarise.memory_facts(
            self.plan, self.seats.peaks(), self.placed.finds if self.placed else MemoryFinds()
        )

    def _ledgers(self) -> dict[str, Path]:
        return {site: self.store.folder / "ledgers" / folder.name for site, folder in self.sites.items()}

    def _timing(self) -> Timing:
        order = ["rounds", "validation", "baselines", "comparison", "test", "report"]
        marks = {phase: self.marks[phase] for phase in order if phase in self.marks}
        ends = [*list(marks.values())[1:], time.monotonic()]
        spans = {phase: end - start for (phase, start), end in zip(marks.items(), ends, strict=True)}
        startup = next(iter(marks.values()), time.monotonic()) - self.began
        parts = {phase: spans.get(phase, 0.0) for phase in order[:-1]}
        return Timing(startup=startup, total=time.monotonic() - self.began, **parts)


def _new_run_id(name: str) -> str:
    now = datetime.datetime.now(datetime.UTC)
    return f"{name}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
