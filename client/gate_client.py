"""Ask the coordinator's gate for published files: signed requests over TLS, asked again where the network fails.

Nothing that comes is trusted here; `client/fetching.py` verifies it.
"""

import contextlib
import http.client
import ssl
import time
from collections.abc import Callable
from typing import BinaryIO, TypeVar

from pydantic import ValidationError

from client.reach import agreed_context, connection_to
from common.errors import CoadaptError, ContentRefused, EnrolmentError, ReleaseError, ServiceError, WrongContext
from common.identity import Identity
from common.release import MOST_LISTING_BYTES, PIECE_BYTES, RELEASE_PATH, WINDOW_SECONDS, Fetch, Refusal, seal
from common.tls import split_address

__all__ = ["GateClient"]

TRIES = 5
TIMEOUT_SECONDS = 60.0
_STEP = 256 << 10
_NAMES_THE_GATE = {"gate", "replay"}

T = TypeVar("T")


class GateClient:
    """One run's files at the gate of `address` (HOST:PORT), as the site with this key. `authority` is PEM, or empty
    where the system knows it; `wait` waits so many seconds."""

    def __init__(
        self,
        address: str,
        authority: bytes,
        *,
        identity: Identity,
        federation: str,
        run_id: str,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._address, self._wait = address, wait
        self._identity, self._federation, self._run_id = identity, federation, run_id
        host, port = split_address(address)
        try:
            context = agreed_context(authority)
        except (ssl.SSLError, UnicodeDecodeError) as error:
            raise EnrolmentError("the agreed authority's certificate is damaged; join again") from error
        self._connection, _ = connection_to(host, port, context)
        self._connection.timeout = TIMEOUT_SECONDS
        self._gate, self._time = "", 0

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()

    def listing(self) -> bytes:
        """The signed list of files; not verified.

        Raises:
            ServiceError, ReleaseError, EnrolmentError, WrongContext: the gate cannot be reached, or gives nothing.
        """
        return self._again(lambda: self._ask("", 0, lambda answer: answer.read(MOST_LISTING_BYTES + 1)))

    def piece(self, path: str, offset: int, *, size: int, into: BinaryIO) -> int:
        """Write what of a file begins at `offset` into a file, at most `size` bytes, and return how many; not verified.

        Raises:
            ContentRefused: it is not as long as it must be.
            ServiceError, ReleaseError, EnrolmentError, WrongContext: as `listing`.
        """
        wanted = min(PIECE_BYTES, size - offset)

        def take(answer: http.client.HTTPResponse) -> int:
            if answer.length != wanted:
                raise ContentRefused(
                    f"the gate gives {answer.length} bytes of {path} from {offset} on, and the coordinator signed"
                    f" {wanted}; nothing of this part was kept"
                )
            into.seek(offset)
            left = wanted
            while left > 0 and (data := answer.read(min(_STEP, left))):
                into.write(data)
                left -= len(data)
            if left:
                raise ConnectionError(f"it ended {left} bytes early")
            return wanted

        return self._again(lambda: self._ask(path, offset, take))

    def _again(self, ask: Callable[[], T]) -> T:
        """Ask until there is an answer, with pauses of 1, 2, 4 and 8 seconds."""
        said = ""
        for turn in range(TRIES):
            if turn:
                self._wait(2.0 ** (turn - 1))
            try:
                return ask()
            except ssl.SSLCertVerificationError as error:
                raise ServiceError(
                    f"{self._address} shows a certificate that was not agreed on: {error.verify_message}"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                said = getattr(error, "strerror", None) or str(error) or type(error).__name__
                self._connection.close()
        raise ServiceError(
            f"the gate at {self._address} gives no answer ({said}); `coadapt site check` looks at the network"
        )

    def _ask(self, path: str, offset: int, take: Callable[[http.client.HTTPResponse], T]) -> T:
        for turn in range(3):
            answer = self._send(path, offset)
            if answer.status == 200:
                found = take(answer)
                answer.read()
                return found
            refusal = _refusal(answer)
            if refusal is None:
                raise self._unanswered(answer)
            if refusal.code not in _NAMES_THE_GATE or turn == 2:
                raise self._reason(refusal, path)
            self._gate = refusal.gate
        raise AssertionError("the last turn raises")

    def _send(self, path: str, offset: int) -> http.client.HTTPResponse:
        self._time = max(time.time_ns(), self._time + 1)
        asked = Fetch(
            federation=self._federation,
            run_id=self._run_id,
            public_key=self._identity.public.hex(),
            gate=self._gate,
            time=self._time,
            path=path,
            offset=offset,
        )
        self._connection.request("POST", RELEASE_PATH, seal(self._identity, asked))
        return self._connection.getresponse()

    def _unanswered(self, answer: http.client.HTTPResponse) -> Exception:
        """The error of a status without a word of the gate."""
        if answer.status in (408, 429, 502, 503):
            return ConnectionError(f"HTTP status {answer.status}")
        if answer.status == 404:
            return EnrolmentError(
                f"the gate at {self._address} gives nothing to this site's key: it is not admitted, or not any more, or"
                " the coordinator's Coadapt is older than `site fetch`; ask the coordinator"
            )
        return ServiceError(f"the gate at {self._address} answers with HTTP status {answer.status}; is it Coadapt's?")

    def _reason(self, refusal: Refusal, path: str) -> CoadaptError:
        run = f"run {self._run_id}"
        match refusal.code:
            case "unpublished":
                return ReleaseError(
                    f"{run} is not published: it has not finished, or there is none of that name; the coordinator"
                    f" publishes it with coadapt coordinator publish {self._run_id}"
                )
            case "roster":
                return ReleaseError(f"{run} was made under a roster without this institution, so it gets nothing of it")
            case "federation":
                return WrongContext(f"{run} is of another federation than the one that this site joined")
            case "clock":
                apart = time.time() - refusal.time
                return ReleaseError(
                    f"this clock is {apart:+.0f} s from the gate's, and {WINDOW_SECONDS} s are allowed; set it by NTP"
                )
            case "file":
                return ContentRefused(f"the gate has no {path} of {run}, which the coordinator signed; ask it")
            case _:
                return ReleaseError(
                    "the gate has seen later requests of this site; let another fetch end and try again"
                )


def _refusal(answer: http.client.HTTPResponse) -> Refusal | None:
    data = answer.read(4096)
    answer.close()
    with contextlib.suppress(ValidationError):
        return Refusal.model_validate_json(data)
    return None
