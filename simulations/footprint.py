"""What a worker needs of memory: measured in a process of its own, or by formula where nothing is near its limit.

    python -m simulations.footprint < federation.json

loads the base of a manifest, trains two steps on made-up records of the longest length with half of the physical batch,
and two with the whole (a quarter and half where memory may not do), measures on a batch of them, and prints a footprint
as JSON. Everything is the code that a site runs; only the records are made up.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from client.protection import Mechanism
from client.resident import Resident, resident
from client.training.loop import train
from client.training.physical import physical_records
from client.training.private import train_private
from common.config.manifest import Manifest
from common.errors import RunError
from common.evaluation import measure
from common.flower import quiet
from common.models import HEADS
from common.randomness import SystemRandomness
from common.records import InstructionRecord, Record, TextRecord, TokensRecord
from common.tasks.task import Example
from simulations.slots import Device, Footprint

__all__ = [
    "PROCESS_BYTES",
    "Shape",
    "closed_form",
    "estimated",
    "footprint_for",
    "measured",
    "peak_bytes",
    "shape_of",
    "training_bytes",
]

# Linux tells a process its own peak, and lets it count anew. (`ru_maxrss` keeps that of the process before exec.)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

# What a worker process takes before it loads a base: torch, transformers, PEFT, Opacus, Ray. Measured, 2026-11-26.
PROCESS_BYTES = 800_000_000
# A CUDA context with its kernels, on the device. An estimate.
CONTEXT_BYTES = 600_000_000

# NF4 with double quantisation: 4 bits and 0.127 of constants for each value (Dettmers et al. 2023, section 3).
FOUR_BIT_BYTES = 4.127 / 8

# Where the formula says that twice as many workers would fit, nothing is measured.
MARGIN = 2.0

# A measurement that takes longer is given up: the machine is too busy, or the base too large for it.
MEASURING_SECONDS = 900.0
STEPS = 2


@dataclass(frozen=True)
class Shape:
    """What the formula knows of a base with its adapter: numbers of values, and the transformer's sizes.

    `linear` are values in the linear layers that a 4-bit base stores in 4 bits, `rest` all others that are frozen,
    `trained` what trains.
    """

    linear: int
    rest: int
    trained: int
    layers: int
    hidden: int
    heads: int
    vocabulary: int = 0
    """Values that the output embedding gives for each token; 0 for models without one."""


def shape_of(manifest: Manifest, model: Resident) -> Shape:
    """The sizes of a model that is loaded."""
    config = next((module.config for module in model.model.modules() if isinstance(module, PreTrainedModel)), None)
    linear = sum(
        module.weight.numel()
        for name, module in model.model.named_modules()
        if type(module) is nn.Linear and not module.weight.requires_grad and not HEADS & set(name.split("."))
    )
    frozen = sum(parameter.numel() for parameter in model.model.parameters() if not parameter.requires_grad)
    return Shape(
        linear=linear,
        rest=frozen - linear,
        trained=sum(parameter.numel() for parameter in model.model.parameters() if parameter.requires_grad),
        layers=int(getattr(config, "num_hidden_layers", 12)),
        hidden=int(getattr(config, "hidden_size", 768)),
        heads=int(getattr(config, "num_attention_heads", 12)),
        vocabulary=int(getattr(config, "vocab_size", 0)) if manifest.task.kind == "causal-lm" else 0,
    )


def closed_form(
    shape: Shape,
    *,
    length: int,
    half: bool,
    private: bool,
    four_bit: bool = False,
    checkpointing: bool = False,
    on_gpu: bool = False,
) -> Footprint:
    """The footprint by formula, for inputs of `length` tokens; `half` is arithmetic in 16 bit.

    Base in float32, as Coadapt loads it, or its linear layers in 4 bits (`FOUR_BIT_BYTES`) and the rest in float32.
    Adapter with gradient and two moments: 16 bytes a value. Activations of a record: s h (34 + 5 a s / h) bytes for
    each layer in 16 bit (Korthikanti et al. 2022, section 4.1), twice that in 32 bit; a fifth of it with gradient
    checkpointing. Of a model that writes also logits and their gradient, s V values of 4 bytes each. With privacy a
    float32 gradient of each record. Loading holds the base twice for a moment.
    """
    base = int(shape.linear * (FOUR_BIT_BYTES if four_bit else 4)) + 4 * shape.rest
    activations = shape.layers * length * shape.hidden * (34 + 5 * shape.heads * length / shape.hidden)
    activations *= (1 if half else 2) * (0.2 if checkpointing else 1)
    record = int(activations) + 8 * length * shape.vocabulary + (4 * shape.trained if private else 0)
    process = CONTEXT_BYTES if on_gpu else PROCESS_BYTES
    return Footprint(process, base, 16 * shape.trained, record, floor=0 if on_gpu else process + 2 * base)


def estimated(manifest: Manifest, model: Resident, *, on_gpu: bool, **changes: bool) -> Footprint:
    """The footprint of the manifest's sites by formula; `changes` are `four_bit` or `checkpointing` other than its."""
    ranks = {*(manifest.simulation.ranks if manifest.simulation else ()), manifest.adapter.rank}
    settings = {
        "four_bit": manifest.adapter.method == "qlora",
        "checkpointing": manifest.training.gradient_checkpointing,
        **changes,
    }
    found = closed_form(
        shape_of(manifest, model),
        length=manifest.data.max_length,
        half=model.precision == "bf16",
        private=manifest.privacy is not None,
        on_gpu=on_gpu,
        **settings,
    )
    if settings["four_bit"] == (manifest.adapter.method == "qlora"):  # what is loaded says it best
        frozen = sum(each.nbytes for each in model.model.parameters() if not each.requires_grad)
        found = replace(found, base=frozen)
    return replace(found, base=found.base * len(ranks))  # a worker holds a base for each rank


