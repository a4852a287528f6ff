"""How a site protects its units in one federation: noise from its own unit count, and every round charged first."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

from client.ledger import Account, Charge, Ledger
from client.units import units_of
from common.config.manifest import Manifest, PrivacySection
from common.errors import PrivacyError, RerunRefused
from common.privacy.accounting import Steps, calibrate, check_delta
from common.randomness import SystemRandomness, seeded_int
from common.records import Record

__all__ = ["Mechanism", "Population", "Protection", "mechanism", "protected_units", "published"]


@dataclass(frozen=True)
class Population:
    """The privacy units of one kind at a site, by its policy.

    `units` is their number as the site publishes it, rounded: sampling rates use it, and it may leave. `epsilon` and
    `delta` are what may be spent on them altogether, by all federations.
    """

    name: str
    units: int
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Mechanism:
    """Noise over clip, the clip (L2), a unit's chance to be drawn, units expected in a step, most records of a unit.

    `head_clip` bounds the head's part of a unit's gradient by itself; None: one bound for head and adapter.
    """

    noise_multiplier: float
    clip: float
    sampling_rate: float
    expected_units: float
    records_per_unit: int
    head_clip: float | None = None


def mechanism(manifest: Manifest, population: Population) -> Mechanism:
    """How the population's units are protected so that all rounds together keep the manifest's bound.

    Raises:
        PrivacyError: there are too few units for the batch or the delta, or no noise keeps the bound.
    """
    section, training = _section(manifest), manifest.training
    if population.units < 2 or training.batch_size >= population.units:
        raise PrivacyError(
            f"training.batch_size must be below the {population.units} privacy units that the site publishes,"
            f" found {training.batch_size}: sampling protects only where a unit may be left out; take a smaller batch"
        )
    check_delta(section.delta, units=population.units)
    rate = training.batch_size / population.units
    steps = (training.rounds + section.spare_rounds) * training.local_steps
    noise = _calibrated(section.epsilon, section.delta, rate, steps)
    return Mechanism(noise, section.clip, rate, training.batch_size, section.records_per_unit, section.head_clip)


class Protection:
    """A manifest's privacy at one site: its mechanism, and its account in the ledger.

    Raises:
        PrivacyError: as `mechanism`.
    """

    def __init__(self, manifest: Manifest, population: Population, ledger: Ledger) -> None:
        self.mechanism = mechanism(manifest, population)
        self.units = population.units
        noise, rate = self.mechanism.noise_multiplier, self.mechanism.sampling_rate
        self.round = Steps(noise, rate, manifest.training.local_steps)
        self._manifest, self._ledger = manifest, ledger
        self._account = Account(population.name, population.epsilon, population.delta)

    def require(self) -> None:
        """Refuse a round that the account cannot pay, before a record is read.

        Raises:
            BudgetError: the account would be overdrawn.
        """
        self._ledger.require(self._account, self.round)

    def charged(self, run_id: str) -> list[int]:
        """The rounds of a run that the ledger holds charges of, in their order."""
        return self._ledger.rounds_of(self._manifest.digest(), run_id)

    def charge(self, run_id: str, number: int, units: Iterable[str], *, unreleased: bool = False) -> None:
        """Charge a round, durably; training may begin when this returns.

        With `unreleased` the caller says that what an earlier training of this round made is lost and never left the
        site: its charge, which must be the run's last, then pays for this training. A charge pays for what is
        released once; how often noise was drawn before that nobody learns.

        Raises:
            RerunRefused: nothing can have been lost, since the round's charge is not the run's last.
            BudgetError: the account would be overdrawn; nothing is charged.
            LedgerError: the ledger cannot be trusted or written.
        """
        if unreleased:
            if self.charged(run_id)[-1:] != [number]:
                raise RerunRefused(f"round {number} is not the one that was charged last; nothing was trained again")
            return
        charge = Charge(
            self._account.population,
            _section(self._manifest).unit,
            self._manifest.name,
            self._manifest.digest(),
            run_id,
            number,
            self.round,
        )
        self._ledger.charge(self._account, charge, units)

    def randomness(self, *labels: str | int) -> SystemRandomness:
        """Where noise and sampling come from: the operating system, or the manifest's unsafe seed and the labels."""
        seed = _section(self._manifest).unsafe_seed
        return SystemRandomness(unsafe_seed=None if seed is None else seeded_int(seed, *labels))


def _section(manifest: Manifest) -> PrivacySection:
    if manifest.privacy is None:
        raise PrivacyError("the manifest has no [privacy] table, so there is nothing to protect with")
    return manifest.privacy


@lru_cache(maxsize=256)
def _calibrated(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Sites with as many published units need the same noise, and the search takes a second."""
    return calibrate(epsilon, delta, sampling_rate=rate, steps=steps)


def protected_units(records: Sequence[Record], unit: str) -> Mapping[str, list[Record]]:
    """The records of each privacy unit by the unit's name; with `unit` "record" every record is one."""
    if unit != "record":
        return units_of(records)
    return {_name(record): [record] for record in records}


def _name(record: Record) -> str:
    content = json.dumps(asdict(record), sort_keys=True, ensure_ascii=False)
    return f"record {hashlib.sha256(content.encode()).hexdigest()}"


def published(units: int) -> int:
    """A unit count rounded down to two digits and at least to fives: one unit more or less does as a rule not show."""
    size: int = max(5, 10 ** (math.floor(math.log10(max(1, units))) - 1))
    return units // size * size
