"""`coadapt bench NAME`: runs a benchmark and prints one JSON object."""

import json
import os
import platform
from collections.abc import Sequence

import torch

from common.errors import RunError
from simulations.benchmarks.dp_step import measure_dp_step
from simulations.benchmarks.round_latency import measure_round_latency
from simulations.benchmarks.secure_sum import SITES, VALUES, measure_secure_sum
from simulations.benchmarks.simulation import REPETITIONS, Size, measure_simulation

__all__ = ["print_bench"]

BENCHMARKS = ("dp-step", "round-latency", "secure-sum", "simulation")
SIMULATED_SITES = 20
BASES = ("default", "tiny")
DP_STEPS, TURNS, LATENCY_TURNS = 7, 3, 2


def print_bench(
    name: str,
    *,
    as_json: bool,
    sites: Sequence[int],
    rounds: int,
    values: Sequence[int],
    repetitions: int | None,
    participants: int | None = None,
    local_steps: int = 1,
    base: str = "default",
) -> None:
    """Run the benchmark `name` and print {"bench", "machine", "figures"}, on one line with `as_json`.

    `sites` and `values` may be empty, `repetitions` None; each benchmark has sizes of its own. `participants`,
    `local_steps` and `base` are the simulation's.

    Raises:
        RunError: there is no such benchmark or base, or it takes one number of sites and got more.
    """
    if name not in BENCHMARKS:
        raise RunError(f"no benchmark {name!r}; there is {', '.join(BENCHMARKS)}")
    if name == "dp-step":
        figures = measure_dp_step(repetitions=repetitions or DP_STEPS)
    elif name == "round-latency":
        figures = measure_round_latency(rounds=rounds, turns=repetitions or LATENCY_TURNS)
    elif name == "secure-sum":
        figures = measure_secure_sum(values=values or VALUES, sites=sites or SITES, repetitions=repetitions or TURNS)
    else:
        if len(sites) > 1:
            raise RunError(f"the simulation is measured with one number of sites, not {len(sites)}; give --sites once")
        if base not in BASES:
            raise RunError(f"the simulation is measured on a base {' or '.join(BASES)}, found {base!r}")
        size = Size(
            sites=sites[0] if sites else SIMULATED_SITES,
            rounds=rounds,
            participants=participants,
            local_steps=local_steps,
            tiny=base == "tiny",
        )
        figures = measure_simulation(size, repetitions=repetitions or REPETITIONS)
    machine = {
        "cores": os.cpu_count(),
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps({"bench": name, "machine": machine, "figures": figures}, indent=None if as_json else 2))
