"""Sites in the field over a Flower Grid: signed orders out, signed answers in, asked again until they are there.

A site answers one payload once, so every order may be sent again: after an error of Flower, after silence, or by a
coordinator that was restarted. No message of Flower stays open while a site works: it says `working` and is polled.
"""

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config.manifest import Manifest
from common.durable import write_text
from common.errors import MessageError, SecureSumError
from common.flower import Grid, Message, pack, unpack
from common.frames import Answer, LedgerHead, Order, open_frame, payload_digest, seal_frame
from common.identity import Identity
from common.messages import decode
from common.roster import Roster
from common.secure_sum.messages import VERSION
from server.channel import Interrupted, Reply

__all__ = ["FieldChannel"]

Kind = Literal["hello", "request", "message", "poll", "cancel"]

# After so long without an answer an order is sent again; a relay that was killed is noticed by Flower within 60 s.
SILENCE_SECONDS = 90.0
LOOK_SECONDS = 0.05
_CODE = re.compile(r"[A-Za-z0-9_:]{1,80}")


@dataclass
class _Task:
    """A payload that a site must answer; `due` is when the next order may go, `sent` the one that is out."""

    site: int
    payload: bytes
    kind: Kind
    due: float = 0.0
    sent: str = ""
    sequence: int = -1
    silent_at: float = 0.0
    polls: bool = False
    code: str = ""


