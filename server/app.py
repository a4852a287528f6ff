"""The coordinator's Flower app: Flower starts it for a run that `coadapt run` has submitted."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType

from common.flower import Context, Grid, ServerApp
from server.home import CoordinatorHome
from server.superlink import HOME

__all__ = ["app"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the run that is named in the run's configuration."""
    from server.field_run import run_field

    stop = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGUSR1, ask)
    run_field(grid, CoordinatorHome(Path(os.environ[HOME])), str(context.run_config["run"]), stop=stop)
