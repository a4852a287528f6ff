"""The run store: one folder for a run, in which everything that is finished stays valid.

<run>/federation.toml     the manifest, with every digest filled in
<run>/events.jsonl        what happened, a line each
<run>/rounds/0003/        the adapter after round 3, in PEFT's format (0000: the first one); its round.json
                          holds what the next round follows from and why one was rejected, under a digest of its own;
                          the newest round also has optimiser.safetensors, the server optimiser's memory
<run>/journal/            the secure sums of the round that goes on (`server/journal.py`)
<run>/measured.json       counts of the last adapter
<run>/adapter/            the selected adapter; with it the run is finished
<run>/summary.json        all figures
<run>/report.html         the report

One process at a time uses a run's folder; a killed one's lock goes with it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save

from common.codec.state import AdapterState, state_digest
from common.durable import new_folder, write_text
from common.errors import RunError

__all__ = ["RunStore", "is_used"]

Memory = Mapping[str, npt.NDArray[np.float64]]

_OPTIMISER = "optimiser.safetensors"
_ADVICE = "restore it from a copy, or begin the run anew"


class RunStore:
    """Writes a run's files whole or not at all. `write_adapter` fills a folder with an adapter in PEFT's format.

    `stored` are the facts of the rounds that were finished before this process, from round 0.
    """

    def __init__(self, folder: Path, write_adapter: Callable[[Path, AdapterState], None]) -> None:
        try:
            folder.mkdir(parents=True)
            (folder / "rounds").mkdir()
        except FileExistsError as error:
            raise RunError(
                f"{folder} exists already; a run never writes over another: choose another --run-id"
            ) from error
        except OSError as error:
            raise RunError(f"cannot make {folder}: {error.strerror}") from error
        self._open(folder, write_adapter)

    @classmethod
    def reopen(cls, folder: Path, write_adapter: Callable[[Path, AdapterState], None]) -> Self:
        """The folder of a run that was stopped or killed. What it left half written is removed.

        Raises:
            RunError: there is none, it is finished, another process uses it, or a stored round was changed.
        """
        store = cls.__new__(cls)
        if not (folder / "rounds").is_dir():
            raise RunError(f"{folder} holds no run that could be resumed; check the run's name")
        store._open(folder, write_adapter)
        try:
            store._clean()
            store.stored = store._finished()
        except BaseException:
            store.close()
            raise
        return store

    def _clean(self) -> None:
        """Refuse a finished run; remove what a crash left half written."""
        if (self.folder / "adapter").exists():
            raise RunError(f"the run in {self.folder} is finished, with its result in adapter; begin another one")
        for left in (*self.folder.glob(".*.part"), *(self.folder / "rounds").glob(".*.part")):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def _open(self, folder: Path, write_adapter: Callable[[Path, AdapterState], None]) -> None:
        self.folder, self._write_adapter = folder, write_adapter
        self.stored: list[dict[str, Any]] = []
        # On the folder itself: no file is left behind, and the system lets go of it when the process dies.
        lock = os.open(folder, os.O_RDONLY)
        self._unlock = weakref.finalize(self, os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise RunError(f"another process uses the run in {folder}; wait until it ends, or stop it") from error

    def close(self) -> None:
        """Let another process use the folder."""
        self._unlock()

    @property
    def journals(self) -> Path:
        """Folder of the journals."""
        return self.folder / "journal"

    def round_folder(self, number: int) -> Path:
        """Where the adapter after round `number` lies."""
        return self.folder / "rounds" / f"{number:04d}"

    def save_round(
        self,
        number: int,
        adapter: AdapterState,
        facts: Mapping[str, Any] | None = None,
        memory: Memory | None = None,
    ) -> None:
        """Store the adapter after a round, durably; `facts` and the optimiser's `memory` go beside it. A rejected
        round's adapter is the one before it. The memory of the round before is removed."""
        with new_folder(self.round_folder(number)) as folder:
            self._write_adapter(folder, adapter)
            written = {**(facts or {}), "round": number, "adapter_sha256": state_digest(adapter)}
            if memory:
                data = save(dict(memory))
                (folder / _OPTIMISER).write_bytes(data)
                written["optimiser_sha256"] = hashlib.sha256(data).hexdigest()
            write_text(folder / "round.json", _sealed(written))
        with contextlib.suppress(OSError):  # it is large, and nothing follows from it any more
            (self.round_folder(number - 1) / _OPTIMISER).unlink(missing_ok=True)

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

    def load_memory(self, number: int) -> dict[str, npt.NDArray[np.float64]]:
        """The optimiser's memory after the newest round; empty where it has none.

        Raises:
            RunError: it was changed, or cannot be read.
        """
        wanted = self.stored[number].get("optimiser_sha256")
        if wanted is None:
            return {}
        path = self.round_folder(number) / _OPTIMISER
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}; {_ADVICE}") from error
        if hashlib.sha256(data).hexdigest() != wanted:
            raise RunError(f"{path} was changed after it was stored; {_ADVICE}")
        return dict(load(data))

    def save_measured(self, facts: Mapping[str, Any]) -> None:
        """Store what was measured of the last adapter."""
        write_text(self.folder / "measured.json", _sealed(facts))

    def load_measured(self) -> dict[str, Any] | None:
        """What `save_measured` was given; None where it was not called."""
        path = self.folder / "measured.json"
        return _unsealed(path) if path.exists() else None

    def save_result(self, adapter: AdapterState) -> Path:
        """Store the selected adapter as `adapter/`. The run is finished."""
        with new_folder(self.folder / "adapter") as folder:
            self._write_adapter(folder, adapter)
        return self.folder / "adapter"

    def write(self, name: str, text: str) -> Path:
        """Write one of the run's text files."""
        write_text(self.folder / name, text)
        return self.folder / name

    def _finished(self) -> list[dict[str, Any]]:
        """The facts of every finished round, in order; every round's adapter is read and compared."""
        names = sorted(path.name for path in (self.folder / "rounds").iterdir() if re.fullmatch(r"\d{4,}", path.name))
        if names != [f"{number:04d}" for number in range(len(names))]:
            raise RunError(f"{self.folder / 'rounds'} lacks a round before {names[-1]}; {_ADVICE}")
        facts = []
        for number in range(len(names)):
            facts.append(_unsealed(self.round_folder(number) / "round.json"))
            self.load_round(number)
        return facts


def _sealed(facts: Mapping[str, Any]) -> str:
    """Facts as JSON with a digest of themselves."""
    # `default`: figures may be numpy's.
    text = json.dumps(facts, indent=2, default=float)
    sealed = {**facts, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(sealed, indent=2, default=float) + "\n"


def _unsealed(path: Path) -> dict[str, Any]:
    """Facts that `_sealed` wrote.

    Raises:
        RunError: one bit of them is another.
    """
    try:
        text = path.read_text(encoding="utf-8")
        facts: dict[str, Any] = json.loads(text)
        facts.pop("sha256", None)
        if _sealed(facts) != text:
            raise RunError(f"{path} was changed after it was stored; {_ADVICE}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RunError(f"{path} cannot be read: {type(error).__name__}; it is damaged or gone; {_ADVICE}") from error
    return facts


def is_used(folder: Path) -> bool:
    """Whether a process holds a run's folder."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False
