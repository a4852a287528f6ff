"""Log lines as JSON objects, one each, fit for syslog: {"time", "process", "event", ...}."""

import json
from datetime import UTC, datetime

__all__ = ["json_line"]


def json_line(process: str, event: str, **facts: object) -> str:
    """One event as a JSON object on one line; the time in UTC, ISO 8601, milliseconds."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "process": process, "event": event, **facts}, default=str)
