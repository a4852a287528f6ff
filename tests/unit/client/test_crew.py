"""One vault, several processes: they train what one process trains, and none outlives the vault.

Two processes compute here on the processor, with gloo; where there are two GPUs, on both of them with NCCL.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

from client.ledger import Ledger
from client.protection import Mechanism, Population
from client.resident import Resident, resident
from client.state import SiteState
from client.ticks import Cancelled, heard
from client.training.crew import Crew, deal
from client.training.loop import Outcome, train
from client.training.orders import Failed
from client.training.private import clipper, train_private
from client.vault import Vault
from common.adapters import get_state
from common.codec.state import AdapterState, state_digest
from common.config.manifest import Columns, Manifest
from common.data_files import write_records
from common.errors import OutOfMemory, PrivacyError, TrainingError
from common.messages import Envelope, RoundDone, RoundStart, decode, encode
from common.randomness import SystemRandomness
from common.records import TextRecord
from common.tasks.task import Batch, Example

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU: the vault would compute on it alone"),
]

DEVICES = ["cuda:0", "cuda:1"] if torch.cuda.device_count() > 1 else ["cpu", "cpu"]
HOW = Mechanism(noise_multiplier=0.8, clip=0.5, sampling_rate=0.6, expected_units=8.0, records_per_unit=2)
STEPS = 4
SECTION = {"batch_size": 8, "local_steps": STEPS, "rounds": 3, "micro_batch_size": 2, "adam_epsilon": 1e-4}
PEOPLE = Population("patients", 16, 50.0, 1e-3)


@pytest.fixture(scope="module")
def calm(manifest_for: Callable[..., Manifest]) -> Manifest:
    """Without dropout: processes draw it apart, so sums would differ by more than rounding."""
    return manifest_for(training=SECTION, adapter={"dropout": 0.0})


@pytest.fixture(scope="module")
def ready(calm: Manifest) -> Resident:
    return resident(calm)


@pytest.fixture(scope="module")
def crew(calm: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    made = Crew(calm, DEVICES, tmp_path_factory.mktemp("cards") / "private", rank=None)
    with contextlib.closing(made):
        yield made


@pytest.fixture(scope="module")
def examples(ready: Resident) -> list[Example]:
    records = [
        TextRecord(text=f"clause {place} " + "of the term " * (1 + place % 5), label="abc"[place % 3], unit=str(place))
        for place in range(24)
    ]
    return list(ready.task.encode(records).examples)


@pytest.fixture(scope="module")
def adapter(ready: Resident) -> AdapterState:
    """One in which everything has a gradient."""
    rng = np.random.Generator(np.random.PCG64(3))
    return {n: rng.normal(0, 0.2, a.shape).astype(np.float32) for n, a in get_state(ready.model).items()}


def differ(one: AdapterState, other: AdapterState) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def plainly(
    ready: Resident,
    adapter: AdapterState,
    examples: list[Example],
    manifest: Manifest,
    crew: Crew | None,
    *,
    batch: int = 8,
    task: Any = None,
    **changes: Any,
) -> tuple[AdapterState, Outcome]:
    def batches() -> Iterator[list[int]]:
        for step in count():
            yield [(batch * step + place) % len(examples) for place in range(batch)]

    ready.take(adapter)
    if crew is not None:
        crew.take(adapter, list(adapter), seed=0, labels=("site", 1))
    section = manifest.training.model_copy(update=changes)
    how = {"first_step": 0, "steps": STEPS, "total_steps": STEPS, "precision": "fp32"}
    outcome = train(ready.model, task or ready.task, examples, batches(), section, crew=crew, **how)  # type: ignore[arg-type]
    return get_state(ready.model), outcome


class Counting(SystemRandomness):
    """Counts how often noise was drawn."""

    drawn = 0

    def normal(self, number: int) -> np.ndarray:
        self.drawn += 1
        return super().normal(number)


def privately(
    ready: Resident,
    adapter: AdapterState,
    units: list[list[Example]],
    manifest: Manifest,
    crew: Crew | None,
    how: Mechanism,
    seed: int = 5,
) -> tuple[AdapterState, int]:
    """The adapter, and how often noise was drawn."""
    randomness = Counting(unsafe_seed=seed)
    ready.take(adapter)
    if crew is not None:
        crew.take(adapter, list(adapter), seed=0, labels=("site", 1), mechanism=how)
    steps: dict[str, Any] = {"first_step": 0, "steps": STEPS, "total_steps": STEPS, "precision": "fp32"}
    train_private(ready.model, ready.task, units, manifest.training, how, randomness, crew=crew, **steps)
    return get_state(ready.model), randomness.drawn


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"proximal_mu": 0.5, "max_grad_norm": 0.05, "head_learning_rate": 0.01},
        {"micro_batch_size": 8},
        {"batch": 1},
    ],
    ids=["plain", "proximal, clipped, two rates", "other parts", "one record"],
)
def test_two_processes_train_what_one_does(
    calm: Manifest, ready: Resident, adapter: AdapterState, examples: list[Example], crew: Crew, changes: dict[str, Any]
) -> None:
    alone, first = plainly(ready, adapter, examples, calm, None, **changes)
    together, second = plainly(ready, adapter, examples, calm, crew, **changes)
    assert differ(alone, together) < 1e-5
    assert differ(alone, adapter) > 1e-3
    assert (second.loss, second.examples) == (pytest.approx(first.loss, abs=1e-5), first.examples)


class SmallMemory:
    """A task that has memory for the losses of one record at once."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self.failed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def losses(self, output: Any, batch: Batch) -> torch.Tensor:
        if len(batch.targets) > 1:
            self.failed += 1
            raise torch.OutOfMemoryError("injected")
        losses: torch.Tensor = self._task.losses(output, batch)
        return losses


