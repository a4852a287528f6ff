"""`coadapt bench NAME`: runs a benchmark and prints one JSON object."""

import json
import os
import platform

import torch

from common.errors import RunError
from simulations.benchmarks.dp_step import measure_dp_step
from simulations.benchmarks.simulation import measure_simulation

__all__ = ["print_bench"]

BENCHMARKS = ("dp-step", "simulation")


def print_bench(name: str, *, as_json: bool, sites: int, rounds: int, repetitions: int) -> None:
    """Run the benchmark `name` and print {"bench", "machine", "figures"}, on one line with `as_json`.

    Raises:
        RunError: there is no such benchmark.
    """
    if name not in BENCHMARKS:
        raise RunError(f"no benchmark {name!r}; there is {', '.join(BENCHMARKS)}")
    if name == "dp-step":
        figures = measure_dp_step(repetitions=repetitions)
    else:
        figures = measure_simulation(sites=sites, rounds=rounds)
    machine = {
        "cores": os.cpu_count(),
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps({"bench": name, "machine": machine, "figures": figures}, indent=None if as_json else 2))
