"""`coadapt site log`: the audit log for a person, its chain verified as it is read."""

from collections import deque

from rich.console import Console

from client.audit_log import read_audit
from client.home import SiteHome

__all__ = ["print_log"]


def print_log(home: SiteHome, console: Console, *, last: int, as_json: bool) -> None:
    """The newest lines. The whole log is read, so that a change in an old line shows as well.

    Raises:
        RunError: the log was changed or cannot be read.
    """
    lines = deque(read_audit(home.audit), maxlen=last)
    if not lines:
        console.print(f"nothing was asked of this site yet: {home.audit} is empty", highlight=False, soft_wrap=True)
        return
    for line in lines:
        if as_json:
            print(line.model_dump_json())
            continue
        place = " ".join(part for part in (line.run_id, "" if line.round is None else f"round {line.round}") if part)
        reason = " ".join(part for part in (line.code, line.reason) if part)
        text = f"{line.number:>6}  {line.time}  {line.decision:<9} {line.kind:<8} {place}  {reason}".rstrip()
        console.print(text, highlight=False, soft_wrap=True, markup=False)
