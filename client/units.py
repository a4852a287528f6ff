"""Records by privacy unit: whatever divides records goes through here, so that no unit is ever cut in two.

A unit (a person, a matter, a document) with records on both sides of a split would be trained on and measured on.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from common.errors import DataError
from common.randomness import seeded
from common.records import Record

__all__ = ["require_disjoint_units", "split_units", "units_of"]


def units_of(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each unit; units in order of first appearance, records in the order given."""
    units: dict[str, list[Record]] = {}
    for record in records:
        units.setdefault(record.unit, []).append(record)
    return units


def split_units(
    records: Sequence[Record], fraction: float, *, seed: int, purpose: str
) -> tuple[list[Record], list[Record]]:
    """Records kept and records held out, each in the order given; equal arguments give equal splits.

    Held out are round(fraction * units) whole units, drawn at random from `seeded(seed, purpose)`: at least one
    where the fraction is above 0, and never all, so that of a single unit nothing is held out.
    """
    if not 0.0 <= fraction < 1.0:
        raise DataError(f"the share of units to hold out must be at least 0 and below 1, found {fraction}")
    units = list(units_of(records))
    count = min(max(round(fraction * len(units)), 1), len(units) - 1) if fraction > 0 and units else 0
    order = seeded(seed, purpose).permutation(len(units))
    held = {units[place] for place in order[:count]}
    return [r for r in records if r.unit not in held], [r for r in records if r.unit in held]


def require_disjoint_units(parts: Mapping[str, Sequence[Record]]) -> None:
    """Raise a DataError if a unit occurs in two of the named parts; it counts such units and does not name them."""
    units = {name: {record.unit for record in records} for name, records in parts.items()}
    shared = {pair: len(units[pair[0]] & units[pair[1]]) for pair in combinations(units, 2)}
    found = [f"{first} and {second} share {count}" for (first, second), count in shared.items() if count]
    if found:
        raise DataError(
            f"units in more than one part: {', '.join(found)}; move all records of a unit to one part, or remove them"
        )
