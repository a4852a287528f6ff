"""Torch's collectives between the processes of one vault: the group, and tensors as one buffer.

Adapters are small beside their base, so one flat buffer goes to and fro in a step, not one for each tensor.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import TrainingError

__all__ = ["LOOPBACK", "MOST_WAIT", "flat", "join", "leave", "unflat"]

# What keeps a process's collectives on this machine, and leaves it to the vault to end what hangs. Whoever is on
# another machine can reach none of the ports; NCCL, which cards use, also has a secret in the private store.
LOOPBACK = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # it would end the vault's process together with a helper's
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}

# Longest that they look for each other. Gloo also ends a collective then; NCCL does not (above).
JOIN_WAIT = timedelta(minutes=5)
# Longest that processes wait for each other where none has ended: a card that hangs.
MOST_WAIT = timedelta(minutes=30)


def join(device: str, store: str, number: int, processes: int) -> None:
    """Become one of the processes; NCCL between cards, gloo where the processor computes.

    Raises:
        TrainingError: they cannot reach each other.
    """
    card = torch.device(device) if device.startswith("cuda") else None
    try:
        _init(card, store, number, processes)
    except RuntimeError as error:
        raise TrainingError(
            "the processes of the cards cannot reach each other over this machine's loopback interface, which the"
            " vault's service must allow: write it again with `coadapt site service`, or set training.gpus = 1 in"
            f" site.toml: {error}"
        ) from error


def _init(card: torch.device | None, store: str, number: int, processes: int) -> None:
    dist.init_process_group(
        "gloo" if card is None else "nccl",
        store=dist.FileStore(store, processes),  # type: ignore[attr-defined]  # a public class of torch's, not listed
        rank=number,
        world_size=processes,
        timeout=JOIN_WAIT,
        device_id=card,
    )


def leave() -> None:
    """End the group, also one whose other processes are gone. NCCL would wait for them, so it is broken off first."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All of the tensors' numbers, float32 [numbers]; a copy."""
    return torch.cat([tensor.detach().reshape(-1).to(torch.float32) for tensor in tensors])


def unflat(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The buffer's numbers as tensors of these shapes and types; numbers behind them are left."""
    numbers = [tensor.numel() for tensor in like]
    parts = torch.split(buffer[: sum(numbers)], numbers)
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]
