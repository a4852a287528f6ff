"""The channel of the field: sites are asked by signed orders over Flower, again and again until they have answered.

No Flower message stays open while a site works: a node handles one message at a time and cannot be stopped. A site that
is not done says so at once and is polled. Whatever is lost on the way is sent again, which is harmless, since a vault
answers one payload once and gives the same answer again. What is too late is cancelled and named.
"""

import contextlib
import json
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.durable import write_text
from common.errors import CoadaptError, MalformedMessage, MessageError, RunError, SignatureRefused, WrongContext
from common.flower import UNREADABLE, Grid, Message, pack, unpack
from common.frames import (
    MOST_HEADER_BYTES,
    Answer,
    Order,
    OrderKind,
    open_frame,
    payload_digest,
    seal_frame,
)
from common.identity import Identity
from common.ledger_statement import LedgerStatement
from common.messages import decode
from common.roster import Roster
from common.secure_sum.messages import VERSION
from server.channel import Interrupted, Reply, fixed_word
from server.order_numbers import OrderNumbers

__all__ = ["FieldChannel", "Heads"]

# What a Flower message of ours is called; the relay answers messages of this kind.
MESSAGE_TYPE = "query"

# A lost message is sent again after so long: a node that is killed is noticed by Flower within 60 seconds.
LOST_SECONDS = 90.0
# How long is waited after a failure on the way before the same is sent again.
AGAIN_SECONDS = 3.0
# How often Flower is asked for replies, which costs the SuperLink as much as any other request: often at first, and
# then after this part of the time that has passed since something came or was sent.
LOOK_SECONDS, MOST_LOOK_SECONDS, LOOK_SHARE = 0.1, 1.0, 1 / 6
# How often the list of nodes is fetched while a site is missing.
NODES_SECONDS = 2.0

# Refusals after which the payload is worth sending again: the vault does not know what it is polled about.
_FORGOTTEN = "unknown_order"
# Failures on the way, told by the relay: its vault is not there yet.
_ON_THE_WAY = ("service",)


