"""The federation manifest: everything that the sides must agree on, as one frozen model.

This file knows the fields, their units and ranges. Reading TOML, `--set` and error lines are in
`loading.py`; the annotated file of `coadapt init` is written from these descriptions in `annotate.py`.
"""

import hashlib
import json
import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from common.config.distillation import DistillationSection
from common.config.section import Commit, FileName, Fraction, ImportPath, Name, Section, Sha256
from common.config.simulation import SimulationSection
from common.config.training import TrainingSection

__all__ = [
    "DEFAULT_BASE",
    "DEFAULT_REVISION",
    "DEFAULT_WEIGHTS_SHA256",
    "METRICS",
    "MIXED_RANKS",
    "PAIRED",
    "AdapterMethod",
    "AdapterSection",
    "AggregationSection",
    "DataSection",
    "EvaluationSection",
    "Manifest",
    "ModelSection",
    "PrivacySection",
    "SecureSumSection",
    "TaskSection",
]

DEFAULT_BASE = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
DEFAULT_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

TaskKind = Literal["text-classification", "token-classification", "causal-lm"]

# The built-in metrics of each task; the first is the default for choosing between rounds.
METRICS: dict[str, tuple[str, ...]] = {
    "text-classification": ("accuracy", "macro_f1", "loss"),
    "token-classification": ("entity_f1", "entity_precision", "entity_recall", "loss"),
    "causal-lm": ("bits_per_byte", "perplexity", "loss"),
}
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte"})

# Adapter methods whose tensors are pairs B, A with the update scale x B A. DoRA has pairs too, but divides by a norm of
# base and update together, so that its function is not linear in their product.
PAIRED = ("lora", "qlora", "rslora", "lora+prompt")

# Methods of aggregation that average products, so that a site may train pairs of a smaller rank.
MIXED_RANKS = ("sketch", "dense")


