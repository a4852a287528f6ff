"""The way from a teacher to a compact model, readable as numbered steps; each is measured before the next begins.

Public text alone is read. What is chosen is chosen on dev records, or where there are none by how often student and
teacher agree on text that was held out; test records are measured and decide nothing.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.config.manifest import LOWER_IS_BETTER
from common.errors import DistillationError
from common.records import Record
from server.assessment.comparison import compare
from server.assessment.timing import latency, texts_of
from server.distillation.corpus import Corpus
from server.distillation.domain_model import DomainModel
from server.distillation.exports import Exported, export
from server.distillation.fresh_tokenizer import train_tokenizer
from server.distillation.measuring import Measured, agreement, figures_of, predictions_of
from server.distillation.planning import most_pieces
from server.distillation.pruning import head_and_column_importance, prune
from server.distillation.student import from_scratch, keep_layers, shape_for
from server.distillation.terms import add_terms, find_terms, read_terms
from server.distillation.training import distil
from server.distillation.vocabulary import apply_vocabulary, measure_coverage, trim

__all__ = ["STEPS", "Data", "Distilled", "distil_to"]

STEPS = ("vocabulary", "terms", "student", "train", "export")

# Texts whose latency is taken, one by one.
TIMED = 40


@dataclass(frozen=True, kw_only=True)
class Data:
    """Public text to distil on, and labelled records to choose and to measure on; either of these may be empty."""

    corpus: Corpus
    dev: Sequence[Record] = ()
    test: Sequence[Record] = ()


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What came of it: every step's line, the verdict in words, and whether the targets were met."""

    steps: tuple[Measured, ...]
    verdict: str
    met: bool


@dataclass
class _Work:
    """What the steps share: the teacher, the student as it is now, and the lines so far."""

    teacher: DomainModel
    data: Data
    listen: Callable[[Measured], None]
    student: DomainModel
    teacher_said: list[Any] = field(default_factory=list)
    lines: list[Measured] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)

    def measure(self, step: str, model: DomainModel, began: float, note: str, *, size: int | None = None) -> Measured:
        """Measure a step's model and tell of it; `size` are the bytes of an export."""
        seconds = time.monotonic() - began
        held_out = self.data.corpus.held_out
        said = predictions_of(model, held_out) if held_out else []
        timed = texts_of(list(held_out or self.data.dev or self.data.corpus.train)[:TIMED])
        line = Measured(
            step=step,
            parameters=model.parameters if size is None else None,
            bytes=4 * model.parameters if size is None else size,
            dev=figures_of(model, self.data.dev),
            test=figures_of(model, self.data.test),
            agreement=agreement(said, self.teacher_said or said),
            latency_ms=latency(model, timed, repetitions=1).cpu_median,
            seconds=seconds,
            note=note,
        )
        if not self.lines:
            self.teacher_said = said
        self.lines.append(line)
        self.listen(line)
        return line


def distil_to(
    folder: Path,
    teacher: DomainModel,
    data: Data,
    *,
    only: Collection[str] = STEPS,
    origin: Mapping[str, Any] | None = None,
    listen: Callable[[Measured], None] = lambda line: None,
) -> Distilled:
    """Make a compact model of `teacher` as its manifest's [distillation] says, and write it to a new `folder`.

    Args:
        folder: appears when everything is done, with the model, its exports and its card.
        teacher: base and adapter, merged.
        data: what is read; no private record is needed.
        only: the steps to take, some of STEPS; export is always taken, since it writes the folder.
        origin: facts of the run, for the model card.
        listen: called with every step's line.

    Raises:
        DistillationError: the folder exists, the corpus is too small for what is wanted, a size cannot be met, or an
            export differs from its source. Nothing is left behind.
    """
    if folder.exists():
        raise DistillationError(f"{folder} exists already; a model never replaces another: choose another --out")
    work = _Work(teacher, data, listen, teacher)
    # 1. The teacher, which everything is held against.
    work.measure("teacher", teacher, time.monotonic(), "base and adapter, merged")
    # 2. The words: a vocabulary of the domain, and its terms as single tokens.
    if teacher.manifest.distillation.from_scratch:
        _fresh_student(work)
    else:
        if "vocabulary" in only:
            _trim(work)
        if "terms" in only:
            _insert_terms(work)
        # 3. The shape: fewer layers, heads and columns, copied from the teacher.
        if "student" in only:
            _shrink(work)
    # 4. What was lost is learnt again from the teacher.
    if "train" in only:
        _train(work)
    # 5. Files, each compared with its source and measured; the model card.
    _export(work, folder, origin or {})
    return _judged(work)


def _trim(work: _Work) -> None:
    settings = work.student.manifest.distillation
    if settings.vocabulary == "keep":
        return
    began, texts = time.monotonic(), texts_of(list(work.data.corpus.train))
    most = most_pieces(work.student, settings.ratio)
    trimmed = trim(
        work.student.tokenizer,
        texts,
        pieces=None if settings.vocabulary == "auto" else settings.vocabulary,
        coverage=settings.coverage,
        least=min(LEAST_PIECES, most),
        most=most,
        characters="seen",
    )
    student = apply_vocabulary(work.student, trimmed)
    found = measure_coverage(work.student.tokenizer, trimmed.tokenizer, texts_of(list(work.data.corpus.held_out)))
    work.student = student
    work.facts["vocabulary"] = asdict(found)
    note = f"{found.pieces} pieces, {found.occurrences:.1%} of held-out occurrences"
    work.made.append(f"The vocabulary was counted on public text: {note}.")
    work.measure("vocabulary", student, began, note)


def _insert_terms(work: _Work) -> None:
    """Terms go in before training, which teaches them; afterwards they would cost more than they save."""
    wanted = work.student.manifest.distillation.terms
    if wanted == 0:
        return
    began, texts = time.monotonic(), texts_of(list(work.data.corpus.train))
    terms = read_terms(Path(wanted)) if isinstance(wanted, str) else find_terms(
        texts, work.student.tokenizer, most=wanted
    )
    work.student = add_terms(work.student, terms)
    note = f"{len(terms)} terms as single tokens"
    work.made.append(f"{note.capitalize()}, before training.")
    work.measure("terms", work.student, began, note)


def _shrink(work: _Work) -> None:
    began = time.monotonic()
    settings = work.student.manifest.distillation
    shape = shape_for(
        work.student,
        settings.ratio,
        of=work.teacher.parameters,
        layers=None if settings.layers == "auto" else settings.layers,
    )
    shallower = keep_layers(work.student, shape.layers)
    importance = head_and_column_importance(shallower, texts_of(list(work.data.corpus.train)[:IMPORTANCE_TEXTS]))
    work.student = prune(shallower, heads=shape.heads, columns=shape.columns, importance=importance)
    note = f"{len(shape.layers)} layers, {shape.heads} heads, {shape.columns} columns"
    work.made.append(f"Layers, heads and feed-forward columns were kept by importance: {note}.")
    work.measure("student", work.student, began, note)


def _fresh_student(work: _Work) -> None:
    began, texts = time.monotonic(), texts_of(list(work.data.corpus.train))
