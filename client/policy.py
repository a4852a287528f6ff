"""The site policy (`site.toml`): what one institution's data is, and how much privacy may be spent on it.

The site enforces it; a coordinator cannot loosen it. Folders and files in it count from the policy's own folder.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from client.protection import Population
from client.secure_site import sum_policy
from common.config.loading import load_document
from common.config.manifest import Columns, FileName, Manifest, Name, Section
from common.errors import PrivacyError
from common.secure_sum.config import SumPolicy

__all__ = ["CrowdPolicy", "DataPolicy", "PopulationPolicy", "SitePolicy", "TrainingPolicy", "load_policy"]


class DataPolicy(Section):
    """Where the records are."""

    train: FileName = Field(description="file of the records to train on")
    held_out: FileName | None = Field(None, description="file of the records to measure on, never trained on")
    columns: Columns = Field(default_factory=Columns, description="names of the columns in these files")


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


class TrainingPolicy(Section):
    """How this site trains, where that is its own choice."""

    rank: int | None = Field(
        None,
        ge=1,
        description="adapter rank that this site trains, where it is smaller than the manifest's (aggregation 'sketch',"
        " 'dense')",
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
    held_out = policy.data.held_out
    files = {
        "train": str(folder / policy.data.train),
        "held_out": None if held_out is None else str(folder / held_out),
    }
    return policy.model_copy(
        update={"ledger": str(folder / policy.ledger), "data": policy.data.model_copy(update=files)}
    )
