"""What a vault says to its further processes, over a pipe between the two: records never go another way. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client.protection import Mechanism
    from common.codec.state import AdapterState
    from common.tasks.task import Example

__all__ = ["Begin", "Failed", "Part", "SetUp"]


@dataclass(frozen=True)
class SetUp:
    """What a process is for: one of `processes`, number `number` of them (the vault is 0), on `device`.

    `manifest` is its JSON, `rank` the adapter rank that the site trains where it is not the manifest's, `store` the
    file in the vault's private folder by which the processes find each other.
    """

    manifest: str
    rank: int | None
    device: str
    gpu_memory: float
    number: int
    processes: int
    store: str


@dataclass(frozen=True)
class Begin:
    """A training begins: the adapter that came, the tensors of it that train, the clip with privacy, what dropout is
    seeded with."""

    adapter: "AdapterState"
    trained: tuple[str, ...]
    mechanism: "Mechanism | None"
    seed: int
    labels: tuple[str | int, ...]


@dataclass(frozen=True)
class Part:
    """This process's part of a step: privacy units with their records, or single records; `of` are in the step."""

    units: "Sequence[Sequence[Example]]"
    of: int


@dataclass(frozen=True)
class Failed:
    """What ended a process, by the error's code and text; both stay at the site."""

    code: str
    text: str
