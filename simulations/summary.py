"""`summary.json`: all figures of a run in one documented shape, which `report.html` is drawn from.

Figures are dictionaries from a metric's name (`accuracy`, `macro_f1`, `entity_f1`, `bits_per_byte`, `loss`, ...)
to its value. Bytes are bytes of encoded envelopes. Seconds are wall time where nothing else is said.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "BaseModelFacts",
    "CleaningFacts",
    "ClosedSlot",
    "DataFacts",
    "DeviceFacts",
    "Failure",
    "Halving",
    "MachineFacts",
    "MemoryFacts",
    "OperatorFacts",
    "PrivacyFacts",
    "ProfileFacts",
    "ResourceFacts",
    "RoundFacts",
    "RunSummary",
    "SiteFacts",
    "SitePrivacy",
    "TableRow",
    "Timing",
]

Figures = dict[str, float]


class Facts(BaseModel):
    """Part of a summary: frozen, unknown keys refused. NaN and infinity are written as strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class BaseModelFacts(Facts):
    """The base model and what is trained of it."""

    name: str
    revision: str | None
    weights_sha256: str
    parameters: int = Field(description="all parameters of base and head, without the adapter")
    trainable_parameters: int = Field(description="parameters that are trained and sent")
    precision: str = Field(description="bf16 or fp32")


class CleaningFacts(Facts):
    """What cleaning changed or removed over all splits."""

    normalised: int = Field(description="records whose text Unicode normalisation changed")
    control_characters: int = Field(description="records that lost control characters")
    duplicates: int = Field(description="records removed as exact duplicates within their unit")
    empty: int = Field(description="records removed because nothing was left of their text")


class DataFacts(Facts):
    """The data as it was read and split."""

    records: dict[str, int] = Field(description="records in train, dev and test")
    units: dict[str, int] = Field(description="privacy units in train, dev and test")
    cleaning: CleaningFacts
    truncated: dict[str, int] = Field(description="records cut to data.max_length, in train, dev and test")
    partitioner: str


class Failure(Facts):
    """A site that sat a round out."""

    round: int
    site: str
    code: str


class SiteFacts(Facts):
    """One site. `labels` counts its training records by label (entities by type); empty for causal-lm."""

    name: str
    records: int
    held_out: int
    units: int
    labels: dict[str, int]
    train_loss: list[float | None] = Field(
        description="mean loss of each round from round 1; null where it sat out, or was not invited"
    )
    validation: list[Figures | None] = Field(
        description="figures of each round's adapter on the site's held-out records, from round 0; null: unknown"
    )
    seconds: float = Field(description="time in training steps over all rounds")
    bytes_up: int
    bytes_down: int
    local_only: Figures | None = Field(description="this site training alone, measured on the test set")
    local_only_held_out: Figures | None = Field(
        None, description="this site training alone, measured on the site's own held-out records"
    )


class RoundFacts(Facts):
    """One finished round; round 0 is the first adapter, before any training."""

    round: int
    train_loss: float | None
    validation: Figures
    answered: int
    failed: int
    bytes_up: int
    bytes_down: int
    seconds: float
    training_seconds: float = Field(description="longest time that one site spent in training steps")
    rejected: str = Field(
        "", description="why a guard rejected the round, whose adapter is then that of the round before; else empty"
    )


class TableRow(Facts):
    """A row of the comparison on the test set."""

    name: Literal[
        "untuned",
        "local only (mean)",
        "local only (best site)",
        "federated",
        "federated, private",
        "federated, not private",
        "federated, compared",
        "centralised",
    ] = Field(description="'federated' is the released adapter; of the others that begin so, at most one is there")
    figures: Figures
    examples_seen: int = Field(description="training examples behind the row, repetitions counted")


class Timing(Facts):
    """Seconds of the run's parts; `total` is wall time of all."""

    startup: float
    rounds: float
    validation: float = Field(description="measuring the last round's adapter on held-out records")
    baselines: float
    comparison: float = 0.0
    test: float
    total: float


class ResourceFacts(Facts):
    """What the run used of its machine, by looks every few seconds; no figures of GPUs that nobody could ask."""

    processors: float = Field(description="mean busy share of all processors")
    memory: int = Field(description="largest resident memory of all processes, bytes; shared pages count in each")
    gpus: list[float] = Field(description="mean busy share of each GPU of the machine")
    gpu_memory: list[int] = Field(description="largest used memory of each GPU of the machine, bytes, whoever used it")


class MachineFacts(Facts):
    """Where the run ran."""

    cores: int
    memory_gib: float
    devices: list[str]
    workers: int
    threads_per_worker: int
    python: str
    torch: str


class DeviceFacts(Facts):
    """A device and what was planned on it, in bytes."""

    name: str
    emulated: bool = Field(description="true: a name and a number for trying a plan; its workers computed on the CPU")
    free: int = Field(description="memory that was free before the run")
    workers: int
    records: int = Field(description="records that a worker computed on at once, by the plan")
    planned: int = Field(description="planned peak of one worker")
    used: int | None = Field(description="largest peak of a worker; null: none told")