def test_where_memory_runs_out_in_the_vault_the_step_is_the_same(
    calm: Manifest, ready: Resident, adapter: AdapterState, examples: list[Example], crew: Crew
) -> None:
    scarce = SmallMemory(ready.task)
    together, _ = plainly(ready, adapter, examples, calm, crew, task=scarce)
    assert scarce.failed == 1
    assert differ(plainly(ready, adapter, examples, calm, None)[0], together) < 1e-5


def test_where_memory_runs_out_on_another_card_it_is_said(calm: Manifest, tmp_path: Path) -> None:
    ours, theirs = Pipe()
    crew = Crew(calm, DEVICES, tmp_path, rank=None)
    with subprocess.Popen(["sleep", "60"]) as process:
        crew._helpers = [(process, ours)]
        theirs.send(Failed("out_of_memory", "memory does not suffice"))
        with pytest.raises(OutOfMemory, match=f"on {DEVICES[1]} training cannot go on .* memory does not suffice"):
            crew._hear(1)
        crew.close()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("head_clip", [None, 0.2])
@pytest.mark.parametrize("noise", [0.0, 0.8])
def test_with_privacy_too_and_noise_is_added_once(
    calm: Manifest,
    ready: Resident,
    adapter: AdapterState,
    examples: list[Example],
    crew: Crew,
    noise: float,
    head_clip: float | None,
) -> None:
    """With the same seed one process samples the same units and draws the same noise; twice the noise would show."""
    units = [examples[place : place + 1 + place % 3] for place in range(16)]
    how = replace(HOW, noise_multiplier=noise, head_clip=head_clip)
    alone, draws = privately(ready, adapter, units, calm, None, how)
    together, draws_together = privately(ready, adapter, units, calm, crew, how)
    assert differ(alone, together) < 1e-5
    assert draws == draws_together == STEPS
    assert differ(alone, privately(ready, adapter, units, calm, crew, how, seed=6)[0]) > 1e-3


