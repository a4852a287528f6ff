"""What a run uses: processors in shares of the machine, memory of all its processes, GPUs as the driver says."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from common.progress import Event, ResourcesUsed
from simulations import resources
from simulations.resources import ResourceWatch
from simulations.summarise import resource_facts
from simulations.wording import resources_text, used_text

GB = 10**9


def test_a_child_that_computes_and_holds_memory_is_seen() -> None:
    watch = ResourceWatch(print, gpus=False)
    idle = watch.used()
    hold = "x = b'1' * 300_000_000; print(flush=True)\nwhile True: pass"
    child = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        watch.used()
        began, busy = time.monotonic(), psutil.Process(child.pid).cpu_times().user
        while psutil.Process(child.pid).cpu_times().user < busy + 0.5:
            time.sleep(0.05)
        found = watch.used()
        least = 0.4 / ((time.monotonic() - began + 0.5) * (os.cpu_count() or 1))
        assert least < found.processors <= 1.0
        assert found.memory > idle.memory + 250_000_000
        assert (found.gpus, found.gpu_memory) == ((), ())
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def test_it_reports_while_it_is_entered_and_not_afterwards() -> None:
    events: list[Event] = []
    enough = threading.Event()

    def take(event: Event) -> None:
        events.append(event)
        if len(events) == 3:
            enough.set()

    with ResourceWatch(take, gpus=False, every=0.01):
        assert enough.wait(60)
    count = len(events)
    time.sleep(0.1)
    assert len(events) == count
    assert all(isinstance(event, ResourcesUsed) for event in events)


def test_gpus_are_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "nvidia-smi"
    said.write_text("#!/bin/sh\necho '93, 7012'\necho '4, 11'\n")
    said.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = ResourceWatch(print, gpus=True).used()
    assert (found.gpus, found.gpu_memory) == ((0.93, 0.04), (7012 * 2**20, 11 * 2**20))
    assert used_text(found).endswith("GPU 0 93%, 7.4 GB, GPU 1 4%, 11.5 MB")
    said.write_text("#!/bin/sh\necho '[N/A], [N/A]'\n")  # a card that does not tell
    assert ResourceWatch(print, gpus=True).used().gpus == ()
    said.write_text("#!/bin/sh\nexit 9\n")
    assert ResourceWatch(print, gpus=True).used().gpus == ()
    monkeypatch.setattr(resources, "ASK", ("no-such-program",))
    assert ResourceWatch(print, gpus=True).used().gpus == ()


def test_a_summary_has_means_of_shares_and_peaks_of_memory() -> None:
    looks = [
        ResourcesUsed(processors=0.5, memory=3 * GB, gpus=(0.2, 0.0), gpu_memory=(4 * GB, GB)),
        ResourcesUsed(processors=1.0, memory=2 * GB, gpus=(0.6, 1.0), gpu_memory=(5 * GB, 0)),
        ResourcesUsed(processors=0.9, memory=GB),
    ]
    facts = resource_facts(looks)
    assert facts is not None
    assert (facts.processors, facts.memory) == (pytest.approx(0.8), 3 * GB)
    assert (facts.gpus, facts.gpu_memory) == ([pytest.approx(0.4), 0.5], [5 * GB, GB])
    assert resources_text(facts) == (
        "processors were 80% busy, its processes held at most 3.0 GB; GPU 0 was 40% busy and held at most 5.0 GB;"
        " GPU 1 was 50% busy and held at most 1.0 GB"
    )
    assert resource_facts([]) is None
    alone = resource_facts(looks[2:])
    assert alone is not None
    assert (alone.gpus, alone.gpu_memory) == ([], [])