class Halving(Facts):
    """Memory ran out in a step, which was computed again with half of the records at once."""

    round: int
    site: str
    before: int
    after: int


class ClosedSlot(Facts):
    """Memory ran out with the halved batch too, and fewer workers computed on the device at once from then on."""

    round: int
    site: str
    device: str
    left: int


class MemoryFacts(Facts):
    """Where the workers computed, and what happened to memory. Neither changes a result but by rounding."""

    measured: bool = Field(description="whether a worker's footprint was measured before the run, or is by formula")
    devices: list[DeviceFacts]
    notes: list[str] = Field(description="what the plan left out or warns of")
    halvings: list[Halving]
    closed_slots: list[ClosedSlot]


class SitePrivacy(Facts):
    """What one site's units have paid for in this run, by the site's ledger."""

    name: str
    units: int = Field(description="privacy units as the site publishes them, rounded")
    noise_multiplier: float = Field(description="deviation of the noise over the clip")
    sampling_rate: float = Field(description="chance of a unit to be in a step")
    steps: int = Field(description="noised steps that were charged, retried rounds included")
    epsilon: float = Field(description="by Renyi differential privacy, which enforces the budget")
    epsilon_prv: float = Field(description="by privacy loss random variables, tighter")


class PrivacyFacts(Facts):
    """Differential privacy of the run: the bound holds for every unit at every site, and composes over sites."""

    unit: str = Field(description="what is protected at each site")
    epsilon: float = Field(description="what the manifest allows for the whole run")
    delta: float
    clip: float
    protects: bool = Field(description="false with an unsafe seed: who knows it takes the noise off")
    sites: list[SitePrivacy]


class ComparedFacts(Facts):
    """The second federation on the same records, which `simulation.compare` asked for."""

    run: str = Field(description="its folder, beside this file")
    settings: list[str] = Field(description="what differs, KEY=VALUE")
    privacy: PrivacyFacts | None = Field(description="null: it is not private")


class SecureSumFacts(Facts):
    """What the coordinator could learn, and over whom the sums were."""

    sites: int = Field(description="sites that a round invites: all, or training.participants")
    least_survivors: int = Field(description="fewest sites in a sum; with fewer nothing is opened")
    threshold: int = Field(description="sites that must sign one list of survivors before anything is revealed")
    max_colluding: int = Field(description="so many sites may work together with the coordinator")
    bits: int = Field(description="bits of a summed value")
    bytes_per_value: float = Field(description="bytes that a value takes on the wire")
    sums: int = Field(description="sums that were opened")
    fewest: int | None = Field(description="fewest sites in one of them; null: none was opened")


class OperatorFacts(Facts):
    """An operator of a profile: its share of all operators' own time, without what they call."""

    name: str
    words: str
    share: float
    calls: int


class ProfileFacts(Facts):
    """What `--profile` found in one site's first steps; the trace lies in `profile/trace.json` beside the summary."""

    site: str
    steps: int
    seconds: float
    device: str
    operators: list[OperatorFacts] = Field(description="the costliest ones, the costliest first")


class RunSummary(Facts):
    """A whole `summary.json`. `version` changes when a field changes its meaning."""

    version: Literal[1] = 1
    run_id: str
    federation: str
    description: str
    status: Literal["finished", "interrupted", "failed"]
    reason: str = Field("", description="why the run did not finish")
    manifest_sha256: str
    task: str
    metrics: list[str] = Field(description="reported metrics; the first one chooses between rounds")
    model: BaseModelFacts
    data: DataFacts
    aggregation: str = Field("separate", description="separate, alternate, ffa, sketch, dense, or an import path")
    measured_on: Literal["the sites' held-out records", "public records"] = Field(
        "the sites' held-out records", description="what validation figures are of"
    )
    sites: list[SiteFacts]
    rounds: list[RoundFacts] = Field(description="finished rounds from round 0")
    selected_round: int = Field(description="round whose adapter is the result")
    table: list[TableRow]
    privacy: PrivacyFacts | None = Field(None, description="null: the run is not private")
    secure_sum: SecureSumFacts | None = Field(
        None, description="null: it is off, and the coordinator sees every site's change"
    )
    compared: ComparedFacts | None = Field(None, description="null: there was no second federation")
    failures: list[Failure]
    overfitting: str = Field("", description="empty, or one sentence that names over-fitting and what to do")
    timing: Timing
    machine: MachineFacts
    resources: ResourceFacts | None = Field(None, description="null: the run was too short to be looked at")
    memory: MemoryFacts | None = Field(None, description="null: a run from before memory was planned")
    profile: ProfileFacts | None = Field(None, description="null: the run was not profiled")
    seeds: int = Field(1, description="number of seeds behind the figures")