class ModelSection(Section):
    """The base model, pinned by content."""

    base: str = Field(
        DEFAULT_BASE,
        min_length=1,
        description="hub id of the base model, or a local directory (absolute, or relative to this file)",
    )
    revision: Commit | None = Field(
        None, description="commit of the hub repository, 40 hex digits; required for a hub id, not used for a directory"
    )
    weights_sha256: Sha256 | None = Field(
        None,
        description="SHA-256 of the base's safetensors weights (of several files: of their sorted 'name:sha256' lines);"
        " required for a hub id, filled in by `coadapt init`",
    )
    tokenizer_sha256: Sha256 | None = Field(
        None,
        description="SHA-256 of tokenizer.json, or of the sorted 'name:sha256' lines of the other tokenizer files",
    )
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        "auto",
        description="how token vectors become one vector for classification;"
        " auto: as the base's own files say, else mean for encoders and last for causal models",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_base_is_pinned(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("base", DEFAULT_BASE) == DEFAULT_BASE:
            pins: dict[str, str] = {"revision": DEFAULT_REVISION}
            if values.get("revision") in (None, DEFAULT_REVISION):
                pins["weights_sha256"] = DEFAULT_WEIGHTS_SHA256
            given = {key: value for key, value in values.items() if value is not None}
            return {**pins, **given}
        return values


class TaskSection(Section):
    """What the model learns to do."""

    kind: TaskKind = Field(description="what the model learns to do")
    labels: tuple[str, ...] = Field(
        (),
        description="ordered list of labels; for token-classification the entity types, of which the BIO tags"
        " O, B-x, I-x are made; empty for causal-lm",
    )
    prompt: str = Field(
        "auto",
        description="causal-lm: template of the prompt with {instruction} and {input};"
        " auto: the tokenizer's chat template, or a built-in one where it has none",
    )
    prompt_sha256: Sha256 | None = Field(
        None, description="SHA-256 of the prompt template that is in force, causal-lm only; filled in by `coadapt init`"
    )

    @property
    def tags(self) -> tuple[str, ...]:
        """The BIO tags of token classification in their agreed order: O, then B-x and I-x for each type."""
        return ("O", *(f"{prefix}-{label}" for label in self.labels for prefix in "BI"))

    @model_validator(mode="after")
    def _labels_fit_the_kind(self) -> Self:
        least = {"text-classification": 2, "token-classification": 1, "causal-lm": 0}[self.kind]
        if self.kind == "causal-lm" and self.labels:
            raise ValueError(f"labels must be empty for causal-lm, found {len(self.labels)}")
        if len(self.labels) < least:
            raise ValueError(f"labels must list at least {least} for {self.kind}, found {len(self.labels)}")
        repeated = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if repeated:
            raise ValueError(f"labels must differ from each other, found {repeated[0]!r} twice")
        if any(not label.strip() for label in self.labels):
            raise ValueError("labels must not be blank")
        if self.kind == "token-classification" and any(re.match(r"^(O$|[BI]-)", label) for label in self.labels):
            raise ValueError("labels must be entity types such as 'Disease'; the tags O, B-x and I-x are made of them")
        if self.prompt != "auto" and "{instruction}" not in self.prompt:
            raise ValueError("prompt must hold {instruction} (and may hold {input}), or be 'auto'")
        return self


class Columns(Section):
    """Names of the columns in the data files."""

    text: str = Field("text", description="text-classification: the text")
    label: str = Field("label", description="text-classification: the label, one of task.labels")
    tokens: str = Field("tokens", description="token-classification: list of words")
    tags: str = Field("tags", description="token-classification: list of BIO tags, as long as the words")
    instruction: str = Field("instruction", description="causal-lm: what is asked")
    input: str = Field("input", description="causal-lm: context of the question; the column may be missing")
    output: str = Field("output", description="causal-lm: the answer, the only part that the loss is taken on")
    unit: str = Field(
        "unit", description="the privacy unit (person, matter, document); if the column is missing each record is one"
    )
    group: str = Field("group", description="natural owner of the record, for simulations; the column may be missing")


class DataSection(Section):
    """How records are read."""

    columns: Columns = Field(default_factory=Columns, description="names of the columns in the data files")
    unicode: Literal["NFC", "NFKC", "none"] = Field("NFC", description="Unicode normalisation of every text")
    max_length: int = Field(
        128, ge=8, le=131072, description="longest input, tokens; longer ones are cut, counted and reported"
    )


AdapterMethod = Literal[
    "lora",
    "qlora",
    "prefix",
    "prompt",
    "p-tuning",
    "adapter",
    "full",
    "lora+prompt",
    "rslora",
    "dora",
    "ia3",
    "bitfit",
    "head",
]


class AdapterSection(Section):
    """What is trained on top of the base (docs/adapters.md); the task's head is trained and shipped with it."""

    method: AdapterMethod = Field("lora", description="adapter method; docs/adapters.md says what each does and needs")
    rank: int = Field(
        8, ge=1, le=1024, description="rank r of the update B A; of method adapter the bottleneck's width"
    )
    alpha: float = Field(16.0, gt=0, description="scale of the update is alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout on the adapter's input, probability")
    targets: Literal["auto"] | tuple[str, ...] = Field(
        "auto", description="names of the linear layers that get an adapter; auto: all of the base's, without the head"
    )
    virtual_tokens: int = Field(
        20, ge=1, le=1024, description="length of the trained prefix or prompt of the methods that have one, tokens"
    )

    @model_validator(mode="after")
    def _targets_are_named(self) -> Self:
        if self.targets == ():
            raise ValueError("targets must name at least one layer, or be 'auto'")
        return self

    @property
    def added_tokens(self) -> int:
        """How many places of the base's longest input the adapter takes."""
        return self.virtual_tokens if self.method in ("prefix", "prompt", "p-tuning", "lora+prompt") else 0


class PrivacySection(Section):
    """Differential privacy of every unit at its site, for the whole run; without this table there is none.

    A table [privacy.settings] may hold other settings, such as training.batch_size = 400, that take the place of the
    file's own while epsilon is finite: under noise large batches and few steps are better."""

    epsilon: float = Field(
        gt=0,
        le=1e6,
        description="most that all rounds together may cost a privacy unit at a site; inf: as if this table were not"
        " there",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="chance that the bound fails; below 1 / units at every site")
    unit: str = Field(
        "record",
        min_length=1,
        description="what is protected: record, or what the unit column names (patient, matter, contract)",
    )
    clip: float = Field(1.0, gt=0, description="largest L2 norm of a unit's gradient; larger ones are scaled")
    head_clip: float | None = Field(
        None,
        gt=0,
        description="largest L2 norm of the head's part of a unit's gradient, scaled by itself; the adapter's part has"
        " the rest, sqrt(clip^2 - head_clip^2), so the guarantee is the same; default: one bound for both",
    )
    records_per_unit: int = Field(8, ge=1, description="most records of one unit that a step looks at")
    spare_rounds: int = Field(0, ge=0, description="rounds beyond training.rounds that the budget pays for, as retries")
    unsafe_seed: int | None = Field(
        None, ge=0, description="makes noise and sampling repeatable, so that they protect nobody; for tests alone"
    )

    @model_validator(mode="after")
    def _both_parts_have_a_share(self) -> Self:
        if self.head_clip is not None and self.head_clip >= self.clip:
            raise ValueError(f"head_clip must be below clip {self.clip:g}, found {self.head_clip:g}")
        return self


class AggregationSection(Section):
    """How the coordinator combines what the sites send."""

    method: Literal["auto", "separate", "alternate", "ffa", "sketch", "dense"] | ImportPath = Field(
        "auto",
        description="how low-rank pairs B A are averaged (docs/aggregation.md): separate (A and B apart), alternate (B"
        " and A in turn), ffa (B alone), sketch (products, in two sums), dense (products), or 'module:function' of"
        " f(changes, weights) -> change; auto: alternate with privacy and low-rank pairs, else separate",
    )
    refresh_every: int | None = Field(
        None, ge=1, description="ffa: accepted rounds after which the pair is kept as it is and a new one is begun"
    )
    weighting: Literal["records", "uniform"] = Field("records", description="weight of a site in the mean")
    server_optimizer: Literal["momentum", "adam", "yogi"] = Field(
        "momentum", description="what the coordinator makes of the mean change: FedAvgM, FedAdam or FedYogi"
    )
    server_learning_rate: float = Field(
        1.0,
        gt=0,
        le=10,
        description="factor on the coordinator's step; above 1 makes up for the few steps of a round; adam and yogi"
        " need about 0.01",
    )
    server_momentum: float = Field(
        0.0, ge=0, lt=1, description="share of the last round's step that is added to this round's (FedAvgM)"
    )
    server_beta1: float = Field(0.9, ge=0, lt=1, description="adam and yogi: decay of the mean of changes")
    server_beta2: float = Field(0.99, ge=0, lt=1, description="adam and yogi: decay of the mean of squared changes")
    server_tau: float = Field(
        1e-3, gt=0, le=1, description="adam and yogi: added to the root of squared changes; smaller adapts more"
    )
    max_norm: float | None = Field(
        None, gt=0, description="largest L2 norm of the mean change; a round with a larger one is rejected"
    )
    accept_drop: float | None = Field(
        None,
        ge=0,
        description="most that the first metric on evaluation.public may worsen from the last accepted adapter; a round"
        " that worsens it more is rejected",
    )
    max_rejected: int = Field(3, ge=1, description="rounds rejected one after the other that end the run")
    average_last: int = Field(
        1,
        ge=1,
        description="rounds whose adapters' mean becomes the last round's: noise averages out; 1: the last as it is",
    )
    min_sites: int = Field(2, ge=1, description="fewest sites that must answer; with fewer the run stops")

    @model_validator(mode="after")
    def _settings_fit_the_method(self) -> Self:
        if self.refresh_every is not None and self.method != "ffa":
            raise ValueError(f"refresh_every must be left out with method {self.method!r}: it is a setting of ffa")
        if self.refresh_every is not None and self.average_last > 1:
            raise ValueError(
                "average_last must be 1 with refresh_every, which makes adapters of different sizes, found"
                f" {self.average_last}"
            )
        if self.server_momentum and self.server_optimizer != "momentum":
            raise ValueError(
                f"server_momentum must be 0 with server_optimizer {self.server_optimizer!r}, whose momentum is"
                f" server_beta1; found {self.server_momentum}"
            )
        if self.method == "sketch" and (self.server_momentum or self.server_optimizer != "momentum"):
            raise ValueError(
                "method must be another than 'sketch' with server_momentum, adam or yogi: what they remember is as"
                " large as the layers, which a sketch is there to avoid; take 'dense', or leave them out"
            )
        if self.server_optimizer != "momentum" and self.server_learning_rate >= 1:
            raise ValueError(
                f"server_learning_rate must be below 1 with server_optimizer {self.server_optimizer!r}, which moves all"
                f" values by about as much; 0.01 is usual; found {self.server_learning_rate:g}"
            )
        return self


class SecureSumSection(Section):
    """The coordinator learns the sum over all sites and nothing about one of them (docs/secure-sum.md)."""

    enabled: bool = Field(
        True, description="whether sites mask what they send; without it the coordinator sees every site's change"
    )
    min_sites: int = Field(
        3, ge=2, le=2048, description="fewest sites in any sum; two are refused unless unsafe_two_sites is true"
    )
    max_colluding: int = Field(
        0, ge=0, le=1024, description="so many sites may work together with the coordinator and still learn nothing"
    )
    most_records: int = Field(
        10_000,
        ge=1,
        le=2**31,
        description="records that count at most for a site's weight in the mean, with aggregation.weighting 'records'",
    )
    unsafe_two_sites: bool = Field(
        False, description="allow sums over two sites, which tell each of them the other's change"
    )

    @model_validator(mode="after")
    def _two_are_no_crowd(self) -> Self:
        if self.min_sites < 3 and not self.unsafe_two_sites:
            raise ValueError(f"min_sites must be 3 or more unless unsafe_two_sites is true, found {self.min_sites}")
        return self


class EvaluationSection(Section):
    """How the federation sees whether it learns. Choices are made on held-out records of the sites, never on test."""

    metrics: tuple[str, ...] = Field(
        (),
        description="figures to report: names of the task's metrics, or import paths 'module:function'"
        " of f(predicted, expected) -> number; empty: all of the task's",
    )
    holdout: Fraction = Field(
        0.1, description="share of each site's units kept out of training to measure on, where no dev file is given"
    )
    public: FileName | None = Field(
        None,
        description="file of public records to measure on instead, which belong to no site; with privacy nothing else"
        " is measured during a run",
    )
    public_sha256: Sha256 | None = Field(
        None,
        description="SHA-256 of the file of public records; required between institutions, so that all agree on it",
    )
    every: int = Field(1, ge=1, description="rounds from one measuring to the next; the last round is always measured")
    max_records: int = Field(500, ge=1, description="most held-out records that a site measures on in a round")
    batch_size: int = Field(64, ge=1, le=65536, description="records in one forward pass when measuring")
    select: Literal["last", "best"] = Field(
        "last", description="the round whose adapter is the result: the last, or the best on the held-out records"
    )

    @model_validator(mode="after")
    def _a_digest_is_of_a_file(self) -> Self:
        if self.public_sha256 is not None and self.public is None:
            raise ValueError("public_sha256 is the digest of the file that public names, and public names none")
        return self


class Manifest(Section):
    """A whole `federation.toml`."""

    version: Literal[1] = Field(description="version of this file's format")
    name: Name = Field(description="short name of the federation: letters, digits, '.', '_', '-'")
    description: str = Field("", description="one line for people")
    model: ModelSection = Field(default_factory=ModelSection)
    task: TaskSection
    data: DataSection = Field(default_factory=DataSection)
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    privacy: PrivacySection | None = None
    aggregation: AggregationSection = Field(default_factory=AggregationSection)
    secure_sum: SecureSumSection = Field(default_factory=SecureSumSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    distillation: DistillationSection = Field(default_factory=DistillationSection)
    simulation: SimulationSection | None = None

    @model_validator(mode="after")
    def _metrics_fit_the_task(self) -> Self:
        known = METRICS[self.task.kind]
        for metric in self.evaluation.metrics:
            if metric not in known and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", metric):
                raise ValueError(
                    f"evaluation.metrics: {metric!r} is no metric of {self.task.kind};"
                    f" known: {', '.join(known)}, or 'module:function'"
                )
        return self

    @model_validator(mode="after")
    def _the_method_fits(self) -> Self:
        headed = {"head_rounds": self.training.head_rounds, "head_learning_rate": self.training.head_learning_rate}
        if self.task.kind == "causal-lm" and (given := [name for name, value in headed.items() if value]):
            raise ValueError(f"training.{given[0]} cannot be given for causal-lm, which has no head")
        if self.task.kind == "causal-lm" and self.privacy is not None and self.privacy.head_clip is not None:
            raise ValueError("privacy.head_clip cannot be given for causal-lm, which has no head")
        if self.adapter.method == "prefix" and self.training.gradient_checkpointing:
            raise ValueError("training.gradient_checkpointing must be false with a prefix, which it would leave out")
        return self

    @model_validator(mode="after")
    def _rounds_to_average_are_there(self) -> Self:
        # Adapters of the rounds that train the head alone would pull the mean back.
        most = max(1, self.training.rounds - self.training.head_rounds)
        if self.aggregation.average_last > most:
            raise ValueError(
                f"aggregation.average_last must be at most the {most} rounds after training.head_rounds,"
                f" found {self.aggregation.average_last}"
            )
        return self

    @model_validator(mode="after")
    def _enough_sites_are_invited(self) -> Self:
        asked, least = self.training.participants, self.least_participants
        if isinstance(asked, int) and asked < least:
            raise ValueError(
                f"training.participants must be at least {least}, as secure_sum.min_sites and aggregation.min_sites"
                f" want, found {asked}"
            )
        return self

    @model_validator(mode="after")
    def _nothing_private_chooses(self) -> Self:
        if self.privacy is not None and self.evaluation.select == "best" and self.evaluation.public is None:
            raise ValueError(
                "evaluation.select must be 'last' with privacy: a choice by private records tells about them;"
                " evaluation.public names public ones"
            )
        return self

    @model_validator(mode="after")
    def _the_aggregation_fits(self) -> Self:
        method, adapter = self.aggregation.method, self.adapter.method
        if method in ("alternate", "ffa", "sketch", "dense") and adapter not in PAIRED:
            raise ValueError(
                f"aggregation.method must be 'auto', 'separate' or 'module:function' with adapter.method {adapter!r},"
                f" found {method!r}: it averages products of low-rank pairs; such pairs have {', '.join(PAIRED)}"
            )
        ranks = self.simulation.ranks if self.simulation else ()
        if ranks and (self.aggregation_method not in MIXED_RANKS or max(ranks) > self.adapter.rank):
            raise ValueError(
                f"simulation.ranks must be at most adapter.rank = {self.adapter.rank}, with aggregation.method"
                f" {' or '.join(map(repr, MIXED_RANKS))}, found {list(ranks)} with {self.aggregation_method!r}"
            )
        if ":" in method and self.secure_sum.enabled:
            raise ValueError(
                f"aggregation.method must be one of the built-in ones with secure_sum.enabled, found {method!r}: it"
                " needs every site's change, and the coordinator learns their sum alone; choose 'auto', or turn the"
                " secure sum off"
            )
        if self.aggregation.accept_drop is not None and self.evaluation.public is None:
            raise ValueError(
                "aggregation.accept_drop: needs evaluation.public, a file of public records to measure a round's"
                " adapter on; without one, aggregation.max_norm guards"
            )
        return self

    @property
    def least_participants(self) -> int:
        """Fewest sites that a round must invite, where it does not invite all."""
        crowd = self.secure_sum.min_sites if self.secure_sum.enabled else 1
        return max(crowd, self.aggregation.min_sites)

    @property
    def aggregation_method(self) -> str:
        """The method of aggregation, with the choice that 'auto' makes."""
        if self.aggregation.method != "auto":
            return self.aggregation.method
        return "alternate" if self.privacy is not None and self.adapter.method in PAIRED else "separate"

    @property
    def need_unit(self) -> bool:
        """Whether data must name the unit of every record: what is protected is more than the record itself."""
        return self.privacy is not None and self.privacy.unit != "record"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The figures to report, the first of which chooses between rounds."""
        return self.evaluation.metrics or METRICS[self.task.kind]

    def digest(self) -> str:
        """SHA-256 in hex of everything agreed: the canonical JSON without the `simulation` table.

        Where a side finds a base whose weights are pinned is its own business, so its name is left out then.
        """
        agreed = self.model_dump(mode="json", exclude={"simulation"})
        if self.model.weights_sha256 is not None:
            del agreed["model"]["base"], agreed["model"]["revision"]
        return hashlib.sha256(json.dumps(agreed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
