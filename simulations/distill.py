"""`coadapt distill`: finds the teacher and the data, takes the steps, and shows the table."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config.loading import load_manifest
from common.config.manifest import Manifest
from common.data_files import read_records
from common.errors import DistillationError
from common.records import Record
from server.distillation.corpus import Corpus, corpus_of, read_corpus
from server.distillation.domain_model import DomainModel
from server.distillation.federation_facts import federation_facts
from server.distillation.measuring import Measured
from server.distillation.pipeline import STEPS, Data, Distilled, distil_to
from server.distillation.teacher import load_teacher
from server.distillation.written import write_texts
from simulations.sites import read_federation, read_split

__all__ = ["distill"]


def distill(
    run: Path,
    out: Path | None,
    *,
    corpus: Sequence[Path] = (),
    dev: Path | None = None,
    test: Path | None = None,
    data: Path | None = None,
    base: Path | None = None,
    only: Sequence[str] = (),
    overrides: Sequence[str] = (),
    console: Console,
    as_json: bool = False,
) -> Distilled:
    """Distil the run (or model) at `run` into the new folder `out`; None: `<run>/compact`.

    Raises:
        DistillationError: a step is unknown, there is no corpus, or what `distil_to` raises.
    """
    unknown = [step for step in only if step not in STEPS]
    if unknown:
        raise DistillationError(f"--only must name some of {', '.join(STEPS)}, found {unknown[0]!r}")
    folder = out or run / "compact"
    teacher = load_teacher(run, base=base)
    agreed = _manifest(run, teacher, overrides)
    teacher = DomainModel(teacher.network, teacher.tokenizer, agreed)
    found = _data(teacher, corpus, dev, test, data, run)
    origin = {"federation": federation_facts(run)} if (run / "summary.json").is_file() else {}

    def show(line: Measured) -> None:
        if not as_json:
            console.print(_told(line, agreed.metrics[0]), highlight=False, soft_wrap=True)

    done = distil_to(folder, teacher, found, only=only or STEPS, origin=origin, listen=show)
    if as_json:
        print(json.dumps({"steps": [asdict(line) for line in done.steps], "verdict": done.verdict, "met": done.met}))
    else:
        console.print(_table(done.steps, agreed.metrics[0]))
        console.print(done.verdict, highlight=False, soft_wrap=True)
        console.print(f"model: {folder}; its card: {folder / 'README.md'}", highlight=False, soft_wrap=True)
    return done


def _manifest(run: Path, teacher: DomainModel, overrides: Sequence[str]) -> Manifest:
    """The run's manifest with a person's settings of [distillation]; what was trained stays what it was."""
    file = run / "federation.toml"
    if not file.is_file():
        if overrides:
            raise DistillationError(f"--set needs a run's folder with its federation.toml, and {run} has none")
        return teacher.manifest
    wrong = [setting for setting in overrides if not setting.startswith("distillation.")]
    if wrong:
        raise DistillationError(f"--set takes settings of [distillation] here, found {wrong[0]!r}; the run is finished")
    loaded = load_manifest(file, overrides)
    return teacher.manifest.model_copy(
        update={"distillation": loaded.distillation, "simulation": loaded.simulation, "evaluation": loaded.evaluation}
    )


def _data(
    teacher: DomainModel, corpus: Sequence[Path], dev: Path | None, test: Path | None, data: Path | None, run: Path
) -> Data:
    """Files that a person names come first; a simulated run's own dev and test records, and public text, else."""
    manifest = teacher.manifest
    folders = [folder for folder in (data, Path.cwd(), run) if folder is not None]
    named = list(corpus) or [_found(name, folders) for name in manifest.distillation.corpus]
    text: Corpus
    if named:
        text = read_corpus(named, manifest)
    elif manifest.distillation.written:
        settings = manifest.distillation
        text = corpus_of(write_texts(teacher, settings.written, seed=settings.seed), manifest)
    elif manifest.simulation is not None and manifest.simulation.source is not None:
        text = corpus_of(read_split(manifest, "public", folders), manifest)
    else:
        raise DistillationError(
            "there is no public text to distil on; name files with --corpus FILE or distillation.corpus, or let a"
            " causal teacher write: --set distillation.written=5000"
        )
    own_dev: Sequence[Record] = _records(dev, manifest)
    own_test: Sequence[Record] = _records(test, manifest)
    if manifest.simulation is not None and dev is None and test is None:
        splits = read_federation(manifest, folders).splits()
        own_dev, own_test = splits["dev"], splits["test"]
    return Data(corpus=text, dev=own_dev, test=own_test)


def _records(path: Path | None, manifest: Manifest) -> list[Record]:
    return [] if path is None else read_records(path, task=manifest.task, data=manifest.data)[0]


def _found(name: str, folders: Sequence[Path]) -> Path:
    return next((folder / name for folder in folders if (folder / name).exists()), Path(name))


def _told(line: Measured, metric: str) -> str:
    figures = [
        f"{split} {metric} {found[metric]:.3f}" for split, found in (("dev", line.dev), ("test", line.test)) if found
    ]
    agreed = [f"agrees with the teacher on {line.agreement:.1%}"] if line.agreement is not None else []
    return f"{line.step}: {'; '.join([line.note, *figures, *agreed])}"


def _table(lines: Sequence[Measured], metric: str) -> Table:
    """Narrow enough for 80 columns: a cut name of a format would say nothing."""
    name = metric.replace("_", " ")
    title = f"From teacher to compact model: {name}, CPU time of a text"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    for head in ("step", "parameters", "MB", "dev", "test", "agrees", "ms", "s"):
        table.add_column(head, justify="left" if head == "step" else "right", no_wrap=True)
    for line in lines:
        table.add_row(
            line.step,
            f"{line.parameters:,}" if line.parameters is not None else "",
            f"{line.bytes / 1e6:.2f}",
            _figure(line.dev, metric),
            _figure(line.test, metric),
            f"{line.agreement:.3f}" if line.agreement is not None else "",
            f"{line.latency_ms:.2f}",
            f"{line.seconds:.0f}",
        )
    return table


def _figure(figures: dict[str, Any], metric: str) -> str:
    return f"{figures[metric]:.4f}" if metric in figures else ""
