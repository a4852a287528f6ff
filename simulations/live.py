"""A run as seen on the terminal: live while it happens, and its final table.

On a terminal a picture is redrawn in place. Anywhere else (a file, a pipe, a batch system) each event worth it
is one plain line. Nothing here knows how a run is run: all it knows comes from events and the summary.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.config.manifest import LOWER_IS_BETTER
from common.progress import (
    BaselineFinished,
    BatchHalved,
    Event,
    PhaseStarted,
    ResourcesUsed,
    RoundFinished,
    RoundLost,
    RoundRejected,
    RoundStarted,
    RoundValidated,
    RunStarted,
    RunStopped,
    SiteFailed,
    SiteFinished,
    SlotClosed,
    WorkersPlanned,
)
from simulations.summary import RunSummary
from simulations.wording import (
    best_places,
    count_text,
    duration_text,
    figure_text,
    metric_title,
    size_text,
    used_text,
)

__all__ = [
    "LiveView",
    "print_table",
]

NARROW = 60
TITLE = "Test set (* best, ↓ lower is better)"


class LiveView:
    """An event sink that shows the run on `console`; use it as a context manager, which gives the terminal back."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._run = _Run()
        # Events come from the threads that serve sites; Live redraws from a thread of its own.
        self._lock = threading.Lock()
        self._live: Live | None = None
        if _can_draw(self._console):
            self._live = Live(get_renderable=self._picture, console=self._console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take `event` in and show what it changed."""
        with self._lock:
            self._run.apply(event)
            line = None if self._live else _line(event, self._run)
        if line is not None:
            _print_plain(self._console, line)

    def _picture(self) -> RenderableType:
        with self._lock:
            return _picture(self._run, self._console)


def print_table(summary: RunSummary, console: Console) -> None:
    """Print the comparison on the test set, best values marked, rejected rounds, absent sites, and want of memory."""
    if not summary.table:
        _print_plain(console, "No figures on the test set.")
    elif not _can_draw(console):
        for line in _plain_table(summary):
            _print_plain(console, line)
    else:
        table = _wide_table(summary)
        fits = Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width
        console.print(table if fits else _stacked_table(summary))
    for line in [*_rejections(summary), *_absences(summary), *_shortages(summary)]:
        _print_plain(console, line)


@dataclass
class _Site:
    """A site: its state in this round, its last loss, and what it has done in all rounds."""

    state: str = "waiting"
    loss: float | None = None
    examples: int = 0
    traffic: int = 0


@dataclass
class _Run:
    """A run so far, gathered from its events."""

    federation: str = ""
    run_id: str = ""
    total: int = 0
    metrics: tuple[str, ...] = ()
    trainable: int = 0
    phase: str = ""
    round: int = 0
    done: int = 0
    round_began: float = 0.0
    sites: dict[str, _Site] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    losses: dict[int, float | None] = field(default_factory=dict)
    validation: dict[int, dict[str, float]] = field(default_factory=dict)
    rejected: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    measured: str = ""
    plan: tuple[str, ...] = ()
    short: list[str] = field(default_factory=list)
    used: ResourcesUsed | None = None
    phases: dict[str, float] = field(default_factory=dict)
    stopped: RunStopped | None = None

    def apply(self, event: Event) -> None:
        """Take in what `event` says."""
        self._look_at_machine(event)
        match event:
            case RunStarted():
                self.federation, self.run_id, self.total = event.federation, event.run_id, event.rounds
                self.metrics, self.trainable = event.metrics, event.trainable_parameters
                self.sites = {site: _Site() for site in event.sites}
            case PhaseStarted():
                self.phase = event.phase
            case RoundStarted():
                self.round, self.round_began = event.round, event.time
                for name in {**self.sites, **dict.fromkeys(event.sites)}:
                    self._site(name).state = "training" if name in event.sites else "waiting"
            case SiteFinished():
                site = self._site(event.site)
                site.state, site.loss = "done", event.train_loss
                site.examples += event.examples
                site.traffic += event.bytes_up + event.bytes_down
            case SiteFailed():
                self._site(event.site).state = f"failed: {event.code}"
            case RoundFinished():
                self.round, self.round_began = event.round, 0.0
                self.done = event.round
                self.seconds.append(event.seconds)
                self.losses[event.round] = event.train_loss
            case RoundRejected():
                self.rejected.add(event.round)
            case RoundLost():
                self.lost.add(event.round)
            case RoundValidated():
                self.validation[event.round] = event.figures
            case BaselineFinished():
                self.measured = event.baseline
            case RunStopped():
                self.stopped = event

    def seconds_left(self, now: float | None = None) -> float | None:
        """Estimate for the rounds to come, from the finished ones; None where nothing can be said."""
        if not self.seconds or self.stopped or self.done >= self.total:
            return None
        elapsed = max(0.0, now - self.round_began) if now is not None and self.round_began else 0.0
        one = sum(self.seconds) / len(self.seconds)
        # A round that takes longer than the others counts as about to end, not as less than nothing.
        return max(0.0, one - elapsed) + one * (self.total - self.done - 1)

    def _look_at_machine(self, event: Event) -> None:
        match event:
            case PhaseStarted():
                self.phases[event.phase] = event.time
            case ResourcesUsed():
                self.used = event
            case WorkersPlanned():
                self.plan = event.plan
            case BatchHalved():
                self.short.append(f"memory: {event.site} computes on {event.after} records at once, not {event.before}")
            case SlotClosed():
                self.short.append(f"memory: at most {_plural(event.left, 'worker')} at once on {event.device}")

    def _site(self, name: str) -> _Site:
        return self.sites.setdefault(name, _Site())


def _can_draw(console: Console) -> bool:
    drawable = console.is_terminal and not console.is_dumb_terminal
    return drawable and console.encoding.lower().startswith("utf")


def _print_plain(console: Console, line: str) -> None:
    # A site's name may hold what the output's encoding has not; a question mark beats an ended run.
    line = line.encode(console.encoding, "replace").decode(console.encoding)
    console.print(_clean(line), markup=False, highlight=False, emoji=False, soft_wrap=True)


def _clean(text: str) -> str:
    """`text` without control characters: a name must not move the cursor or change colours."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# Plain lines.


def _line(event: Event, run: _Run) -> str | None:
    """The line for `event`, which `run` has taken in; None where it is not worth one."""
    parts: list[str] = []
    match event:
        case RunStarted():
            sizes = f"{_plural(len(event.sites), 'site')}, {_plural(event.rounds, 'round')}"
            parts = [event.federation, f"{sizes}, {count_text(event.trainable_parameters)} parameters", event.run_id]
        case PhaseStarted():
            parts = [f"phase {event.phase}"]
        case SiteFailed():
            parts = [f"round {event.round}/{run.total}", f"{event.site} sat out: {event.code}"]
        case WorkersPlanned():
            parts = [f"{_plural(event.workers, 'worker')}", *event.plan]
        case BatchHalved() | SlotClosed():
            parts = [f"round {event.round}/{run.total}", run.short[-1]]
        case RoundFinished():
            parts = _round_parts(event, run)
        case RoundRejected():
            found = f"{event.setting} allows {figure_text(event.bound)}, found {figure_text(event.value)}"
            parts = [f"round {event.round}/{run.total}", f"rejected: {found}; the adapter stays"]
        case RoundLost():
            parts = [f"round {event.round}/{run.total}", f"lost: {event.reason}; the adapter stays"]
        case RoundValidated():
            parts = [f"round {event.round}/{run.total}", "validation", *_figures(event.figures)]
        case BaselineFinished():
            parts = ["test set", event.baseline, *_figures(event.figures)]
        case RunStopped():
            parts = [f"{event.status}: {event.reason}" if event.reason else event.status]
    return "  ".join(parts) or None


def _round_parts(event: RoundFinished, run: _Run) -> list[str]:
    invited = event.answered + event.failed
    left = run.seconds_left()
    return [
        f"round {event.round}/{run.total}",
        f"train loss {figure_text(event.train_loss)}",
        f"{event.answered} of {_plural(invited, 'site')}" if event.failed else _plural(invited, "site"),
        size_text(event.bytes_up + event.bytes_down),
        duration_text(event.seconds),
        *([] if left is None else [f"about {duration_text(left)} left"]),
    ]


def _figures(figures: dict[str, float]) -> list[str]:
    return [f"{metric_title(metric)} {figure_text(value)}" for metric, value in figures.items()]


def _plural(count: int, noun: str) -> str:
    return f"{count_text(count)} {noun}" if count == 1 else f"{count_text(count)} {noun}s"


# The picture on a terminal.


def _picture(run: _Run, console: Console) -> RenderableType:
    narrow = console.width < NARROW
    # The title, the bar, two table heads with their rules, and the line of the cursor take about a dozen lines.
    room = max(6, console.height - 12)
    rounds = sorted(run.losses.keys() | run.validation.keys())
    rows = min(len(rounds), max(3, room // 3))
    parts: list[RenderableType] = [_title(run), _progress(run)]
    if run.sites:
        parts.append(_site_table(run, room - rows, narrow))
    if rounds:
        parts.append(_round_table(run, rounds, rows, narrow))
    if run.short:
        parts.append(_one_line(run.short[-1], "yellow"))
    if machine := _machine(run, time.time()):
        parts.append(_one_line(machine, "dim"))
    if run.plan and not rounds:
        parts.append(_one_line("; ".join(run.plan), "dim"))
    if run.measured:
        parts.append(_one_line(f"test set: {run.measured} measured"))
    return Group(*parts)


def _machine(run: _Run, now: float) -> str:
    """How long the phases took, and what the run uses: one line; empty before the first phase."""
    if not run.phases:
        return ""
    ends = [*list(run.phases.values())[1:], run.stopped.time if run.stopped else now]
    spans = [(phase, end - began) for (phase, began), end in zip(run.phases.items(), ends, strict=True)]
    parts = [f"{phase} {duration_text(max(0.0, seconds))}" for phase, seconds in spans if phase != "report"]
    if run.used and not run.stopped:
        parts = [used_text(run.used), *parts]
    return ", ".join(parts)


def _title(run: _Run) -> Text:
    title = Text(_clean(run.federation or "starting"), style="bold", no_wrap=True, overflow="ellipsis")
    if run.stopped:
        style = "green" if run.stopped.status == "finished" else "red"
        title.append(f"  {run.stopped.status}", style)
        title.append(_clean(f": {run.stopped.reason}" if run.stopped.reason else ""), style)
    elif run.phase:
        title.append(_clean(f"  {run.phase}"), "cyan")
    if run.run_id:
        title.append(_clean(f"  run {run.run_id}"), "dim")
    return title


def _progress(run: _Run) -> RenderableType:
    left = run.seconds_left(time.time())
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    bar = ProgressBar(total=max(run.total, 1), completed=run.done)
    grid.add_row(f"round {run.round}/{run.total}", bar, "" if left is None else f"about {duration_text(left)} left")
    return grid


def _site_table(run: _Run, most: int, narrow: bool) -> RenderableType:
    table = _table("site", "state", "train loss")
    if not narrow:
        for heading in ("examples", "bytes"):
            table.add_column(heading, justify="right", no_wrap=True)
    # Where not all fit, those that someone may wait for or look into come first; else the order stays.
    order = list(run.sites.items())
    if len(order) > most:
        urgency = {"failed": 0, "training": 1}
        order.sort(key=lambda item: urgency.get(item[1].state.partition(":")[0], 2))
        most = max(1, most - 1)
    for name, site in order[:most]:
        cells: list[str | Text] = [_one_line(name), _state(site.state), figure_text(site.loss)]
        table.add_row(*cells, *([] if narrow else [count_text(site.examples), size_text(site.traffic)]))
    hidden = order[most:]
    return Group(table, _one_line(f" and {len(hidden)} more: {_states(hidden)}", "dim")) if hidden else table


def _states(sites: Iterable[tuple[str, _Site]]) -> str:
    counts: dict[str, int] = {}
    for _, site in sites:
        state = site.state.partition(":")[0]
        counts[state] = counts.get(state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _state(state: str) -> Text:
    style = {"done": "green", "training": "yellow", "failed": "red"}.get(state.partition(":")[0], "dim")
    return _one_line(state, style)


def _round_table(run: _Run, rounds: Sequence[int], most: int, narrow: bool) -> Table:
    """The last `most` rounds; stars mark the best of all rounds, also where that one is no longer shown."""
    metrics = run.metrics[: 1 if narrow else 4]
    table = _table("round", *(metric_title(metric) for metric in metrics), "train loss")
    columns = [[run.validation.get(number, {}).get(metric) for number in rounds] for metric in metrics]
    best = [best_places(values, metric) for values, metric in zip(columns, metrics, strict=True)]
    for place in range(len(rounds) - most, len(rounds)):
        figures = [_marked(values[place], place in places) for values, places in zip(columns, best, strict=True)]
        number = rounds[place]
        what = " rejected" if number in run.rejected else " lost" if number in run.lost else ""
        named = f"{number}{what}"
        table.add_row(named, *figures, figure_text(run.losses.get(rounds[place])))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold dim")
    table.add_column(first, no_wrap=True, overflow="ellipsis", max_width=30)
    for heading in others:
        table.add_column(heading, justify="left" if heading == "state" else "right")
    return table


def _one_line(text: str, style: str = "") -> Text:
    return Text(_clean(text), style=style, no_wrap=True, overflow="ellipsis")


def _marked(value: float | None, best: bool) -> Text:
    """A figure; the best of its column is bold and has a star, which is seen without colours too."""
    text = figure_text(value)
    return Text(f"{text}*", style="bold green") if best else Text(f"{text} ")


# The final table.


def _final_rows(summary: RunSummary, text: Callable[[float | None, bool], str | Text]) -> list[list[str | Text]]:
    rows: list[list[str | Text]] = [[row.name] for row in summary.table]
    for metric in summary.metrics:
        values = [row.figures.get(metric) for row in summary.table]
        best = best_places(values, metric)
        for place, value in enumerate(values):
            rows[place].append(text(value, place in best))
    return rows


def _heading(metric: str) -> str:
    return f"{metric_title(metric)}{' ↓' if metric in LOWER_IS_BETTER else ''}"


def _wide_table(summary: RunSummary) -> Table:
    table = Table(title=TITLE, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("", no_wrap=True)
    for heading in [*map(_heading, summary.metrics), "examples seen"]:
        # A word a line, so that columns are as narrow as their figures; the arrow stays with its word.
        lines = heading.replace(" ", "\n").replace("\n↓", " ↓")
        table.add_column(lines, justify="right", vertical="bottom", no_wrap=True)
    for cells, row in zip(_final_rows(summary, _marked), summary.table, strict=True):
        style = "cyan" if row.name == "federated" else ""
        table.add_row(*cells, count_text(row.examples_seen), style=style)
    return table


def _stacked_table(summary: RunSummary) -> Group:
    """A small table for each metric, one below the other: a narrow terminal has no room for them side by side."""
    parts: list[RenderableType] = [Text(TITLE, style="bold")]
    rows = _final_rows(summary, _marked)
    for place, heading in enumerate(map(_heading, summary.metrics), start=1):
        table = Table(title=Text(heading), title_justify="left", box=None, show_header=False, pad_edge=False)
        for cells in rows:
            table.add_row(cells[0], cells[place])
        parts.append(table)
    return Group(*parts)


def _plain_table(summary: RunSummary) -> list[str]:
    headings = ["", *(metric_title(metric) for metric in summary.metrics), "examples seen"]
    rows = _final_rows(summary, lambda value, best: f"{figure_text(value)}{'*' if best else ' '}")
    lines = [[str(cell) for cell in cells] for cells in rows]
    for line, row in zip(lines, summary.table, strict=True):
        line.append(count_text(row.examples_seen))
    # Figures end in a star or a blank; a heading ends above the figure's last digit.
    lines.insert(0, [headings[0], *(f"{heading} " for heading in headings[1:-1]), headings[-1]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    lower = [metric_title(metric) for metric in summary.metrics if metric in LOWER_IS_BETTER]
    note = f"On the test set; * best{'; lower is better: ' + ', '.join(lower) if lower else ''}"
    return [note, *(_aligned(line, widths) for line in lines)]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join((cells[0].ljust(widths[0]), *others)).rstrip()


def _rejections(summary: RunSummary) -> list[str]:
    return [f"round {facts.round} was rejected: {facts.rejected}" for facts in summary.rounds if facts.rejected]


def _shortages(summary: RunSummary) -> list[str]:
    """What running out of memory led to; nothing where it did not."""
    memory = summary.memory
    if memory is None:
        return []
    return [
        *(
            f"memory ran out for {each.site} in round {each.round}: {each.after} records at once instead of"
            f" {each.before}, same results"
            for each in memory.halvings
        ),
        *(
            f"memory ran out for {each.site} in round {each.round} again: at most {_plural(each.left, 'worker')} at"
            f" once on {each.device} from then on"
            for each in memory.closed_slots
        ),
    ]


def _absences(summary: RunSummary) -> list[str]:
    """One line for each site and code: in which rounds it sat out."""
    rounds: dict[tuple[str, str], list[int]] = {}
    for failure in summary.failures:
        rounds.setdefault((failure.site, failure.code), []).append(failure.round)
    return [
        f"{site} sat out {'round' if len(numbers) == 1 else 'rounds'} {', '.join(map(str, numbers))}: {code}"
        for (site, code), numbers in rounds.items()
    ]
