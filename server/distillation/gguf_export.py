"""GGUF files of causal models, as llama.cpp reads them: Llama and Qwen2, in float32, float16 or Q8_0.

Names and layout follow llama.cpp's own converter (`convert_hf_to_gguf.py`): for Llama the rows of queries and keys are
reordered, since llama.cpp turns neighbouring values where transformers turns halves.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import DistillationError
from server.distillation.domain_model import DomainModel
from server.distillation.exported import read_facts
from server.distillation.extras import need, quiet
from server.distillation.gguf_vocabulary import add_vocabulary
from server.distillation.onnx_network import load_tokenizer_beside
from server.distillation.plain import is_plain

__all__ = ["Precision", "check_gguf", "compare_vocabulary", "export_gguf", "load_gguf"]

Precision = Literal["f32", "f16", "q8_0"]

ARCHITECTURES = ("llama", "qwen2")

# Least share of sample texts that the vocabulary in the file must cut as the model's own tokenizer does.
SAME_CUTS = 0.9

# Q8_0 stores 32 weights of a row with one scale.
BLOCK = 32


def export_gguf(model: DomainModel, path: Path, *, precision: Precision = "q8_0") -> None:
    """Write a causal model with its vocabulary as one GGUF file; vectors stay float32.

    Raises:
        DistillationError: gguf is missing, or the model or its tokenizer is of a kind that is not written.
    """
    need("a GGUF file", "gguf")
    config = check_gguf(model)
    with quiet():
        _write(model, config, path, precision)


def _write(model: DomainModel, config: Any, path: Path, precision: Precision) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, config.model_type)
    try:
        writer.add_name(model.manifest.name)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
            add(_head_width(config))
        writer.add_vocab_size(config.vocab_size)
        types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
        writer.add_file_type(gguf.LlamaFileType[types[precision]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, model.tokenizer, config.vocab_size)
        _add_tensors(writer, model, config, precision)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def check_gguf(model: DomainModel) -> Any:
    """The network's configuration, if a GGUF file can hold the network.

    Raises:
        DistillationError: it cannot; the line says why, and what can.
    """
    kind = model.manifest.task.kind
    if kind != "causal-lm":
        raise DistillationError(f"gguf is a format of causal models, this model's task is {kind}; export onnx instead")
    config = cast(Any, getattr(model.network, "config", None))
    if config is None or config.model_type not in ARCHITECTURES:
        found = "an ONNX file" if config is None else config.model_type
        raise DistillationError(f"gguf is written for {' and '.join(ARCHITECTURES)} models, found {found}; export onnx")
    rope = config.rope_parameters.get("rope_type", "default")
    if rope != "default":
        raise DistillationError(f"gguf is written for rotary positions without scaling, found {rope!r}; export onnx")
    if getattr(config, "use_sliding_window", False):
        raise DistillationError("gguf is written for attention to all tokens, found a sliding window; export onnx")
    width = _head_width(config)
    if config.model_type != "llama" and width * config.num_attention_heads != config.hidden_size:
        # llama.cpp would take it; transformers reads the width of heads for Llama alone, so it could not be compared.
        raise DistillationError(
            f"gguf is written for {config.model_type} models whose heads fill the width, found"
            f" {config.num_attention_heads} heads of {width} for {config.hidden_size}; export onnx"
        )
    if not is_plain(model.network, kind):
        raise DistillationError(
            "a GGUF file holds layers of one width alone, and this model's were pruned to different ones; export onnx"
        )
    return config


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_tensors(writer: Any, model: DomainModel, config: Any, precision: Precision) -> None:
    import gguf

    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    state = model.network.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, tensor in state.items():
        wanted = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if wanted is None:
            raise DistillationError(f"gguf has no name for the tensor {name}; export onnx")
        array = tensor.detach().float().cpu().numpy()
        if config.model_type == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            array = _neighbours(array, heads)
        kind = gguf.GGMLQuantizationType.F32
        if array.ndim > 1 and precision != "f32":
            whole = precision == "q8_0" and array.shape[-1] % BLOCK == 0
            kind = gguf.GGMLQuantizationType.Q8_0 if whole else gguf.GGMLQuantizationType.F16
        writer.add_tensor(wanted, gguf.quantize(array, kind), raw_dtype=kind)


def _neighbours(array: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows [heads x width, ...] reordered within each head: i and i + width/2 become neighbours."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def load_gguf(path: Path) -> DomainModel:
    """The model of a .gguf file with the `coadapt.json` and the tokenizer beside it, unpacked to float32.

    Raises:
        DistillationError: gguf is missing, or the file or one beside it is damaged, changed or gone.
    """
    need("a GGUF file", "gguf")
    facts = read_facts(path)
    try:
        with quiet():
            read = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False, local_files_only=True
            )
            # The library marks what it read as quantised, which can then be neither converted nor stored.
            config = read.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            network = AutoModelForCausalLM.from_config(config)
            network.load_state_dict(read.state_dict())
    except Exception as error:  # gguf reads a damaged file with whatever numpy raises
        raise DistillationError(
            f"{path} cannot be read as a GGUF file ({type(error).__name__}); it is damaged: export the model again"
        ) from error
    return DomainModel(network.eval(), load_tokenizer_beside(path), facts.manifest)


def compare_vocabulary(model: DomainModel, path: Path, texts: Sequence[str]) -> None:
    """Check that the vocabulary in the file, which llama.cpp has nothing else than, cuts texts as the model needs.

    Raises:
        DistillationError: more than a tenth of `texts` are cut in another way.
    """
    with quiet(), tempfile.TemporaryDirectory() as alone:  # a tokenizer.json beside the file would be read instead
        (Path(alone) / "own.gguf").symlink_to(path.resolve())
        own = AutoTokenizer.from_pretrained(alone, gguf_file="own.gguf", local_files_only=True)
    pairs = zip(own(list(texts))["input_ids"], cast(Any, model.tokenizer(list(texts)))["input_ids"], strict=True)
    other = sum(ours != theirs for ours, theirs in pairs)
    if other > (1 - SAME_CUTS) * len(texts):
        raise DistillationError(
            f"the vocabulary of a GGUF file cuts {other} of {len(texts)} sample texts otherwise than the model's"
            " tokenizer: whole terms and text normalisation have no place in it; export onnx, or distil with terms = 0"
        )
