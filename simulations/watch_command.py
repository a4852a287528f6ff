"""`coadapt watch`: what a person types to look at a run, in the field or simulated; the work is done elsewhere."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["watch"]


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or the name of one in the folder runs.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")] = 8790,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Serve a page that follows a run, to this machine alone; it only reads."""
    from server.watching.folder import find_run
    from server.watching.serve import serve
    from simulations.spent import spent_in

    console, folder = Console(), find_run(run)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    def ready(address: str) -> None:
        own = address.rstrip("/").rpartition(":")[2]
        say(f"{folder.path.name}: {address}")
        say(f"from another machine: ssh -L {own}:127.0.0.1:{own} THIS-MACHINE, then the same address; Ctrl-C ends this")
        if open_page:
            webbrowser.open(address)

    serve(folder, port=port, spent=spent_in(folder) if folder.simulated else None, ready=ready)
    say("no longer watching; the run is as it was")
