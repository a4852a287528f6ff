"""The processes of one vault, one for each card: how a step's gradient is summed over all of them.

The vault's own process is the first and does what it does alone: it draws batches and units, clips the mean gradient
or adds the noise, and steps. The others get their part of the step's records through a pipe and the present parameters
by torch's broadcast, and torch's reduction adds their sums to the first one's. So a step is the step of one process, to
rounding, and there is one optimiser, one sampling and one noise, drawn once for the whole sum: what Opacus'
DistributedDPOptimizer does with noise on the first process alone, but without sums or optimisers left on the others.

A process that fails or ends takes the training with it: one error, and all are started anew for the next.
"""

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from client.protection import Mechanism
from client.training.helper import start_helper
from client.training.orders import Begin, Failed, Part, SetUp
from client.training.together import LOOPBACK, MOST_WAIT, flat, join, leave, unflat
from common.codec.state import AdapterState
from common.config.manifest import Manifest
from common.errors import AdapterError, CoadaptError, ModelError, OutOfMemory, PrivacyError, TrainingError
from common.private_files import private_folder
from common.tasks.task import Example

__all__ = ["Crew", "deal"]

Units = Sequence[Sequence[Example]]

# Between two looks at whether a collective is over; what a process says ends the wait at once.
LOOK_SECONDS = 0.0005
# What an ended process said, or that it ended, is known so much after its collective failed.
LAST_WORD_SECONDS = 2.0
END_SECONDS = 10.0

KNOWN: dict[str, type[CoadaptError]] = {
    kind.code: kind for kind in (OutOfMemory, PrivacyError, ModelError, AdapterError)
}


