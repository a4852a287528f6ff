"""The manifest's table of training: what a site does in a round, and how many sites a round invites."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.config.section import Section

__all__ = ["TrainingSection"]


class TrainingSection(Section):
    """What a site does in a round. Steps are numbers, never epochs: an epoch would tell how many records a site has."""

    rounds: int = Field(5, ge=1, le=10000, description="rounds of the run")
    local_steps: int = Field(20, ge=1, le=100000, description="optimiser steps of each site in a round")
    head_rounds: int = Field(
        0, ge=0, description="first rounds that train the task's head alone, before the adapter joins in"
    )
    batch_size: int = Field(16, ge=1, le=65536, description="records in one optimiser step")
    micro_batch_size: int | None = Field(
        None, ge=1, description="records in one forward pass; gradients add up to batch_size; default: batch_size"
    )
    learning_rate: float = Field(1e-3, gt=0, le=1.0, description="peak learning rate of AdamW")
    head_learning_rate: float | None = Field(
        None, gt=0, le=1.0, description="peak learning rate of the task's head; default: learning_rate"
    )
    weight_decay: float = Field(0.01, ge=0, le=1.0, description="decoupled weight decay of AdamW")
    adam_epsilon: float = Field(
        1e-8, gt=0, le=1.0, description="epsilon of AdamW; near the gradients' size, 1e-3, small gradients move less"
    )
    warmup_steps: int = Field(10, ge=0, description="steps from 0 to the peak learning rate, once in a run")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="learning rate after warm-up, over the steps of the whole run"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="largest L2 norm of a step's gradient; larger ones are scaled")
    proximal_mu: float = Field(
        0.0, ge=0, description="FedProx term: adds mu/2 times the squared distance to the round's adapter to the loss"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="arithmetic of forward and backward pass; auto: bf16 where the processor has it"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of the first adapter, and of a simulation's batches")
    participants: Literal["all"] | Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] = Field(
        "all",
        description="sites that a round invites: all, so many, or a share of them, drawn anew for every round from the"
        " seed; with privacy a site pays for the rounds it trains in, each in full: the draw is no protection",
    )

    def invited(self, sites: int) -> int:
        """How many of so many sites a round invites; a share gives the nearest number, and at least one."""
        if isinstance(self.participants, str):
            return sites
        return self.participants if isinstance(self.participants, int) else max(1, round(self.participants * sites))

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> Self:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"micro_batch_size must divide batch_size {self.batch_size}, found {micro}")
        if self.head_rounds > self.rounds:
            raise ValueError(f"head_rounds must be at most rounds {self.rounds}, found {self.head_rounds}")
        return self