def training_bytes(manifest: Manifest, model: Resident) -> int:
    """Estimated bytes of one site's training beside the process itself, by formula (`closed_form`)."""
    found = estimated(manifest, model, on_gpu=False)
    return found.base + found.adapter + found.record * physical_records(manifest.training)


def footprint_for(manifest: Manifest, model: Resident, devices: list[Device], *, workers: int) -> Footprint:
    """What a worker needs on these devices: by formula where memory is plenty for `workers`, or else measured.

    Raises:
        RunError: it cannot be measured.
    """
    on_gpu = any(device.is_gpu for device in devices)
    guess = estimated(manifest, model, on_gpu=on_gpu)
    records = physical_records(manifest.training)
    if not on_gpu and sum(device.memory for device in devices) > MARGIN * workers * guess.at(records):
        return guess
    if guess.at(1) > psutil.virtual_memory().available + max(device.memory for device in devices):
        return guess  # not even a measurement would fit
    return measured(manifest)


def measured(manifest: Manifest) -> Footprint:
    """Measure in a fresh process on this machine, on the first GPU that it sees or else the CPU.

    Raises:
        RunError: the process failed; the last line it wrote says why.
    """
    command = [sys.executable, "-m", "simulations.footprint"]
    try:
        ended = subprocess.run(
            command,
            input=manifest.model_dump_json(),
            capture_output=True,
            text=True,
            timeout=MEASURING_SECONDS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"measuring memory took more than {MEASURING_SECONDS:.0f} s; set simulation.workers") from error
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1][:300]
        raise RunError(f"measuring memory failed: {said}; set simulation.workers, which are then not measured")
    return Footprint(**json.loads(ended.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Print the footprint of the manifest on standard input as JSON."""
    import_module("simulations.app")
    import_module("flwr.simulation.ray_transport.ray_actor")  # a worker has all that too
    quiet()
    torch.set_num_threads(1)
    print(json.dumps(asdict(_measure(Manifest.model_validate_json(sys.stdin.read())))))


def _measure(manifest: Manifest) -> Footprint:
    meter = _Meter(torch.cuda.is_available())
    model = resident(manifest)
    loading = meter.peak()
    meter.start()
    base = sum(parameter.nbytes for parameter in model.model.parameters() if not parameter.requires_grad)
    trained = sum(parameter.nbytes for parameter in model.model.parameters() if parameter.requires_grad)
    records = physical_records(manifest.training)
    # What is measured with the whole batch needs no extrapolation; where that may not fit, half of it must do.
    free = torch.cuda.mem_get_info()[0] if meter.on_gpu else psutil.virtual_memory().available
    if estimated(manifest, model, on_gpu=meter.on_gpu).at(records) > free / 2:
        records = max(1, records // 2)
    small, large = max(1, records // 2), records
    peaks = []
    for size in (small, large):
        _train(manifest, model, _examples(manifest, model, size))
        peaks.append(meter.peak())
    if large > small:
        record = max(0, peaks[1] - peaks[0]) // (large - small)
    else:
        record = estimated(manifest, model, on_gpu=meter.on_gpu).record
    adapter = 4 * trained
    process = max(0, peaks[0] - record * small - base - adapter)
    meter.start()
    section = manifest.evaluation
    examples = _examples(manifest, model, min(section.batch_size, section.max_records))
    measure(model.model, model.task, examples, batch_size=section.batch_size, precision=model.precision)
    ranks = len({*(manifest.simulation.ranks if manifest.simulation else ()), manifest.adapter.rank})
    extra = (ranks - 1) * base
    floor = max(loading, meter.peak()) + extra
    return Footprint(process, base + extra, adapter, record, floor=floor, measured=True)


def _examples(manifest: Manifest, model: Resident, number: int) -> list[Example]:
    """Made-up examples of the longest length."""
    words = ["agreement"] * manifest.data.max_length
    text, kind = " ".join(words), manifest.task.kind
    record: Record
    if kind == "text-classification":
        record = TextRecord(unit="made up", text=text, label=manifest.task.labels[0])
    elif kind == "token-classification":
        record = TokensRecord(unit="made up", tokens=tuple(words), tags=("O",) * len(words))
    else:
        half = " ".join(words[: len(words) // 2])
        record = InstructionRecord(unit="made up", instruction=half, input="", output=text)
    return model.task.encode([record] * number).examples


def _train(manifest: Manifest, model: Resident, examples: list[Example]) -> None:
    """Some steps on all examples at once, as a site takes them."""
    section = manifest.training.model_copy(update={"batch_size": len(examples), "micro_batch_size": None})
    how: dict[str, Any] = {"first_step": 0, "steps": STEPS, "total_steps": STEPS, "precision": model.precision}
    if manifest.privacy is None:
        everything: Iterator[list[int]] = itertools.repeat(list(range(len(examples))))
        train(model.model, model.task, examples, everything, section, **how)
    else:
        mechanism = Mechanism(1.0, manifest.privacy.clip, 1.0, len(examples), 1, manifest.privacy.head_clip)
        units = [[example] for example in examples]
        train_private(model.model, model.task, units, section, mechanism, SystemRandomness(), **how)


def peak_bytes() -> int:
    """Largest memory of this process so far: on the GPU where it uses one, or else of its own; 0: unknown."""
    return _Meter(torch.cuda.is_available() and torch.cuda.is_initialized()).peak()  # type: ignore[no-untyped-call]


class _Meter:
    """The peak of this process's memory since `start`, in bytes."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def start(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif STATUS.exists():
            ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):  # then the peak is that of before too, which may only be too large
                CLEAR.write_text("5")

    def peak(self) -> int:
        if self.on_gpu:
            return torch.cuda.max_memory_reserved() + CONTEXT_BYTES
        if STATUS.exists():
            return 1024 * int(STATUS.read_text().split("VmHWM:")[1].split()[0])
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else 1024 * largest


if __name__ == "__main__":
    main()
