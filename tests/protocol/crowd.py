"""A federation whose sites do not train: everything of a run's secure sums, with made-up contributions."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.codec.state import AdapterState, state_digest
from common.config.manifest import Manifest
from common.messages import Envelope, Evaluate, Evaluated, Header, Project, Projected, RoundDone, RoundStart, decode
from common.metrics import Counts
from common.progress import Event
from common.randomness import seeded
from server.channel import Reply
from server.collection import Collected
from server.secure_collection import SecureCollection
from simulations.secure_sites import SecureSites, found_consortium

Manifests = Callable[..., Manifest]


@dataclass
class Made:
    """What a site answers, in place of training and measuring."""

    change: AdapterState
    records: int = 24
    loss: float = 1.0
    counts: Counts = field(default_factory=dict)


class Crowd:
    """Simulated sites from "s0" on, their coordinator, and what the coordinator sent and was given (`sent`, `heard`).

    `made` maps a site to its answer; who is not in it is silent. `answer` may be replaced, to have a site lie.
    """

    def __init__(self, manifest: Manifest, made: Mapping[str, Made], adapter: AdapterState) -> None:
        self.manifest, self.made, self.adapter = manifest, dict(made), adapter
        self.names = tuple(made)
        self.events: list[Event] = []
        self.heard: list[Reply] = []
        self.sent: list[tuple[str, bytes]] = []
        self.asked: list[tuple[str, str]] = []
        self.tamper: Callable[[str, bytes], bytes] = lambda name, data: data
        self.consortium = found_consortium(manifest, self.names)
        self.secure = SecureSites(self, self.consortium.sites, self.events.append)
        self.sums = self.sums_over(self.names)

    def sums_over(self, names: tuple[str, ...]) -> SecureCollection:
        """The coordinator's side of sums over some of the sites."""
        return SecureCollection(
            self.manifest,
            identity=self.consortium.coordinator,
            roster=self.consortium.roster,
            sites=names,
            shapes={name: array.shape for name, array in self.adapter.items()},
            channel=_Overheard(self),
            report=self.events.append,
        )

    def spoken_of(self, number: int) -> dict[str, Any]:
        """What every header of a round says."""
        return {
            "manifest_sha256": self.manifest.digest(),
            "run_id": "run",
            "round": number,
            "adapter_sha256": state_digest(self.adapter),
        }

    def start(self, number: int = 1, **values: Any) -> RoundStart:
        """A round's start."""
        return RoundStart(**{**self.spoken_of(number), "evaluate": False, "accepted": 0, **values})

    def round(self, number: int = 1, sums: SecureCollection | None = None, **values: Any) -> Collected:
        """One round's first sum."""
        shapes = {name: array.shape for name, array in self.adapter.items()}
        return (sums or self.sums).first(self.start(number, **values), self.adapter, shapes)

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        """The channel behind the secure sums."""
        for site, data in requests.items():
            self.asked.append((site, kind))
            if site not in self.made:
                yield Reply(site, None, "timeout", 0, len(data))
            else:
                yield Reply(site, self.answer(site, decode(data)), "", 1, len(data))

    def answer(self, site: str, request: Envelope) -> Envelope:
        """What the site makes of a request."""
        made, said = self.made[site], request.header
        header: Header
        match said:
            case RoundStart():
                header = RoundDone(
                    **said.spoken_of(),
                    records=made.records,
                    examples=8,
                    loss=made.loss if self.manifest.privacy is None else None,
                    counts=made.counts if said.evaluate else {},
                    seconds=1.0,
                    noise_multiplier=None,
                    sampling_rate=None,
                )
            case Project():
                return Envelope(header=Projected(**said.spoken_of()), tensors=made.change)
            case Evaluate():
                return Envelope(header=Evaluated(**said.spoken_of(), counts=made.counts))
            case _:
                raise AssertionError(said.kind)
        return Envelope(header=header, tensors=made.change)


class _Overheard:
    """What the coordinator talks through; it keeps what comes back."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        requests = {name: self._crowd.tamper(name, data) for name, data in requests.items()}
        self._crowd.sent.extend(requests.items())
        for reply in self._crowd.secure.exchange(requests, kind=kind):
            self._crowd.heard.append(reply)
            yield reply


def changes(count: int, values: int, size: float, seed: int = 0) -> dict[str, Made]:
    """Contributions of `count` sites, uniform in +-size."""
    return {
        f"s{site}": Made({"w": seeded(seed, "change", site).uniform(-size, size, values).astype(np.float32)})
        for site in range(count)
    }


def request_of(crowd: Crowd, site: str = "s0") -> Envelope:
    """The last request with a sum's first message in it that a site was sent."""
    return next(decode(data) for name, data in reversed(crowd.sent) if name == site and not data[0])
