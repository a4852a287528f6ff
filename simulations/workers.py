"""Ray's worker processes: started so that they find our code and no other, and ended when nobody waits for them.

Ray puts the current folder first in its workers' `sys.path`. A folder there that is named `client`, say, would take
the place of ours. So every worker imports our rooms before, and then gets the path of the process that started it.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import psutil

from common.config.simulation import SimulationSection
from common.errors import RunError

__all__ = ["SLOTS", "cluster_size", "end_workers", "require_cluster", "start_workers", "worker_begins", "worker_starts"]

# Environment variable with `sys.path` of the process that started the workers, as JSON.
PATH = "COADAPT_PATH"

# Environment variable with the folder of the simulated sites whose base a worker loads when it starts; may be missing.
SITES = "COADAPT_SITES"

# Environment variable with the folder of the plan's slots (`simulations/seats.py`).
SLOTS = "COADAPT_SLOTS"

# Environment variables with the number of threads of a worker.
THREADS = ("COADAPT_THREADS", "OMP_NUM_THREADS")

# Of "ray::ClientAppActor.run()" Linux keeps fifteen characters as the process's name.
NAME = "ray::ClientAppA"

# Seconds that a worker gets to end in order.
PATIENCE = 5.0


def start_workers(count: int, *, preload: Path | None, slots: Path | None, address: str | None = None) -> None:
    """Start Ray for `count` workers on this machine, before Flower would, or join the cluster at `address`, which has
    workers of its own; where this process has Ray already it is left as it is.

    Each loads the base for the sites in the folder `preload` at once, while Flower starts; None leaves that to its
    first call, as it must be where a worker is told only then which GPU is its own. With `slots`, the folder of the
    plan's (`simulations/seats.py`), it takes one of them in its first call: Ray starts processes that never get one.

    Ray takes SIGTERM over and ends the process on it in the middle of things; the handlers from before are put back.

    Raises:
        RunError: there is no cluster at the address.
    """
    import ray  # late: it takes a second

    if ray.is_initialized():
        return
    places = {SITES: str(preload)} if preload is not None else {}
    if slots is not None:  # Ray must not hide the GPU that a slot gave
        places |= {SLOTS: str(slots), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if address is not None:  # its machines do not have this process's environment
        places |= {name: os.environ[name] for name in THREADS if name in os.environ}
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(
            address=address or "local",
            num_cpus=None if address else count,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={
                "env_vars": {PATH: json.dumps(sys.path), **places},
                "worker_process_setup_hook": "simulations.workers.worker_starts",
            },
        )
    except (ConnectionError, ValueError) as error:
        if address is None:
            raise
        raise _no_cluster(address) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in ours.items():
                signal.signal(number, handler)


def require_cluster(address: str) -> None:
    """See that something listens at HOST:PORT: Ray itself would look for it for minutes.

    Raises:
        RunError: nothing does.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address) from error


def _no_cluster(address: str) -> RunError:
    return RunError(
        f"simulation.ray_address: no Ray cluster answers at {address}; `ray start --head` starts one and says its"
        " address"
    )


def cluster_size(section: SimulationSection) -> tuple[int, float]:
    """Workers that the joined cluster has room for, and the share of a GPU that each gets; 0 where it has none.

    A worker takes a processor, and where GPUs are wanted as much of one as `slots_per_gpu` says, on auto a whole one.
    """
    import ray

    there = ray.cluster_resources()
    cores, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
    if not gpus or section.gpus == 0:
        return max(1, cores), 0.0
    slots = 1 if section.slots_per_gpu == "auto" else section.slots_per_gpu
    return max(1, min(cores, gpus * slots)), 1 / slots


def worker_starts() -> None:
    """Ray calls this first in a new worker: what it needs is imported from where we lie, the base loaded."""
    from simulations import app

    sites = os.environ.get(SITES)
    if sites is not None:
        with contextlib.suppress(Exception):  # the first call will meet it again, and can say so
            app.preload(Path(sites))


def worker_begins() -> None:
    """Called before a worker's first work; nothing happens in workers that `start_workers` did not start.

    It gets the path of the process that started it, and will end in order when `end_workers` says so: of a worker
    that is killed Ray makes a report on the terminal.
    """
    path = os.environ.get(PATH)
    if path is not None:
        sys.path[:] = json.loads(path)
        signal.signal(signal.SIGTERM, _leave)


def _leave(_number: int, _frame: object) -> None:
    import ray

    ray.actor.exit_actor()


def end_workers() -> None:
    """End the workers of this process in the middle of what they do, which may take hours."""
    workers = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended by itself
            if process.name().startswith(NAME):
                process.terminate()
                workers.append(process)
    for process in psutil.wait_procs(workers, timeout=PATIENCE)[1]:
        process.kill()