class Heads:
    """The newest statement of each site's ledger, durably, as JSON of hex by site name.

    It is handed back to the site, which believes its own signature alone; a vault whose ledger has less stops. Names
    outlive keys: an institution that changed its key, and took its ledger along, gets back what it said before.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            written = json.loads(path.read_bytes()) if path.exists() else {}
            self._heads = {name: LedgerStatement.parse(bytes.fromhex(text)) for name, text in written.items()}
        except (OSError, ValueError, TypeError, AttributeError, MalformedMessage) as error:
            raise RunError(f"{path} is damaged ({type(error).__name__}); restore it from a backup") from error

    def of(self, site: str) -> str:
        """The newest that was told, in hex; empty where none was."""
        return self._heads[site].raw.hex() if site in self._heads else ""

    def saw(self, site: str, statement: LedgerStatement) -> None:
        """Remember a statement that was verified, if it is newer."""
        known = self._heads.get(site)
        if known is not None and statement.number <= known.number:
            return
        self._heads[site] = statement
        write_text(self._path, json.dumps({name: each.raw.hex() for name, each in self._heads.items()}) + "\n")


@dataclass
class _Asked:
    """One site in one exchange."""

    site: str
    payload: bytes
    kind: OrderKind
    about: str
    polling: bool = False
    message: str = ""  # Flower's id of the message that is out
    node: int = 0  # where it went
    sequence: int = 0
    sent_at: float = 0.0
    next_at: float = 0.0
    trouble: str = ""  # the last failure on the way, which is the reason if the time runs out
    missing_since: float = 0.0  # since when it has no node; without meaning while it has one


class FieldChannel:
    """Sites by name over a Flower Grid. Raises what the grid raises where the SuperLink is gone.

    `phase_seconds` is how long a site may take for one answer, `absent_seconds` how long one is waited for that has no
    node. `told` is called with (site, code, reason) of every refusal.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        identity: Identity,
        roster: Roster,
        manifest_sha256: str,
        run_id: str,
        heads: Heads,
        orders: OrderNumbers,
        stop: threading.Event,
        phase_seconds: float,
        poll_seconds: float,
        absent_seconds: float = 120.0,
    ) -> None:
        self._grid, self._identity, self._roster = grid, identity, roster
        self._manifest_sha256, self._run_id = manifest_sha256, run_id
        self._heads, self._orders, self._stop = heads, orders, stop
        self._phase, self._poll, self._absent = phase_seconds, poll_seconds, absent_seconds
        self._numbers = {entry.name: entry.site for entry in roster.institutions}
        self._names = {number: name for name, number in self._numbers.items()}
        self._nodes: dict[str, int] = {}
        self._greeted: dict[str, tuple[int, float, int]] = {}  # Flower's message id: node, when, the order's sequence
        self._online: set[int] = set()
        self._looked_at = 0.0
        self._one_by_one = False  # whether replies are fetched singly: one was found that Flower cannot read
        self.reasons: dict[str, str] = {}
        self.progress: dict[str, float] = {}

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        """See `Channel`. `kind` is not needed: an order says itself what it is.

        Raises:
            Interrupted: the person asked to stop.
        """
        began = last = time.monotonic()
        asked = {
            site: _Asked(
                site,
                data,
                "message" if data[:1] == bytes([VERSION]) else "request",
                payload_digest(data),
                missing_since=began,
            )
            for site, data in requests.items()
        }
        while asked:
            if self._stop.is_set():
                raise Interrupted
            now = time.monotonic()
            self._find_nodes(asked, now)
            self._send_due(asked, now)
            for each, outcome in self._taken_in(asked, now):
                del asked[each.site]
                last = time.monotonic()
                yield outcome
            for each in list(asked.values()):
                # From when it was last there, and not from the beginning: a site that is killed may come back.
                if each.site in self._nodes:
                    each.missing_since = now
                absent = now - each.missing_since > self._absent or (
                    each.site not in self._nodes and not each.node and now - began > self._phase
                )
                if absent or now - began > self._phase:
                    del asked[each.site]
                    if not absent:
                        self._send(each, "cancel", b"", now)
                    code = "absent" if absent else each.trouble or "timeout"
                    yield Reply(each.site, None, code, 0, len(each.payload))
            if asked:
                self._stop.wait(_pause(asked.values(), last, now))

    def _find_nodes(self, asked: Mapping[str, _Asked], now: float) -> None:
        """Greet nodes that are not known yet; the signed answer says which site one is."""
        if now - self._looked_at < NODES_SECONDS:
            return
        self._looked_at = now
        self._online = set(self._grid.get_node_ids())
        known = {node for node in self._nodes.values() if node in self._online}
        self._nodes = {site: node for site, node in self._nodes.items() if node in known}
        for message, (_, when, _) in list(self._greeted.items()):
            if now - when > LOST_SECONDS:
                del self._greeted[message]
        missing = [site for site in asked if site not in self._nodes]
        greeted = {node for node, _, _ in self._greeted.values()}
        for node in sorted(self._online - known - greeted) if missing else ():
            order = self._order("hello", missing[0], "")
            frame = seal_frame(self._identity, order)
            for message in self._grid.push_messages([Message(pack(frame), node, MESSAGE_TYPE)]):
                if message:
                    self._greeted[str(message)] = (node, now, order.sequence)

    def _send_due(self, asked: Mapping[str, _Asked], now: float) -> None:
        for each in asked.values():
            moved = self._nodes.get(each.site, each.node) != each.node  # the old node answers no more
            if each.message and (moved or now - each.sent_at > LOST_SECONDS):
                each.message, each.trouble = "", "lost"
            if not each.message and now >= each.next_at and each.site in self._nodes:
                if each.polling:
                    self._send(each, "poll", b"", now)
                else:
                    self._send(each, each.kind, each.payload, now)

    def _send(self, each: _Asked, kind: OrderKind, payload: bytes, now: float) -> None:
        node = self._nodes.get(each.site)
        if node is None:
            return
        order = self._order(kind, each.site, each.about if kind in ("poll", "cancel") else "")
        frame = seal_frame(self._identity, order, payload)
        (message,) = self._grid.push_messages([Message(pack(frame), node, MESSAGE_TYPE)]) or (None,)
        each.message, each.node, each.sequence, each.sent_at = str(message or ""), node, order.sequence, now
        if not each.message:
            each.next_at = now + AGAIN_SECONDS

    def _order(self, kind: OrderKind, site: str, about: str) -> Order:
        return Order(
            federation=self._roster.federation.hex(),
            epoch=self._roster.epoch,
            manifest_sha256=self._manifest_sha256,
            run_id=self._run_id,
            site=self._numbers[site],
            kind=kind,
            sequence=self._orders.next(),
            about=about,
            # A greeting may reach another site than the one it names, whose ledger would seem an older copy.
            seen="" if kind == "hello" else self._heads.of(site),
        )

    def _taken_in(self, asked: Mapping[str, _Asked], now: float) -> Iterator[tuple[_Asked, Reply]]:
        """Replies that have come; what ends a site's part of the exchange is yielded."""
        by_message = {each.message: each for each in asked.values() if each.message}
        for message in self._pulled(list(by_message.values()), now):
            about = str(message.metadata.reply_to_message_id)
            if about in self._greeted:
                node, _, sequence = self._greeted.pop(about)
                self._met(message, node, sequence)
            elif about in by_message:
                each = by_message.pop(about)  # a second reply to the same is nobody's
                each.message = ""
                if (outcome := self._outcome(each, message, now)) is not None:
                    yield each, outcome

    def _pulled(self, out: Sequence[_Asked], now: float) -> Iterator[Message]:
        """The replies that are there.

        Flower builds a message from what the other side wrote, and a node that writes nonsense makes that fail, for
        the others whose replies are fetched with it too. Whatever was out is then sent again and fetched singly, so
        that only the one that writes nonsense gets nowhere.
        """
        wanted = [*(each.message for each in out), *self._greeted]
        for part in [[one] for one in wanted] if self._one_by_one else [wanted] if wanted else ():
            try:
                found = list(self._grid.pull_messages(part))
            except UNREADABLE:
                self._one_by_one = True
                for each in out:
                    if each.message in part:
                        each.message, each.trouble, each.next_at = "", MessageError.code, now + AGAIN_SECONDS
                for message in part:
                    self._greeted.pop(message, None)
                continue
            yield from found

    def _met(self, message: Message, node: int, sequence: int) -> None:
        """Learn which site a node is: whoever signs the answer with its key. A refusal is an answer too."""
        with contextlib.suppress(CoadaptError):
            answer, _ = self._opened(message)
            # An answer that was recorded elsewhere must not make a node pass for another's.
            if answer.to != sequence and not _unread(answer):
                raise WrongContext("an answer to another greeting")
            self._nodes[self._names[answer.site]] = node
            self._keep_statement(answer)

    def _outcome(self, each: _Asked, message: Message, now: float) -> Reply | None:
        """What a reply means: the end for this site, or something to do again."""
        size = len(each.payload)
        if (trouble := _trouble(message)) is not None:
            each.trouble, each.next_at = trouble, now + AGAIN_SECONDS
            if not message.has_error() and trouble not in _ON_THE_WAY:
                return Reply(each.site, None, trouble, 0, size)
            if message.has_error():  # the node may have gone; another may come in its place
                self._nodes.pop(each.site, None)
            return None
        try:
            answer, payload = self._opened(message)
            ours = (answer.to, answer.about) == (each.sequence, each.about) or _unread(answer)
            if answer.site != self._numbers[each.site] or not ours:
                raise WrongContext(f"site {each.site} answers another order")
        except CoadaptError as error:
            return Reply(each.site, None, error.code, 0, size)
        self._keep_statement(answer)
        each.trouble = ""
        return self._answered(each, answer, payload, now)

    def _answered(self, each: _Asked, answer: Answer, payload: bytes, now: float) -> Reply | None:
        size = len(each.payload)
        match answer.kind:
            case "working":
                self.progress[each.site] = answer.progress
                each.polling, each.next_at = True, now + self._poll
                return None
            case "refused" if answer.code == _FORGOTTEN and each.polling:
                each.polling, each.next_at = False, now
                return None
            case "refused":
                reason = _printable(answer.reason)
                self.reasons[each.site] = reason
                return Reply(each.site, None, answer.code or MessageError.code, len(payload), size, reason=reason)
            case "done":
                return Reply(each.site, None, "", 0, size)
            case _:
                return _reply(each.site, payload, size)

    def _opened(self, message: Message) -> tuple[Answer, bytes]:
        """An answer that the site which it names has signed.

        Raises:
            MessageError, SecureSumError: it is none.
        """
        if message.has_error():
            raise MessageError("Flower's error in place of an answer")
        data = unpack(message.content)
        number = _site_in(data)
        answer, payload = open_frame(Answer, self._roster.public_key_of(number), data)
        said = (answer.federation, answer.epoch, answer.site)
        if said != (self._roster.federation.hex(), self._roster.epoch, number):
            raise WrongContext("an answer of another federation or roster")
        # A site that agreed to another manifest can say so, and nothing else.
        if answer.kind != "refused" and (answer.manifest_sha256, answer.run_id) != (
            self._manifest_sha256,
            self._run_id,
        ):
            raise WrongContext("an answer under another manifest or of another run")
        if answer.ledger:
            LedgerStatement.verified(bytes.fromhex(answer.ledger), self._roster, number)
        return answer, payload

    def _keep_statement(self, answer: Answer) -> None:
        """Of an answer that was verified."""
        if answer.ledger:
            self._heads.saw(self._names[answer.site], LedgerStatement.parse(bytes.fromhex(answer.ledger)))


