"""Small federations in one process: real vaults behind a channel that carries bytes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from client.ledger import Ledger
from client.protection import Population
from client.resident import resident
from client.state import SiteState
from client.vault import Vault
from common.adapters import first_state, save_adapter, set_state
from common.codec.state import AdapterState
from common.config.manifest import Columns, Manifest
from common.data_files import write_records
from common.evaluation import measure
from common.messages import Envelope, decode
from common.metrics import Counts
from common.progress import Event
from common.randomness import seeded
from common.records import TextRecord
from server.channel import Channel, Reply
from server.collection import Collection
from server.coordinator import Coordinator
from server.run_store import RunStore
from server.secure_collection import SecureCollection
from simulations.secure_sites import SecureSites, found_consortium

Manifests = Callable[..., Manifest]
SITES = ("north", "south", "west")
WORDS = {
    "a": ("indemnify", "liability", "damages"),
    "b": ("terminate", "notice", "days"),
    "c": ("law", "court", "state"),
}
RANK = 2


def records(site: str, count: int) -> list[TextRecord]:
    """Clauses whose label shows in their words; no site has all three labels."""
    rng = seeded(0, "clauses", site)
    labels = {"north": "ab", "south": "bc", "west": "ca"}.get(site, "abc")
    texts = [" ".join(map(str, rng.choice(WORDS[labels[n % len(labels)]], 4))) for n in range(count)]
    return [TextRecord(text=text, label=labels[n % len(labels)], unit=f"{site} {n}") for n, text in enumerate(texts)]


class Overheard:
    """A channel that keeps what the coordinator is given."""

    def __init__(self, inner: Channel, heard: list[Reply]) -> None:
        self.inner, self.heard = inner, heard

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        for reply in self.inner.exchange(requests, kind=kind):
            self.heard.append(reply)
            yield reply


class Federation:
    """Vaults behind a channel that carries bytes; `fails` says which requests get no answer. With `secure` the sites
    send through secure sums; the coordinator then sees what `masked` holds and nothing else. `ranks` are those of sites
    that train a smaller one than the manifest's."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        fails: Callable[[str, Envelope], bool] | None = None,
        secure: bool = False,
        held_out: bool = False,
        sites: Sequence[str] = SITES,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        self.ranks = dict(ranks or {})
        section = manifest.secure_sum.model_copy(update={"enabled": secure})
        manifest = manifest.model_copy(update={"secure_sum": section})
        self.sites, self.held_out = tuple(sites), held_out
        self.manifest, self.folder, self.fails = manifest, folder, fails or (lambda site, request: False)
        self.events: list[Event] = []
        self.sent: list[tuple[str, Envelope, Envelope]] = []
        self.masked: list[Reply] = []
        self.states = dict.fromkeys(self.sites, SiteState())
        self.vaults = {site: self._vault(site) for site in self.sites}
        self.model = resident(manifest)
        self.first = first_state(self.model.model, 0)
        self.public = self.model.task.encode(records("public", 30)).examples
        self.coordinator = Coordinator(
            manifest,
            run_id="run",
            sites=self.sites,
            first=self.first,
            channel=self,
            store=RunStore(folder / "run", self._write),
            report=self.events.append,
            public=self.measured if manifest.evaluation.public else None,
            sums=self._sums() if secure else None,
        )

    def _sums(self) -> Collection:
        self.consortium = consortium = found_consortium(self.manifest, self.sites)
        self.secure = SecureSites(self, consortium.sites, self.events.append)
        return SecureCollection(
            self.manifest,
            identity=consortium.coordinator,
            roster=consortium.roster,
            sites=self.sites,
            shapes={name: array.shape for name, array in self.first.items()},
            channel=Overheard(self.secure, self.masked),
            report=self.events.append,
        )

    def _vault(self, site: str) -> Vault:
        write_records(self.folder / f"{site}.jsonl", records(site, 24), Columns())
        private = self.manifest.privacy is not None
        return Vault(
            site,
            self.manifest,
            train=self.folder / f"{site}.jsonl",
            held_out=self._held_out(site),
            log=self.folder / f"{site}.log",
            population=Population(site, 24, 1000.0, 1e-3) if private else None,
            ledger=Ledger(self.folder / f"{site}.ledger") if private else None,
            rank=self.ranks.get(site),
        )

    def _held_out(self, site: str) -> Path | None:
        if not self.held_out:
            return None
        path = self.folder / f"{site}.held_out.jsonl"
        write_records(path, records(f"{site} held out", 5), Columns())
        return path

    def _write(self, where: Path, state: AdapterState) -> None:
        save_adapter(where, self.model.model, state, self.model.base, self.manifest)

    def measured(self, adapter: AdapterState) -> Counts:
        set_state(self.model.model, adapter)
        return measure(self.model.model, self.model.task, self.public, batch_size=30, precision="fp32")

    def loss(self, adapter: AdapterState) -> float:
        counts = self.measured(adapter)
        return counts["loss_sum"] / counts["records"]

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        for site, data in requests.items():
            if self.fails(site, decode(data)):
                yield Reply(site, None, "timeout", 0, len(data))
                continue
            answer, self.states[site] = self.vaults[site].answer(data, self.states[site])
            self.sent.append((site, decode(data), decode(answer)))
            yield Reply(site, decode(answer), "", len(answer), len(data))

    def bytes_up(self) -> list[int]:
        return [sum(answer.bytes_up for answer in done.answers) for done in self.coordinator.rounds[1:]]

    def logs(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.log"))


def agreed(manifest_for: Manifests, method: str, rounds: int = 6, **tables: Any) -> Manifest:
    training = {"rounds": rounds, "local_steps": 4, "batch_size": 8, "learning_rate": 0.02, "adam_epsilon": 1e-3}
    values = {"adapter": {"rank": RANK}, "aggregation": {"method": method}, "training": training, **tables}
    return manifest_for(data={"max_length": 16}, **values)


def folder(above: Path, name: str) -> Path:
    (above / name).mkdir()
    return above / name
