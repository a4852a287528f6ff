"""Ray's worker processes: started so that they find our code and no other, and ended when nobody waits for them.

Ray puts the current folder first in its workers' `sys.path`. A folder there that is named `client`, say, would take
the place of ours. So every worker imports our rooms before, and then gets the path of the process that started it.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

import psutil

__all__ = ["SLOTS", "end_workers", "start_workers", "worker_begins", "worker_starts"]

# Environment variable with `sys.path` of the process that started the workers, as JSON.
PATH = "COADAPT_PATH"

# Environment variable with the folder of the simulated sites whose base a worker loads when it starts; may be missing.
SITES = "COADAPT_SITES"

# Environment variable with the folder of the plan's slots (`simulations/seats.py`).
SLOTS = "COADAPT_SLOTS"

# Of "ray::ClientAppActor.run()" Linux keeps fifteen characters as the process's name.
NAME = "ray::ClientAppA"

# Seconds that a worker gets to end in order.
PATIENCE = 5.0


def start_workers(count: int, *, preload: Path) -> None:
    """Start Ray for `count` workers on this machine, before Flower would; where Ray runs already it is left as it is.

    Each takes a slot of the plan in the folder `preload` and loads the base for the sites there at once, while Flower
    starts.

    Ray takes SIGTERM over and ends the process on it in the middle of things; the handlers from before are put back.
    """
    import ray  # late: it takes a second

    if ray.is_initialized():
        return
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ray.init(
        address="local",
        num_cpus=count,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={
            "env_vars": {
                PATH: json.dumps(sys.path),
                SITES: str(preload),
                SLOTS: str(preload / "slots"),
                "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray hides the GPU that a slot gave
            },
            "worker_process_setup_hook": "simulations.workers.worker_starts",
        },
    )
    if threading.current_thread() is threading.main_thread():
        for number, handler in ours.items():
            signal.signal(number, handler)


def worker_starts() -> None:
    """Ray calls this first in a new worker: what it needs is imported from where we lie, the base loaded."""
    from simulations import app
    from simulations.seats import take_seat

    sites = os.environ.get(SITES)
    if sites is not None:
        with contextlib.suppress(Exception):  # the first call will meet it again, and can say so
            take_seat(patience=0.0)
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
