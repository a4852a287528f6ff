"""The benchmark of the simulation runs as a whole process and prints one JSON object."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import RunError
from simulations.benchmarks import dp_step
from simulations.benchmarks.bench import print_bench
from simulations.commands import app


@pytest.mark.slow
def test_the_simulation_bench_prints_one_object(tmp_path: Path) -> None:
    coadapt = Path(sys.executable).with_name("coadapt")
    command = [str(coadapt), "bench", "simulation", "--json", "--sites", "3", "--rounds", "1", "--repetitions", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)

    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    result = json.loads(line)
    figures = result["figures"]
    assert result["bench"] == "simulation"
    assert set(result) == {"bench", "machine", "figures"}
    assert figures["outside_training_seconds"] > 0
    assert figures["secure_outside_training_seconds"] > 0
    assert figures["ratio"] == pytest.approx(
        figures["outside_training_seconds"] / figures["plain_outside_training_seconds"], abs=1e-3
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.federation
def test_the_round_latency_bench_names_where_a_round_goes(tmp_path: Path) -> None:
    coadapt = Path(sys.executable).with_name("coadapt")
    command = [str(coadapt), "bench", "round-latency", "--json", "--rounds", "1", "--repetitions", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)

    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    figures = json.loads(line)["figures"]
    stages = [figures[f"stage_{name}_seconds"] for name in ("advertise", "shares", "masked", "confirm", "reveal")]
    between = [figures[f"{name}_seconds"] for name in ("between_stages", "opening", "storing")]
    legs = [value for name, value in figures.items() if name.startswith("leg_")]
    assert sum(stages) + sum(between) == pytest.approx(figures["round_seconds"], abs=0.1)
    assert sum(legs) == pytest.approx(sum(stages), abs=0.01)
    phases = [figures[f"stock_phase_{number}_seconds"] for number in (1, 2, 3, 4)]
    assert sum(phases) == pytest.approx(figures["stock_round_seconds"], abs=0.01)
    assert figures["ratio"] == pytest.approx(figures["round_seconds"] / figures["stock_round_seconds"], abs=1e-3)
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
    assert done.stderr == "error: no benchmark 'nothing'; there is dp-step, round-latency, secure-sum, simulation\n"


def test_the_secure_sum_bench_prints_one_object() -> None:
    size = ["--values", "5000", "--values", "90000", "--sites", "3", "--sites", "8", "--repetitions", "1"]
    done = CliRunner().invoke(app, ["bench", "secure-sum", "--json", *size], catch_exceptions=False)

    result = json.loads(done.stdout)
    figures = result["figures"]
    assert set(result) == {"bench", "machine", "figures"}
    assert result["bench"] == "secure-sum"
    assert all(value > 0 for value in figures.values())
    for place in ("5000_3", "5000_8", "90000_3", "90000_8"):
        assert figures[f"bytes_per_value_{place}"] <= 2.67
        seconds, flower = figures[f"mask_seconds_{place}"], figures[f"mask_flower_seconds_{place}"]
        assert figures[f"mask_times_flower_{place}"] == pytest.approx(flower / seconds, rel=2e-3)
    for step in ("split", "open"):
        assert figures[f"{step}_times_flower_8"] > 2


def test_the_simulation_bench_takes_one_number_of_sites() -> None:
    with pytest.raises(RunError, match="one number of sites, not 2"):
        print_bench("simulation", as_json=True, sites=[2, 3], rounds=1, values=(), repetitions=1)
