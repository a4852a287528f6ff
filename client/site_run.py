"""One run at a site: payloads of orders in, answers out, over the secure sum's attempts and training in the background.

    request    an envelope        -> with a secure sum the site's one-time keys at once, else `working`; training begins
    message    the sum's next     -> its answer; `working` while the vector is waited for
    poll       a payload's digest -> the answer once it is there
    cancel     a payload's digest -> nobody waits for it; training is broken off

A payload is answered once, and the same payload gets the same answer again. One-time keys are in this object alone:
after a restart the messages of an older attempt are refused (`UnknownAttempt`), and the site takes part in the next.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor
from dataclasses import dataclass
from typing import Literal

from client.background import Job, Trains, start_job
from client.run_folder import Body, RunFolder
from client.secure_site import SecureSite
from client.ticks import Cancelled
from common.codec.state import state_digest
from common.config.manifest import Manifest
from common.errors import (
    CoadaptError,
    MessageError,
    OutOfTurn,
    PolicyBreach,
    RerunRefused,
    UnknownAttempt,
    UnknownOrder,
    error_code,
)
from common.frames import payload_digest
from common.messages import Envelope, Evaluate, Project, Refused, RoundStart, decode
from common.summed import Request, sum_number

__all__ = ["Outcome", "SiteRun"]

_KINDS = 3  # sums are numbered three to a round (`common/summed.py`)


@dataclass(frozen=True)
class Outcome:
    """What an order is answered with; see `Answer`. `code` without `refused` is the word of a refusal inside a sum,
    which is a signed message of its own; `error` stays at the site."""

    kind: Literal["message", "working", "done", "refused"]
    payload: bytes = b""
    code: str = ""
    reason: str = ""
    progress: float = 0.0
    error: BaseException | None = None


class SiteRun:
    """The run of an id. `secure` is None where the manifest has no secure sum. `admit` is asked before a request is
    answered, with whether training or measuring begins for it, and raises a PolicyBreach where it may not."""

    def __init__(
        self,
        run_id: str,
        manifest: Manifest,
        folder: RunFolder,
        *,
        secure: SecureSite | None,
        vault: Trains,
        executor: Executor,
        admit: Callable[[bool], None],
    ) -> None:
        self._run_id, self._manifest, self._folder = run_id, manifest, folder
        self._secure, self._vault, self._executor, self._admit = secure, vault, executor, admit
        self._answers: dict[str, Outcome] = {}
        self._due = ""  # digest of the payload whose answer is not there yet
        self._job: Job | None = None
        self._body: Body | None = None  # what was let go in an earlier attempt, to be masked again
        self._sum = 0

    def request(self, payload: bytes) -> Outcome:
        """Answer an envelope.

        Raises:
            CoadaptError: it is refused, and no attempt has begun.
        """
        digest = payload_digest(payload)
        if digest in self._answers:
            return self._answers[digest]
        if digest == self._due:
            return self._settled(digest)
        envelope = decode(payload)
        header = envelope.header
        if not isinstance(header, RoundStart | Project | Evaluate):
            raise MessageError(f"a site does not answer {header.kind!r}")
        if (header.run_id, header.manifest_sha256) != (self._run_id, self._manifest.digest()):
            raise MessageError("the envelope is of another run or manifest than the order that carries it")
        if not isinstance(header, Project):  # a second sum belongs to training that has begun
            self._admit(not self._has_begun(envelope, header))
        if self._secure is None:
            self._work_on(payload, envelope)
            self._due, self._answers = digest, {}
            return self._settled(digest)
        return self._begin(self._secure, payload, envelope, header)

    def message(self, payload: bytes) -> Outcome:
        """Answer a message of the secure sum.

        Raises:
            CoadaptError: it is refused, and there is no attempt in whose name that could be said.
        """
        digest = payload_digest(payload)
        if digest in self._answers:
            return self._answers[digest]
        if digest == self._due:
            return self._settled(digest)
        if self._secure is None:
            raise MessageError("a message of a secure sum, and the manifest has none")
        message = self._secure.site.read(payload)
        if message.turn != self._secure.turn:
            raise UnknownAttempt(
                f"a message of sum {message.turn.round}, attempt {message.turn.attempt}, whose one-time keys this vault"
                " does not have; begin the next attempt"
            )
        try:
            answer = self._secure.receive(payload)
        except CoadaptError as error:
            return self._refused(digest, error)
        if answer is None:
            self._due = digest
            return self._settled(digest)
        return self._answered(digest, answer)

    def poll(self, about: str) -> Outcome:
        """The answer to a payload that came before.

        Raises:
            UnknownOrder: it did not come since this process began.
        """
        if about in self._answers:
            return self._answers[about]
        if about != self._due or not about:
            raise UnknownOrder("a poll about a payload that is not here; send the payload again")
        return self._settled(about)

    def cancel(self, about: str) -> Outcome:
        """Nobody waits for the answer any more."""
        if about and about == self._due:
            self._due = ""
            if self._job is not None:
                self._job.cancel()
        return Outcome("done")

    @property
    def round(self) -> int | None:
        """The round that was spoken of last; for the audit log."""
        return self._sum // _KINDS or None

    def close(self) -> None:
        """Another run takes this one's place: break off what goes on."""
        if self._job is not None:
            self._job.cancel()

    def _begin(self, secure: SecureSite, payload: bytes, envelope: Envelope, header: Request) -> Outcome:
        """Begin an attempt at a sum, and the work for it."""
        memory = self._folder.load()
        if header.secure_sum:
            turn = secure.site.read(bytes.fromhex(header.secure_sum)).turn
            if (turn.epoch, turn.round, turn.attempt) == memory.newest:
                raise UnknownAttempt(
                    f"sum {turn.round}, attempt {turn.attempt} was begun before this vault was started, and its"
                    " one-time keys are gone; begin the next attempt"
                )
        answer = secure.start(envelope)
        self._answers, self._due = {}, ""
        self._sum, self._body = sum_number(header), None
        if memory.released_in == (secure.site.roster.epoch, self._sum):
            self._body = self._folder.load_body()
            if self._job is not None:
                self._job.cancel()
                self._job = None
        else:
            self._work_on(payload, envelope)
        return self._answered(payload_digest(payload), answer)

    def _has_begun(self, envelope: Envelope, header: Request) -> bool:
        """Whether the request can be answered by work that is done or goes on: another attempt begins nothing anew."""
        question, work = _question(envelope), self._folder.load_work()
        if (work.stage, work.question) == ("done", question):
            return True
        if self._secure is not None and self._folder.load().released_in == (
            self._secure.site.roster.epoch,
            sum_number(header),
        ):
            return True
        return self._goes_on(question)

    def _goes_on(self, question: str) -> bool:
        job = self._job
        return job is not None and job.question == question and not job.cancelled and not _failed(job)

    def _work_on(self, payload: bytes, envelope: Envelope) -> None:
        """Begin the work; where the same is being done for an earlier attempt it goes on."""
        question = _question(envelope)
        if self._goes_on(question):
            return
        if self._job is not None:
            self._job.cancel()
        self._job = start_job(self._executor, self._vault, self._folder, self._manifest, payload, question)

    def _settled(self, digest: str) -> Outcome:
        """The answer that is waited for, if it is there."""
        if self._body is None:
            if self._job is None:
                raise UnknownAttempt("nothing is worked on; begin the next attempt")
            if not self._job.over:
                return Outcome("working", progress=self._job.progress)
        try:
            answer = self._reply(self._job)
        except CoadaptError as error:
            return self._refused(digest, error)
        except (Cancelled, CancelledError):
            return self._refused(digest, _Declined("cancelled"))
        except Exception as error:
            return self._refused(digest, _Declined(error_code(error)), error)
        return self._answered(digest, answer)

    def _reply(self, job: Job | None) -> bytes:
        secure = self._secure
        if secure is None:
            return job.reply() if job is not None else b""
        if self._body is None and job is not None:
            reply = decode(job.reply())
            if isinstance(reply.header, Refused):
                raise _Declined(reply.header.code)
            words = secure.encoded(reply)
            if secure.site.policy.noised_at_site:
                # On the disk before the vector leaves: for this sum nothing else may leave again.
                self._folder.save_body(Body(self._sum, *secure.laid_out(), words))
            return secure.repeat(words)
        body = self._body
        if body is None or (body.number, body.spec, body.request) != (self._sum, *secure.laid_out()):
            raise RerunRefused(
                f"a vector has left in sum {self._sum} already; only the identical one may be masked anew, for the"
                " same request among as many sites"
            )
        return secure.repeat(body.words)

    def _answered(self, digest: str, payload: bytes) -> Outcome:
        self._answers[digest] = outcome = Outcome("message", payload)
        if digest == self._due:
            self._due = ""
        return outcome

    def _refused(self, digest: str, error: CoadaptError, cause: BaseException | None = None) -> Outcome:
        """A refusal in the name of the attempt that goes on, or, where there is none, of this order alone."""
        if digest == self._due:
            self._due = ""
        reason = str(error) if isinstance(error, PolicyBreach) else ""
        try:
            if self._secure is None:
                raise OutOfTurn("no secure sum")
            said = self._secure.refuse(error)
            outcome = Outcome("message", said, error.code, reason, error=cause or error)
        except OutOfTurn:
            outcome = Outcome("refused", b"", error.code, reason, error=cause or error)
        self._answers[digest] = outcome
        return outcome


class _Declined(CoadaptError):
    """The vault could not answer; its fixed word is passed on."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def _question(envelope: Envelope) -> str:
    """What is asked, without what differs between attempts at summing it: digest in hex."""
    header = json.loads(envelope.header.model_dump_json(exclude={"secure_sum", "ranges"}))
    said = json.dumps([header, state_digest(envelope.tensors)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _failed(job: Job) -> bool:
    """Whether it is over without anything to send."""
    if not job.over:
        return False
    try:
        return isinstance(decode(job.reply()).header, Refused)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return True