def deal(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """Indices of `sizes` for each process, in order, so that sums are alike (Graham 1969, longest first).

    The largest goes to the first process, which has something to do whenever there is anything.
    """
    dealt: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        least = loads.index(min(loads))
        dealt[least].append(index)
        loads[least] += sizes[index]
    return [sorted(indices) for indices in dealt]


class Crew:
    """The further processes of a vault that computes on `devices`, the first of which is its own.

    `folder` is private and holds the file by which they find each other. `rank` and `gpu_memory` are the site's. In a
    process there is one crew at a time, and one training at a time in it.
    """

    def __init__(
        self, manifest: Manifest, devices: Sequence[str], folder: Path, *, rank: int | None, gpu_memory: float = 1.0
    ) -> None:
        self._manifest, self._devices, self._folder = manifest, tuple(devices), folder
        self._rank, self._gpu_memory = rank, gpu_memory
        self._helpers: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._store = folder / "none"
        self._member = self._joined = False  # of torch's group; and all others are

    @property
    def processes(self) -> int:
        """How many compute, the vault's own counted."""
        return len(self._devices)

    @property
    def pids(self) -> list[int]:
        """The further processes that were started."""
        return [process.pid for process, _ in self._helpers]

    def start(self) -> None:
        """Let the further processes load the base; nobody waits for them here.

        Raises:
            RunError, TrainingError: the folder or a process cannot be made.
        """
        private_folder(self._folder)
        for left in self._folder.glob("*.store"):  # of a vault that was killed
            left.unlink(missing_ok=True)
        self._store = self._folder / f"{secrets.token_hex(8)}.store"
        os.environ.update(LOOPBACK)  # the own part of the collectives reads them here
        with self._or_end():
            for number, device in enumerate(self._devices[1:], start=1):
                try:
                    self._helpers.append(start_helper(LOOPBACK))
                except OSError as error:
                    raise TrainingError(f"no process can be started for card {number}: {error.strerror}") from error
                self._say(
                    number,
                    SetUp(
                        manifest=self._manifest.model_dump_json(),
                        rank=self._rank,
                        device=device,
                        gpu_memory=self._gpu_memory,
                        number=number,
                        processes=self.processes,
                        store=str(self._store),
                    ),
                )

    def ready(self) -> None:
        """Wait until all are there; what ended since the last training is started again.

        Raises:
            TrainingError: one cannot be started, or they cannot reach each other.
            ModelError, AdapterError, OutOfMemory: one cannot load the base.
        """
        if self._joined and any(connection.poll() for _, connection in self._helpers):
            self.close()  # one that waits for orders says nothing, so it has ended
        if not self._helpers:
            self.start()
        if self._joined:
            return
        with self._or_end():
            for number in range(1, self.processes):
                self._hear(number)
            for number in range(1, self.processes):
                self._say(number, "join")
            self._member = True
            try:
                join(self._devices[0], str(self._store), 0, self.processes)
            except TrainingError:
                self._last_word()
                raise
            for number in range(1, self.processes):
                self._hear(number)
            self._joined = True

    def take(
        self,
        adapter: AdapterState,
        trained: Sequence[str],
        *,
        seed: int,
        labels: tuple[str | int, ...],
        mechanism: Mechanism | None = None,
    ) -> None:
        """Begin a training everywhere, of these tensors of an adapter that the vault's model has taken; dropout is
        seeded with `seed`, `labels` and the process's number.

        Raises:
            CoadaptError: as `ready`.
        """
        self.ready()
        with self._or_end():
            for number in range(1, self.processes):
                own = (*labels, "card", number)
                self._say(number, Begin(adapter, tuple(trained), mechanism, seed, own))

    def summed(
        self,
        parameters: Sequence[nn.Parameter],
        units: Units,
        own: Callable[[Units], float],
        *,
        attribute: str = "grad",
    ) -> float:
        """Leave the sum over all `units` in the parameters' `attribute`, and return the sum of what `own` returns.

        `own` does this for the part of the units that the vault's own process has.

        Raises:
            TrainingError: a process failed or ended; what it says is in the text.
            OutOfMemory, PrivacyError: of a process, or of `own`.
        """
        dealt = deal([sum(len(example.tokens) for example in unit) for unit in units], self.processes)
        shares = [[units[index] for index in indices] for indices in dealt]
        with self._or_end():
            if not self._joined:
                raise TrainingError("the processes of the cards were not told of a training; `take` comes first")
            for number, share in enumerate(shares[1:], start=1):
                self._say(number, Part(share, len(units)))
            self._finish(lambda: dist.broadcast(flat(parameters), 0, async_op=True))
            value = own(shares[0])
            before = [getattr(parameter, attribute, None) for parameter in parameters]
            sums = [torch.zeros_like(p) if s is None else s for p, s in zip(parameters, before, strict=True)]
            buffer = flat([*sums, sums[0].new_tensor([value])])
            self._finish(lambda: dist.reduce(buffer, 0, async_op=True), answered=True)
        for parameter, old, new in zip(parameters, before, unflat(buffer, parameters), strict=True):
            # What no gradient reaches has none here either: an optimiser treats that otherwise than zero.
            if old is not None or not shares[0]:
                setattr(parameter, attribute, new)
        return float(buffer[-1])

    def close(self) -> None:
        """End the further processes, whatever they are at; they hold nothing that anybody wants."""
        for process, connection in self._helpers:
            process.kill()
            connection.close()
        for process, _ in self._helpers:
            with contextlib.suppress(subprocess.TimeoutExpired):  # in a driver that hangs; the kernel ends it later
                process.wait(END_SECONDS)
        if self._member:
            leave()
        self._helpers, self._member, self._joined = [], False, False
        self._store.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _or_end(self) -> Iterator[None]:
        """Whatever goes wrong in the block leaves others in the middle of something, so they are ended."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _finish(self, begin: Callable[[], Any], *, answered: bool = False) -> None:
        """Wait for a collective, and for a process that will never come to it; with `answered` also until each of them
        says that it has nothing of its sum any more."""
        connections = self._connections()
        silent = set(connections.values()) if answered else set()
        try:
            work, began, over = begin(), time.monotonic(), False
            while silent or not over:
                if not over and work.is_completed():
                    work.wait()
                    over = True
                for connection in wait(list(connections), LOOK_SECONDS if silent or not over else 0):
                    number = connections[cast(Connection, connection)]
                    self._hear(number)
                    silent.discard(number)
                if time.monotonic() - began > MOST_WAIT.total_seconds():
                    raise TrainingError(f"a card did not answer for {MOST_WAIT}; look at it with `nvidia-smi`")
        except RuntimeError as error:
            self._last_word()
            raise TrainingError(f"the processes of the cards lost each other in a step: {error}") from error

    def _last_word(self) -> None:
        """What a process said before it ended, if one did, as an error."""
        connections = self._connections()
        for connection in wait(list(connections), LAST_WORD_SECONDS):
            self._hear(connections[cast(Connection, connection)])

    def _connections(self) -> dict[Connection, int]:
        return {connection: number for number, (_, connection) in enumerate(self._helpers, start=1)}

    def _say(self, number: int, order: object) -> None:
        try:
            self._helpers[number - 1][1].send(order)
        except OSError:
            self._hear(number)
            raise self._lost(number) from None

    def _hear(self, number: int) -> object:
        try:
            said = self._helpers[number - 1][1].recv()
        except (EOFError, OSError):
            raise self._lost(number) from None
        if isinstance(said, Failed):
            kind = KNOWN.get(said.code, TrainingError)
            text = " ".join(said.text.split())  # torch's have lines
            raise kind(f"on {self._devices[number]} training cannot go on ({said.code}): {text}")
        return said

    def _lost(self, number: int) -> TrainingError:
        process = self._helpers[number - 1][0]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORD_SECONDS)
        return TrainingError(
            f"the process of card {number} ({self._devices[number]}, pid {process.pid}) ended with status"
            f" {process.returncode}; the site sits this round out, and it is started anew for the next"
        )
