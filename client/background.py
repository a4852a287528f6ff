"""Training in the background: one request's, in one thread, kept on the disk from its beginning to its reply.

What was trained is released once for each charge of privacy, and a charge pays for one release:

- `begun` is on the disk before the charge, `done` with the reply before anything leaves. So where the ledger holds the
  round's charge and the folder says `begun`, the process was killed in training and nothing left: the same request
  trains again, with fresh noise, on the same charge. What it draws is as if the first had never been drawn, since
  nobody saw it.
- A `done` request is never trained again: its reply is on the disk, and is masked or sent again.
- Whatever else finds its round in the ledger is refused: training that failed told the coordinator its error's word,
  and a folder that was emptied or put back from a copy does not know what left.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Protocol

from client.run_folder import RunFolder, Work
from client.state import SiteState
from client.ticks import Cancelled, heard
from common.config.manifest import Manifest
from common.errors import RerunRefused
from common.messages import Envelope, Refused, RoundStart, decode

__all__ = ["Job", "Trains", "start_job"]


class Trains(Protocol):
    """What is known of the vault."""

    def answer(self, data: bytes, state: SiteState, *, unreleased: bool = False) -> tuple[bytes, SiteState]:
        """See `Vault.answer`."""

    def charged(self, run_id: str) -> list[int]:
        """See `Vault.charged`."""


class Job:
    """A request that is worked on. `question` is the digest by which its reply is kept."""

    def __init__(self, question: str) -> None:
        self.question = question
        self.progress = 0.0
        self._cancelled = False
        self._future: Future[bytes] | None = None

    def submit(self, executor: Executor, work: Callable[[], bytes]) -> None:
        """Begin, or wait for a place."""
        self._future = executor.submit(work)

    @property
    def over(self) -> bool:
        """Whether there is a reply or an error."""
        return self._future is not None and self._future.done()

    @property
    def cancelled(self) -> bool:
        """Whether somebody broke it off."""
        return self._cancelled

    def reply(self) -> bytes:
        """The vault's envelope, once it is over; an error of the work is raised."""
        if self._future is None:
            raise RuntimeError("a job that has not begun has no reply")
        return self._future.result(timeout=0)

    def cancel(self) -> None:
        """Break it off before its next step; what was charged stays charged, and the request may come again."""
        self._cancelled = True
        if self._future is not None:
            self._future.cancel()

    def wait(self, seconds: float) -> None:
        """Until it is over, or for so long."""
        if self._future is not None:
            with suppress(TimeoutError, Exception, Cancelled):
                self._future.result(timeout=seconds)


def start_job(
    executor: Executor, vault: Trains, folder: RunFolder, manifest: Manifest, payload: bytes, question: str
) -> Job:
    """Have the vault work on an envelope in the executor's thread; its reply is in `folder` before the job is over."""
    job = Job(question)
    section = manifest.training

    def listen(step: int) -> None:
        if job.cancelled:
            raise Cancelled
        job.progress = (step % section.local_steps) / section.local_steps

    def work() -> bytes:
        with heard(listen):
            return _worked(vault, folder, payload, question)

    job.submit(executor, work)
    return job


def _worked(vault: Trains, folder: RunFolder, payload: bytes, question: str) -> bytes:
    before = folder.load_work()
    if before.stage == "done" and before.question == question:
        return before.reply
    header = decode(payload).header
    paid = isinstance(header, RoundStart) and header.round in vault.charged(header.run_id)
    if paid and (before.stage, before.question) != ("begun", question):
        raise RerunRefused(
            f"round {header.round} of run {header.run_id} was paid for, and what became of it is not known here; a"
            " charge pays for one release, so the site sits this round out"
        )
    folder.save_work(Work.of("begun", question, before.state))
    reply, after = vault.answer(payload, before.state, unreleased=paid)
    refused = _refused(decode(reply))
    folder.save_work(Work.of("failed", question, before.state) if refused else Work.of("done", question, after, reply))
    return reply


def _refused(reply: Envelope) -> bool:
    return isinstance(reply.header, Refused)
