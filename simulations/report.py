"""`report.html`: a run's summary as one page that opens offline; knows the summary's shape, nothing of how it came.

The page loads nothing: its style is in it, its plots are inline SVG (`plots.py`), and it has no script. Names of
sites and labels are other people's text, so the template escapes everything that is not a plot.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from common.config.manifest import LOWER_IS_BETTER
from common.durable import write_text
from simulations import plots
from simulations.report_page import PAGE
from simulations.summary import ComparedFacts, RunSummary, SiteFacts, SitePrivacy, TableRow
from simulations.wording import (
    best_places,
    count_text,
    duration_text,
    figure_text,
    metric_title,
    resources_text,
    size_text,
)

__all__ = [
    "cost_result",
    "main_result",
    "privacy_result",
    "profile_result",
    "render",
    "secure_sum_result",
    "utility_result",
    "write_report",
]


# Metrics between 0 and 1 of which a hundredth is called a point.
SHARES = frozenset({"accuracy", "macro_f1", "entity_f1", "entity_precision", "entity_recall"})

# Longer tables would make a page that no one reads; summary.json has every line.
MOST_ROWS = 200

# With more sites than this the tables of sites show so many as someone may look into.
MOST_SITES, LOOKED_INTO = 50, 20


def write_report(summary: RunSummary, path: Path) -> None:
    """Write the page of `summary` to `path`, whole or not at all."""
    write_text(path, render(summary))


def render(summary: RunSummary) -> str:
    """The page of `summary`, as HTML."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=count_text, duration=duration_text, figure=figure_text, metric=metric_title, share=_share, size=size_text
    )
    return environment.from_string(PAGE).render(_view(summary))


def main_result(summary: RunSummary) -> str:
    """The run's main result in one sentence; says so where there is none."""
    if not summary.metrics:
        return "No metric was reported."
    metric = summary.metrics[0]
    values: dict[str, float | None] = {row.name: row.figures.get(metric) for row in summary.table}
    federated = values.get("federated")
    if federated is None or not math.isfinite(federated):
        return _without_test(summary, metric)
    others = {"local only (mean)": "the mean site alone", "centralised": "centralised training"}
    if not others.keys() & values.keys():
        others = {"untuned": "the untuned model"}
    told = [
        f"{_difference(federated, other, metric)} {words}"
        for name, words in others.items()
        if (other := values.get(name)) is not None and math.isfinite(other)
    ]
    start = f"Federated training reached {metric_title(metric)} {figure_text(federated)} on the test set"
    return f"{start}: {' and '.join(told)}." if told else f"{start}."


def privacy_result(summary: RunSummary) -> str:
    """Whether the released adapter is private, in one sentence."""
    facts = summary.privacy
    if facts is None:
        return "The released adapter is not private: it may give single records away."
    if not facts.protects:
        return "The released adapter is not private: privacy.unsafe_seed makes its noise known."
    spent = max((site.epsilon for site in facts.sites), default=0.0)
    return (
        f"The released adapter is private: epsilon at most {figure_text(spent)} at delta {facts.delta:.0e} for each"
        f" {facts.unit} and site, over all rounds."
    )


def secure_sum_result(summary: RunSummary) -> str:
    """What the coordinator could learn of one site, in one sentence."""
    facts = summary.secure_sum
    if facts is None:
        return "The secure sum is off: the coordinator sees every site's change."
    return (
        f"The coordinator learns sums over at least {facts.least_survivors} of {facts.sites} sites,"
        " and nothing of a single one."
    )


def utility_result(summary: RunSummary) -> str:
    """What privacy costs, or what else the second federation changes, in one sentence; empty without one."""
    if summary.compared is None or not summary.metrics:
        return ""
    metric = summary.metrics[0]
    values = {row.name: row.figures.get(metric) for row in summary.table}
    ours = values.get("federated")
    other = next((value for name, value in values.items() if name.startswith("federated, ")), None)
    if ours is None or other is None or not math.isfinite(ours) or not math.isfinite(other):
        return ""
    who = f"The same federation with {_setting(summary, summary.compared)}"
    return (
        f"{who} reached {metric_title(metric)} {figure_text(other)}: {_difference(other, ours, metric)} the released."
    )


