"""The command `coadapt`: what a person types, in few words; the work is done elsewhere.

Commands import what they need when they run, so that `coadapt --help` answers at once.
"""

import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from client.commands import site
from common.errors import BundleError, CoadaptError, ManifestError, RunError
from server.assessment.commands import compare as compare_models
from server.assessment.commands import evaluate
from server.commands import coordinator
from server.distillation.export_command import export
from server.distillation.vocabulary_commands import vocabulary
from simulations.runs.command import runs as runs_commands
from simulations.watch_command import watch

if TYPE_CHECKING:
    from simulations.bundle_format import Facts

__all__ = ["app", "main"]

INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Institutions that may not share records fine-tune one language model together.",
)

app.add_typer(site, name="site")
app.add_typer(coordinator, name="coordinator")
bundle = typer.Typer(help="Everything that an institution installs, in one file, where nothing can be downloaded.")
app.add_typer(bundle, name="bundle")
app.command()(evaluate)
app.command()(export)
app.command("compare")(compare_models)
app.add_typer(vocabulary, name="vocabulary")
app.command()(watch)
app.add_typer(runs_commands, name="runs")

ManifestPath = Annotated[Path, typer.Argument(metavar="MANIFEST", help="A federation.toml.")]
DataFolder = Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Folder of the data files.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. training.rounds=3. Repeatable."),
]
LogTo = Annotated[
    list[str] | None,
    typer.Option(metavar="TOOL", help="Also draw figures in tensorboard:DIR or mlflow:URI. Repeatable."),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"coadapt {importlib.metadata.version('coadapt')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def simulate(
    manifest: ManifestPath,
    data: DataFolder = None,
    runs: Annotated[Path, typer.Option(help="Folder that gets a folder for this run.")] = Path("runs"),
    run_id: Annotated[str | None, typer.Option(help="Name of the run's folder; default: name and time.")] = None,
    overrides: Overrides = None,
    baselines: Annotated[
        bool | None,
        typer.Option("--baselines/--no-baselines", help="Also train each site alone and all records in one place."),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Setting of a second federation to compare with; may be repeated."),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="KEY=V1,V2,...", help="Run once for each value of a setting and draw what comes of it."),
    ] = None,
    log_to: LogTo = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace one site's first steps, and name what costs most in them.")
    ] = False,
) -> None:
    """Simulate a whole federation on this machine, from raw files to a report."""
    if sweep is not None:
        if log_to or profile:
            raise RunError("--log-to and --profile are of one run: of a sweep's points, use coadapt runs export")
        _sweep(manifest, sweep, data, runs, run_id, overrides or [], baselines)
        return
    from simulations.engine import simulate as run
    from simulations.live import LiveView, print_table
    from simulations.profiling import profiling
    from simulations.report import (
        cost_result,
        main_result,
        privacy_result,
        profile_result,
        secure_sum_result,
        utility_result,
    )
    from simulations.tracked import tracked

    console = Console()
    with profiling(profile), LiveView(console) as live, tracked(log_to or (), runs, live) as view:
        summary = run(
            manifest,
            data=data,
            runs=runs,
            run_id=run_id,
            overrides=overrides or [],
            baselines=baselines,
            compare=compare,
            view=view,
        )
    folder = runs / summary.run_id
    print_table(summary, console)
    console.print(main_result(summary), highlight=False, soft_wrap=True)
    console.print(f"{privacy_result(summary)} {secure_sum_result(summary)}", highlight=False, soft_wrap=True)
    if compared := utility_result(summary):
        console.print(compared, highlight=False, soft_wrap=True)
    if summary.overfitting:
        console.print(summary.overfitting, highlight=False, soft_wrap=True)
    console.print(cost_result(summary), highlight=False, soft_wrap=True)
    if profile:
        console.print(profile_result(summary), highlight=False, soft_wrap=True, markup=False)
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    if summary.status == "interrupted":
        console.print(f"stopped by you; what was finished lies in {folder}", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED)


