"""A run whose coordinator is killed at any moment ends as the undisturbed one does, bit for bit."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from resuming import RANK, Clock, Crash, World, write

from common.codec.state import AdapterState, state_digest
from common.config.manifest import Manifest
from common.errors import RunError
from server.run_store import RunStore

Manifests = Callable[..., Manifest]

CASES: dict[str, dict[str, Any]] = {
    "separate": {"method": "separate"},
    "momentum": {"method": "separate", "server_momentum": 0.5},
    "adam": {"method": "separate", "server_optimizer": "adam", "server_learning_rate": 0.01},
    "alternate, average_last": {"method": "alternate", "average_last": 2},
    "sketch": {"method": "sketch"},
}


def manifest_of(manifest_for: Manifests, *, secure: bool = True, rounds: int = 3, **aggregation: Any) -> Manifest:
    return manifest_for(
        adapter={"rank": RANK},
        training={"rounds": rounds},
        aggregation={"weighting": "records", **aggregation},
        evaluation={"metrics": ["accuracy"], "select": "best"},
        secure_sum={"enabled": secure},
    )


def facts(world: World) -> list[Any]:
    assert world.coordinator is not None
    return [replace(done, seconds=0.0) for done in world.coordinator.rounds]


def folder(above: Path, name: object) -> Path:
    path = above / str(name)
    path.mkdir()
    return path


def undisturbed(above: Path, manifest: Manifest) -> tuple[AdapterState, list[Any], int]:
    clock, world = Clock(), World(folder(above, "undisturbed"), manifest)
    return world.process(clock), facts(world), clock.now


def same(a: AdapterState, b: AdapterState) -> bool:
    return state_digest(a) == state_digest(b)


def test_the_undisturbed_run_moves_and_selects_a_round(tmp_path: Path, manifest_for: Manifests) -> None:
    """So that comparing with it says something."""
    result, rounds, moments = undisturbed(tmp_path, manifest_of(manifest_for, method="separate"))
    assert moments > 100
    assert not same(result, World(folder(tmp_path, "other"), manifest_of(manifest_for, rounds=1)).process())
    assert len({tuple(done.counts["all sites"].items()) for done in rounds}) > 1
    assert all(len(done.answers) == 3 for done in rounds[1:])


@pytest.mark.parametrize("secure", [True, False])
@pytest.mark.parametrize(
    ("case", "step"),
    [
        *((case, 13) for case in CASES),
        *(pytest.param(case, 1, marks=pytest.mark.slow) for case in ("momentum", "sketch")),
    ],
)
def test_killed_at_any_moment_it_ends_the_same(
    tmp_path: Path, manifest_for: Manifests, case: str, step: int, secure: bool
) -> None:
    manifest = manifest_of(manifest_for, secure=secure, **CASES[case])
    result, rounds, moments = undisturbed(tmp_path, manifest)
    for moment in range(1 + len(case) % step, moments + 1, step):
        world = World(folder(tmp_path, moment), manifest)
        with pytest.raises(Crash):
            world.process(Clock(moment))
        assert same(world.process(), result), moment
        assert facts(world) == rounds, moment
        assert len(world.trainers.trained) == 3 * 3, moment  # nobody trained twice
        assert not list(world.folder.glob("journal/*")), moment


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lives=st.lists(st.integers(1, 60), max_size=8))
def test_killed_again_and_again_it_ends_the_same(
    tmp_path_factory: pytest.TempPathFactory, manifest_for: Manifests, lives: list[int]
) -> None:
    manifest = manifest_of(manifest_for, rounds=2, method="sketch")
    above = tmp_path_factory.mktemp("lives")
    result, rounds, _ = undisturbed(above, manifest)
    world = World(folder(above, "killed"), manifest)
    for life in lives:
        try:
            found = world.process(Clock(life))
        except Crash:
            continue
        break
    else:
        found = world.process()
    assert same(found, result)
    assert facts(world) == rounds


def killed(tmp_path: Path, manifest: Manifest, moment: int) -> World:
    world = World(folder(tmp_path, "killed"), manifest)
    with pytest.raises(Crash):
        world.process(Clock(moment))
    return world


def one_line(world: World) -> str:
    with pytest.raises(RunError) as error:
        world.process()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_flipped_bit_anywhere_is_refused(tmp_path: Path, manifest_for: Manifests) -> None:
    world = killed(tmp_path, manifest_of(manifest_for, method="separate", server_momentum=0.5), 45)
    (journal,) = world.folder.glob("journal/*")
    assert len(list(world.folder.glob("rounds/*"))) == 2  # in the second round
    files = [journal, *world.folder.glob("rounds/*/*")]
    assert {path.name for path in files} >= {"round.json", "optimiser.safetensors", "adapter_model.safetensors"}
    for path in files:
        whole = path.read_bytes()
        for place in np.linspace(0, len(whole) - 1, 40).astype(int):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            assert "was changed" in (said := one_line(world)) or "cannot be read" in said
        path.write_bytes(whole)
    world.process()


def test_a_torn_tail_is_cut_at_any_byte(tmp_path: Path, manifest_for: Manifests) -> None:
    manifest = manifest_of(manifest_for, rounds=1, method="separate")
    result, rounds, _ = undisturbed(tmp_path, manifest)
    size = 0
    for cut in (1, 2, 31, 32, 33, 70, 200, 300, 1000, 5000, 10**9):
        world = World(folder(tmp_path, cut), manifest)
        with pytest.raises(Crash):
            world.process(Clock(26))
        (journal,) = world.folder.glob("journal/*")
        whole = journal.read_bytes()
        size = max(size, len(whole))
        journal.write_bytes(whole[: max(0, len(whole) - cut)])
        assert same(world.process(), result), cut
        assert facts(world) == rounds
    assert size > 5000


def test_what_was_half_written_is_removed_and_does_not_count(tmp_path: Path, manifest_for: Manifests) -> None:
    manifest = manifest_of(manifest_for, method="separate")
    result, _, _ = undisturbed(tmp_path, manifest)
    world = killed(tmp_path, manifest, 45)
    torn = world.folder / "rounds" / ".0002.abc.part"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half")
    (world.folder / ".summary.json.abc.part").write_bytes(b"half")
    assert same(world.process(), result)
    assert not list(world.folder.rglob("*.part"))


def test_another_manifest_or_run_does_not_go_on(tmp_path: Path, manifest_for: Manifests) -> None:
    world = killed(tmp_path, manifest_of(manifest_for, method="separate"), 45)
    world.manifest = manifest_of(manifest_for, method="separate", rounds=4)
    assert "has the manifest_sha256" in one_line(world)
    world.manifest, world.names = manifest_of(manifest_for, method="separate"), ("north", "south")
    assert "has the sites ['north', 'south', 'west'], and this one" in one_line(world)


def test_a_finished_run_and_a_missing_one_are_refused(tmp_path: Path, manifest_for: Manifests) -> None:
    world = World(tmp_path, manifest_of(manifest_for, rounds=1, method="separate"))
    world.process()
    assert "is finished" in one_line(world)
    with pytest.raises(RunError, match="holds no run"):
        RunStore.reopen(tmp_path / "none", write)


def test_a_missing_round_is_refused(tmp_path: Path, manifest_for: Manifests) -> None:
    world = killed(tmp_path, manifest_of(manifest_for, method="separate"), 45)
    (world.folder / "rounds" / "0000").rename(world.folder / "rounds" / "0007")
    assert "lacks a round" in one_line(world)


def test_two_processes_never_use_one_run(tmp_path: Path) -> None:
    """The second is another process; when the first is killed, its lock goes with it."""
    RunStore(tmp_path / "run", write).close()
    holds = "import sys; from pathlib import Path; from server.run_store import RunStore\n"
    holds += "store = RunStore.reopen(Path(sys.argv[1]), lambda a, b: None); print('open', flush=True); input()"
    command = [sys.executable, "-c", holds, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        with pytest.raises(RunError, match="another process uses the run"):
            RunStore.reopen(tmp_path / "run", write)
        first.kill()
    RunStore.reopen(tmp_path / "run", write).close()
