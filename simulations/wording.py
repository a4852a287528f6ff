"""How figures are worded for people, the same in the terminal and in the report."""

import math
from collections.abc import Sequence

from common.config.manifest import LOWER_IS_BETTER
from common.progress import ResourcesUsed
from simulations.summary import ResourceFacts

__all__ = [
    "best_places",
    "count_text",
    "duration_text",
    "figure_text",
    "metric_title",
    "resources_text",
    "size_text",
    "used_text",
]


def figure_text(value: float | None) -> str:
    """A metric's value with about three digits after the point; a dash for none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(float(value)).replace("nan", "NaN")
    if value and abs(value) < 0.0005:
        return f"{value:.1e}"
    size = abs(value)
    if size >= 1e7:
        return f"{value:.2e}"
    return f"{value:.3f}" if size < 10 else f"{value:.2f}" if size < 100 else f"{value:,.1f}"


def size_text(size: float) -> str:
    """Bytes in decimal units: `3.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def duration_text(seconds: float) -> str:
    """Seconds as `4.2 s`, `14 s`, `1 m 20 s` or `2 h 5 m`."""
    if not math.isfinite(seconds):
        return "unknown"
    if abs(seconds) < 9.95:
        return f"{seconds:.1f} s" if seconds else "0 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    large, small, units = (whole // 60, whole % 60, "ms") if whole < 3600 else (whole // 3600, whole % 3600 // 60, "hm")
    return f"{large:,} {units[0]} {small} {units[1]}" if small else f"{large:,} {units[0]}"


def count_text(count: int) -> str:
    """A count with its thousands apart."""
    return f"{count:,}"


def metric_title(metric: str) -> str:
    """A metric's name for people: `macro f1`; of an import path the function's."""
    return metric.rpartition(":")[2].replace("_", " ")


def used_text(used: ResourcesUsed) -> str:
    """What is used now: `processors 94 %, memory 3.1 GB`, and each GPU."""
    gpus = [
        f"GPU {place} {share:.0%}, {size_text(size)}"
        for place, (share, size) in enumerate(zip(used.gpus, used.gpu_memory, strict=True))
    ]
    return ", ".join([f"processors {used.processors:.0%}", f"memory {size_text(used.memory)}", *gpus])


def resources_text(facts: ResourceFacts) -> str:
    """What a run used: means of shares, peaks of memory."""
    gpus = [
        f"; GPU {place} was {share:.0%} busy and held at most {size_text(size)}"
        for place, (share, size) in enumerate(zip(facts.gpus, facts.gpu_memory, strict=True))
    ]
    said = f"processors were {facts.processors:.0%} busy, its processes held at most {size_text(facts.memory)}"
    return said + "".join(gpus)


def best_places(values: Sequence[float | None], metric: str) -> set[int]:
    """Places of the best finite values; values that read the same are equally good."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return set()
    best = figure_text(min(known) if metric in LOWER_IS_BETTER else max(known))
    return {place for place, value in enumerate(values) if figure_text(value) == best}
