"""The benchmark of the simulation runs as a whole process and prints one JSON object."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_simulation_bench_prints_one_object(tmp_path: Path) -> None:
    coadapt = Path(sys.executable).with_name("coadapt")
    command = [str(coadapt), "bench", "simulation", "--json", "--sites", "2", "--rounds", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)

    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    result = json.loads(line)
    figures = result["figures"]
    assert result["bench"] == "simulation"
    assert set(result) == {"bench", "machine", "figures"}
    assert figures["outside_training_seconds"] > 0
    assert figures["ratio"] == pytest.approx(
        figures["outside_training_seconds"] / figures["plain_outside_training_seconds"], abs=1e-3
    )
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_bench_is_one_line(tmp_path: Path) -> None:
    coadapt = Path(sys.executable).with_name("coadapt")
    done = subprocess.run([str(coadapt), "bench", "nothing"], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr == "error: no benchmark 'nothing'; there is dp-step, simulation\n"
