"""The benchmark of the simulation runs as a whole process and prints one JSON object."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simulations.benchmarks import dp_step


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


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_the_private_step_bench_compares_four_engines_with_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_step, "BATCH", 3)
    monkeypatch.setattr(dp_step, "LENGTH", 8)
    figures = dp_step.measure_dp_step(repetitions=1)
    for model in ("bert", "llama"):
        assert figures[f"{model}_plain_seconds"] > 0
        for engine in dp_step.ENGINES:
            assert figures[f"{model}_{engine}_time"] > 0
            assert figures[f"{model}_{engine}_memory"] > 0
            assert figures[f"{model}_{engine}_error"] < 1e-5


def test_an_unknown_bench_is_one_line(tmp_path: Path) -> None:
    coadapt = Path(sys.executable).with_name("coadapt")
    done = subprocess.run([str(coadapt), "bench", "nothing"], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr == "error: no benchmark 'nothing'; there is dp-step, simulation\n"
