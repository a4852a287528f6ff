"""The plots of a report, each as inline SVG; knows matplotlib and summaries, nothing of the page around them.

Several of these SVGs stand in one page, where ids are shared: each drawing's ids begin with its own key.
Text stays text (`svg.fonttype` none), so that a browser sets it with the fonts it has, for any script.
"""

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from simulations.summary import RoundFacts, SiteFacts, Timing
from simulations.wording import duration_text, figure_text, metric_title, size_text

__all__ = [
    "MOST_LABELS",
    "MOST_SITES",
    "Drawing",
    "label_heat_map",
    "loss_curves",
    "metric_curve",
    "records_bars",
    "shorten",
    "site_figures",
    "site_losses",
    "site_validation",
    "time_parts",
    "trade_off",
    "traffic",
]

MOST_SITES = 40
MOST_LABELS = 40

# Inches. Narrow, because the page scales a plot to its column: on a telephone its text must still be read.
WIDTH = 4.6

# Okabe and Ito's palette, told apart with every common colour blindness; its yellow is too pale on white.
BLUE, RED, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
GREY, INK = "#8A8F98", "#22262B"
LOOKS = ((BLUE, "o"), (RED, "s"), (GREEN, "D"), (ORANGE, "^"), (SKY, "v"), (PURPLE, "P"))

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a site's name is a dollar
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E3E6EA",
    "legend.frameon": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Drawing:
    """A finished plot: its SVG, a sentence for those who cannot see it, and a note for its caption."""

    svg: Markup
    alt: str
    note: str = ""
    large: bool = False


def shorten(name: str, cells: int = 22) -> str:
    """At most `cells` columns of `name`, its middle left out: names often differ in their end."""
    name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    if _cells(name) <= cells:
        return name
    head, tail = "", ""
    for letter in name:
        if _cells(head + letter) > cells * 2 // 3:
            break
        head += letter
    for letter in reversed(name):
        if _cells(head + letter + tail) > cells - 1:
            break
        tail = letter + tail
    return f"{head}…{tail}"


def loss_curves(rounds: Sequence[RoundFacts], selected: int) -> Drawing | None:
    """Training and validation loss over the rounds."""
    numbers = [facts.round for facts in rounds]
    curves = {
        "training": [_finite(facts.train_loss) for facts in rounds],
        "validation": [_finite(facts.validation.get("loss")) for facts in rounds],
    }
    if not _any_finite(*curves.values()):
        return None
    with _canvas("loss") as canvas:
        axes = canvas.axes(WIDTH, 2.9)
        for (name, values), (colour, marker), line in zip(curves.items(), LOOKS[:2], ("-", "--"), strict=True):
            if _any_finite(values):
                style = {"color": colour, "marker": marker, "linestyle": line}
                places, heights = _known(numbers, values)
                axes.plot(places, heights, label=name, markevery=_marker_step(places), **style)
        _mark_selected(axes, numbers, selected)
        _label_rounds(axes, "loss")
        axes.legend()
    said = [f"{name} loss {_course(values)}" for name, values in curves.items() if _any_finite(values)]
    return Drawing(canvas.svg, f"Lines over the rounds: {'; '.join(said)}.")


def trade_off(names: Sequence[str], values: Sequence[float | None], *, key: str, metric: str) -> Drawing | None:
    """A metric at each value of a setting, in the order given and evenly spaced: the last may be infinite."""
    heights = [_finite(value) for value in values]
    if not _any_finite(heights):
        return None
    with _canvas("trade-off") as canvas:
        axes = canvas.axes(WIDTH, 2.9)
        axes.plot(range(len(names)), heights, "o-", color=BLUE)
        axes.set_xticks(range(len(names)), [shorten(name, 10) for name in names])
        axes.set_xlabel(key)
        axes.set_ylabel(metric_title(metric))
    said = ", ".join(f"{figure_text(value)} at {name}" for name, value in zip(names, values, strict=True))
    return Drawing(canvas.svg, f"{metric_title(metric)} by {key}: {said}.")


def metric_curve(rounds: Sequence[RoundFacts], metric: str, selected: int) -> Drawing | None:
    """The metric that chooses between rounds, on the sites' held-out records."""
    numbers = [facts.round for facts in rounds]
    values = [_finite(facts.validation.get(metric)) for facts in rounds]
    if not _any_finite(values):
        return None
    title = metric_title(metric)
    with _canvas("metric") as canvas:
        axes = canvas.axes(WIDTH, 2.9)
        places, heights = _known(numbers, values)
        axes.plot(places, heights, "D-", color=GREEN, label="validation", markevery=_marker_step(places))
        _mark_selected(axes, numbers, selected)
        _label_rounds(axes, title)
        axes.legend()
    return Drawing(canvas.svg, f"Line over the rounds: {title} {_course(values)}.")


