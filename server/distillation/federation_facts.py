"""What a run's `summary.json` tells a model card: who took part, and what was paid for privacy.

Simulations and runs between institutions have summaries of two shapes (`docs/summary.schema.json` is the first's). Of a
site's data only that is taken which its policy lets out: with privacy the rounded number of its units.
"""

import json
import math
from pathlib import Path
from typing import Any

from common.errors import DistillationError

__all__ = ["federation_facts"]


def federation_facts(run: Path) -> dict[str, Any]:
    """Facts of a finished run, as JSON: name, run, simulated, sites, rounds, selected_round, privacy and, of a
    simulation, the records on this machine and the figures of the federated adapter on the test set.

    `privacy` is None, or unit, delta, protects and sites, a list of name, units, epsilon.

    Raises:
        DistillationError: the run has no summary, or one of another shape.
    """
    path = run / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        simulated = "table" in summary
        sites = [site["name"] for site in summary["sites"]] if simulated else list(summary["sites"])
        facts: dict[str, Any] = {
            "name": summary["federation"],
            "run": summary["run_id"],
            "simulated": simulated,
            "sites": sites,
            "rounds": max(0, len(summary["rounds"]) - 1),
            "selected_round": summary["selected_round"],
            "secure_sum": summary["secure_sum"] is not None if simulated else None,
            "privacy": _privacy(summary.get("privacy")),
            "said": summary.get("first_line", ""),
        }
        if simulated:
            facts["records"] = summary["data"]["records"]
            facts["figures"] = next(
                (row["figures"] for row in summary["table"] if row["name"].startswith("federated")), {}
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DistillationError(
            f"{path} cannot be read ({type(error).__name__}); a model card needs the summary of a finished run"
        ) from error
    return facts


def _privacy(privacy: dict[str, Any] | None) -> dict[str, Any] | None:
    if privacy is None:
        return None
    return {
        "unit": privacy["unit"],
        "delta": privacy["delta"],
        "protects": privacy["protects"],
        "sites": [
            {"name": site["name"], "units": site["units"], "epsilon": _number(site["epsilon"])}
            for site in privacy["sites"]
        ],
    }


def _number(value: float | str) -> float | str:
    """A JSON number stays; summaries write infinity as a text, and so does this."""
    number = float(value)
    return number if math.isfinite(number) else str(value)