def _sweep(
    manifest: Path,
    text: str,
    data: Path | None,
    runs: Path,
    run_id: str | None,
    overrides: list[str],
    baselines: bool | None,
) -> None:
    from simulations.live import LiveView
    from simulations.sweep import parse_sweep, run_sweep
    from simulations.wording import figure_text

    sweep = parse_sweep(text)
    console = Console()
    with LiveView(console) as view:
        summary, folder = run_sweep(
            manifest,
            sweep,
            data=data,
            runs=runs,
            run_id=run_id,
            overrides=overrides,
            baselines=False if baselines is None else baselines,
            view=view,
        )
    for point in summary.points:
        figures = "  ".join(f"{name} {figure_text(point.figures.get(name))}" for name in summary.metrics)
        console.print(f"{summary.key} {point.value}:  {figures}", highlight=False, soft_wrap=True)
    if summary.epsilon_of_all is not None:
        paid = f"a site that really tried all of this would have paid epsilon {figure_text(summary.epsilon_of_all)}"
        console.print(paid, highlight=False, soft_wrap=True)
    console.print(f"report: {folder / 'sweep.html'}", highlight=False, soft_wrap=True)
    if summary.points[-1].status == "interrupted":
        raise typer.Exit(INTERRUPTED)


@app.command()
def run(
    home: Annotated[Path, typer.Option("--home", metavar="DIR", help="The coordinator's folder.")] = Path(),
    run_id: Annotated[str | None, typer.Option(help="Name of the run; default: name and time.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with a run that was cut off.")] = None,
    stop: Annotated[str | None, typer.Option(metavar="RUN", help="End a run that goes on; it can be resumed.")] = None,
    log_to: LogTo = None,
) -> None:
    """Run the agreed federation between institutions, and show how it goes."""
    from server.home import CoordinatorHome
    from server.submission import end, follow, new_run_id, require_run_id, submit, summary_of
    from simulations.live import LiveView
    from simulations.tracked import tracked

    console, place = Console(), CoordinatorHome(home.absolute())
    for given in (run_id, resume, stop):
        if given is not None:
            require_run_id(given)
    if stop is not None:
        end(place, stop)
        console.print(f"{stop} was asked to stop; go on with --resume {stop}", highlight=False, soft_wrap=True)
        return
    from server.field_run import prepared  # takes torch, and so seconds

    manifest, _ = prepared(place)
    name = resume or run_id or new_run_id(manifest.name)
    with LiveView(console) as live, tracked(log_to or (), place.runs, live) as view:
        submitted = submit(place, name, resume=resume is not None)
        try:
            for event in follow(place, submitted):
                view(event)
        except KeyboardInterrupt:
            end(place, name)
            raise
    summary = summary_of(place.runs / name)
    if summary is None:
        raise RunError(f"run {name} ended without a summary; {place.logs} says why")
    console.print(summary.first_line, highlight=False, soft_wrap=True)
    for site_name, words in summary.refusals.items():
        console.print(f"{site_name} refused: {words}", highlight=False, soft_wrap=True, markup=False)
    if summary.status != "finished":
        raise RunError(f"run {name} {summary.status}: {summary.reason}; go on with coadapt run --resume {name}")
    console.print(f"adapter: {place.runs / name / 'adapter'}", highlight=False, soft_wrap=True)
    if (place.published / name).is_dir():
        console.print(f"sites bring it with: coadapt site fetch {name}", highlight=False, soft_wrap=True)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The manifest to write.")] = Path("federation.toml"),
    name: Annotated[str | None, typer.Option(help="Short name of the federation.")] = None,
    task: Annotated[str | None, typer.Option(help="text-classification, token-classification or causal-lm.")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels in their order, parted by commas.")] = None,
    labels_from: Annotated[
        Path | None,
        typer.Option(help="Public file to take the labels from: a label a line (.txt), or a data file."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model: a local directory or a hub id.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the hub repository.")] = None,
    train: Annotated[str | None, typer.Option(help="Adds a [simulation] table that reads this data file.")] = None,
    sites: Annotated[int, typer.Option(help="Number of simulated sites.")] = 6,
) -> None:
    """Write an annotated manifest; on a terminal, what is not given is asked for."""
    from simulations.new_manifest import write_manifest

    write_manifest(
        path,
        name=name,
        task=task,
        labels=labels,
        labels_from=labels_from,
        base=base,
        revision=revision,
        train=train,
        sites=sites,
    )
    Console().print(f"wrote {path}; next: coadapt check {path}", highlight=False, soft_wrap=True)


@app.command()
def check(manifest: ManifestPath, data: DataFolder = None, overrides: Overrides = None) -> None:
    """Validate a manifest and print what would happen."""
    from simulations.check import print_check

    print_check(manifest, data=data, overrides=overrides or [], console=Console())


@app.command()
def distill(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder, or a model's.")],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Public text of the domain, labels not needed. Repeatable."),
    ] = None,
    dev: Annotated[Path | None, typer.Option(metavar="FILE", help="Labelled records that choices are made on.")] = None,
    test: Annotated[Path | None, typer.Option(metavar="FILE", help="Labelled records to measure steps on.")] = None,
    data: DataFolder = None,
    base: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the run's base model lies.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="New folder; default: RUN/compact.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP", help="Take this step alone: vocabulary, terms, student or train. Repeatable."),
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a compact model of a run from public text, and measure every step."""
    from simulations.distill import distill as work

    work(
        run,
        out,
        corpus=corpus or (),
        dev=dev,
        test=test,
        data=data,
        base=base,
        only=only or (),
        overrides=overrides or (),
        console=Console(),
        as_json=as_json,
    )


@app.command()
def bench(
    name: Annotated[
        str, typer.Argument(help="Name of the benchmark: simulation, dp-step, secure-sum or round-latency.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    sites: Annotated[
        list[int] | None, typer.Option(min=2, help="Number of sites; secure-sum takes it more than once.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds of the simulation; counted rounds of a turn of round-latency.")
    ] = 3,
    values: Annotated[
        list[int] | None, typer.Option(min=1, help="Length of the vector in secure-sum; may be given more than once.")
    ] = None,
    repetitions: Annotated[int | None, typer.Option(min=1, help="Turns, of which medians are taken.")] = None,
    participants: Annotated[
        int | None, typer.Option(min=1, help="Sites in a round of the simulation; default: all.")
    ] = None,
    local_steps: Annotated[int, typer.Option(min=1, help="Training steps of a site in a round of the simulation.")] = 1,
    base: Annotated[str, typer.Option(help="Base of the simulation: default or tiny.")] = "default",
) -> None:
    """Measure speed as a ratio inside one run; docs/benchmarks.md says what each figure means."""
    from simulations.benchmarks.bench import print_bench

    print_bench(
        name,
        as_json=as_json,
        sites=sites or (),
        rounds=rounds,
        values=values or (),
        repetitions=repetitions,
        participants=participants,
        local_steps=local_steps,
        base=base,
    )


@bundle.callback(invoke_without_command=True)
def make_bundle(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The tar file to write.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: a directory or a hub id; default: Coadapt's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the base's hub repository.")] = None,
    extra: Annotated[list[str] | None, typer.Option(help="Also what an extra needs: compact. Repeatable.")] = None,
    wheel: Annotated[Path | None, typer.Option(metavar="FILE", help="Coadapt's wheel; default: built here.")] = None,
    constraints: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Pinned versions; default: Coadapt's constraints.txt.")
    ] = None,
) -> None:
    """Write wheels and base model, by digest, into one tar file."""
    if context.invoked_subcommand is not None:
        return
    if out is None:
        raise BundleError("--out FILE.tar says where to write the bundle")
    from simulations.bundle import make_bundle as make

    facts, digest = make(out, base=base, revision=revision, extras=extra or (), wheel=wheel, constraints=constraints)
    _print_bundle(out, facts, digest)


@bundle.command("check")
def check_bundle(file: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle.")]) -> None:
    """Compare every byte of a bundle with its digests."""
    from simulations.bundle_format import check_bundle as read

    _print_bundle(file, *read(file))


def _print_bundle(path: Path, facts: "Facts", digest: str) -> None:
    from simulations.bundle_format import machine

    size = sum(file.size for file in facts.files.values())
    wheels = sum(name.endswith(".whl") for name in facts.files)
    lines = [
        f"{path}: Coadapt {facts.coadapt}, {wheels} wheels, {size} bytes, for Python {facts.python} on"
        f" {facts.platform}",
        f"base {facts.base.name}, weights {facts.base.weights_sha256}",
        f"SHA-256 of the file, to compare by phone: {digest}",
    ]
    if machine() != (facts.python, facts.platform):
        lines.append(f"warning: this is Python {machine()[0]} on {machine()[1]}, where it does not install")
    for line in lines:
        Console().print(line, highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Run the command; an error of Coadapt ends in one line for each problem and exit status 1 (2 for a manifest)."""
    try:
        app()
    except ManifestError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except CoadaptError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped by you", file=sys.stderr)
        sys.exit(INTERRUPTED)