def site_validation(site: SiteFacts, selected: int) -> dict[str, float] | None:
    """Figures of the selected round on the site's held-out records, else the last that are known."""
    if 0 <= selected < len(site.validation) and site.validation[selected]:
        return site.validation[selected]
    return next((figures for figures in reversed(site.validation) if figures), None)


def site_figures(sites: Sequence[SiteFacts], metric: str, selected: int) -> Drawing | None:
    """For each site, on its own held-out records: the federated model, and the model that the site trained alone."""
    shown, left_out = _largest(sites)
    bars = {
        "federated": [_value(site_validation(site, selected), metric) for site in shown],
        "site alone": [_value(site.local_only_held_out, metric) for site in shown],
    }
    bars = {name: values for name, values in bars.items() if _any_finite(values)}
    if not bars:
        return None
    with _canvas("sites") as canvas:
        row = 0.16 * (len(bars) + 0.4) if len(shown) <= 12 else 0.22
        axes = canvas.axes(WIDTH, 1.2 + row * len(shown))
        height = 0.8 / len(bars)
        for place, (name, values) in enumerate(bars.items()):
            places = [index + (place - (len(bars) - 1) / 2) * height for index in range(len(shown))]
            colour, hatch = ((BLUE, ""), (ORANGE, "////"))[place]
            axes.barh(places, values, height, label=name, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3)
        _name_rows(axes, [site.name for site in shown])
        axes.set_xlabel(metric_title(metric))
        axes.figure.legend(loc="outside upper left")
    said = "; ".join(f"{name}: {_spread(values)}" for name, values in bars.items())
    return Drawing(canvas.svg, f"Horizontal bars of {metric_title(metric)} by site; {said}.", left_out)


def site_losses(sites: Sequence[SiteFacts]) -> Drawing | None:
    """Each site's training loss over the rounds; with many sites thin lines and their mean."""
    shown, left_out = _largest(sites)
    losses = [[_finite(loss) for loss in site.train_loss] for site in shown]
    if not _any_finite(*losses):
        return None
    each = len(shown) <= len(LOOKS)
    # Two names beside each other in the legend where they are short.
    columns = 2 if not each or all(_cells(site.name) <= 14 for site in shown) else 1
    with _canvas("site-losses") as canvas:
        axes = canvas.axes(WIDTH, 2.9 + (0.16 * len(shown) if columns == 1 else 0.0))
        if each:
            for site, values, (colour, marker) in zip(shown, losses, LOOKS, strict=False):
                axes.plot(range(1, len(values) + 1), values, color=colour, marker=marker, label=shorten(site.name))
        else:
            for index, values in enumerate(losses):
                label = None if index else f"one of {len(shown)} sites"
                axes.plot(range(1, len(values) + 1), values, color=SKY, linewidth=0.8, alpha=0.7, label=label)
                # A site that trained between two rounds which it sat out would have no line: dots show it.
                axes.plot(range(1, len(values) + 1), values, ".", color=SKY, markersize=2.5)
            means = _means(losses)
            axes.plot(range(1, len(means) + 1), means, color=INK, linewidth=2.2, label="mean of these sites")
        _label_rounds(axes, "training loss")
        axes.figure.legend(loc="outside upper left", ncols=columns)
    last = [values[-1] for values in losses if values]
    return Drawing(
        canvas.svg, f"Lines of training loss over the rounds by site; in the last round {_spread(last)}.", left_out
    )


def label_heat_map(sites: Sequence[SiteFacts]) -> Drawing | None:
    """Share of each label in each site's training records; counts are written in where there is room."""
    shown, without_sites = _largest(sites)
    labels, without_labels = _frequent_labels(shown)
    if not labels:
        return None
    counts = [[site.labels.get(label, 0) for label in labels] for site in shown]
    totals = [sum(site.labels.values()) for site in shown]
    shares = [[count / max(total, 1) for count in row] for row, total in zip(counts, totals, strict=True)]
    roomy = len(labels) <= 16 and len(shown) <= 20
    cell = 0.42 if roomy else 0.235
    with _canvas("labels") as canvas:
        axes = canvas.axes(max(4.6, 3.1 + cell * len(labels)), 2.3 + max(0.2, cell * 0.75) * len(shown))
        # Few enough colours for matplotlib to draw the bar as shapes; a finer bar would be an embedded image.
        colours = matplotlib.colormaps["Blues"].resampled(20)
        mesh = axes.pcolormesh(shares, cmap=colours, vmin=0, edgecolors="white", linewidth=0.4)
        axes.grid(visible=False)
        axes.set_xticks([index + 0.5 for index in range(len(labels))], [shorten(label, 22) for label in labels])
        axes.tick_params(axis="x", rotation=90, length=0)
        _name_rows(axes, [f"{shorten(site.name)} ({site.records:,})" for site in shown], offset=0.5, cells=40)
        if roomy:
            _write_counts(axes, counts, shares)
        bar = axes.figure.colorbar(mesh, location="top", aspect=45, shrink=0.7, fraction=0.05)
        bar.set_label("share of the site's labels")
        bar.formatter = FuncFormatter(lambda share, _: f"{share:.0%}" if share >= 0.01 or not share else f"{share:.1%}")
        bar.outline.set_visible(False)
    alt = f"Heat map of {len(labels)} labels in {len(shown)} sites; the darker, the larger the label's share of a site."
    counted = "Numbers in the cells are counts." if roomy else ""
    return Drawing(canvas.svg, alt, " ".join(filter(None, (counted, without_sites, without_labels))), large=True)


