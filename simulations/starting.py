"""Starts a planned federation in Flower's simulation engine: the rounds in this process, sites in Ray's workers."""

import logging
import os
from pathlib import Path
from typing import Any, Protocol

from common.config.manifest import Manifest
from common.errors import CoadaptError, RunError
from common.flower import ClientApp, Context, Grid, ServerApp, quiet
from server.channel import Interrupted
from simulations.app import THREADS
from simulations.seats import Seats
from simulations.sites import simulation_of
from simulations.slots import Plan, on_cluster
from simulations.workers import cluster_size, end_workers, start_workers

__all__ = ["Startable", "start_flower"]


class Startable(Protocol):
    """What starting knows of a run."""

    manifest: Manifest
    plan: Plan
    root: Path
    failure: BaseException | None

    @property
    def nodes(self) -> int:
        """Flower nodes that the run needs."""

    def take_places(self, plan: Plan, seats: Seats | None) -> None:
        """Learn where the workers compute; without `seats` that is for a cluster to say."""

    def federate(self, grid: Grid) -> None:
        """The rounds and what follows; whatever stops them is kept in `failure`."""


def start_flower(run: Startable, client: ClientApp) -> None:
    """Run the federation through Flower's simulation engine: the rounds in this process, `client` in Ray's workers."""
    from flwr.simulation import run_simulation  # late: it imports Ray, which takes a second

    quiet()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        run.federate(grid)
        if isinstance(run.failure, Interrupted):
            quiet(logging.CRITICAL)  # Flower shows a traceback of every call that is cut off
            end_workers()

    os.environ[THREADS] = str(run.plan.threads)
    os.environ["OMP_NUM_THREADS"] = str(run.plan.threads)
    section = simulation_of(run.manifest)
    # A worker takes its GPU from the plan (`simulations/seats.py`): Ray would deal equal shares of equal GPUs alone.
    # A cluster's GPUs are Ray's to deal, since the plan knows this machine only.
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0}
    try:
        if section.ray_address is None:
            seats = Seats(run.root / "slots", run.plan)
            preload = None if run.plan.gpu_share else run.root
            start_workers(run.plan.workers, preload=preload, slots=seats.folder)
            run.take_places(run.plan, seats)
        else:
            start_workers(run.plan.workers, preload=None, slots=None, address=section.ray_address)
            workers, resources["num_gpus"] = cluster_size(section)
            records = run.plan.slots[0].records
            run.take_places(on_cluster(section.ray_address, run.plan.footprint, records=records, workers=workers), None)
        run_simulation(server, client, run.nodes, backend_config={"client_resources": resources})
    except Exception as error:
        if run.failure is None:
            run.failure = error if isinstance(error, CoadaptError) else _engine_failed(error)


def _engine_failed(error: Exception) -> RunError:
    return RunError(f"Flower's simulation engine stopped: {type(error).__name__}: {error}")
