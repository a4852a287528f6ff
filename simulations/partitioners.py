"""Who owns which records, when one machine plays all sites.

Every partitioner deals whole units, so no unit is ever at two sites, and draws from `seeded(seed, "partition")` only,
so equal arguments give equal partitions. Skews follow NIID-Bench (Li et al. 2022, arXiv:2102.02079, section IV).
Group names and unit ids are record content and stay out of errors.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from client.units import units_of
from common.errors import DataError, ExtensionError
from common.extensions import load
from common.randomness import seeded
from common.records import Record, TextRecord, TokensRecord

__all__ = ["deal", "partition", "sites_of_groups"]

Units = Mapping[str, Sequence[Record]]
Owners = dict[str, str]  # unit -> site


def partition(
    records: Sequence[Record],
    *,
    sites: Sequence[str],
    partitioner: str,
    concentration: float,
    seed: int,
    search: Path | None = None,
) -> dict[str, list[Record]]:
    """The records of each site, in the order given; sites in their order, none without records.

    natural: by the group of the records, see `sites_of_groups`. iid: at random, with record counts as near to each
    other as whole units allow. dirichlet: for each label the shares of the sites in its units are drawn from
    Dirichlet(concentration, ..., concentration). quantity: the shares of the sites in all records are drawn so.
    Where a draw of the last two leaves a site without units, it gets one of the site that has most.
    'module:function': f(units, sites, rng) -> site -> unit ids, imported with `search` as a last place to look.
    Raises a DataError if the records cannot be dealt so, an ExtensionError if a function of one's own misbehaves.
    """
    units = units_of(records)
    rng = seeded(seed, "partition")
    if ":" in partitioner:
        owners = _by_function(partitioner, records, sites, rng, search)
    elif partitioner == "natural":
        groups = _groups(units)
        by_group = sites_of_groups({group: sum(len(units[unit]) for unit in groups[group]) for group in groups}, sites)
        owners = {unit: by_group[group] for group, members in groups.items() for unit in members}
    else:
        _require_enough(len(units), sites)
        if partitioner == "iid":
            owners = _deal_evenly(_sizes(units, rng), dict.fromkeys(sites, 0))
        elif partitioner == "dirichlet":
            owners = _no_site_empty(_by_label(units, sites, concentration, rng), sites)
        elif partitioner == "quantity":
            owners = _no_site_empty(_by_quantity(units, sites, concentration, rng), sites)
        else:
            raise DataError(
                f"no partitioner {partitioner!r}; give natural, iid, dirichlet, quantity or 'module:function'"
            )
    dealt = _collect(records, owners, sites)
    for site, own in dealt.items():
        if not own:
            raise DataError(f"site {site} has no records under {partitioner}; use fewer sites or another partitioner")
    return dealt


def deal(
    records: Sequence[Record], *, like: Mapping[str, Sequence[Record]], partitioner: str, seed: int
) -> dict[str, list[Record]]:
    """Held-out records for the sites of `like`, which is what `partition` gave; a site may end up with none.

    natural: a record goes where its group is; the units of a group that no site has go, largest group first, to the
    site with fewest held-out records. Otherwise units are dealt at random and evenly. Records without a group
    under natural raise a DataError.
    """
    units = units_of(records)
    if partitioner != "natural":
        owners = _deal_evenly(_sizes(units, seeded(seed, "deal")), dict.fromkeys(like, 0))
        return _collect(records, owners, list(like))
    home = {record.group: site for site, own in like.items() for record in own}
    groups = _groups(units)
    sizes = {group: sum(len(units[unit]) for unit in members) for group, members in groups.items()}
    loads = dict.fromkeys(like, 0)
    for group in groups.keys() & home.keys():
        loads[home[group]] += sizes[group]
    foreign = {group: size for group, size in sorted(sizes.items()) if group not in home}
    by_group = home | _deal_evenly(foreign, loads)
    owners = {unit: by_group[group] for group, members in groups.items() for unit in members}
    return _collect(records, owners, list(like))


def sites_of_groups(sizes: Mapping[str, int], sites: Sequence[str]) -> dict[str, str]:
    """The site of each group, given the number of records of each group.

    A group that is named like a site goes there. Of the others, as many groups as sites are paired in order, groups
    by name; where there are more groups, whole groups go, largest first, to the site with fewest records.
    Fewer groups than sites raise a DataError.
    """
    if len(sizes) < len(sites):
        raise DataError(
            f"natural partition: {len(sites)} sites but {len(sizes)} groups; use at most {len(sizes)} sites,"
            " or another partitioner"
        )
    paired = {group: group for group in sizes if group in sites}
    others = {group: size for group, size in sorted(sizes.items()) if group not in paired}
    if len(sizes) == len(sites):
        return paired | dict(zip(others, (site for site in sites if site not in paired), strict=True))
    return paired | _deal_evenly(others, {site: sizes[site] if site in paired else 0 for site in sites})


def _deal_evenly(sizes: Mapping[str, int], loads: Mapping[str, int]) -> dict[str, str]:
    """Deal named things to the site with fewest records so far, largest first: the small ones then even it out.

    Ties go to the thing named first in `sizes` and the site named first in `loads`.
    """
    heap = [(load, place, site) for place, (site, load) in enumerate(loads.items())]
    heapq.heapify(heap)
    owners: dict[str, str] = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        load, place, site = heap[0]
        owners[name] = site
        heapq.heapreplace(heap, (load + sizes[name], place, site))
    return owners


def _sizes(units: Units, rng: np.random.Generator) -> dict[str, int]:
    return {unit: len(units[unit]) for unit in _shuffled(units, rng)}


def _shuffled(names: Iterable[str], rng: np.random.Generator) -> list[str]:
    listed = list(names)
    return [listed[place] for place in rng.permutation(len(listed))]


def _by_label(units: Units, sites: Sequence[str], concentration: float, rng: np.random.Generator) -> Owners:
    members: dict[str, list[str]] = {}
    for unit, records in units.items():
        members.setdefault(_label(records), []).append(unit)
    owners: Owners = {}
    for label in sorted(members):
        shuffled = _shuffled(members[label], rng)
        cuts = np.cumsum(_shares(len(sites), concentration, rng)) * len(shuffled)
        places = np.searchsorted(cuts[:-1], np.arange(len(shuffled)) + 0.5)
        owners |= {unit: sites[place] for unit, place in zip(shuffled, places, strict=True)}
    return owners


def _by_quantity(units: Units, sites: Sequence[str], concentration: float, rng: np.random.Generator) -> Owners:
    sizes = _sizes(units, rng)
    ends = np.cumsum(list(sizes.values()))
    cuts = np.cumsum(_shares(len(sites), concentration, rng)) * ends[-1]
    # A unit belongs where its middle record falls.
    places = np.searchsorted(cuts[:-1], ends - np.array(list(sizes.values())) / 2)
    return {unit: sites[place] for unit, place in zip(sizes, places, strict=True)}


def _shares(count: int, concentration: float, rng: np.random.Generator) -> np.ndarray:
    return rng.dirichlet(np.full(count, concentration))


def _label(records: Sequence[Record]) -> str:
    """A unit's most frequent label, the first by name of several; of tagged text its entity type, or O."""
    counts: Counter[str] = Counter()
    for record in records:
        if isinstance(record, TextRecord):
            counts[record.label] += 1
        elif isinstance(record, TokensRecord):
            counts.update(tag[2:] for tag in record.tags if tag.startswith("B-"))
        elif record.group is not None:
            counts[record.group] += 1
        else:
            raise DataError("dirichlet needs labels: these records have neither label nor group; use iid or quantity")
    return min(counts, key=lambda label: (-counts[label], label), default="O")


