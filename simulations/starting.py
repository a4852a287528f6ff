"""Starts a planned federation in Flower's simulation engine: the rounds in this process, sites in Ray's workers."""

import logging
import os
from pathlib import Path
from typing import Any, Protocol

from common.errors import CoadaptError, RunError
from common.flower import ClientApp, Context, Grid, ServerApp, quiet
from server.channel import Interrupted
from simulations.app import THREADS
from simulations.sites import FederationData
from simulations.slots import Plan
from simulations.workers import end_workers, start_workers

__all__ = ["Startable", "start_flower"]


class Startable(Protocol):
    """What starting knows of a run."""

    plan: Plan
    data: FederationData
    root: Path
    failure: BaseException | None

    def federate(self, grid: Grid) -> None:
        """The rounds and what follows; whatever stops them is kept in `failure`."""


def start_flower(run: Startable, client: ClientApp) -> None:
    """Run the federation through Flower's simulation engine: the rounds in this process, `client` in Ray's workers."""
    from flwr.simulation import run_simulation  # late: it imports Ray, which takes a second

    quiet()
    plan, server = run.plan, ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        run.federate(grid)
        if isinstance(run.failure, Interrupted):
            quiet(logging.CRITICAL)  # Flower shows a traceback of every call that is cut off
            end_workers()

    os.environ[THREADS] = str(plan.threads)
    os.environ["OMP_NUM_THREADS"] = str(plan.threads)
    # A worker takes its GPU from the plan (`simulations/seats.py`): Ray would deal equal shares of equal GPUs alone.
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0}
    try:
        start_workers(plan.workers, preload=run.root)
        run_simulation(server, client, len(run.data.train), backend_config={"client_resources": resources})
    except Exception as error:
        if run.failure is None:
            run.failure = error if isinstance(error, CoadaptError) else _engine_failed(error)


def _engine_failed(error: Exception) -> RunError:
    return RunError(f"Flower's simulation engine stopped: {type(error).__name__}: {error}")