def records_bars(sites: Sequence[SiteFacts]) -> Drawing | None:
    """Training records of each site."""
    shown, left_out = _largest(sites)
    if not shown:
        return None
    records = [site.records for site in shown]
    with _canvas("records") as canvas:
        axes = canvas.axes(WIDTH, 0.8 + 0.22 * len(shown))
        axes.barh(range(len(shown)), records, 0.7, color=BLUE)
        _name_rows(axes, [site.name for site in shown])
        axes.set_xlim(left=0, right=max(*records, 1) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        axes.set_xlabel("training records")
    return Drawing(
        canvas.svg, f"Horizontal bars of training records by site; {min(records)} to {max(records)}.", left_out
    )


def traffic(rounds: Sequence[RoundFacts]) -> Drawing | None:
    """Bytes that the sites sent and received in each round; bars, or steps where rounds are many."""
    if not rounds:
        return None
    numbers = [facts.round for facts in rounds]
    ways = {
        "up, from the sites": [facts.bytes_up for facts in rounds],
        "down, to the sites": [facts.bytes_down for facts in rounds],
    }
    with _canvas("traffic") as canvas:
        axes = canvas.axes(WIDTH, 2.9)
        for place, ((name, values), colour) in enumerate(zip(ways.items(), (BLUE, ORANGE), strict=True)):
            if len(numbers) > 40:
                axes.step(numbers, values, where="mid", label=name, color=colour, linestyle=("-", "--")[place])
            else:
                at = [number + (place - 0.5) * 0.4 for number in numbers]
                hatch = ("", "////")[place]
                axes.bar(at, values, 0.4, label=name, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3)
        _label_rounds(axes, "bytes in the round")
        axes.set_ylim(bottom=0, top=max(*ways["up, from the sites"], *ways["down, to the sites"], 1) * 1.05)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: size_text(size)))
        axes.figure.legend(loc="outside upper left", ncols=2)
    said = "; ".join(f"{name} {size_text(sum(values))} in all" for name, values in ways.items())
    return Drawing(canvas.svg, f"Bytes by round: {said}.")


def time_parts(timing: Timing, rounds: Sequence[RoundFacts]) -> Drawing | None:
    """Where the run's seconds went; a round is its slowest site's training, and waiting for all else."""
    training = min(sum(max(_finite(facts.training_seconds), 0.0) for facts in rounds), timing.rounds)
    parts = {
        "start-up": timing.startup,
        "rounds: training": training,
        "rounds: waiting": timing.rounds - training,
        "validation": timing.validation,
        "baselines": timing.baselines,
        "test": timing.test,
    }
    parts = {name: seconds if math.isfinite(seconds) else 0.0 for name, seconds in parts.items()}
    other = timing.total - sum(parts.values())
    if other > 0.005 * timing.total:
        parts["other"] = other
    longest = max(parts.values())
    if longest <= 0:
        return None
    with _canvas("time") as canvas:
        axes = canvas.axes(WIDTH, 2.6)
        colours = [BLUE if name == "rounds: training" else SKY for name in parts]
        bars = axes.barh(range(len(parts)), list(parts.values()), 0.66, color=colours)
        axes.bar_label(bars, [duration_text(seconds) for seconds in parts.values()], padding=4)
        _name_rows(axes, list(parts))
        axes.set_xlim(0, longest * 1.3)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    said = ", ".join(f"{name} {duration_text(seconds)}" for name, seconds in parts.items())
    return Drawing(canvas.svg, f"Horizontal bars of time: {said}.")


