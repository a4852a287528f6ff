"""The simulated sites: records read once, split, dealt to the sites, and laid in one folder for each site.

A simulated site then reads its own files with the same code as a real one. The folders are temporary and gone when
the run ends: they hold records.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from client.protection import Population, protected_units, published
from client.units import require_disjoint_units, split_units, units_of
from common.config.manifest import Manifest
from common.config.simulation import SimulationSection
from common.data_files import Cleaning, parse_rows, read_records, require_digest, write_records
from common.durable import write_text
from common.errors import CoadaptError, DataError, ExtensionError, RunError
from common.extensions import load
from common.records import Record, TextRecord, TokensRecord
from simulations.partitioners import deal, partition

__all__ = [
    "POOLED",
    "FederationData",
    "label_counts",
    "lay_out",
    "populations",
    "read_federation",
    "read_split",
    "simulation_of",
]

# The pretend site of the centralised baseline, which holds all records; no site can be named so.
POOLED = "pooled records of all sites"


@dataclass(frozen=True)
class FederationData:
    """What each site trains on and holds out, the test records, and what cleaning did."""

    train: dict[str, list[Record]]
    held_out: dict[str, list[Record]]
    test: list[Record]
    cleaning: Cleaning
    public: list[Record] = field(default_factory=list)

    def splits(self) -> dict[str, list[Record]]:
        """All records by split."""
        return {
            "train": [record for records in self.train.values() for record in records],
            "dev": [record for records in self.held_out.values() for record in records],
            "test": self.test,
        }


def simulation_of(manifest: Manifest) -> SimulationSection:
    """The manifest's [simulation] table.

    Raises:
        RunError: it has none, so nothing says which records the sites own.
    """
    if manifest.simulation is None:
        raise RunError("the manifest has no [simulation] table, which says who owns which records; add one")
    return manifest.simulation


def read_federation(manifest: Manifest, folders: Sequence[Path]) -> FederationData:
    """Read, clean, split and deal. Data files are looked for in `folders`, in their order.

    A test file or dev file is taken as it is; where there is none, whole units are kept back from the training
    records: for testing first, then for each site its own held-out part.

    Raises:
        DataError: a file, a column or a record breaks a rule, a unit is on two sides of a split, or a site is empty.
    """
    section = simulation_of(manifest)
    train, cleaning = _records(manifest, section.train, "train", folders)
    parts = {"train": train}
    for split, name in (("dev", section.dev), ("test", section.test)):
        if name is not None or section.source is not None:
            parts[split], cleaned = _records(manifest, name, split, folders)
            cleaning += cleaned
    public: list[Record] = []
    if manifest.evaluation.public is not None:
        if manifest.evaluation.public_sha256 is not None:
            path = _found(manifest.evaluation.public, folders, "public")
            require_digest(path, manifest.evaluation.public_sha256, what="evaluation.public")
        public, _ = _records(manifest, manifest.evaluation.public, "public", folders)
        if not public:
            raise DataError("evaluation.public: the file holds no records")
    require_disjoint_units(parts)
    train = _first_units(train, section.max_records)
    test = parts.get("test", [])
    if not test:
        train, test = split_units(train, section.test_fraction, seed=section.seed, purpose="test")
    owned = partition(
        train,
        sites=section.site_names,
        partitioner=section.partitioner,
        concentration=section.concentration,
        seed=section.seed,
        search=folders[-1],
    )
    if parts.get("dev"):
        held_out = deal(parts["dev"], like=owned, partitioner=section.partitioner, seed=section.seed)
    else:
        held_out = {}
        for site, records in owned.items():
            fraction = manifest.evaluation.holdout
            owned[site], held_out[site] = split_units(records, fraction, seed=section.seed, purpose=f"holdout {site}")
    for site, records in owned.items():
        if not records:
            raise DataError(f"site {site!r} has no training records; use fewer sites or another partitioner")
    return FederationData(owned, held_out, test, cleaning, public)


def read_split(manifest: Manifest, split: str, folders: Sequence[Path]) -> list[Record]:
    """The records that a simulation's own source gives for a split, such as public text to distil on."""
    return _records(manifest, None, split, folders)[0]


