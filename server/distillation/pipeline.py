"""The way from a teacher to a compact model, readable as numbered steps; each is measured before the next begins.

Public text alone is read. What is chosen is chosen on dev records, or where there are none by how often student and
teacher agree on text that was held out; test records are measured and decide nothing.
"""

import copy
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import DistillationError, SizeNotMet
from common.records import Record
from server.assessment.timing import latency, one_thread, texts_of
from server.distillation.corpus import Corpus, texts_in
from server.distillation.domain_model import DomainModel
from server.distillation.exports import Exported, export
from server.distillation.fresh_tokenizer import train_tokenizer
from server.distillation.measuring import Measured, agreement, figures_of, predictions_of
from server.distillation.narrow_words import narrow_words
from server.distillation.planning import LEAST_PIECES, SIZES, general_pieces, most_pieces, narrow_rank
from server.distillation.pruning import head_and_column_importance, prune
from server.distillation.student import from_scratch, keep_layers, keep_positions, shape_for
from server.distillation.term_search import find_terms
from server.distillation.term_trial import try_terms
from server.distillation.terms import add_terms, new_terms, read_terms
from server.distillation.training import distil
from server.distillation.verdict import judge
from server.distillation.vocabulary import apply_vocabulary, measure_coverage, trim

__all__ = ["STEPS", "Data", "Distilled", "distil_to"]

STEPS = ("vocabulary", "terms", "student", "train", "export")

