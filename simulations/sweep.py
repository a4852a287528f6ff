"""One federation at several values of a setting: a run for each, a table, and the curve that they make.

    coadapt simulate federation.toml --sweep privacy.epsilon=1,3,8,inf

Each point is a run of its own, with its own simulated ledgers. Reality has one: a site that tried all points would
have paid for all of them, and the page says how much.
"""

import dataclasses
import datetime
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

import jinja2
from pydantic import BaseModel, ConfigDict, Field

from common.durable import write_text
from common.errors import ManifestError, RunError
from common.privacy.accounting import Steps, rdp_epsilon
from common.progress import EventSink
from simulations import plots
from simulations.engine import simulate
from simulations.summary import RunSummary
from simulations.wording import figure_text, metric_title

__all__ = ["Point", "Sweep", "SweepSummary", "parse_sweep", "run_sweep"]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A setting and the values to try, as they would stand behind `--set`."""

    key: str
    values: tuple[str, ...]


class Point(BaseModel):
    """One value, its run, and the result's figures on the test set."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    value: str
    run: str = Field(description="folder of the run, beside this file")
    status: str
    figures: dict[str, float]
    epsilon: float | None = Field(description="most that a site's units paid; null: not private")


class SweepSummary(BaseModel):
    """`sweep.json`: what was varied, and what came of it."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    federation: str
    key: str
    metrics: list[str]
    points: list[Point]
    epsilon_of_all: float | None = Field(description="what a site that tried all points would have paid")


def parse_sweep(text: str) -> Sweep:
    """`KEY=V1,V2,...`, each value once.

    Raises:
        ManifestError: it has another form.
    """
    key, equals, listed = text.partition("=")
    values = tuple(value.strip() for value in listed.split(","))
    if not equals or not key.strip() or not all(values) or len(set(values)) < max(2, len(values)):
        problem = f"--sweep {text}: must be KEY=VALUE,VALUE,... with different values, such as privacy.epsilon=1,3,inf"
        raise ManifestError([problem])
    return Sweep(key.strip(), values)


def run_sweep(
    manifest: Path,
    sweep: Sweep,
    *,
    data: Path | None,
    runs: Path,
    run_id: str | None,
    overrides: Sequence[str],
    baselines: bool | None,
    view: EventSink | None,
) -> tuple[SweepSummary, Path]:
    """Run every point and write `sweep.json` and `sweep.html` after each, so that what is finished stays.

    Returns:
        The summary, and the folder with all runs. It holds fewer points if the person pressed Ctrl-C.

    Raises:
        CoadaptError: what stopped a point; the points before it stay.
    """
    folder = runs / (run_id or f"sweep-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}")
    if folder.exists():
        raise RunError(f"{folder} exists already; a run never writes over another: choose another --run-id")
    done: list[tuple[str, RunSummary]] = []
    for value in sweep.values:
        summary = simulate(
            manifest,
            data=data,
            runs=folder,
            run_id=re.sub(r"[^A-Za-z0-9._-]", "_", f"{sweep.key}-{value}"),
            overrides=[*overrides, f"{sweep.key}={value}"],
            baselines=baselines,
            compare=(),
            view=view,
        )
        done.append((value, summary))
        result = _summary(sweep, done)
        write_text(folder / "sweep.json", result.model_dump_json(indent=2) + "\n")
        write_text(folder / "sweep.html", _page(result))
        if summary.status == "interrupted":
            break
    return result, folder


def _summary(sweep: Sweep, done: Sequence[tuple[str, RunSummary]]) -> SweepSummary:
    last = done[-1][1]
    return SweepSummary(
        federation=last.federation,
        key=sweep.key,
        metrics=last.metrics,
        points=[
            Point(
                value=value,
                run=summary.run_id,
                status=summary.status,
                figures=next((row.figures for row in summary.table if row.name == "federated"), {}),
                epsilon=max((site.epsilon for site in summary.privacy.sites), default=0.0) if summary.privacy else None,
            )
            for value, summary in done
        ],
        epsilon_of_all=_epsilon_of_all([summary for _, summary in done]),
    )


def _epsilon_of_all(summaries: Sequence[RunSummary]) -> float | None:
    """What the site that pays most would pay for all private points; None where there is none."""
    private = [summary.privacy for summary in summaries if summary.privacy]
    if not private:
        return None
    histories: dict[str, list[Steps]] = {}
    for facts in private:
        for site in facts.sites:
            histories.setdefault(site.name, []).append(Steps(site.noise_multiplier, site.sampling_rate, site.steps))
    delta = min(facts.delta for facts in private)
    return max(rdp_epsilon(history, delta) for history in histories.values())


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ sweep.federation }} - {{ sweep.key }}</title>
<style>
body { max-width: 54rem; margin: 0 auto; padding: 2rem 1.25rem; color: #22262b; background: #fff;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.75rem; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } figure svg { width: 100%; max-width: 36rem; height: auto; }
figcaption { color: #5a626c; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid #d9dde2; text-align: right; }
th:first-child { text-align: left; }
.callout { padding: .75rem 1rem; border-left: 5px solid #d55e00; background: #fdf1ea; }
</style>
</head>
<body>
<h1>{{ sweep.federation }}: {{ sweep.key }}</h1>
{% if sweep.epsilon_of_all is not none %}
<p class="callout">Every point has simulated ledgers of its own. A site that really tried all of them would have paid
epsilon {{ sweep.epsilon_of_all | figure }}: its units have one budget.</p>
{% endif %}
{% if drawing %}
<figure><div role="img" aria-label="{{ drawing.alt }}">{{ drawing.svg }}</div>
<figcaption>{{ sweep.metrics[0] | metric }} on the test set at each value of {{ sweep.key }}; one seed for each
point.</figcaption></figure>
{% endif %}
<div class="wide"><table>
<thead><tr><th scope="col">{{ sweep.key }}</th>{% for name in sweep.metrics %}<th scope="col">{{ name | metric }}</th>
{% endfor %}<th scope="col">epsilon paid</th><th scope="col">run</th></tr></thead>
<tbody>
{% for point in sweep.points %}
<tr><th scope="row">{{ point.value }}</th>{% for name in sweep.metrics %}<td>{{ point.figures.get(name) | figure }}</td>
{% endfor %}<td>{{ point.epsilon | figure }}</td><td><a href="{{ point.run }}/report.html">{{ point.run }}</a></td></tr>
{% endfor %}
</tbody></table></div>
</body>
</html>
"""


def _page(summary: SweepSummary) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(figure=figure_text, metric=metric_title)
    metric = summary.metrics[0] if summary.metrics else ""
    values = [point.figures.get(metric) for point in summary.points]
    drawing = plots.trade_off([point.value for point in summary.points], values, key=summary.key, metric=metric)
    return environment.from_string(PAGE).render(sweep=summary, drawing=drawing)
