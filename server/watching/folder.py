"""A run's folder as those see it who look on: whether it is one, whether it goes on, and what its privacy costs."""

import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import RunError
from server.run_store import is_used

__all__ = ["RunFolder", "Spent", "find_run"]

# Epsilon that each site's units have paid so far, by site.
Spent = Callable[[], Mapping[str, float]]

EVENTS = "events.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which only its own process writes."""

    path: Path

    @property
    def events(self) -> Path:
        """The stream of its events."""
        return self.path / EVENTS

    @property
    def simulated(self) -> bool:
        """Whether one machine played all sites; a run between institutions lies in its coordinator's folder."""
        return not (self.path.absolute().parent.parent / "coordinator.toml").exists() and (
            "roster_sha256" not in self.summary()
        )

    def goes_on(self) -> bool:
        """Whether a process uses it."""
        return is_used(self.path)

    def manifest(self) -> dict[str, Any]:
        """The settings of its manifest as they are written, by table; empty where they cannot be read."""
        try:
            return tomllib.loads((self.path / "federation.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def settings(self) -> dict[str, str]:
        """The same by dotted keys, values as JSON."""
        return dict(_flat(self.manifest()))

    def summary(self) -> dict[str, Any]:
        """Its `summary.json`; empty where there is none that can be read."""
        try:
            found = json.loads((self.path / "summary.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def promise(self) -> dict[str, Any] | None:
        """What the manifest promises to a privacy unit: `unit`, `epsilon`, `delta`, `protects`; None: no privacy."""
        section = self.manifest().get("privacy")
        if not isinstance(section, dict) or not math.isfinite(section.get("epsilon", math.inf)):
            return None
        return {
            "unit": section.get("unit", "record"),
            "epsilon": section["epsilon"],
            "delta": section.get("delta", 1e-5),
            "protects": "unsafe_seed" not in section,
        }

    def paid(self) -> dict[str, float]:
        """Epsilon that each site's units have paid, by the summary; empty before it is written, or where it is not
        known here: in the field it stands in the sites' own ledgers."""
        privacy = self.summary().get("privacy")
        return {site["name"]: site["epsilon"] for site in privacy["sites"]} if isinstance(privacy, dict) else {}


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", json.dumps(value, ensure_ascii=False, default=str)


def find_run(name: Path, *, runs: Path = Path("runs")) -> RunFolder:
    """The run in a folder; a bare name is also looked for in `runs`.

    Raises:
        RunError: there is none.
    """
    for folder in (name, runs / name) if len(name.parts) == 1 else (name,):
        if (folder / EVENTS).is_file() or (folder / "rounds").is_dir():
            return RunFolder(folder)
    if not name.is_dir():
        raise RunError(f"there is no run {name}; `coadapt runs` lists those in the folder runs")
    inside = sorted(name.glob(f"*/{EVENTS}"), key=lambda path: path.stat().st_mtime)
    hint = f"; the newest in it is {inside[-1].parent}" if inside else "; a run's folder holds events.jsonl"
    raise RunError(f"{name} is not a run{hint}")
