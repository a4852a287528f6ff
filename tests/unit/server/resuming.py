"""A small federation that outlives its coordinator: sites answer one payload once, and crashes come when wanted."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from test_coordinator import header_of

from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.contribution import contribution, projection
from common.factors import scale
from common.messages import Envelope, Evaluate, Evaluated, Project, Projected, RoundDone, RoundStart, decode
from common.progress import Event
from common.randomness import seeded
from server.channel import Channel, Reply
from server.coordinator import Coordinator
from server.run_store import RunStore
from server.secure_collection import SecureCollection
from simulations.secure_sites import SecureSites, found_consortium

RANK = 2
SHAPES = {"x.lora_A.weight": (RANK, 12), "x.lora_B.weight": (14, RANK), "head.weight": (2, 3)}
RECORDS = {"north": 1, "south": 30, "west": 9, "east": 4}
THREE = ("north", "south", "west")


class Crash(BaseException):
    """The coordinator's process dies here."""


def drawn(*labels: str | int, size: float = 1.0) -> AdapterState:
    rng = seeded(0, *labels)
    return {name: (size * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


FIRST = drawn("first")


class Trainers:
    """Sites whose training is an addition that depends on site and round; `trained` counts how often they did it."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.trained = manifest, list[tuple[str, int]]()
        self.after: dict[str, AdapterState] = {}

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        for site, data in requests.items():
            yield Reply(site, self.answer(site, decode(data)), "", 1000, len(data))

    def answer(self, site: str, request: Envelope) -> Envelope:
        header = request.header
        correct = float(sum(abs(float(array.flat[0])) for array in request.tensors.values()) * 1000 // 1 % 5)
        counts = {"records": 4.0, "correct": correct}
        if isinstance(header, Evaluate):
            return Envelope(header=Evaluated(**header_of(request), counts=counts))
        if isinstance(header, Project):
            pairs = {name: array for name, array in self.after[site].items() if "lora" in name}
            sent = projection(scale(self.manifest.adapter), pairs, request.tensors)
            return Envelope(header=Projected(**header_of(request)), tensors=sent)
        assert isinstance(header, RoundStart)
        self.trained.append((site, header.round))
        drift = drawn(site, header.round, size=0.01)
        self.after[site] = {name: array + drift[name] for name, array in request.tensors.items()}
        facts: dict[str, Any] = {
            "examples": 5,
            "loss": 1.0,
            "seconds": 0.5,
            "counts": counts if header.evaluate else {},
        }
        facts |= {"records": RECORDS[site], "noise_multiplier": None, "sampling_rate": None}
        sent = contribution(self.manifest, request.tensors, self.after[site], header.accepted)
        return Envelope(header=RoundDone(**header_of(request, **facts)), tensors=sent)


class Lasting:
    """Sites that live on while coordinators come and go: one payload is answered once, and always with that answer."""

    def __init__(self, inner: Channel) -> None:
        self.inner = inner
        self.answers: dict[tuple[str, bytes], Reply] = {}

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        digests = {site: hashlib.sha256(data).digest() for site, data in requests.items()}
        fresh = {site: data for site, data in requests.items() if (site, digests[site]) not in self.answers}
        for site in [site for site in requests if site not in fresh]:
            yield self.answers[site, digests[site]]
        # All of them work to the end, whatever becomes of the coordinator meanwhile.
        replies = list(self.inner.exchange(fresh, kind=kind))
        self.answers |= {(reply.site, digests[reply.site]): reply for reply in replies}
        yield from replies


class Clock:
    """Counts the moments of a run, and raises at those in `at`."""

    def __init__(self, *at: int) -> None:
        self.now, self.at = 0, set(at)

    def tick(self) -> None:
        self.now += 1
        if self.now in self.at:
            raise Crash


class Ticking:
    """A channel with a moment before and after an exchange, and before and after the coordinator has each reply."""

    def __init__(self, inner: Channel, clock: Clock) -> None:
        self.inner, self.clock = inner, clock

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        self.clock.tick()
        for reply in self.inner.exchange(requests, kind=kind):
            self.clock.tick()
            yield reply
        self.clock.tick()


def write(folder: Path, state: AdapterState) -> None:
    save_file(state, folder / "adapter_model.safetensors")


class TickingStore(RunStore):
    """A run store with moments before and after everything that it writes, and within."""

    clock = Clock()

    def save_round(self, *args: Any, **named: Any) -> None:
        self.clock.tick()
        super().save_round(*args, **named)
        self.clock.tick()

    def save_measured(self, facts: Mapping[str, Any]) -> None:
        self.clock.tick()
        super().save_measured(facts)
        self.clock.tick()

    def save_result(self, adapter: AdapterState) -> Path:
        self.clock.tick()
        return super().save_result(adapter)


class World:
    """One federation and one run folder; `process` is the life of one coordinator's process."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        sites: Sequence[str] = THREE,
        attempts: int = 1,
        between: Callable[[Channel], Channel] = lambda channel: channel,
    ) -> None:
        self.folder, self.manifest, self.names, self.attempts = folder / "run", manifest, tuple(sites), attempts
        self.trainers, self.events = Trainers(manifest), list[Event]()
        channel: Channel = self.trainers
        if manifest.secure_sum.enabled:
            self.consortium = found_consortium(manifest, self.names)
            channel = SecureSites(channel, self.consortium.sites, lambda event: None)
        self.channel = Lasting(between(channel))
        self.coordinator: Coordinator | None = None

    def process(self, clock: Clock | None = None) -> AdapterState:
        """Begin the run, or resume it where its folder is there; the result is saved at the end."""
        clock = clock or Clock()
        began = (self.folder / "rounds" / "0000").exists()
        make = TickingStore.reopen if self.folder.exists() else TickingStore
        store = make(self.folder, write)
        store.clock = clock
        channel = Ticking(self.channel, clock)
        sums = None
        if self.manifest.secure_sum.enabled:
            sums = SecureCollection(
                self.manifest,
                identity=self.consortium.coordinator,
                roster=self.consortium.roster,
                sites=self.names,
                shapes=SHAPES,
                channel=channel,
                report=self.events.append,
                attempts=self.attempts,
                journals=store.journals,
            )
        common: dict[str, Any] = {
            "run_id": "run",
            "sites": self.names,
            "channel": channel,
            "store": store,
            "report": self.events.append,
            "sums": sums,
            "lost_rounds": self.attempts,
        }
        try:
            if began:
                self.coordinator = Coordinator.resume(self.manifest, **common)
            else:
                self.coordinator = Coordinator(self.manifest, first=FIRST, **common)
            result = self.coordinator.run()
            store.save_result(result)
            return result
        finally:
            store.close()
