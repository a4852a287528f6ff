"""The devices that a simulation may compute on: the GPUs that `simulation.gpus` names, or the machine.

For trying a plan without GPUs they can be emulated: `COADAPT_EMULATED_GPUS=8,8,8` are three of 8 GiB each. Their
workers compute on the CPU, nothing keeps them below that memory, and everything that is said of them says so.
"""

import os
import re

import psutil
import torch

from common.config.simulation import SimulationSection
from common.errors import RunError
from simulations.slots import Device

__all__ = ["EMULATED", "find_devices", "keep_to", "visible"]

EMULATED = "COADAPT_EMULATED_GPUS"
VISIBLE = "CUDA_VISIBLE_DEVICES"


def find_devices(section: SimulationSection) -> list[Device]:
    """The GPUs that the section asks for, with their free memory; the machine itself where there are none or 0.

    Raises:
        RunError: it asks for GPUs that are not there, or the emulated ones are not sizes.
    """
    there = _emulated() if os.environ.get(EMULATED) else _gpus()
    wanted = section.gpus
    if wanted == "auto":
        chosen = there
    elif isinstance(wanted, int):
        if wanted > len(there):
            raise RunError(
                f"simulation.gpus = {wanted}, and this machine has {_listed(there)}; set it to 'auto' or less"
            )
        chosen = there[:wanted]
    else:
        unknown = [index for index in wanted if index >= len(there)]
        if unknown:
            raise RunError(
                f"simulation.gpus names GPU {unknown[0]}, and this machine has {_listed(there)}; the first is number 0"
            )
        chosen = [there[index] for index in wanted]
    return chosen or [Device("CPU", psutil.virtual_memory().available)]


def _listed(devices: list[Device]) -> str:
    return f"{len(devices)} ({', '.join(device.name for device in devices)})" if devices else "none"


def _gpus() -> list[Device]:
    return [
        Device(f"GPU {index} ({torch.cuda.get_device_name(index)})", torch.cuda.mem_get_info(index)[0], index)
        for index in range(torch.cuda.device_count())
    ]


def _emulated() -> list[Device]:
    sizes = os.environ[EMULATED].split(",")
    for size in sizes:
        if not re.fullmatch(r"\s*\d+(\.\d+)?\s*", size) or not float(size):
            raise RunError(f"{EMULATED} must be sizes in GiB such as 8,8,8, found {os.environ[EMULATED]!r}")
    return [
        Device(f"emulated GPU {index} ({float(size):g} GiB)", int(float(size) * 2**30), index, emulated=True)
        for index, size in enumerate(sizes)
    ]


def visible(device: Device) -> str:
    """What a worker's CUDA_VISIBLE_DEVICES must be, so that it sees this device and no other."""
    if device.index is None or device.emulated:
        return ""
    ours = os.environ.get(VISIBLE)
    return ours.split(",")[device.index] if ours else str(device.index)


def keep_to(section: SimulationSection) -> None:
    """Keep this process off the GPUs where none are wanted, before it has touched one."""
    if section.gpus == 0 and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        os.environ[VISIBLE] = ""