def test_a_step_that_samples_nobody_is_noise_alone(
    calm: Manifest, ready: Resident, adapter: AdapterState, examples: list[Example], crew: Crew
) -> None:
    nobody = replace(HOW, sampling_rate=0.0)
    states = [privately(ready, adapter, [[e] for e in examples], calm, each, nobody)[0] for each in (None, crew)]
    assert differ(*states) == 0
    one = replace(HOW, sampling_rate=1 / 24)  # at most a unit or two in a step: a process has nothing to sum
    states = [privately(ready, adapter, [[e] for e in examples], calm, each, one)[0] for each in (None, crew)]
    assert differ(*states) < 1e-5


def test_noise_of_two_processes_has_the_variance_of_one(
    calm: Manifest, ready: Resident, adapter: AdapterState, examples: list[Example], crew: Crew
) -> None:
    """From the system's own randomness: a step that samples nobody is noise of deviation z C / expected units."""
    how = replace(HOW, sampling_rate=0.0)
    seen: list[torch.Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen.extend(p.grad.flatten().cpu() for group in optimizer.param_groups for p in group["params"])

    ready.take(adapter)
    crew.take(adapter, list(adapter), seed=0, labels=("site", 1), mechanism=how)
    steps: dict[str, Any] = {"first_step": 0, "steps": STEPS, "total_steps": STEPS, "precision": "fp32"}
    handle = register_optimizer_step_pre_hook(look)
    try:
        train_private(
            ready.model, ready.task, [[e] for e in examples], calm.training, how, SystemRandomness(), crew=crew, **steps
        )
    finally:
        handle.remove()
    noise = torch.cat(seen).double()
    deviation = how.noise_multiplier * how.clip / how.expected_units
    assert len(noise) == STEPS * sum(array.size for array in adapter.values())
    assert abs(float(noise.var()) / deviation**2 - 1) < 5 * (2 / len(noise)) ** 0.5
    assert abs(float(noise.mean())) < 5 * deviation / len(noise) ** 0.5


def test_what_clips_elsewhere_takes_no_step(calm: Manifest, ready: Resident, adapter: AdapterState) -> None:
    ready.take(adapter)
    optimizer = clipper(ready.model, calm.training, HOW)
    for parameter in optimizer.params:
        parameter.grad_sample = torch.ones((1, *parameter.shape), device=parameter.device)
    with pytest.raises(PrivacyError, match="without noise"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for parameter in optimizer.params:
        del parameter.grad_sample
    assert differ(get_state(ready.model), adapter) == 0


def records_in(folder: Path) -> Path:
    rows = [TextRecord(unit=f"unit {n // 2}", text=f"clause {n} of it", label="abc"[n % 3]) for n in range(32)]
    write_records(folder / "train.jsonl", rows, Columns())
    return folder / "train.jsonl"


def asked(vault: Vault, manifest: Manifest, adapter: AdapterState) -> Envelope:
    start = RoundStart(
        manifest_sha256=manifest.digest(),
        run_id="run",
        round=1,
        adapter_sha256=state_digest(adapter),
        evaluate=False,
        accepted=0,
    )
    return decode(vault.answer(encode(Envelope(header=start, tensors=adapter)), SiteState())[0])


def test_a_vault_answers_with_what_all_processes_trained(
    calm: Manifest, adapter: AdapterState, crew: Crew, tmp_path: Path
) -> None:
    before = crew.pids
    vaults = [
        Vault("site", calm, train=records_in(tmp_path), held_out=None, log=tmp_path / "log", crew=each)
        for each in (None, crew)
    ]
    alone, together = (asked(vault, calm, adapter) for vault in vaults)
    assert isinstance(alone.header, RoundDone)
    assert isinstance(together.header, RoundDone)
    assert differ(alone.tensors, together.tensors) < 1e-5
    assert together.header.loss == pytest.approx(alone.header.loss, abs=1e-5)
    assert crew.pids == before != []  # the base was loaded once
    open_here = [place for pid in (os.getpid(), *crew.pids) for place in psutil.Process(pid).net_connections()]
    assert {place.laddr.ip for place in open_here if place.status == psutil.CONN_LISTEN} <= {"127.0.0.1"}


def test_a_private_vault_does_too(calm: Manifest, adapter: AdapterState, crew: Crew, tmp_path: Path) -> None:
    before, privacy = crew.pids, {"epsilon": 8.0, "delta": 1e-3, "unit": "patient"}
    manifest = Manifest.model_validate_json(json.dumps({**calm.model_dump(mode="json"), "privacy": privacy}))
    vault = Vault(
        "site",
        manifest,
        train=records_in(tmp_path),
        held_out=None,
        log=tmp_path / "log",
        population=PEOPLE,
        ledger=Ledger(tmp_path / "ledger"),
        crew=crew,
    )
    answer = asked(vault, manifest, adapter)
    assert isinstance(answer.header, RoundDone), (tmp_path / "log").read_text()
    assert (answer.header.loss, answer.header.counts) == (None, {})
    assert vault.charged("run") == [1]
    assert crew.pids == before


def test_a_training_is_broken_off_between_two_steps(
    calm: Manifest, ready: Resident, adapter: AdapterState, examples: list[Example], crew: Crew
) -> None:
    before = crew.pids

    def stop(step: int) -> None:
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled), heard(stop):
        plainly(ready, adapter, examples, calm, crew)
    assert differ(*(plainly(ready, adapter, examples, calm, each)[0] for each in (None, crew))) < 1e-5
    assert crew.pids == before


def test_a_process_that_ends_takes_one_training_with_it(
    calm: Manifest, ready: Resident, adapter: AdapterState, examples: list[Example], crew: Crew
) -> None:
    crew.ready()
    (pid,) = crew.pids

    def kill(step: int) -> None:
        if step == 2:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(TrainingError) as caught, heard(kill):
        plainly(ready, adapter, examples, calm, crew)
    assert f"pid {pid}) ended with status -9" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert crew.pids == []
    together, _ = plainly(ready, adapter, examples, calm, crew)
    assert differ(together, plainly(ready, adapter, examples, calm, None)[0]) < 1e-5
    assert crew.pids != [pid]


def test_an_error_of_a_process_is_the_vaults(
    calm: Manifest, adapter: AdapterState, ready: Resident, examples: list[Example], crew: Crew, tmp_path: Path
) -> None:
    """The shorter of two records is dealt to the second process, and no word of the base has its number."""
    crew.ready()
    (pid,) = crew.pids
    bad = replace(examples[0], tokens=np.full(3, 10**6, np.int32))
    with pytest.raises(TrainingError, match=r"on .* training cannot go on \(unexpected:"):
        plainly(ready, adapter, [examples[4], bad], calm, crew, batch=2)
    assert not psutil.pid_exists(pid)
    assert [path.name for path in crew._folder.iterdir()] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked")
def test_no_process_outlives_its_vault(
    calm: Manifest, adapter: AdapterState, ready: Resident, examples: list[Example], tmp_path: Path
) -> None:
    """A process with a crew in the middle of a step is killed; the other one waits for it in a collective."""
    reads, writes = os.pipe()
    vault = os.fork()
    if vault == 0:
        try:
            own = Crew(calm, DEVICES, tmp_path / "private", rank=None)
            own.take(adapter, list(adapter), seed=0, labels=("site", 1))

            def hang(_: object) -> float:
                os.write(writes, f"{own.pids[0]}\n".encode())
                time.sleep(600)
                return 0.0

            own.summed([p for p in ready.model.parameters() if p.requires_grad], [[e] for e in examples], hang)
        finally:
            os._exit(1)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        helper = psutil.Process(int(pipe.readline()))
    assert helper.is_running()
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    time.sleep(0.5)  # it has summed its part, and waits
    os.kill(vault, signal.SIGKILL)
    os.waitpid(vault, 0)
    helper.wait(10)


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 8))
def test_a_step_is_dealt_whole_and_evenly(sizes: list[int], processes: int) -> None:
    dealt = deal(sizes, processes)
    assert sorted(index for share in dealt for index in share) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in share) for share in dealt]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert bool(sizes) == bool(dealt[0])
    assert dealt == deal(sizes, processes)
