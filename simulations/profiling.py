"""`--profile`: a torch profiler trace of one site's first steps, and in words what costs most in them.

The worker that plays the first site writes it, as `profile/` in the run's folder: `trace.json`, which
ui.perfetto.dev and chrome://tracing open, and `operators.json`. Names of operators and times stand in it, no shapes,
no values and no text of records. What a profiler does takes time itself, so a profiled round is slower than others.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType

from client.site_log import note
from client.ticks import heard
from common.durable import new_folder, write_text
from common.errors import CoadaptError
from common.flower import Context, Message
from simulations.summary import OperatorFacts, ProfileFacts

__all__ = ["FOLDER", "profiled", "profiles", "profiling", "read_profile"]

Answer = Callable[[Message, Context], Message]

# Environment variable that tells the workers to do it.
PROFILE = "COADAPT_PROFILE"

FOLDER = "profile"

# The site that is profiled, by its folder (`sites.lay_out`).
FIRST_SITE = "1"

# More would make a trace that no viewer opens: a step of a small encoder takes about three megabytes.
MOST_STEPS = 5

SHOWN = 3

# The commonest operators of training a transformer. Others are told by their names.
WORDS = {
    "aten::addmm": "matrix multiplication with a bias",
    "aten::mm": "matrix multiplication",
    "aten::bmm": "matrix multiplication in batches",
    "aten::baddbmm": "matrix multiplication in batches with a bias",
    "aten::linear": "linear layers",
    "aten::mkldnn_linear": "linear layers",
    "mkldnn::_linear_pointwise": "linear layers",
    "aten::_scaled_dot_product_flash_attention": "attention",
    "aten::_scaled_dot_product_flash_attention_backward": "gradients of attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "gradients of attention",
    "aten::_scaled_dot_product_efficient_attention": "attention",
    "aten::_scaled_dot_product_efficient_attention_backward": "gradients of attention",
    "aten::_flash_attention_forward": "attention",
    "aten::_flash_attention_backward": "gradients of attention",
    "aten::_efficient_attention_forward": "attention",
    "aten::_efficient_attention_backward": "gradients of attention",
    "aten::native_layer_norm": "layer normalisation",
    "aten::native_layer_norm_backward": "gradients of layer normalisation",
    "aten::gelu": "the activation GELU",
    "aten::gelu_backward": "gradients of the activation GELU",
    "aten::silu": "the activation SiLU",
    "aten::silu_backward": "gradients of the activation SiLU",
    "aten::_softmax": "softmax",
    "aten::_softmax_backward_data": "gradients of softmax",
    "aten::_log_softmax": "the loss's softmax",
    "aten::_log_softmax_backward_data": "gradients of the loss's softmax",
    "aten::native_dropout": "dropout",
    "aten::native_dropout_backward": "gradients of dropout",
    "aten::bernoulli_": "drawing dropout's coins",
    "aten::normal_": "drawing noise",
    "aten::copy_": "copying tensors, also from one number format to another",
    "aten::clone": "copying tensors",
    "aten::cat": "joining tensors",
    "aten::index": "picking rows",
    "aten::index_select": "picking rows",
    "aten::embedding": "looking up embeddings",
    "aten::embedding_dense_backward": "gradients of embeddings",
    "aten::add": "addition",
    "aten::add_": "addition in place",
    "aten::mul": "multiplication by element",
    "aten::mul_": "multiplication by element in place",
    "aten::div": "division by element",
    "aten::sum": "sums",
    "aten::mean": "means",
    "aten::pow": "powers",
    "aten::fill_": "filling tensors",
    "aten::zero_": "filling tensors with zeros",
    "aten::empty": "asking for memory",
    "aten::item": "waiting for a number",
    "aten::_local_scalar_dense": "waiting for a number from the device",
    "aten::_fused_adamw_": "the optimiser's step",
}


@contextlib.contextmanager
def profiling(wanted: bool) -> Iterator[None]:
    """While the block lasts, workers that start are told to profile."""
    if not wanted:
        yield
        return
    os.environ[PROFILE] = "1"
    try:
        yield
    finally:
        del os.environ[PROFILE]


@contextlib.contextmanager
def profiled(site: str, folder: Path, log: Path) -> Iterator[None]:
    """Profile the first training of the first site in the block, where this is wanted; else nothing happens.

    `folder` is the site's, `log` its log below the run's folder. What goes wrong stands in the log: the site's training
    does not depend on it.
    """
    out = log.parents[1] / FOLDER
    second = (log.parents[2] / "events.jsonl").exists()  # a federation to compare with lies in the first one's folder
    if not os.environ.get(PROFILE) or folder.name != FIRST_SITE or second or out.exists():
        yield
        return
    recording = _Recording(log)
    try:
        with heard(recording.step):
            yield
    finally:
        recording.write(site, out)


def profiles(answer: Answer) -> Answer:
    """A worker's function that answers a message; where it is wanted, the first training in it is profiled."""

    @functools.wraps(answer)
    def wrapped(message: Message, context: Context) -> Message:
        if not os.environ.get(PROFILE):
            return answer(message, context)
        notes = message.content.config_records["notes"]
        with profiled(str(notes["site"]), Path(str(notes["folder"])), Path(str(notes["log"]))):
            return answer(message, context)

    return wrapped