def _records(
    manifest: Manifest, name: str | None, split: str, folders: Sequence[Path]
) -> tuple[list[Record], Cleaning]:
    if name is not None:
        path = _found(name, folders, split)
        return read_records(path, task=manifest.task, data=manifest.data, need_unit=manifest.need_unit)
    section = simulation_of(manifest)
    source = load(section.source or "", "data source", search=folders[-1])
    try:
        rows = [dict(row) for row in source(split, section.seed)]
    except CoadaptError:
        raise
    except Exception as error:
        # A person's own code: its text may hold a record, so the kind of error must do.
        raise ExtensionError(
            f"data source {section.source!r}: raised {type(error).__name__} for split {split!r}; it must be a function"
            " of (split, seed) that gives rows as mappings from column to value"
        ) from error
    where = f"{section.source} ({split})"
    records, cleaning = parse_rows(
        rows, task=manifest.task, data=manifest.data, where=where, need_unit=manifest.need_unit
    )
    if split == "train" and not records:
        raise DataError(f"{section.source}: the data source gave no training records")
    return records, cleaning


def _found(name: str, folders: Sequence[Path], split: str) -> Path:
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    looked = " nor in ".join(str(folder) for folder in dict.fromkeys(folders))
    raise DataError(f"simulation.{split}: no file {name} in {looked}; say where the data is with --data DIR")


def _first_units(records: list[Record], most: int | None) -> list[Record]:
    """Whole units in their order, as long as they fit into `most` records; at least one unit."""
    if most is None:
        return records
    units = list(units_of(records).values())
    sizes = itertools.accumulate(len(unit) for unit in units)
    count = max(1, sum(size <= most for size in sizes))
    kept = {unit[0].unit for unit in units[:count]}
    return [record for record in records if record.unit in kept]


def lay_out(folder: Path, manifest: Manifest, data: FederationData) -> dict[str, Path]:
    """Write the manifest and a folder for each site, the pooled one too; return the sites' folders by name.

    `<folder>/federation.json`, `<folder>/test.jsonl`, `<folder>/<number>/train.jsonl` and `held_out.jsonl`; with
    privacy also `population.json`, and `rank` where the site's is its own.
    """
    columns = manifest.data.columns
    write_text(folder / "federation.json", manifest.model_dump_json())
    write_records(folder / "test.jsonl", data.test, columns)
    splits = data.splits()
    sites = {**{site: (data.train[site], data.held_out[site]) for site in data.train}, POOLED: (splits["train"], [])}
    folders = {}
    for number, (site, (train, held_out)) in enumerate(sites.items(), start=1):
        folders[site] = folder / str(number)
        folders[site].mkdir(mode=0o700)
        write_records(folders[site] / "train.jsonl", train, columns)
        if held_out:
            write_records(folders[site] / "held_out.jsonl", held_out, columns)
    for site, population in populations(manifest, data).items():
        write_text(folders[site] / "population.json", json.dumps(asdict(population)))
    ranks = manifest.simulation.ranks if manifest.simulation else ()
    for site, rank in zip(data.train, ranks, strict=False):  # no ranks: every site has the manifest's
        write_text(folders[site] / "rank", str(rank))
    return folders


def populations(manifest: Manifest, data: FederationData) -> dict[str, Population]:
    """What the simulated sites' policies would say of their units; empty without privacy.

    Each site publishes its rounded count, and lets this one run spend what the manifest asks for.
    """
    privacy = manifest.privacy
    if privacy is None:
        return {}
    return {
        site: Population(
            f"{privacy.unit}s of {site} (simulated)",
            published(len(protected_units(records, privacy.unit))),
            privacy.epsilon,
            privacy.delta,
        )
        for site, records in data.train.items()
    }


def label_counts(records: Iterable[Record]) -> dict[str, int]:
    """How often each label (of entities: each type) occurs; empty for instruction records."""
    counts: Counter[str] = Counter()
    for record in records:
        if isinstance(record, TextRecord):
            counts[record.label] += 1
        elif isinstance(record, TokensRecord):
            counts.update(tag.removeprefix("B-") for tag in record.tags if tag.startswith("B-"))
    return dict(sorted(counts.items()))
