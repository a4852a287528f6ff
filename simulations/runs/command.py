"""`coadapt runs ...`: what a person types, in few words; the work is done elsewhere."""

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup

from common.errors import RunError

if TYPE_CHECKING:
    import click

    from simulations.runs.facts import RunFacts

__all__ = ["runs"]


class _ListsFirst(TyperGroup):
    """`coadapt runs` and `coadapt runs FOLDER` list; a folder named like a command is `coadapt runs list NAME`."""

    def parse_args(self, ctx: "click.Context", args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


runs = typer.Typer(cls=_ListsFirst, help="List, compare and clean the runs in a folder; `coadapt runs` lists.")

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that holds the runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
RUNS = Path("runs")


@runs.command("list")
def list_runs(folder: Folder = RUNS, as_json: AsJson = False) -> None:
    """Say of each run when it was, how far it came, how good it is, what privacy it cost and how large it is."""
    from simulations.runs.facts import runs_in
    from simulations.wording import size_text

    found = runs_in(folder)
    if as_json:
        print(json.dumps({"runs": [facts.as_json() for facts in found]}, indent=2))
        return
    if not found:
        _say(f"no run in {folder}")
        return
    heads = ["run", "federation", "began", "status", "rounds", "best figure", "epsilon", "size"]
    rows = [
        [
            facts.name,
            facts.federation or "-",
            _when(facts.began),
            facts.status,
            f"{facts.done}/{facts.rounds}",
            _figure(facts),
            _epsilon(facts),
            size_text(facts.size),
        ]
        for facts in found
    ]
    _table([heads, *rows])


@runs.command("compare")
def compare_runs(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run's folder, or the name of one in the folder runs.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Show which settings of two runs differ, and their figures side by side."""
    from server.watching.folder import find_run
    from simulations.runs.facts import facts_of
    from simulations.runs.settings import differences
    from simulations.wording import duration_text, figure_text, metric_title, size_text

    paths = [find_run(name).path for name in (a, b)]
    facts, settings = [facts_of(path) for path in paths], differences(*paths)
    if as_json:
        print(json.dumps({"settings": settings, "runs": [each.as_json() for each in facts]}, indent=2))
        return
    heads = ["", *(each.name for each in facts)]
    if settings:
        _table([["settings that differ", *heads[1:]], *([key, *map(_setting, both)] for key, both in settings.items())])
    else:
        _say("the settings are the same")
    _say("")

    def row(name: str, of: "Callable[[RunFacts], str]") -> list[str]:
        return [name, *map(of, facts)]

    metrics = list(dict.fromkeys(name for each in facts for name in each.metrics))
    _table(
        [
            heads,
            row("status", lambda each: each.status),
            row("rounds", lambda each: f"{each.done} of {each.rounds}"),
            row("figures are of", lambda each: each.measured or "-"),
            *([metric_title(name), *(figure_text(each.figures.get(name)) for each in facts)] for name in metrics),
            row("epsilon", _epsilon),
            row("sites", lambda each: str(each.sites)),
            row("times a site failed", lambda each: str(each.failures)),
            row("traffic", lambda each: size_text(each.bytes)),
            row(
                "from first to last event",
                lambda each: "-" if each.began is None or each.last is None else duration_text(each.last - each.began),
            ),
        ]
    )
    _say("")
    if len({each.measured for each in facts}) > 1:
        _say("The figures are of different records, so they cannot be compared.")
    _say(f"One run each: what differs may be chance. On the same records, with intervals: coadapt compare {a} {b} DATA")


@runs.command("clean")
def clean_runs(
    folder: Folder = RUNS,
    only: Annotated[
        list[str] | None, typer.Option("--run", metavar="NAME", help="Only this run of the list. Repeatable.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Delete runs as a whole, with their results and reports.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do delete; else it is only shown.")] = False,
) -> None:
    """Show what can be deleted and how much it is; --yes deletes it. Results and reports stay, runs that go on too."""
    from simulations.runs.cleaning import clean, plan
    from simulations.runs.facts import runs_in
    from simulations.wording import size_text

    found = runs_in(folder)
    if unknown := set(only or ()) - {facts.name for facts in found}:
        raise RunError(f"there is no run {sorted(unknown)[0]!r} in {folder}; `coadapt runs {folder}` lists them")
    plans = plan(folder, [facts for facts in found if not only or facts.name in only], everything=everything)
    for each in plans:
        names = sorted({"the whole run" if path == each.folder else _part(path, each.folder) for path in each.paths})
        what = each.why or (f"{size_text(each.size)}: {', '.join(names)}" if names else "nothing to delete")
        _say(f"{each.facts.name}  {each.facts.status}  {what}")
    if yes:
        _say(f"deleted {size_text(sum(clean(each) for each in plans if each.paths))}")
    else:
        total = sum(each.size for each in plans)
        _say(f"{size_text(total)} would be deleted; --yes deletes them" if total else "nothing would be deleted")


@runs.command("export")
def export_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or the name of one in the folder runs.")],
    log_to: Annotated[str, typer.Option(metavar="TOOL", help="tensorboard:DIR or mlflow:URI.")],
) -> None:
    """Give a run's figures to TensorBoard or MLflow, as --log-to does while it runs."""
    from server.watching.folder import find_run
    from simulations.tracked import export

    _say(f"{export(find_run(run), log_to)} events of {run} went to {log_to}")


def _part(path: Path, folder: Path) -> str:
    """A part of a run as a person reads it: `rounds` stands for each of them."""
    parts = path.relative_to(folder).parts
    return "/".join(part for part in parts if not part.isdigit())


def _when(time: float | None) -> str:
    return "-" if time is None else datetime.datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M")


def _figure(facts: "RunFacts") -> str:
    from simulations.wording import figure_text, metric_title

    metric = facts.metrics[0] if facts.metrics else ""
    known = facts.figures.get(metric)
    return "-" if known is None else f"{metric_title(metric)} {figure_text(known)} ({facts.measured})"


def _epsilon(facts: "RunFacts") -> str:
    """What was paid of what was allowed; without privacy a dash."""
    if facts.allowed is None:
        return "-"
    return f"at most {facts.allowed:g}" if facts.epsilon is None else f"{facts.epsilon:.3g} of {facts.allowed:g}"


def _setting(value: str | None) -> str:
    return "-" if value is None else value if len(value) <= 60 else f"{value[:57]}..."


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _say(text: str) -> None:
    """A line as it is; what a name holds moves no cursor."""
    console = Console()
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    clean = clean.encode(console.encoding, "replace").decode(console.encoding)
    console.print(clean, highlight=False, soft_wrap=True, markup=False, emoji=False)