# Texts whose latency is taken, one by one.
TIMED = 40
# Texts on which importance is measured, and on which exports are compared with their source.
WEIGHED, SAMPLED = 512, 64


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
    """What the steps share: the teacher, the student as it is now, and the lines so far.

    `without_terms` is the student as it would be without whole terms, while it is open whether they pay.
    """

    teacher: DomainModel
    data: Data
    listen: Callable[[Measured], None]
    ratio: Fraction
    student: DomainModel
    without_terms: DomainModel | None = None
    teacher_said: list[Any] = field(default_factory=list)
    lines: list[Measured] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    suffix: str = ""

    def attempt(self, ratio: Fraction) -> None:
        """Begin again with the teacher, for another size."""
        self.ratio, self.suffix = ratio, f" at {ratio}"
        self.student, self.without_terms = self.teacher, None
        self.facts, self.made = {}, []

    def measure(self, step: str, model: DomainModel, began: float, note: str, *, size: int | None = None) -> Measured:
        """Measure a step's model and tell of it; `size` are the bytes of an export."""
        seconds = time.monotonic() - began
        held_out = self.data.corpus.held_out
        said = predictions_of(model, held_out) if held_out else []
        timed = texts_of(list(held_out or self.data.dev or self.data.corpus.train)[:TIMED])
        line = Measured(
            step=step if size is not None else f"{step}{self.suffix}",
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
    settings, metric = teacher.manifest.distillation, teacher.manifest.metrics[0]
    work = _Work(teacher, data, listen, max(SIZES) if settings.size == "auto" else Fraction(settings.size), teacher)
    # 1. The teacher, which everything is held against.
    work.measure("teacher", teacher, time.monotonic(), "base and adapter, merged")
    # 2. to 4. A student of the wanted size, or of the smallest that loses no more than it may.
    if settings.size == "auto":
        _smallest(work, only)
    else:
        _compact(work, only)
    # 5. Files, each compared with its source and measured; the model card.
    _export(work, folder, origin or {})
    verdict, met = judge(work.lines, settings, metric, ratio=work.ratio)
    return Distilled(steps=tuple(work.lines), verdict=verdict, met=met)


def _compact(work: _Work, only: Collection[str]) -> None:
    """Steps 2 to 4, for the size that `work` is at."""
    # 2. The words: a vocabulary of the domain, and its terms as single tokens.
    if work.teacher.manifest.distillation.from_scratch:
        _fresh_student(work)
    else:
        if "vocabulary" in only:
            _trim(work)
        if "terms" in only:
            _insert_terms(work)
        # 3. The shape: words in fewer dimensions, fewer layers, heads and columns, copied from the teacher.
        if "student" in only:
            _shrink(work)
    # 4. What was lost is learnt again from the teacher.
    if "train" in only:
        _train(work)


def _smallest(work: _Work, only: Collection[str]) -> None:
    """Sizes from the smallest on, until one loses no more than `max_loss`; the largest stays if none does."""
    settings, metric = work.teacher.manifest.distillation, work.teacher.manifest.metrics[0]
    if not {"student", "train"} <= set(only):
        raise DistillationError(
            "distillation.size 'auto' trains students until one is good enough, so it needs the steps student and"
            " train; name both with --only, or set a size such as '1/10'"
        )
    for ratio in SIZES:
        work.attempt(ratio)
        try:
            _compact(work, only)
        except SizeNotMet:
            if ratio == max(SIZES):
                raise
            continue
        if judge(work.lines, settings, metric, ratio=ratio)[1]:
            return


def _trim(work: _Work) -> None:
    settings = work.student.manifest.distillation
    if settings.vocabulary == "keep":
        return
    began, texts = time.monotonic(), texts_in(work.data.corpus.train)
    most = most_pieces(work.teacher, work.ratio)
    trimmed = trim(
        work.student.tokenizer,
        texts,
        pieces=None if settings.vocabulary == "auto" else settings.vocabulary,
        coverage=settings.coverage,
        least=min(LEAST_PIECES, most),
        most=most,
        fill=general_pieces(work.teacher, work.ratio),
        characters="seen",
    )
    found = measure_coverage(work.student.tokenizer, trimmed.tokenizer, texts_in(work.data.corpus.held_out))
    work.student = keep_positions(apply_vocabulary(work.student, trimmed))
    work.facts["vocabulary"] = {**asdict(found), "coverage": found.occurrences}
    note = f"{found.pieces:,} pieces, {found.occurrences:.1%} of held-out occurrences"
    work.made.append(f"The vocabulary was counted on public text: {note}.")
    work.measure("vocabulary", work.student, began, note)


def _insert_terms(work: _Work) -> None:
    """Terms go in before training, which teaches them; inserted afterwards they cost more than they save."""
    began, tokenizer = time.monotonic(), work.student.tokenizer
    terms = _wanted_terms(work, tokenizer)
    if not terms:
        return
    work.without_terms = work.student
    work.student = add_terms(work.student, new_terms(tokenizer, terms))
    note = f"{len(work.student.tokenizer) - len(tokenizer):,} terms as single tokens"
    work.made.append(f"Before training, {note} were added.")
    work.measure("terms", work.student, began, note)


def _wanted_terms(work: _Work, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    wanted = work.student.manifest.distillation.terms
    if isinstance(wanted, str):
        return read_terms(Path(wanted))
    return find_terms(texts_in(work.data.corpus.train), tokenizer, most=wanted) if wanted else []


def _shrink(work: _Work) -> None:
    began = time.monotonic()
    work.student, note = _shrunk(work, work.student)
    if work.without_terms is not None:
        work.without_terms = _shrunk(work, work.without_terms)[0]
    work.made.append(f"Of the teacher's layers, heads and feed-forward columns the important ones stayed: {note}.")
    work.measure("student", work.student, began, note)


def _shrunk(work: _Work, model: DomainModel) -> tuple[DomainModel, str]:
    """The model with the shape that the wanted size leaves, and that shape in words."""
    corpus, settings, whole = work.data.corpus.train, model.manifest.distillation, work.teacher.parameters
    rank = narrow_rank(model, work.ratio, of=whole)
    if rank is not None:
        model = narrow_words(model, rank, texts_in(corpus))
    layers = None if settings.layers == "auto" else settings.layers
    shape = shape_for(model, work.ratio, of=whole, layers=layers)
    shallow = keep_layers(model, shape.layers)
    importance = head_and_column_importance(shallow, corpus[:WEIGHED])
    note = f"{len(shape.layers)} layers of {shape.heads} heads and {shape.columns} columns"
    if rank is not None:
        note += f", words in {rank} dimensions"
    return prune(shallow, heads=shape.heads, columns=shape.columns, importance=importance), note


def _fresh_student(work: _Work) -> None:
    """A tokenizer of the corpus' own, and a small network that knows nothing yet."""
    began = time.monotonic()
    terms = _wanted_terms(work, work.teacher.tokenizer)
    work.student = _from_scratch(work, terms)
    if terms:
        work.without_terms = _from_scratch(work, [])
    note = f"{len(work.student.tokenizer):,} pieces, {len(terms):,} of them whole terms; random weights"
    work.made.append(f"Tokenizer and network were made afresh: {note}.")
    work.measure("student", work.student, began, note)


def _from_scratch(work: _Work, terms: Sequence[str]) -> DomainModel:
    manifest, texts = work.teacher.manifest, texts_in(work.data.corpus.train)
    wanted = manifest.distillation.vocabulary
    pieces = wanted if isinstance(wanted, int) else None
    tokenizer = train_tokenizer(texts, kind="unigram", pieces=pieces, terms=terms, like=work.teacher.tokenizer)
    return from_scratch(manifest, tokenizer, parameters=int(work.ratio * work.teacher.parameters))


def _train(work: _Work) -> None:
    if work.without_terms is not None:
        _keep_terms_that_pay(work, work.without_terms)
    began, settings = time.monotonic(), work.student.manifest.distillation
    student = DomainModel(copy.deepcopy(work.student.network), work.student.tokenizer, work.student.manifest)
    work.student = distil(work.teacher, student, work.data.corpus, settings)
    note = f"{settings.epochs} passes over {len(work.data.corpus.train):,} texts"
    known = len(work.data.corpus.labelled)
    with_labels = f", {known:,} of them with labels" if known else " without labels"
    work.made.append(f"It learnt from the teacher's softened answers and hidden states in {note}{with_labels}.")
    work.measure("train", work.student, began, note)


def _keep_terms_that_pay(work: _Work, without: DomainModel) -> None:
    began = time.monotonic()
    trial = try_terms(work.teacher, work.student, without, work.data.corpus, work.data.dev)
    if not trial.pays:
        work.student = without
    done = f"terms {'stayed' if trial.pays else 'were dropped'}: {trial.told()}"
    work.made.append(f"The {done}.")
    work.measure("terms tried", work.student, began, done)


def _export(work: _Work, folder: Path, origin: Mapping[str, Any]) -> None:
    settings = work.student.manifest.distillation
    began = time.monotonic()

    def measured(done: Exported, model: DomainModel) -> Mapping[str, Any]:
        nonlocal began
        note = f"same answer as its source on {done.agreement:.1%} of sample texts"
        line = work.measure(done.format, model, began, note, size=done.bytes)
        began = time.monotonic()
        return _as_fact(line)

    corpus = work.data.corpus
    facts = {
        **origin,
        "corpus": f"Distilled on {len(corpus.train):,} public texts; {len(corpus.held_out):,} more were held out.",
        "vocabulary": work.facts.get("vocabulary"),
        "made": work.made,
        "steps": [_as_fact(line) for line in work.lines],
    }
    sample = [text if isinstance(text, str) else " ".join(text) for text in texts_in(corpus.held_out[:SAMPLED])]
    with one_thread():  # as latency is taken; an ONNX session keeps the threads that it was opened with
        export(work.student, folder, settings.exports, sample=sample, facts=facts, measure=measured)


def _as_fact(line: Measured) -> dict[str, Any]:
    """A line as the model card tells it; figures are those on the test records, else on dev."""
    return {
        "name": line.step,
        "parameters": line.parameters,
        "bytes": line.bytes,
        "figures": line.test or line.dev,
        "latency_ms": line.latency_ms,
    }
