"""`coadapt evaluate` and `coadapt compare`: what a person types, in few words; the work is done elsewhere."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.config.manifest import Manifest
    from common.records import Record
    from server.assessment.comparison import Comparison
    from server.assessment.evaluation import Evaluation, Figure
    from server.assessment.memory import PeakMemory
    from server.assessment.text_quality import Check
    from server.assessment.timing import Latency
    from server.distillation.domain_model import DomainModel

__all__ = ["compare", "evaluate"]

ModelPath = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run, an adapter, a model's folder, an .onnx or .gguf file, a base.")
]
DataPath = Annotated[Path, typer.Argument(metavar="DATA", help="A data file with the columns of the model's manifest.")]
BasePath = Annotated[
    Path | None, typer.Option("--base", metavar="DIR", help="Where the base of a run or adapter lies.")
]
ManifestPath = Annotated[
    Path | None, typer.Option("--manifest", metavar="FILE", help="The federation.toml of a base, which has no task.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Measure on so many records at most, drawn with a fixed seed.")]
Pattern = Annotated[
    str | None, typer.Option(metavar="REGEX", help="causal-lm: the form that a written answer must have as a whole.")
]
Schema = Annotated[
    Path | None, typer.Option(metavar="FILE", help="causal-lm: the JSON schema that a written answer must fit.")
]
NewTokens = Annotated[int, typer.Option(min=0, help="causal-lm: longest written answer; 0 writes none.")]


def evaluate(
    model: ModelPath,
    data: DataPath,
    as_json: AsJson = False,
    limit: Limit = None,
    max_new_tokens: NewTokens = 128,
    pattern: Pattern = None,
    schema: Schema = None,
    base: BasePath = None,
    manifest: ManifestPath = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Also measure latency, throughput, memory.")] = True,
) -> None:
    """Measure a model on a data file: figures with 95 % intervals, latency, memory and size."""
    from server.assessment.evaluation import TIMED_TEXTS, drawn
    from server.assessment.evaluation import evaluate as measured
    from server.assessment.memory import peak_memory
    from server.assessment.opening import stored_bytes
    from server.assessment.timing import texts_of

    check, agreed = _check(pattern, schema), _manifest(manifest)
    opened = _opened(model, base, agreed)
    records = drawn(_records(data, opened), limit)
    found = measured(opened, records, most_tokens=max_new_tokens, check=check, timed=speed)
    size = stored_bytes(model, base=base)
    memory = None
    if speed:
        memory = peak_memory(model, texts_of(drawn(records, TIMED_TEXTS)), base=base, manifest=agreed)
    if as_json:
        facts = {"model": str(model), "data": str(data), **found.as_json(), "bytes": size}
        facts["peak_memory_mib"] = None if memory is None else {"process": memory.process, "model": memory.model}
        print(json.dumps(facts, indent=2))
        return
    _print_evaluation(model, found, size, memory)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The first model, as `coadapt evaluate` takes it.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The second model.")],
    data: DataPath,
    as_json: AsJson = False,
    limit: Limit = None,
    metric: Annotated[str | None, typer.Option(help="Metric of the verdict; default: the task's first.")] = None,
    max_new_tokens: NewTokens = 0,
    pattern: Pattern = None,
    schema: Schema = None,
    base: BasePath = None,
    manifest: ManifestPath = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Also time both, in turns.")] = True,
) -> None:
    """Say whether one of two models is better on the same records, and how sure that is."""
    from server.assessment.comparison import check_tasks
    from server.assessment.comparison import compare as compared
    from server.assessment.evaluation import drawn
    from server.assessment.opening import stored_bytes

    check, agreed = _check(pattern, schema), _manifest(manifest)
    first, second = _opened(a, base, agreed), _opened(b, base, agreed)
    check_tasks(first.manifest.task, second.manifest.task)  # before A's labels refuse B's data
    records = drawn(_records(data, first), limit)
    found = compared(first, second, records, metric=metric, most_tokens=max_new_tokens, check=check, timed=speed)
    sizes = [stored_bytes(path, base=base) for path in (a, b)]
    if as_json:
        facts = {"a": str(a), "b": str(b), "data": str(data), **found.as_json(), "bytes": sizes}
        print(json.dumps(facts, indent=2))
        return
    _print_comparison(a, b, found, sizes)


def _opened(path: Path, base: Path | None, manifest: "Manifest | None") -> "DomainModel":
    from server.assessment.opening import open_model
    from server.assessment.timing import one_thread

    with one_thread():  # an ONNX file keeps the threads that it was opened with
        return open_model(path, base=base, manifest=manifest)


def _manifest(path: Path | None) -> "Manifest | None":
    from common.config.loading import load_manifest

    return None if path is None else load_manifest(path)


def _records(path: Path, model: "DomainModel") -> "Sequence[Record]":
    from common.data_files import read_records

    records, _ = read_records(path, task=model.manifest.task, data=model.manifest.data)
    return records


def _check(pattern: str | None, schema: Path | None) -> "Check | None":
    from server.assessment.text_quality import pattern_check, schema_check

    checks = [] if pattern is None else [pattern_check(pattern)]
    if schema is not None:
        checks.append(schema_check(schema))
    return (lambda answer: all(check(answer) for check in checks)) if checks else None


def _print_evaluation(path: Path, found: "Evaluation", size: int, memory: "PeakMemory | None") -> None:
    cut = f", {found.truncated} of them cut" if found.truncated else ""
    table = _table(f"{path} on {found.records:,} records{cut}", "figure", "value", "95 % interval")
    for figure in found.figures:
        table.add_row(_title(figure.metric), _value(figure.value), _interval(figure))
    if found.cost is not None:
        _add_latency(table, found.cost.latency)
        passed = found.cost.throughput
        table.add_row(
            f"throughput, batches of {passed.batch_size}",
            f"{passed.by_cpu:,.0f}/s CPU",
            f"records; by the clock {passed.by_wall:,.0f}",
        )
    if memory is not None:
        table.add_row(
            "peak memory",
            f"{memory.model:,.0f} MiB",
            f"and {memory.process - memory.model:,.0f} for Python and libraries",
        )
    if found.parameters:
        table.add_row("parameters", f"{found.parameters:,}", "")
    table.add_row("weights on disk", f"{size:,} bytes", "")
    Console().print(table)


def _add_latency(table: Table, latency: "Latency") -> None:
    table.add_row(
        "latency, batch 1",
        f"{latency.cpu_median:.2f} ms CPU",
        f"95 % below {latency.cpu_p95:.2f}; by the clock {latency.wall_median:.2f} and {latency.wall_p95:.2f}",
    )
    table.add_row("tokenising", f"{latency.tokenise:.2f} ms CPU", f"median text of {latency.tokens:.0f} tokens")


def _print_comparison(a: Path, b: Path, found: "Comparison", sizes: "Sequence[int]") -> None:
    console = Console()
    table = _table(f"A {a}\nB {b}\non {found.records:,} records", "figure", "A", "B", "B minus A", "95 % interval")
    for row in found.differences:
        paired = row.difference
        limits = f"{_value(paired.low)} to {_value(paired.high)}"
        table.add_row(_title(row.metric), _value(row.a.value), _value(row.b.value), _value(paired.difference), limits)
    if found.parameters is not None and all(found.parameters):
        _add_size(table, "parameters", found.parameters)
    _add_size(table, "weights, bytes", sizes)
    if found.speed is not None:
        ours_ms, theirs_ms = found.speed.first.cpu_median, found.speed.second.cpu_median
        table.add_row(
            "latency, ms CPU", f"{ours_ms:.2f}", f"{theirs_ms:.2f}", f"{theirs_ms - ours_ms:+.2f}",
            f"B is {found.speed.ratio:.1f} times as fast",
        )  # fmt: skip
    console.print(table)
    if found.mcnemar is not None:
        test = found.mcnemar
        _say(f"McNemar: {test.only_first} records right by A alone, {test.only_second} by B alone; {_p(test.p)}"
             f" ({test.method})")  # fmt: skip
    _say(found.verdict)


def _add_size(table: Table, name: str, sizes: "Sequence[int]") -> None:
    ours, theirs = sizes
    table.add_row(name, f"{ours:,}", f"{theirs:,}", f"{theirs - ours:+,}", f"B is 1/{ours / theirs:.1f} of A")


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, title=escape(title), title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place and column != "95 % interval" else "left")
    return table


def _title(metric: str) -> str:
    return escape(metric.rpartition(":")[2].replace("_", " "))


def _value(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def _interval(figure: "Figure") -> str:
    return "" if math.isnan(figure.low) else f"{_value(figure.low)} to {_value(figure.high)}"


def _p(p: float) -> str:
    return f"p = {p:.4f}" if p >= 0.0001 else "p < 0.0001"


def _say(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True, markup=False)