def _pause(asked: Collection[_Asked], last: float, now: float) -> float:
    """Seconds until it is worth looking again: for a reply (the last came at `last`), or to send what is due."""
    since = now - max([last, *(each.sent_at for each in asked if each.message)])
    due = [each.next_at - now for each in asked if not each.message]
    return max(LOOK_SECONDS, min([MOST_LOOK_SECONDS, LOOK_SHARE * since, *due]))


def _site_in(data: bytes) -> int:
    """The number that a frame gives for its site; whether it is true, the signature under that site's key will show."""
    try:
        length = min(int.from_bytes(data[:8], "big"), MOST_HEADER_BYTES)
        number = json.loads(data[8 : 8 + length])["site"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SignatureRefused("an answer without a readable header") from error
    if not isinstance(number, int):
        raise SignatureRefused("an answer without a site's number")
    return number


def _trouble(message: Message) -> str | None:
    """A fixed word for what went wrong between here and the vault; None where the vault has answered."""
    if message.has_error():
        return f"flower_{message.error.code}"
    failure = message.content.config_records.get("failure")
    return None if failure is None else fixed_word(failure.get("code", ""))


def _unread(answer: Answer) -> bool:
    """Whether a site refuses an order that it did not even open, because of its size or signature: it knows neither
    its number nor its payload. An old one that is shown again can only keep its own site out."""
    return answer.kind == "refused" and answer.to == 0 and not answer.about


def _printable(text: str) -> str:
    """A site's words, without what could steer the terminal that shows them."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _reply(site: str, payload: bytes, bytes_down: int) -> Reply:
    if payload[:1] == bytes([VERSION]):
        return Reply(site, None, "", len(payload), bytes_down, payload)
    try:
        return Reply(site, decode(payload), "", len(payload), bytes_down)
    except MessageError as error:
        return Reply(site, None, error.code, 0, bytes_down)
