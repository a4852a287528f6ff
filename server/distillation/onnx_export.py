"""ONNX files of a domain model: in float32, in int8 and in 4 bits.

Every file has the inputs `input_ids` and `attention_mask`, int64 [batch, length], and the output `logits`, float32
[batch, labels] for text classification, else [batch, length, tags or words]; batch and length are free.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.errors import DistillationError
from server.distillation.domain_model import DomainModel
from server.distillation.extras import need, quiet

__all__ = ["INPUTS", "OUTPUT", "export_onnx", "quantise_int4", "quantise_int8"]

INPUTS = ("input_ids", "attention_mask")
OUTPUT = "logits"

# A protocol buffer, which an .onnx file is, holds at most so many bytes.
LARGEST = 2**31 - 1

# Weights that share a scale in 4 bits. Blocks of 128 are 2 % smaller and cost 0.3 points on banking77.
BLOCK = 32


class _Logits(nn.Module):
    """A network of tensors alone, as graphs know them."""

    def __init__(self, network: nn.Module, *, causal: bool) -> None:
        super().__init__()
        self.network = network
        self.options: dict[str, Any] = {"use_cache": False} if causal else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.network(input_ids=input_ids, attention_mask=attention_mask, **self.options)
        return output if isinstance(output, Tensor) else cast(Tensor, output.logits)


def export_onnx(model: DomainModel, path: Path) -> None:
    """Write the model as one ONNX file in float32.

    Raises:
        DistillationError: onnx or onnxscript is missing, the model is too large for one file or is not in float32,
            or it does something that ONNX cannot express.
    """
    need("an ONNX file", "onnx", "onnxscript")
    _check(model)
    # Two records of different length: what is one and the same in an example would become a constant of the graph.
    ids = torch.zeros((2, 8), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    free = {0: "batch", 1: "length"}
    network = _Logits(model.network, causal=model.manifest.task.kind == "causal-lm").eval()
    try:
        with quiet(), torch.inference_mode():
            program = torch.onnx.export(
                network,
                (ids, mask),
                dynamo=True,
                dynamic_shapes=(free, free),
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                verbose=False,
            )
            graph = cast(Any, program).model_proto
    except Exception as error:  # the exporter wraps whatever the network's own code raises
        raise DistillationError(
            f"the model cannot be written as ONNX ({type(error).__name__}); write safetensors instead"
        ) from error
    # Shapes noted for values between the nodes come from before constants were folded; onnxruntime's quantiser
    # refuses a file where they disagree with its own ("Inferred shape and existing shape differ in dimension 0").
    del graph.graph.value_info[:]
    path.write_bytes(graph.SerializeToString())


def _check(model: DomainModel) -> None:
    parameters = list(model.network.parameters())
    if not parameters:
        raise DistillationError(
            "the model is an ONNX file already, which cannot be exported again; give the folder that it was made from"
        )
    if any(parameter.dtype != torch.float32 for parameter in parameters):
        raise DistillationError(
            "the model is not in float32 throughout; ONNX files are made from merged float32 models"
        )
    size = sum(parameter.numel() * 4 for parameter in parameters)
    if size > LARGEST:
        raise DistillationError(
            f"an ONNX file holds at most {LARGEST / 1e9:.1f} GB, the model has {size / 1e9:.1f} GB; write safetensors,"
            " or gguf for a causal model"
        )


def quantise_int8(source: Path, target: Path) -> None:
    """Weights of an ONNX file, embeddings included, as int8 with one scale for each output; activations on the fly.

    (Dynamic quantisation; one scale for a whole matrix costs a point on banking77.)
    """
    need("int8 quantisation", "onnx", "onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(_with_own_head(source), target, per_channel=True, weight_type=QuantType.QInt8)


def quantise_int4(source: Path, target: Path) -> None:
    """Weights of an ONNX file, embeddings included, in 4 bits with one scale for each 32; activations stay float32.

    (Round to nearest, symmetric; the nodes are onnxruntime's MatMulNBits and GatherBlockQuantized.)
    """
    need("4-bit quantisation", "onnx", "onnxruntime")
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=4,
        bits=4,
        op_types_to_quantize=("MatMul", "Gather"),
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )
    with quiet():
        quantiser = MatMulNBitsQuantizer(_with_own_head(source), algo_config=config)
        quantiser.process()
        target.write_bytes(quantiser.model.model.SerializeToString())


def _with_own_head(source: Path) -> Any:
    """The graph, in which a head that is tied to the embeddings has a transposed copy of its own.

    Of a tied head the quantisers see a matrix that is made while the graph runs: int8 would unpack all of it for every
    text, and 4 bits leave it as it is, in float32.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type == "Transpose" and node.input[0] in stored:
            order = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
            array = numpy_helper.to_array(stored[node.input[0]]).transpose(order)
            graph.initializer.append(numpy_helper.from_array(array.copy(), node.output[0]))
            graph.node.remove(node)
    return model
