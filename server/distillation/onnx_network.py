"""An ONNX file as a network: onnxruntime computes, and whatever takes a domain model takes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import DistillationError
from server.distillation.domain_model import DomainModel
from server.distillation.exported import read_facts
from server.distillation.extras import need
from server.distillation.onnx_export import INPUTS, OUTPUT

__all__ = ["OnnxNetwork", "Output", "load_onnx"]


@dataclass(frozen=True)
class Output:
    """What a network gives for every token: `logits` [records, tokens, tags or words]."""

    logits: Tensor


class OnnxNetwork(nn.Module):
    """Calls onnxruntime on the CPU, with as many threads as torch has; it has no parameters that torch could see.

    Called like a DomainModel's network: logits [records, labels] where the file gives one row a record, else an
    `Output`.

    Raises:
        DistillationError: onnxruntime is missing, or the file is no ONNX file of Coadapt.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        need("an ONNX file", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        try:
            self.session: Any = onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the classes are pybind's own, one for each status, below Exception
            raise DistillationError(
                f"{path} cannot be read as an ONNX file ({type(error).__name__}); it is damaged, or needs a newer"
                " onnxruntime: export the model again"
            ) from error
        names = (
            [value.name for value in self.session.get_inputs()],
            [value.name for value in self.session.get_outputs()],
        )
        if names != (list(INPUTS), [OUTPUT]):
            raise DistillationError(
                f"{path} has inputs {', '.join(names[0])} and outputs {', '.join(names[1])}; a model of Coadapt has"
                f" {' and '.join(INPUTS)}, and {OUTPUT}"
            )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | Output:
        """Logits of `input_ids` and `attention_mask`, both [records, tokens]."""
        given = (input_ids, attention_mask)
        feeds = {name: value.to("cpu", torch.int64).numpy() for name, value in zip(INPUTS, given, strict=True)}
        logits = torch.from_numpy(self.session.run([OUTPUT], feeds)[0])
        return logits if logits.ndim == 2 else Output(logits)


def load_onnx(path: Path) -> DomainModel:
    """The model of an .onnx file with the `coadapt.json` and the tokenizer beside it, which `coadapt export` wrote.

    Raises:
        DistillationError: onnxruntime is missing, or the file or one beside it is damaged, changed or gone.
    """
    facts = read_facts(path)
    return DomainModel(OnnxNetwork(path).eval(), load_tokenizer_beside(path), facts.manifest)


def load_tokenizer_beside(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside an exported file."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DistillationError(f"the tokenizer beside {path} cannot be loaded: {type(error).__name__}") from error
    return cast(PreTrainedTokenizerBase, tokenizer)
