"""The manifest's table of distillation: how small the compact model is to be, and what it may lose."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from common.config.section import FileName, Section

__all__ = ["DistillationSection", "Share"]

Share = Annotated[str, StringConstraints(pattern=r"^1/[1-9][0-9]{0,2}$")]
Export = Literal["safetensors", "adapter", "onnx", "onnx-int8", "onnx-int4", "gguf", "gguf-f16", "gguf-f32", "triton"]


class DistillationSection(Section):
    """From a run's base and adapter to a compact model. Public text alone is read; choices are made on dev."""

    size: Share | Literal["auto"] = Field(
        "1/5",
        description="parameters of the compact model as a share of the teacher's, '1/N'; auto: the smallest of 1/20,"
        " 1/10, 1/5 and 1/3 that loses at most max_loss, each trained in turn",
    )
    max_loss: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="most that the first metric may worsen on dev, in its own unit (0.02 of accuracy: two points)",
    )
    corpus: tuple[FileName, ...] = Field(
        (), description="files of public domain text without labels; empty: what `coadapt distill --corpus` names"
    )
    written: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="texts that a causal teacher writes itself where no public text is named; 0: none. They may repeat"
        " what it was trained on",
    )
    vocabulary: Literal["auto", "keep"] | Annotated[int, Field(ge=100)] = Field(
        "auto", description="pieces that the tokenizer keeps; auto: as many as reach coverage, 5000 to 8000 at most"
    )
    coverage: float = Field(
        0.95, gt=0, le=1, description="least share of the corpus' token occurrences that the vocabulary keeps"
    )
    terms: Annotated[int, Field(ge=0, le=10000)] | FileName = Field(
        0, description="most domain terms that become single tokens, or a file with one term a line; 0: none"
    )
    layers: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="layers that the student keeps; auto: all, which does better than wide and shallow"
    )
    from_scratch: bool = Field(
        False,
        description="a fresh tokenizer and a student of random weights instead of the teacher's own, for text that the"
        " base does not know",
    )
    epochs: int = Field(10, ge=1, le=1000, description="passes over the corpus")
    batch_size: int = Field(32, ge=1, le=65536, description="texts in one optimiser step")
    learning_rate: float = Field(4e-4, gt=0, le=1, description="peak learning rate of AdamW")
    temperature: float = Field(2.0, gt=0, le=100, description="softens teacher's and student's logits alike")
    hidden_weight: float = Field(1.0, ge=0, description="weight of the distance between hidden states")
    label_weight: float = Field(
        0.5, ge=0, description="weight of the loss on labels, for texts of the corpus that have one"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of the order of texts and of what starts at random")
    exports: tuple[Export, ...] = Field(
        ("safetensors", "onnx", "onnx-int8"), description="formats to write; each is compared with its source"
    )

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> Self:
        if self.from_scratch and self.vocabulary == "keep":
            raise ValueError("vocabulary must be 'auto' or a number with from_scratch, which makes a new one")
        return self