class FieldChannel:
    """The sites of a roster, by name. `heads` is the file of the newest end of each site's ledger and the sequence.

    `refusals` holds, by site, what its last refusal said. Nodes and sites find each other by `hello`.
    """

    def __init__(
        self,
        grid: Grid,
        manifest: Manifest,
        *,
        run_id: str,
        roster: Roster,
        identity: Identity,
        heads: Path,
        stop: threading.Event,
        poll_seconds: float = 1.0,
        phase_seconds: float = 3600.0,
    ) -> None:
        self._grid, self._roster, self._identity, self._file, self._stop = grid, roster, identity, heads, stop
        self._run_id, self._manifest_digest = run_id, manifest.digest()
        self._poll, self._phase = poll_seconds, phase_seconds
        self._numbers = {entry.name: entry.site for entry in roster.institutions}
        self._names = {entry.site: entry.name for entry in roster.institutions}
        self._keys = {entry.site: entry.public for entry in roster.institutions}
        self._nodes: dict[int, int] = {}
        self._hellos: dict[str, tuple[int, int]] = {}
        self._asked: dict[int, float] = {}
        self._sequence = 0
        self._seen: dict[int, LedgerHead] = {}
        self.refusals: dict[str, str] = {}
        if heads.exists():
            stored = json.loads(heads.read_text(encoding="utf-8"))
            self._sequence = int(stored["sequence"])
            self._seen = {int(site): LedgerHead(**head) for site, head in stored["heads"].items()}

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        """Send every site its payload; yield each site's reply as it comes, and `timeout` for the rest in the end.

        Raises:
            Interrupted: the person asked to stop.
        """
        tasks = {
            self._numbers[site]: _Task(
                self._numbers[site], data, "message" if data[:1] == bytes([VERSION]) else "request"
            )
            for site, data in requests.items()
        }
        deadline = time.monotonic() + self._phase
        while tasks and time.monotonic() < deadline:
            if self._stop.is_set():
                raise Interrupted
            self._greet(set(tasks))
            for task in tasks.values():
                self._send_due(task, kind)
            for message in self._pull(tasks):
                reply = self._take(message, tasks)
                if reply is not None:
                    del tasks[self._numbers[reply.site]]
                    yield reply
            self._stop.wait(LOOK_SECONDS)
        for task in tasks.values():
            if task.site in self._nodes:
                self._push(task.site, "cancel", b"", about=payload_digest(task.payload), flower=kind)
            yield Reply(self._names[task.site], None, task.code or "timeout", 0, len(task.payload))

    def _push(
        self, site: int, kind: Kind, payload: bytes, *, about: str, flower: str, node: int = 0
    ) -> tuple[str, int]:
        """Sign an order and give it to Flower: its id there (empty: not taken), and its sequence."""
        self._sequence = max(self._sequence + 1, time.time_ns())
        order = Order(
            federation=self._roster.federation.hex(),
            epoch=self._roster.epoch,
            manifest_sha256=self._manifest_digest,
            run_id=self._run_id,
            site=site,
            kind=kind,
            sequence=self._sequence,
            about=about,
            seen=self._seen.get(site),
        )
        frame = pack(seal_frame(self._identity, order, payload))
        taken = list(self._grid.push_messages([Message(frame, node or self._nodes[site], flower)]))
        return (str(taken[0]) if taken and taken[0] else ""), self._sequence

    def _greet(self, wanted: set[int]) -> None:
        """Ask nodes that no site is known for who they are; each site that is missing is asked for by its number."""
        now, known = time.monotonic(), set(self._nodes.values())
        missing = sorted(wanted - set(self._nodes))
        if not missing:
            return
        for node in self._grid.get_node_ids():
            if node in known or now < self._asked.get(node, 0.0):
                continue
            # A vault refuses an order for another site's number, and signs its own number under that refusal.
            self._asked[node] = now + SILENCE_SECONDS
            sent, _ = self._push(missing[0], "hello", b"", about="", flower="query", node=node)
            self._hellos[sent] = (node, missing[0])

    def _send_due(self, task: _Task, flower: str) -> None:
        now = time.monotonic()
        if task.sent and now > task.silent_at:
            task.sent, task.due = "", now
        if task.sent or now < task.due or task.site not in self._nodes:
            return
        digest = payload_digest(task.payload)
        kind: Kind = "poll" if task.polls else task.kind
        task.sent, task.sequence = self._push(
            task.site, kind, b"" if task.polls else task.payload, about=digest, flower=flower
        )
        task.silent_at = now + SILENCE_SECONDS
        if not task.sent:
            task.due = now + self._poll

    def _pull(self, tasks: Mapping[int, _Task]) -> list[Message]:
        out = [task.sent for task in tasks.values() if task.sent] + [sent for sent in self._hellos if sent]
        return list(self._grid.pull_messages(out)) if out else []

    def _take(self, message: Message, tasks: Mapping[int, _Task]) -> Reply | None:
        sent = str(message.metadata.reply_to_message_id)
        if sent in self._hellos:
            self._met(message, *self._hellos.pop(sent))
            return None
        task = next((task for task in tasks.values() if task.sent == sent), None)
        if task is None:
            return None
        task.sent, task.due = "", time.monotonic() + self._poll
        try:
            answer, payload = self._open(message, task.site)
        except (MessageError, SecureSumError) as error:
            task.code = _word(message) or error.code
            return None
        if answer.to != task.sequence or answer.about != payload_digest(task.payload):
            task.code = "out_of_turn"
            return None
        return self._answered(task, answer, payload)

    def _answered(  # noqa: PLR0911
        self, task: _Task, answer: Answer, payload: bytes
    ) -> Reply | None:
        self._remember(task.site, answer)
        name, down = self._names[task.site], len(task.payload)
        task.code = ""
        if answer.kind == "working":
            task.polls = True
            return None
        if answer.kind == "refused":
            if task.polls and answer.code == "unknown_order":  # the site was restarted
                task.polls, task.due = False, 0.0
                return None
            self.refusals[name] = f"{answer.code}: {answer.reason}" if answer.reason else answer.code
            return Reply(name, None, answer.code or "refused", 0, down)
        if answer.kind == "done":
            return Reply(name, None, "", 0, down)
        if payload[:1] == bytes([VERSION]):
            return Reply(name, None, "", len(payload), down, payload)
        try:
            return Reply(name, decode(payload), "", len(payload), down)
        except MessageError as error:
            return Reply(name, None, error.code, 0, down)

    def _met(self, message: Message, node: int, asked: int) -> None:
        """Which site a node is: whose key signed the answer to its hello."""
        self._asked[node] = time.monotonic() + self._poll
        for site in (asked, *self._keys):
            try:
                answer, _ = self._open(message, site)
            except (MessageError, SecureSumError):
                continue
            self._nodes[site] = node
            self._remember(site, answer)
            return

    def _open(self, message: Message, site: int) -> tuple[Answer, bytes]:
        """Raises MessageError or SecureSumError where the message is no signed answer of this site in this run."""
        if message.has_error():
            self._nodes.pop(site, None)
            self._asked.clear()
            raise MessageError("Flower could not deliver an order, or the relay ended")
        answer, payload = open_frame(Answer, self._keys[site], unpack(message.content))
        said = (answer.federation, answer.epoch, answer.manifest_sha256, answer.run_id, answer.site)
        roster = self._roster
        if said != (roster.federation.hex(), roster.epoch, self._manifest_digest, self._run_id, site):
            raise MessageError("an answer speaks of another federation, manifest, run or site")
        return answer, payload

    def _remember(self, site: int, answer: Answer) -> None:
        """Keep the newest end of the site's ledger, durably, so that a restored copy is found out."""
        before = self._seen.get(site)
        if answer.ledger is None or (before is not None and before.number >= answer.ledger.number):
            return
        self._seen[site] = answer.ledger
        heads = {str(number): head.model_dump() for number, head in self._seen.items()}
        write_text(self._file, json.dumps({"sequence": self._sequence, "heads": heads}) + "\n")


def _word(message: Message) -> str:
    """The fixed word with which a relay or launcher says what failed; anything else is not looked at."""
    if message.has_error():
        return "app" if message.error.reason == "app" else f"flower_{message.error.code}"
    record = message.content.config_records.get("failure")
    code = str(record.get("code", "")) if record is not None else ""
    return code if _CODE.fullmatch(code) else ""
