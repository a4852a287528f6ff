"""The vault: a site's resident object. It alone holds the records; an envelope comes in and an envelope goes out."""

import contextlib
import traceback
from pathlib import Path

from client.records import read_records
from client.resident import resident
from client.round import SiteData, evaluate, train_round
from client.state import SiteState
from common.config.manifest import Manifest
from common.errors import MessageError, error_code
from common.messages import Envelope, Evaluate, Refused, RoundStart, decode, encode

__all__ = ["Vault", "note"]


class Vault:
    """One site under one manifest.

    `train` and `held_out` are files of records; the second may be missing. Errors are written to `log`, which stays
    at the site; what leaves is a fixed word.
    """

    def __init__(self, name: str, manifest: Manifest, *, train: Path, held_out: Path | None, log: Path) -> None:
        self._manifest = manifest
        self._digest = manifest.digest()
        self._log = log
        task = resident(manifest).task
        examples = []
        for path in (train, held_out):
            records = read_records(path, task=manifest.task, data=manifest.data)[0] if path else []
            examples.append(task.encode(records).examples)
        self._site = SiteData(name, examples[0], examples[1][: manifest.evaluation.max_records])

    def answer(self, data: bytes, state: SiteState) -> tuple[bytes, SiteState]:
        """Answer one envelope. Whatever goes wrong ends in a Refused, and the state stays as it was.

        Raises:
            MessageError: what came is no envelope, so there is no request to answer.
        """
        request = decode(data)
        try:
            reply, state = self._reply(request, state)
        except Exception as error:
            note(self._log, error)
            header = request.header
            reply = Envelope(
                header=Refused(
                    manifest_sha256=self._digest,
                    run_id=header.run_id,
                    round=header.round,
                    adapter_sha256=header.adapter_sha256,
                    code=error_code(error),
                )
            )
        return encode(reply), state

    def _reply(self, request: Envelope, state: SiteState) -> tuple[Envelope, SiteState]:
        header = request.header
        if header.manifest_sha256 != self._digest:
            raise MessageError("the coordinator speaks of another manifest than the one this site agreed to")
        model = resident(self._manifest)
        if isinstance(header, RoundStart):
            return train_round(request, header, self._manifest, self._site, model, state)
        if isinstance(header, Evaluate):
            return evaluate(request, header, self._manifest, self._site, model), state
        raise MessageError(f"a site does not answer {header.kind!r}")


def note(log: Path, error: BaseException) -> None:
    """Write an error with its traceback to the site's own log; what cannot be written is lost, the run is not."""
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)) + "\n")
