"""A coordinator that is killed and resumed between real vaults ends with the adapter of the undisturbed run."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from vaults import Federation, Manifests, agreed, folder

from common.codec.state import AdapterState, state_digest
from server.channel import Channel, Reply
from server.coordinator import Coordinator
from server.run_store import RunStore
from server.secure_collection import SecureCollection

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class Crash(BaseException):
    """The coordinator's process dies here."""


class Lasting:
    """Sites that answer one payload once. The coordinator dies as it is given its `dies`-th reply."""

    def __init__(self, inner: Channel, dies: int) -> None:
        self.inner, self.dies, self.given = inner, dies, 0
        self.answers: dict[tuple[str, bytes], Reply] = {}

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        keys = {site: (site, hashlib.sha256(data).digest()) for site, data in requests.items()}
        fresh = {site: data for site, data in requests.items() if keys[site] not in self.answers}
        self.answers |= {keys[reply.site]: reply for reply in list(self.inner.exchange(fresh, kind=kind))}
        for site in requests:
            self.given += 1
            if self.given == self.dies:
                raise Crash
            yield self.answers[keys[site]]


def resumed(it: Federation, dies: int) -> AdapterState:
    """Run the federation's manifest in a folder of its own; killed once, and resumed from the folder."""
    where, channel = it.folder / "resumed", Lasting(it.secure, dies)
    for life in (1, 2):
        store = RunStore(where, it._write) if life == 1 else RunStore.reopen(where, it._write)
        sums = SecureCollection(
            it.manifest,
            identity=it.consortium.coordinator,
            roster=it.consortium.roster,
            sites=it.sites,
            shapes={name: array.shape for name, array in it.first.items()},
            channel=channel,
            report=it.events.append,
            journals=store.journals,
        )
        make = Coordinator.resume if life == 2 else lambda *a, **k: Coordinator(*a, first=it.first, **k)
        try:
            coordinator = make(
                it.manifest,
                run_id="run",
                sites=it.sites,
                channel=channel,
                store=store,
                report=it.events.append,
                sums=sums,
            )
            return coordinator.run()
        except Crash:
            assert life == 1
        finally:
            store.close()
    raise AssertionError("the coordinator was killed twice")


@pytest.mark.parametrize(("method", "dies"), [("separate", 20), ("alternate", 24), ("sketch", 50)])
def test_a_killed_run_of_real_vaults_ends_the_same(
    tmp_path: Path, manifest_for: Manifests, method: str, dies: int
) -> None:
    manifest = agreed(manifest_for, method, 2)
    plain = Federation(folder(tmp_path, "plain"), manifest, secure=True, held_out=True)
    killed = Federation(folder(tmp_path, "killed"), manifest, secure=True, held_out=True)
    assert state_digest(resumed(killed, dies)) == state_digest(plain.coordinator.run())
    trained = [site for site, request, _ in killed.sent if request.header.kind == "round_start"]
    assert sorted(trained) == sorted(killed.sites * 2)  # each once a round