def read_profile(run: Path) -> ProfileFacts | None:
    """What a worker wrote in a run's folder; None where it wrote nothing."""
    try:
        return ProfileFacts.model_validate_json((run / FOLDER / "operators.json").read_bytes())
    except (OSError, ValueError):
        return None


class _Recording:
    """The profiler of some steps: begun by the first, ended by the one after the last or by `write`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._profiler: Any = None
        self._steps = 0
        self._began = self._seconds = 0.0
        self._over = False

    def step(self, _number: int) -> None:
        """A step is about to be taken."""
        if self._over:
            return
        try:
            if self._profiler is None:
                self._begin()
            if self._steps == MOST_STEPS:
                self._end()
            else:
                self._steps += 1
        except Exception as error:
            self._over = True
            note(self._log, error)

    def write(self, site: str, out: Path) -> None:
        """Write what was recorded; nothing where no step was taken."""
        if self._profiler is None:
            return
        try:
            if not self._over:
                self._end()
            facts = ProfileFacts(
                site=site,
                steps=self._steps,
                seconds=self._seconds,
                device=_device(),
                operators=_costliest(self._profiler),
            )
            with new_folder(out) as folder:
                self._profiler.export_chrome_trace(str(folder / "trace.json"))
                write_text(folder / "operators.json", json.dumps(facts.model_dump(), indent=2) + "\n")
        except (OSError, RuntimeError, CoadaptError) as error:
            note(self._log, error)

    def _begin(self) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=kinds)
        self._profiler.start()
        self._began = time.perf_counter()

    def _end(self) -> None:
        self._over = True
        self._seconds = time.perf_counter() - self._began
        self._profiler.stop()


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _costliest(profiler: Any) -> list[OperatorFacts]:
    """The operators with the most time of their own, without what they call: on a GPU its time, else the CPU's."""
    on_gpu = torch.cuda.is_available()
    rows = [row for row in profiler.key_averages() if row.device_type == DeviceType.CPU]
    costs = {row.key: row.self_device_time_total if on_gpu else row.self_cpu_time_total for row in rows}
    whole, calls = sum(costs.values()) or 1.0, {row.key: row.count for row in rows}
    # Ends of the profiler itself and of autograd's bookkeeping are no operators.
    named = sorted(
        (name for name in costs if "::" in name and "evaluate_function" not in name), key=lambda name: -costs[name]
    )
    return [
        OperatorFacts(
            name=name, words=WORDS.get(name, f"the operator {name.rpartition('::')[2]}"), share=costs[name] / whole,
            calls=calls[name],
        )
        for name in named[:SHOWN]
    ]  # fmt: skip
