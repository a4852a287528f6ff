"""A run's adapter as a folder of its own: PEFT's files, copied and compared."""

import shutil
from pathlib import Path

from common.errors import DistillationError
from server.distillation.domain_model import sha256

__all__ = ["adapter_of", "export_adapter"]

# PEFT's own configuration is there for the methods that have a file format of PEFT's.
NEEDED = ("adapter_model.safetensors", "coadapt.json")
FILES = ("adapter_config.json", *NEEDED)


def adapter_of(model: Path) -> Path:
    """The adapter's folder of a run, or the folder itself if it is one.

    Raises:
        DistillationError: it is neither.
    """
    for folder in (model / "adapter", model):
        if all((folder / name).is_file() for name in NEEDED):
            return folder
    raise DistillationError(
        f"{model} is no run and has no adapter of its own: a compact model is merged; the format 'adapter' needs the"
        " folder of the run"
    )


def export_adapter(run: Path, folder: Path) -> None:
    """Copy the run's adapter into a new `folder`.

    Raises:
        DistillationError: `run` has no adapter, or the copy is not what lies there.
    """
    source = adapter_of(run)
    folder.mkdir()
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            if sha256(source / name) != sha256(folder / name):
                raise DistillationError(
                    f"{source / name} changed while it was copied; export again when the run is done"
                )
