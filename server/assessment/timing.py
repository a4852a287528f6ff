"""How fast a model is: latency at batch 1, throughput, and how two models compare in one process.

Times are taken on one thread, as process CPU time and as wall time. On a machine that others use too, CPU time is
the one that repeats: wall time holds the waiting for others. One thread means `torch.set_num_threads(1)` around the
measuring. An ONNX session has as many threads as torch had when the file was opened, and cannot change: open it within
`one_thread()`.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import AssessmentError
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from server.distillation.domain_model import DomainModel

__all__ = ["Latency", "SpeedRatio", "Throughput", "compared_latency", "latency", "one_thread", "texts_of", "throughput"]

WARM_UP = 3  # calls before the first that counts: caches fill, memory is taken, kernels are chosen


@dataclass(frozen=True)
class Latency:
    """Milliseconds from token ids to logits at batch 1; `tokenise` is the median of what comes before, CPU time."""

    cpu_median: float
    cpu_p95: float
    wall_median: float
    wall_p95: float
    tokenise: float
    tokens: float
    """median length of the inputs"""
    calls: int


@dataclass(frozen=True)
class SpeedRatio:
    """Latencies of two models that took turns, text by text, and how many times faster the second is, by CPU time."""

    first: Latency
    second: Latency
    ratio: float
    """median of the texts' own ratios, so that a text that is long for both weighs as any other"""


@dataclass(frozen=True)
class Throughput:
    """Records a second on one thread, tokenising not counted."""

    by_cpu: float
    by_wall: float
    batch_size: int
    records: int


def texts_of(records: Sequence[Record]) -> list[str]:
    """What a model reads of each record, as one text; of an instruction question and context, not the answer."""
    texts = []
    for record in records:
        match record:
            case TextRecord():
                texts.append(record.text)
            case TokensRecord():
                texts.append(" ".join(record.tokens))
            case InstructionRecord():
                texts.append(f"{record.instruction}\n{record.input}".strip())
    return texts


def latency(model: DomainModel, texts: Sequence[str], *, repetitions: int = 3) -> Latency:
    """The latency of a model over `texts`, each `repetitions` times, after some calls that do not count.

    Raises:
        AssessmentError: there are no texts.
    """
    return _summary(_turns([model], texts, repetitions)[0])


def compared_latency(
    first: DomainModel, second: DomainModel, texts: Sequence[str], *, repetitions: int = 3
) -> SpeedRatio:
    """Two models' latencies in one process, turn by turn (A B A B), so that a busy moment meets both alike.

    Raises:
        AssessmentError: there are no texts.
    """
    ours, theirs = _turns([first, second], texts, repetitions)
    ratios = [a.cpu / b.cpu if b.cpu else 1.0 for a, b in zip(ours, theirs, strict=True)]
    return SpeedRatio(_summary(ours), _summary(theirs), statistics.median(ratios))


def throughput(model: DomainModel, texts: Sequence[str], *, batch_size: int = 32, repetitions: int = 3) -> Throughput:
    """Records a second in batches, sorted by length so that little is padded; the median of the repetitions.

    Raises:
        AssessmentError: there are no texts.
    """
    _check(texts)
    order = sorted(texts, key=len)
    batches = [_encoded(model, order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    cpu, wall = [], []
    with _measuring(model):
        _run(model, batches[-1])
        for _ in range(repetitions):
            began_cpu, began = time.process_time(), time.perf_counter()
            for batch in batches:
                _run(model, batch)
            cpu.append(time.process_time() - began_cpu)
            wall.append(time.perf_counter() - began)
    return Throughput(
        by_cpu=len(texts) / max(statistics.median(cpu), 1e-9),
        by_wall=len(texts) / max(statistics.median(wall), 1e-9),
        batch_size=batch_size,
        records=len(texts),
    )


@dataclass(frozen=True, slots=True)
class _Call:
    """One call in seconds."""

    tokenise: float
    cpu: float
    wall: float
    tokens: int


def _turns(models: Sequence[DomainModel], texts: Sequence[str], repetitions: int) -> list[list[_Call]]:
    """The calls of each model; every text goes through one model after the other before the next text comes."""
    _check(texts)
    calls: list[list[_Call]] = [[] for _ in models]
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(_measuring(model))
            for text in [texts[index % len(texts)] for index in range(WARM_UP)]:
                _call(model, text)
        for _ in range(repetitions):
            for text in texts:
                for place, model in enumerate(models):
                    calls[place].append(_call(model, text))
    return calls


def _call(model: DomainModel, text: str) -> _Call:
    began = time.process_time()
    inputs = _encoded(model, [text])
    ready, ready_wall = time.process_time(), time.perf_counter()
    _run(model, inputs)
    done, done_wall = time.process_time(), time.perf_counter()
    return _Call(ready - began, done - ready, done_wall - ready_wall, int(inputs["input_ids"].shape[1]))


def _encoded(model: DomainModel, texts: Sequence[str]) -> dict[str, Tensor]:
    """Token ids and mask [texts, tokens], on the CPU or where the network is, cut to the manifest's longest input."""
    found = model.tokenizer(
        list(texts),
        truncation=True,
        max_length=model.manifest.data.max_length,
        padding=len(texts) > 1,
        return_tensors="pt",
    )
    parameter = next(model.network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}


def _run(model: DomainModel, inputs: dict[str, Tensor]) -> None:
    output = model.network(**inputs)
    if inputs["input_ids"].device.type == "cuda":  # kernels run on after the call returns
        logits = output if isinstance(output, Tensor) else output.logits
        torch.cuda.synchronize(logits.device)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread; an ONNX file that is opened meanwhile keeps to one for good."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _measuring(model: DomainModel) -> Iterator[None]:
    session = getattr(model.network, "session", None)
    threads = 1 if session is None else session.get_session_options().intra_op_num_threads
    if threads != 1:
        raise AssessmentError(
            f"times are taken on one thread, and this ONNX file was opened for {threads}; open it within one_thread()"
        )
    training = model.network.training
    model.network.eval()
    try:
        with one_thread(), torch.inference_mode():
            yield
    finally:
        model.network.train(training)


def _summary(calls: Sequence[_Call]) -> Latency:
    cpu = np.array([call.cpu for call in calls]) * 1000
    wall = np.array([call.wall for call in calls]) * 1000
    return Latency(
        cpu_median=float(np.median(cpu)),
        cpu_p95=float(np.quantile(cpu, 0.95)),
        wall_median=float(np.median(wall)),
        wall_p95=float(np.quantile(wall, 0.95)),
        tokenise=statistics.median(call.tokenise for call in calls) * 1000,
        tokens=statistics.median(call.tokens for call in calls),
        calls=len(calls),
    )


def _check(texts: Sequence[str]) -> None:
    if not texts:
        raise AssessmentError("no texts to time a model on; give at least one")
