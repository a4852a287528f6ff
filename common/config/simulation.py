"""The manifest's table of a simulation: who owns which records when one machine plays all sites."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.config.section import Address, FileName, Fraction, ImportPath, Name, Section

__all__ = ["SimulationSection"]


class SimulationSection(Section):
    """Who owns which records when one machine plays all sites. Not part of what the sides agree on."""

    sites: int | tuple[Name, ...] = Field(6, description="number of sites, or their names")
    partitioner: str = Field(
        "iid",
        description="natural (by the group column), iid, dirichlet (label skew), quantity (size skew), or"
        " 'module:function'; always by unit",
    )
    concentration: float = Field(
        0.5, gt=0, description="Dirichlet concentration of dirichlet and quantity: smaller is more skewed"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of partition and splits")
    train: FileName | None = Field(None, description="file of records (.jsonl, .csv, .parquet, .gz of the first two)")
    dev: FileName | None = Field(
        None, description="file of held-out records, dealt to the sites; none: evaluation.holdout"
    )
    test: FileName | None = Field(
        None, description="file of test records, measured once at the end; none: test_fraction"
    )
    source: ImportPath | None = Field(
        None, description="instead of files: 'module:function' of f(split, seed) -> records, split train, dev or test"
    )
    test_fraction: Fraction = Field(0.1, description="share of units kept for testing where no test file is given")
    max_records: int | None = Field(None, ge=1, description="use only the first units up to so many training records")
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="adapter ranks of the sites in their order, at most adapter.rank, with aggregation.method 'sketch'"
        " or 'dense'; empty: all train adapter.rank",
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="processes that train sites at the same time; auto: one per core, as memory allows"
    )
    gpus: Literal["auto"] | Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...] = Field(
        "auto", description="GPUs to compute on: auto (all), their number (0: the CPU), or a list of their indices"
    )
    slots_per_gpu: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="workers on each GPU; auto: as many as its memory holds"
    )
    ray_address: Address | None = Field(
        None,
        description="address of a running Ray cluster, HOST:PORT; its machines need this Coadapt, the base, and"
        " this machine's temporary folder and runs under the same paths; none: Ray is started here for the run",
    )
    baselines: bool = Field(False, description="also train each site alone, and all records in one place")
    compare: tuple[str, ...] = Field(
        (),
        description="settings KEY=VALUE, as for --set, of a second federation on the same records to compare with,"
        " such as 'privacy.epsilon=8'",
    )

    @model_validator(mode="after")
    def _records_come_from_somewhere(self) -> Self:
        if (self.train is None) == (self.source is None):
            raise ValueError("exactly one of train (a file) and source (an import path) must be given")
        if self.source is not None and (self.dev or self.test):
            raise ValueError("dev and test are files beside train; a source gives its own splits")
        count = self.sites if isinstance(self.sites, int) else len(self.sites)
        if count < 1:
            raise ValueError(f"sites must be at least 1, found {count}")
        if self.ranks and len(self.ranks) != count:
            raise ValueError(f"ranks must be one for each of the {count} sites, found {len(self.ranks)}")
        if not isinstance(self.sites, int) and len(set(self.sites)) != count:
            raise ValueError("sites must have different names")
        if isinstance(self.gpus, tuple) and (not self.gpus or len(set(self.gpus)) != len(self.gpus)):
            raise ValueError(f"gpus must be different indices, at least one, found {list(self.gpus)}")
        known = ("natural", "iid", "dirichlet", "quantity")
        if self.partitioner not in known and ":" not in self.partitioner:
            raise ValueError(
                f"partitioner must be one of {', '.join(known)} or 'module:function', found {self.partitioner!r}"
            )
        return self

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the sites in order; `site-1`, `site-2`, ... where only their number is given."""
        if isinstance(self.sites, int):
            return tuple(f"site-{number + 1}" for number in range(self.sites))
        return self.sites
