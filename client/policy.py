"""The site policy (`site.toml`): what one institution's data is, how much privacy may be spent on it, what it allows.

The site enforces it; a coordinator cannot loosen it. Folders and files in it count from the policy's own folder.
`client/admission.py` holds a manifest against it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from client.hours import Window
from client.protection import Population
from client.secure_site import sum_policy
from common.config.loading import load_document
from common.config.manifest import AdapterMethod, Columns, Manifest, TaskKind
from common.config.section import FileName, Name, Section, Sha256
from common.errors import DataError, PrivacyError
from common.secure_sum.config import SumPolicy

__all__ = [
    "CrowdPolicy",
    "DataPolicy",
    "LimitsPolicy",
    "PopulationPolicy",
    "SitePolicy",
    "TrainingPolicy",
    "load_policy",
]


class DataPolicy(Section):
    """Where the records are."""

    train: FileName = Field(description="file of the records to train on")
    held_out: FileName | None = Field(None, description="file of the records to measure on, never trained on")
    columns: Columns = Field(default_factory=Columns, description="names of the columns in these files")
    withdrawn: FileName | None = Field(
        None,
        description="file of units that withdrew, the name of one on each line: their records are read no more, what"
        " was spent on them stays in the ledger",
    )


class PopulationPolicy(Section):
    """The privacy units that own the records. They have one budget, whichever federation or file it is spent on."""

    name: str = Field(min_length=1, description="name of the population, such as 'cardiology patients'")
    unit: str = Field("record", min_length=1, description="what is protected: record, or what the unit column names")
    units: int = Field(ge=2, description="number of units as it may be published, rounded; sampling rates use it")
    epsilon: float = Field(gt=0, le=1e6, description="most that all federations together may spend on a unit")
    delta: float = Field(gt=0, lt=1, description="chance that the bound fails; below 1 / units")


class CrowdPolicy(Section):
    """Which secure sums the site is part of, and what may leave in them beside its change.

    The stricter of this and the manifest holds.
    """

    min_sites: int = Field(3, ge=3, le=2048, description="fewest sites in a sum that this site is part of")
    max_colluding: int = Field(
        0, ge=0, le=1024, description="so many sites may work together with the coordinator and still learn nothing"
    )
    metrics: Literal["summed", "none"] = Field(
        "summed",
        description="what leaves of loss and held-out counts: their sum over the sites, or nothing; none with privacy",
    )
    unsafe_unmasked: bool = Field(
        False,
        description="take part in federations without secure sums too, whose coordinator sees this site's own change",
    )


def _hours(text: str) -> str:
    Window.parse(text)
    return text


class LimitsPolicy(Section):
    """What a federation may ask for. Whatever exceeds it is refused, and the coordinator is told setting and number."""

    bases: tuple[Sha256, ...] = Field(
        (), description="weights_sha256 of the base models that may be loaded; empty: any, also one that is not pinned"
    )
    adapter_methods: tuple[AdapterMethod, ...] = Field(
        (), description="adapter methods that may be trained; empty: any"
    )
    tasks: tuple[TaskKind, ...] = Field((), description="tasks that may be trained; empty: any")
    rank: int | None = Field(None, ge=1, description="largest adapter.rank; default: any")
    rounds: int | None = Field(None, ge=1, description="most training.rounds; default: any")
    epsilon: float | None = Field(
        None,
        gt=0,
        description="largest privacy.epsilon of one federation, and none without privacy; default: what the population"
        " has left",
    )
    delta: float | None = Field(
        None, gt=0, lt=1, description="largest privacy.delta of one federation, and none without privacy; default: any"
    )
    plain_runs: int = Field(
        1,
        ge=0,
        description="runs of one manifest without privacy: what two of them sum over different sites tells what lies"
        " between",
    )
    message_bytes: int = Field(1 << 30, ge=1 << 16, description="largest order that is read, in bytes")
    fetch_bytes: int = Field(8 << 30, ge=1 << 16, description="most that `coadapt site fetch` takes of a run, in bytes")
    gpu_memory: float = Field(1.0, gt=0, le=1, description="share of the GPU's memory that may be used")
    hours: tuple[Annotated[str, AfterValidator(_hours)], ...] = Field(
        (),
        description="when training may begin, local time, such as 'mon-fri 18:00-06:00' and 'sat-sun 00:00-24:00';"
        " what goes on is not broken off; empty: always",
    )

    def windows(self) -> tuple[Window, ...]:
        """The hours, read."""
        return tuple(Window.parse(text) for text in self.hours)


class TrainingPolicy(Section):
    """How this site trains, where that is its own choice."""

    rank: int | None = Field(
        None,
        ge=1,
        description="adapter rank that this site trains, where it is smaller than the manifest's (aggregation 'sketch',"
        " 'dense')",
    )
    gpus: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="GPUs to compute on: auto (all that the vault sees), or so many of the first ones"
    )


class SitePolicy(Section):
    """A whole `site.toml`."""

    version: Literal[1] = Field(description="version of this file's format")
    name: Name = Field(description="name of the site: letters, digits, '.', '_', '-'")
    ledger: FileName = Field("ledger", description="folder of the ledger, which nobody else may write")
    data: DataPolicy
    population: PopulationPolicy
    secure_sum: CrowdPolicy = Field(default_factory=CrowdPolicy)
    training: TrainingPolicy = Field(default_factory=TrainingPolicy)
    limits: LimitsPolicy = Field(default_factory=LimitsPolicy)

    def sum_policy(self, manifest: Manifest) -> SumPolicy:
        """What the site insists on in a secure sum: the stricter of its own rules and the manifest's."""
        own, agreed = self.secure_sum, sum_policy(manifest)
        return replace(
            agreed,
            min_sites=max(own.min_sites, agreed.min_sites),
            max_colluding=max(own.max_colluding, agreed.max_colluding),
            unsafe_two_sites=False,
        )

    def account(self) -> Population:
        """The population as the ledger and the accounting know it."""
        own = self.population
        return Population(own.name, own.units, own.epsilon, own.delta)

    def withdrawn_units(self) -> frozenset[str]:
        """The units that withdrew; none where no file is named.

        Raises:
            DataError: the file cannot be read. Nothing is read then, since nobody knows whose records may be.
        """
        if self.data.withdrawn is None:
            return frozenset()
        try:
            text = Path(self.data.withdrawn).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{self.data.withdrawn} of data.withdrawn cannot be read ({type(error).__name__}); it must be UTF-8"
                " text with the name of a unit on each line, and may be empty"
            ) from error
        return frozenset(line.strip() for line in text.splitlines() if line.strip())

    def require_unit(self, manifest: Manifest) -> None:
        """Refuse a manifest that protects other units than the population consists of.

        Raises:
            PrivacyError: it does.
        """
        if manifest.privacy is not None and manifest.privacy.unit != self.population.unit:
            raise PrivacyError(
                f"the manifest protects each {manifest.privacy.unit!r}, the population {self.population.name!r} of"
                f" site.toml consists of {self.population.unit!r}: its account cannot pay; agree on one unit"
            )


def load_policy(path: Path) -> SitePolicy:
    """Read and check a policy; its files and folders come back absolute.

    Raises:
        ManifestError: with every problem, one line each.
    """
    policy = load_document(
        path, SitePolicy, advice="a site's policy says where its data is and what may be spent on it"
    )
    folder = path.absolute().parent

    def found(name: str | None) -> str | None:
        return None if name is None else str(folder / name)

    data = policy.data
    files = {"train": found(data.train), "held_out": found(data.held_out), "withdrawn": found(data.withdrawn)}
    return policy.model_copy(
        update={"ledger": str(folder / policy.ledger), "data": policy.data.model_copy(update=files)}
    )