def profile_result(summary: RunSummary) -> str:
    """The three costliest operators of a profiled run in one sentence; says so where there is no profile."""
    facts = summary.profile
    if facts is None:
        return "No profile was written: the first site took no step, or its log in site-logs says why."
    named = [f"{each.words} ({each.name}) {each.share:.0%}" for each in facts.operators]
    steps = "step" if facts.steps == 1 else f"{facts.steps} steps"
    return (
        f"The first {steps} of {facts.site} took {duration_text(facts.seconds)} on {facts.device}. Costliest:"
        f" {', '.join(named) or 'no operator'}. Trace: profile/trace.json, for ui.perfetto.dev or chrome://tracing."
    )


def _setting(summary: RunSummary, facts: ComparedFacts) -> str:
    """What the second federation has that the first has not."""
    if facts.privacy is not None and summary.privacy is None:
        return f"privacy (epsilon {facts.privacy.epsilon:g} for each {facts.privacy.unit} and site)"
    if facts.privacy is None and summary.privacy is not None:
        return "no privacy"
    return ", ".join(facts.settings)


def _without_test(summary: RunSummary, metric: str) -> str:
    trained = [facts.round for facts in summary.rounds if facts.round > 0]
    if not trained:
        return "The run ended before its first round of training was finished: there is no result."
    chosen = next((facts for facts in summary.rounds if facts.round == summary.selected_round), summary.rounds[-1])
    value = chosen.validation.get(metric)
    if value is None:
        return f"{trained[-1]} rounds of training were finished; no {metric_title(metric)} on the test set is known."
    reached = f"The adapter of round {chosen.round} reached {metric_title(metric)} {figure_text(value)}"
    return f"{reached} on {summary.measured_on}; no figure on the test set is known."


def _difference(value: float, other: float, metric: str) -> str:
    points = metric in SHARES
    text = f"{abs(value - other) * 100:.1f} points" if points else figure_text(abs(value - other))
    if figure_text(value) == figure_text(other) or text == "0.0 points":
        return "level with"
    if metric in LOWER_IS_BETTER:
        return f"{text} lower (better) than" if value < other else f"{text} higher (worse) than"
    return f"{text} above" if value > other else f"{text} below"


def cost_result(summary: RunSummary) -> str:
    """How long the run and its parts took, and what it used of its machine, in one or two sentences."""
    timing = summary.timing
    parts = {"start-up": timing.startup, **timing.model_dump(exclude={"startup", "total"})}
    said = ", ".join(f"{name} {duration_text(seconds)}" for name, seconds in parts.items() if seconds >= 0.05)
    took = f"The run took {duration_text(timing.total)}{f' ({said})' if said else ''}."
    return f"{took} Its {resources_text(summary.resources)}." if summary.resources else took


def _share(part: float, whole: float) -> str:
    """`part` of `whole` in per cent; a dash where there is no whole."""
    return f"{part / whole:.1%}" if whole else "-"