def _no_site_empty(owners: Owners, sites: Sequence[str]) -> Owners:
    """Give each site without units one of the site that has most; there are at least as many units as sites."""
    counts = Counter(owners.values())
    for site in sites:
        if not counts[site]:
            richest = max(sites, key=lambda name: counts[name])
            unit = next(unit for unit, owner in reversed(owners.items()) if owner == richest)
            owners[unit] = site
            counts.update({site: 1, richest: -1})
    return owners


def _groups(units: Units) -> dict[str, list[str]]:
    """The units of each group; a DataError if a record has none or a unit has two."""
    groups: dict[str, list[str]] = {}
    split = 0
    for unit, records in units.items():
        own = {record.group for record in records}
        if None in own:
            raise DataError(
                "natural partition: a record has no group; fill in the group column, name it in [data.columns],"
                " or use another partitioner"
            )
        split += len(own) > 1
        groups.setdefault(str(records[0].group), []).append(unit)
    if split:
        raise DataError(
            f"natural partition: {split} units are in more than one group; a unit must have one owner:"
            " correct the unit or group column, or use another partitioner"
        )
    return groups


def _by_function(
    path: str, records: Sequence[Record], sites: Sequence[str], rng: np.random.Generator, search: Path | None
) -> Owners:
    function = load(path, "partitioner", search=search)
    rule = "it must return a mapping of site to unit ids in which each unit occurs exactly once"
    try:
        dealt = {site: list(units) for site, units in function(units_of(records), tuple(sites), rng).items()}
        owners = {unit: site for site, units in dealt.items() for unit in units}
    except Exception as error:  # its text may hold a record, so only its kind is told
        raise ExtensionError(f"partitioner {path!r} failed with {type(error).__name__}; {rule}") from error
    unknown = [site for site in dealt if site not in sites]
    if unknown:
        raise ExtensionError(f"partitioner {path!r} deals to {len(unknown)} unknown sites; use the sites it is given")
    asked = {record.unit for record in records}
    missing, invented = len(asked - owners.keys()), len(owners.keys() - asked)
    repeated = sum(map(len, dealt.values())) - len(owners)
    if missing or invented or repeated:
        raise ExtensionError(
            f"partitioner {path!r}: {missing} units missing, {invented} unknown, {repeated} dealt again; {rule}"
        )
    return owners


def _require_enough(units: int, sites: Sequence[str]) -> None:
    if units < len(sites):
        raise DataError(
            f"{len(sites)} sites but {units} units, so that site {sites[units]} would have no records;"
            f" use at most {units} sites or more records"
        )


def _collect(records: Sequence[Record], owners: Mapping[str, str], sites: Sequence[str]) -> dict[str, list[Record]]:
    dealt: dict[str, list[Record]] = {site: [] for site in sites}
    for record in records:
        dealt[owners[record.unit]].append(record)
    return dealt
