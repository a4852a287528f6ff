"""Public records at the coordinator: the file that all sides agreed on, and how an adapter does on it.

Its digest stands in the manifest, so every site has signed which records choose between adapters and reject rounds.
They belong to no site. What is measured are adapters that every site receives anyway, so it costs no privacy.
"""

from pathlib import Path

import torch
from torch import nn

from common.adapters import set_state
from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.data_files import read_records, require_digest
from common.errors import DataError
from common.evaluation import measure
from common.metrics import Counts
from common.models import Base, load_tokenizer, precision
from common.tasks.task import make_task

__all__ = ["PublicRecords", "public_file"]


def public_file(manifest: Manifest, folder: Path) -> Path | None:
    """The agreed file, its digest checked; None where the manifest names none. It counts from the manifest's folder.

    Raises:
        DataError: it is missing, is another one, or nobody agreed on its digest.
    """
    section = manifest.evaluation
    if section.public is None:
        return None
    if section.public_sha256 is None:
        raise DataError(
            "evaluation.public: needs evaluation.public_sha256 between institutions, so that all agree on one file"
        )
    path = folder / section.public
    require_digest(path, section.public_sha256, what="evaluation.public")
    return path


class PublicRecords:
    """The records of a file, and the model that measures adapters on them; a GPU is used where there is one.

    Raises:
        DataError: the file breaks a rule.
    """

    def __init__(self, path: Path, manifest: Manifest, model: nn.Module, base: Base) -> None:
        records, _ = read_records(path, task=manifest.task, data=manifest.data)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._task = make_task(manifest, load_tokenizer(base))
        self._examples = self._task.encode(records[: manifest.evaluation.max_records]).examples
        self._model, self._manifest = model.to(device), manifest
        self._precision = precision(manifest.training.precision, device)

    def measure(self, adapter: AdapterState) -> Counts:
        """Counts of an adapter."""
        set_state(self._model, adapter)
        return measure(
            self._model,
            self._task,
            self._examples,
            batch_size=self._manifest.evaluation.batch_size,
            precision=self._precision,
            metrics=self._manifest.metrics,
        )
