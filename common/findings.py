"""What a check found, a line each: ok, a warning, or a problem that stops a start."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

__all__ = ["Finding", "Level", "print_findings"]

Level = Literal["ok", "warning", "problem"]
_STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of a check: how bad, what was looked at, what was found."""

    level: Level
    what: str
    text: str


def print_findings(findings: Iterable[Finding], console: Console) -> int:
    """Print each as it comes; the number of problems."""
    problems = 0
    for finding in findings:
        problems += finding.level == "problem"
        console.print(f"{finding.level:<9}", style=_STYLES[finding.level], end="")
        console.print(f"{finding.what:<14}{finding.text}", soft_wrap=True, highlight=False, markup=False)
    return problems