def _view(summary: RunSummary) -> dict[str, Any]:
    """What the template reads."""
    chooser = summary.metrics[0] if summary.metrics else "loss"
    shown = _looked_into(summary.sites, chooser, summary.selected_round)
    return {
        "summary": summary,
        "result": main_result(summary),
        "privacy": privacy_result(summary),
        "secure": secure_sum_result(summary),
        "utility": utility_result(summary),
        "profile": profile_result(summary),
        "unsafe": summary.privacy is not None and not summary.privacy.protects,
        "chooser": chooser,
        "lower_is_better": LOWER_IS_BETTER,
        "table": _table(summary),
        "sites": [_site(site, summary.selected_round) for site in shown],
        "cost": cost_result(summary),
        "private_sites": _of_shown(summary, shown),
        "left_out": _left_out(len(shown), len(summary.sites), chooser),
        "local_known": any(site.local_only for site in summary.sites),
        "plots": _plots(summary, chooser),
        "rounds": summary.rounds[:MOST_ROWS],
        "rejected": [facts for facts in summary.rounds if facts.rejected][:MOST_ROWS],
        "failures": summary.failures[:MOST_ROWS],
        "most_rows": MOST_ROWS,
        "bytes_up": sum(facts.bytes_up for facts in summary.rounds),
        "bytes_down": sum(facts.bytes_down for facts in summary.rounds),
        "splits": [split for split in ("train", "dev", "test") if split in summary.data.records],
    }


def _table(summary: RunSummary) -> list[dict[str, Any]]:
    best = {
        metric: best_places([row.figures.get(metric) for row in summary.table], metric) for metric in summary.metrics
    }
    return [{"row": row, "cells": _cells(place, row, best)} for place, row in enumerate(summary.table)]


def _cells(place: int, row: TableRow, best: dict[str, set[int]]) -> list[tuple[str, bool]]:
    return [(figure_text(row.figures.get(metric)), place in places) for metric, places in best.items()]


def _looked_into(sites: Sequence[SiteFacts], metric: str, selected: int) -> list[SiteFacts]:
    """All sites, or of very many those that someone may look into: the slowest ones, and the worst by the metric."""
    if len(sites) <= MOST_SITES:
        return list(sites)

    def badness(site: SiteFacts) -> float:
        value = (plots.site_validation(site, selected) or {}).get(metric, math.nan)
        return -math.inf if math.isnan(value) else value if metric in LOWER_IS_BETTER else -value

    slowest = sorted(sites, key=lambda site: site.seconds, reverse=True)[: LOOKED_INTO // 2]
    names = {site.name for site in slowest}
    others = sorted((site for site in sites if site.name not in names), key=badness, reverse=True)
    names |= {site.name for site in others[: LOOKED_INTO - len(names)]}
    return [site for site in sites if site.name in names]


def _of_shown(summary: RunSummary, shown: Sequence[SiteFacts]) -> list[SitePrivacy]:
    """The privacy of the sites that are shown."""
    sites, names = summary.privacy.sites if summary.privacy else [], {site.name for site in shown}
    return sites if len(shown) == len(summary.sites) else [site for site in sites if site.name in names]


def _left_out(shown: int, sites: int, metric: str) -> str:
    if shown == sites:
        return ""
    return (
        f"Shown are {shown} of {sites} sites, the slowest and those with the worst {metric_title(metric)};"
        f" summary.json has the other {sites - shown} too."
    )


def _site(site: SiteFacts, selected: int) -> dict[str, Any]:
    return {
        "facts": site,
        "train_loss": next((loss for loss in reversed(site.train_loss) if loss is not None), None),
        "validation": plots.site_validation(site, selected) or {},
        "local": site.local_only or {},
    }


def _plots(summary: RunSummary, chooser: str) -> dict[str, plots.Drawing | None]:
    rounds, sites, selected = summary.rounds, summary.sites, summary.selected_round
    labels = plots.label_heat_map(sites)
    return {
        "loss": plots.loss_curves(rounds, selected),
        # Where the loss itself chooses, its curve stands in the first plot already.
        "metric": None if chooser == "loss" else plots.metric_curve(rounds, chooser, selected),
        "sites": plots.site_figures(sites, chooser, selected),
        "site_losses": plots.site_losses(sites),
        "labels": labels,
        # The heat map names the records of each site already.
        "records": None if labels else plots.records_bars(sites),
        "traffic": plots.traffic(rounds),
        "time": plots.time_parts(summary.timing, rounds),
    }
