"""How many GPUs of its machine a vault computes on, by `training.gpus` of site.toml."""

from typing import Literal

from common.errors import ManifestError

__all__ = ["cards", "devices"]


def cards(gpus: int | Literal["auto"], there: int) -> int:
    """How many of the cards that the vault sees will compute; 0: there is none, so the processor does.

    Raises:
        ManifestError: more are asked for than there are.
    """
    if gpus == "auto":
        return there
    if gpus > there:
        raise ManifestError(
            [
                f"training.gpus of site.toml is {gpus}, and this machine shows {there or 'no'}"
                f" {'GPU' if there == 1 else 'GPUs'} to the vault; set it to 'auto' or at most what is there"
            ]
        )
    return gpus


def devices(gpus: int | Literal["auto"]) -> list[str]:
    """The cards that will compute, by torch's names; none: the processor does. No card is touched.

    Raises:
        ManifestError: as above.
    """
    import torch

    return [f"cuda:{number}" for number in range(cards(gpus, torch.cuda.device_count()))]
