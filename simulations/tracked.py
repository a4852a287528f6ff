"""`--log-to` of the commands: a view and the tracking tools beside it, and what to say where one could not follow."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import RunError
from common.progress import EventSink, read_events
from server.tracking.sink import Tracking, open_tracker, to_all
from server.watching.folder import RunFolder

__all__ = ["export", "tracked"]


@contextlib.contextmanager
def tracked(targets: Sequence[str], runs: Path, view: EventSink) -> Iterator[EventSink]:
    """A sink for the runs in a folder: `view`, and the tool of every target. A tool that failed is told at the end.

    Raises:
        RunError: a target is none, or cannot be used: before anything begins.
    """
    tools = {
        target: Tracking(open_tracker(target), lambda name: RunFolder(runs / name).settings()) for target in targets
    }
    try:
        yield to_all(view, *tools.values())
    finally:
        for target, tool in tools.items():
            if tool.trouble:
                print(
                    f"warning: --log-to {target} stopped: {tool.trouble}; afterwards: coadapt runs export RUN --log-to"
                    f" {target}",
                    file=sys.stderr,
                )


def export(run: RunFolder, target: str) -> int:
    """Give a run's events to a tool; return how many there were.

    Raises:
        RunError: the tool cannot be used, or the events cannot be read.
    """
    tool = Tracking(open_tracker(target), lambda _: run.settings())
    try:
        events = list(read_events(run.events))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run.events} cannot be read ({type(error).__name__})") from error
    for event in events:
        tool(event)
    if tool.trouble:
        raise RunError(tool.trouble)
    return len(events)
