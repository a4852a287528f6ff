"""The adapter methods of `[adapter] method`: what each adds to a task model and which parameters it trains.

Low-rank methods, IA3 and virtual tokens are PEFT's; the bottleneck is ours, since PEFT has none. What works with which
task and with privacy stands in docs/adapters.md, which a test writes.
"""

import warnings
from collections.abc import Callable
from typing import Any, cast

from peft import (
    IA3Config,
    LoraConfig,
    PeftModelForFeatureExtraction,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import Tensor, nn

from common.config.manifest import AdapterSection
from common.errors import AdapterError
from common.models import HEADS, PooledClassifier, body_of, head_name

__all__ = ["Bottleneck", "Prompted", "add_adapter", "linear_targets"]


def add_adapter(model: nn.Module, section: AdapterSection) -> nn.Module:
    """The task model with the adapter of `section`; adapter and head train, all else is frozen.

    Raises:
        AdapterError: the base has nothing that the method could train, or lacks a target.
    """
    with warnings.catch_warnings():
        # PEFT asks for a property by a name that transformers is giving up.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return _METHODS[section.method](model, section)


def linear_targets(model: nn.Module) -> list[str]:
    """Names (last part of the path, sorted) of all linear layers of the base, without heads."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    return sorted(names - HEADS)


def _targets(model: nn.Module, section: AdapterSection) -> list[str]:
    known = linear_targets(model)
    targets = known if section.targets == "auto" else list(section.targets)
    paths = [f".{name}" for name, _ in model.named_modules()]
    unknown = [
        name
        for name in targets
        if name.rsplit(".", 1)[-1] not in known or not any(path.endswith(f".{name}") for path in paths)
    ]
    if unknown or not targets:
        raise AdapterError(
            f"adapter.targets: {unknown[0] if unknown else 'auto'!r} is no linear layer of the base;"
            f" it has {', '.join(known) or 'none'}"
        )
    return targets


def _low_rank_config(model: nn.Module, section: AdapterSection, *, head: str | None) -> LoraConfig:
    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=_targets(model, section),
        modules_to_save=[head] if head else None,
        bias="none",
        fan_in_fan_out=_has_conv1d(model),
        use_rslora=section.method == "rslora",
        use_dora=section.method == "dora",
    )


def _has_conv1d(model: nn.Module) -> bool:
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def _low_rank(model: nn.Module, section: AdapterSection) -> nn.Module:
    """LoRA (Hu et al. 2021, section 4.1) and its kin: rank-stabilised (Kalajdzievski 2023), DoRA (Liu et al. 2024).

    QLoRA (Dettmers et al. 2023) is LoRA on a base that `load_task_model` has loaded in four bits.
    """
    return cast(nn.Module, get_peft_model(cast(Any, model), _low_rank_config(model, section, head=head_name(model))))


def _ia3(model: nn.Module, section: AdapterSection) -> nn.Module:
    """IA3 (Liu et al. 2022, section 3.3): factors on keys, values and the feed-forward layer's inside."""
    head = head_name(model)
    own = None if section.targets == "auto" else _targets(model, section)
    config = IA3Config(
        target_modules=own,
        feedforward_modules=None if own is None else [],
        modules_to_save=[head] if head else None,
        fan_in_fan_out=_has_conv1d(model),
    )
    try:
        return cast(nn.Module, get_peft_model(cast(Any, model), config))
    except ValueError as error:
        raise AdapterError(
            "adapter.method: ia3 knows no layers of this base by itself; name them in adapter.targets"
        ) from error


class Prompted(nn.Module):
    """A transformer with trained virtual tokens before every text, whose output shows only the text's own places."""

    def __init__(self, body: nn.Module, config: Any) -> None:
        super().__init__()
        self.config = cast(Any, body).config
        self.prompted = PeftModelForFeatureExtraction(cast(Any, body), config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """The body's output for `input_ids` and `attention_mask` [records, tokens]."""
        output = self.prompted(input_ids=input_ids, attention_mask=attention_mask)
        for name in ("logits", "last_hidden_state"):
            if name in output:
                output[name] = output[name][:, -input_ids.shape[1] :]
        return output


def _virtual_tokens(model: nn.Module, section: AdapterSection) -> nn.Module:
    """Prefix tuning (Li and Liang 2021), prompt tuning (Lester et al. 2021), P-tuning (Liu et al. 2021)."""
    body = body_of(model)
    common = {"num_virtual_tokens": section.virtual_tokens}
    if section.method == "prefix":
        config: Any = PrefixTuningConfig(**common)
    elif section.method == "p-tuning":
        config = PromptEncoderConfig(**common, encoder_hidden_size=int(cast(Any, body).config.hidden_size))
    else:
        config = PromptTuningConfig(**common)
    prompted = Prompted(body, config)
    adapted: nn.Module = prompted
    if isinstance(model, PooledClassifier):
        model.encoder = prompted
        adapted = model
    return _train(adapted, lambda name: "prompt_encoder." in name)


def _low_rank_with_prompt(model: nn.Module, section: AdapterSection) -> nn.Module:
    """LoRA inside, prompt tuning before."""
    model = cast(nn.Module, inject_adapter_in_model(_low_rank_config(model, section, head=None), model))
    adapted = _virtual_tokens(model, section)
    return _train(adapted, lambda name: ".lora_" in name or "prompt_encoder." in name)


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))) (Houlsby et al. 2019, figure 2), here after every block (Pfeiffer et al. 2021)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape."""
        return x + cast(Tensor, self.up(nn.functional.gelu(self.down(x))))


def _bottleneck(model: nn.Module, section: AdapterSection) -> nn.Module:
    width = int(cast(Any, model).config.hidden_size)
    for block in _blocks(model):
        block.bottleneck = Bottleneck(width, section.rank)
        block.register_forward_hook(_through_bottleneck)
    return _train(model, lambda name: ".bottleneck." in name)


def _through_bottleneck(block: nn.Module, _: Any, output: Any) -> Any:
    bottleneck = cast(Bottleneck, block.bottleneck)
    return (bottleneck(output[0]), *output[1:]) if isinstance(output, tuple) else bottleneck(output)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the longest list of modules that the model has."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=len, default=[])
    if not blocks:
        raise AdapterError("adapter.method: the base has no list of transformer blocks to put a bottleneck into")
    return blocks


def _full(model: nn.Module, _: AdapterSection) -> nn.Module:
    return _train(model, lambda name: True)


def _biases(model: nn.Module, _: AdapterSection) -> nn.Module:
    """BitFit (Ben Zaken et al. 2022): the base's biases alone."""
    head = head_name(model)
    if not any(n.endswith(".bias") for n, _ in model.named_parameters() if head is None or not n.startswith(head)):
        raise AdapterError("adapter.method: bitfit trains biases, and this base has none; choose lora")
    return _train(model, lambda name: name.endswith(".bias"))


def _head_alone(model: nn.Module, _: AdapterSection) -> nn.Module:
    if head_name(model) is None:
        raise AdapterError("adapter.method: head trains a task's head, and a causal model has none; choose lora")
    return model


def _train(model: nn.Module, chosen: Callable[[str], bool]) -> nn.Module:
    """Freeze all parameters but the chosen ones and the head."""
    inner = model.prompted.base_model if isinstance(model, Prompted) else model
    head = head_name(inner)
    of_the_head = {id(p) for p in (getattr(inner, head).parameters() if head else ())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in of_the_head or chosen(f".{name}"))
    return model


_METHODS: dict[str, Callable[[nn.Module, AdapterSection], nn.Module]] = {
    "lora": _low_rank,
    "qlora": _low_rank,
    "rslora": _low_rank,
    "dora": _low_rank,
    "ia3": _ia3,
    "prefix": _virtual_tokens,
    "prompt": _virtual_tokens,
    "p-tuning": _virtual_tokens,
    "lora+prompt": _low_rank_with_prompt,
    "adapter": _bottleneck,
    "full": _full,
    "bitfit": _biases,
    "head": _head_alone,
}
