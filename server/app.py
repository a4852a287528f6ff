"""The coordinator's Flower app: Flower starts it for a run that `coadapt run` has submitted."""

import os
from pathlib import Path

from common.flower import Context, Grid, ServerApp
from server.home import CoordinatorHome
from server.superlink import HOME

__all__ = ["app"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the run that is named in the run's configuration."""
    from server.field_run import run_field

    # Flower ends its apps by a signal of its own; what is stored then stays, and the run can be resumed.
    run_field(grid, CoordinatorHome(Path(os.environ[HOME])), str(context.run_config["run"]))