class _Canvas:
    """A figure in the making; `svg` is there once its block has ended."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.svg = Markup("")
        self._figure: Any = None

    def axes(self, width: float, height: float) -> Any:
        """The only axes of a new figure; inches."""
        self._figure = Figure(figsize=(width, height), layout="constrained")
        return self._figure.subplots()

    def finish(self) -> None:
        """Write the figure as SVG that can stand inside a page."""
        buffer = io.StringIO()
        # Nothing of metadata: it holds addresses and the date, and a report is to be the same when drawn again.
        self._figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Type", "Format")))
        self.svg = Markup(_inline(buffer.getvalue(), self.key))  # matplotlib has escaped all names


@contextmanager
def _canvas(key: str) -> Iterator[_Canvas]:
    canvas = _Canvas(key)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": key}), warnings.catch_warnings():
        # Names may be in any script. matplotlib measures with a font that may lack it; the browser's has it.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield canvas
        canvas.finish()


def _inline(document: str, key: str) -> str:
    """The `<svg>` element of a document, without declarations, with ids that begin with `plot-<key>-`."""
    svg = document[document.index("<svg") :]
    # A style element inside an SVG would hold for the whole page: the page's own style says it.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg, count=2)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    # Only inside tags: a site's name may hold the same characters as text, where < and > are escaped.
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r'(\bid="|href="#|url\(#)', rf"\1plot-{key}-", tag[0]), svg)


def _largest(sites: Sequence[SiteFacts]) -> tuple[list[SiteFacts], str]:
    if len(sites) <= MOST_SITES:
        return list(sites), ""
    largest = sorted(sites, key=lambda site: site.records, reverse=True)[:MOST_SITES]
    return largest, f"Only the {MOST_SITES} sites with the most records of {len(sites)} are drawn."


def _frequent_labels(sites: Sequence[SiteFacts]) -> tuple[list[str], str]:
    counts: dict[str, int] = {}
    for site in sites:
        for label, count in site.labels.items():
            counts[label] = counts.get(label, 0) + count
    if len(counts) <= MOST_LABELS:
        return list(counts), ""
    frequent = sorted(counts, key=lambda label: counts[label], reverse=True)[:MOST_LABELS]
    return frequent, f"Only the {MOST_LABELS} most frequent labels of {len(counts)} are drawn."


def _name_rows(axes: Any, names: Sequence[str], offset: float = 0.0, cells: int = 22) -> None:
    axes.set_yticks([index + offset for index in range(len(names))], [shorten(name, cells) for name in names])
    axes.set_ylim(len(names) - 0.5 + offset, -0.5 + offset)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _write_counts(axes: Any, counts: list[list[int]], shares: list[list[float]]) -> None:
    darkest = max(max(row) for row in shares)
    for row, (numbers, parts) in enumerate(zip(counts, shares, strict=True)):
        for column, (count, share) in enumerate(zip(numbers, parts, strict=True)):
            colour = "white" if share > 0.55 * darkest else INK
            axes.text(column + 0.5, row + 0.5, _brief(count), ha="center", va="center", fontsize=8, color=colour)


def _brief(count: int) -> str:
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"


def _label_rounds(axes: Any, title: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set_xlabel("round")
    axes.set_ylabel(title)


def _mark_selected(axes: Any, numbers: Sequence[int], selected: int) -> None:
    if selected in numbers:
        axes.axvline(selected, color=GREY, linestyle=":", linewidth=1.6, label=f"selected: round {selected}", zorder=1)


def _known(numbers: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """The rounds that were measured: with evaluation.every above 1 a line joins them over those that were not."""
    known = [(number, value) for number, value in zip(numbers, values, strict=True) if math.isfinite(value)]
    return [number for number, _ in known], [value for _, value in known]


def _marker_step(numbers: Sequence[int]) -> int:
    return max(1, len(numbers) // 25)


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    longest = max(len(row) for row in rows)
    means = []
    for place in range(longest):
        known = [row[place] for row in rows if place < len(row) and math.isfinite(row[place])]
        means.append(sum(known) / len(known) if known else math.nan)
    return means


def _course(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    return f"goes from {figure_text(known[0])} to {figure_text(known[-1])}"


def _spread(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    return f"{figure_text(min(known))} to {figure_text(max(known))}" if known else "unknown"


def _value(figures: dict[str, float] | None, metric: str) -> float:
    return _finite((figures or {}).get(metric))


def _finite(value: float | None) -> float:
    """`value`, or NaN, which leaves a gap in a plot; infinity would stretch the axis without end."""
    return value if value is not None and math.isfinite(value) else math.nan


def _any_finite(*rows: Sequence[float]) -> bool:
    return any(math.isfinite(value) for row in rows for value in row)


def _cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
