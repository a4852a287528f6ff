"""The run store: one folder for a run, in which everything that is finished stays valid.

<run>/federation.toml     the manifest, with every digest filled in
<run>/events.jsonl        what happened, a line each
<run>/rounds/0003/        the adapter after round 3, in PEFT's format (0000: the first one); its round.json
                          also says how many aggregations were accepted, and why one was rejected
<run>/adapter/            the selected adapter
<run>/summary.json        all figures
<run>/report.html         the report
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file

from common.codec.state import AdapterState, state_digest
from common.durable import new_folder, write_text
from common.errors import RunError

__all__ = ["RunStore"]


class RunStore:
    """Writes a run's files whole or not at all. `write_adapter` fills a folder with an adapter in PEFT's format."""

    def __init__(self, folder: Path, write_adapter: Callable[[Path, AdapterState], None]) -> None:
        self.folder = folder
        self._write_adapter = write_adapter
        try:
            folder.mkdir(parents=True)
            (folder / "rounds").mkdir()
        except FileExistsError as error:
            raise RunError(
                f"{folder} exists already; a run never writes over another: choose another --run-id"
            ) from error
        except OSError as error:
            raise RunError(f"cannot make {folder}: {error.strerror}") from error

    def round_folder(self, number: int) -> Path:
        """Where the adapter after round `number` lies."""
        return self.folder / "rounds" / f"{number:04d}"

    def save_round(self, number: int, adapter: AdapterState, facts: Mapping[str, int | str] | None = None) -> None:
        """Store the adapter after a round, durably; `facts` go beside it. A rejected round's is the one before it."""
        with new_folder(self.round_folder(number)) as folder:
            self._write_adapter(folder, adapter)
            written = {**(facts or {}), "round": number, "adapter_sha256": state_digest(adapter)}
            write_text(folder / "round.json", json.dumps(written, indent=2) + "\n")

    def load_round(self, number: int) -> AdapterState:
        """The adapter after a round.

        Raises:
            RunError: it is not the adapter that was stored, or cannot be read.
        """
        folder = self.round_folder(number)
        try:
            state: AdapterState = load_file(folder / "adapter_model.safetensors")
            stored = json.loads((folder / "round.json").read_text(encoding="utf-8"))["adapter_sha256"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise RunError(f"{folder} cannot be read: {type(error).__name__}; it is damaged or gone") from error
        if state_digest(state) != stored:
            raise RunError(f"{folder} was changed after it was stored; its digest is not the stored one")
        return state

    def save_result(self, adapter: AdapterState) -> Path:
        """Store the selected adapter as `adapter/`."""
        with new_folder(self.folder / "adapter") as folder:
            self._write_adapter(folder, adapter)
        return self.folder / "adapter"

    def write(self, name: str, text: str) -> Path:
        """Write one of the run's text files."""
        write_text(self.folder / name, text)
        return self.folder / name
