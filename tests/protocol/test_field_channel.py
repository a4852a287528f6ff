"""The channel of the field over a grid in memory, whose nodes are scripted, or hold the sessions of real vaults."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error
from flwr.supercore.task_identity import TaskIdentity
from vault_field import Field

from common.config.manifest import Manifest
from common.errors import MessageError, RunError
from common.flower import ConfigRecord, Grid, Message, RecordDict, pack, unpack
from common.frames import Answer, Order, open_frame, payload_digest, seal_frame
from common.identity import Identity
from common.ledger_statement import SEAL_BYTES, LedgerStatement
from common.messages import Envelope, Evaluated, RoundDone, encode
from common.randomness import system_bytes
from common.roster import FEDERATION_BYTES, Institution, Roster
from server import field_channel as module
from server.channel import Interrupted, Reply
from server.field_channel import FieldChannel, Heads
from server.order_numbers import OrderNumbers

DIGEST, OTHER = "0" * 64, "1" * 64
HEADER = {"manifest_sha256": DIGEST, "run_id": "run", "round": 1, "adapter_sha256": OTHER}
REQUEST = encode(Envelope(header=Evaluated(**HEADER, counts={"asked": 1.0})))
DONE = encode(Envelope(header=Evaluated(**HEADER, counts={"done": 1.0})))

# What a vault makes of an order: an answer's header (with what differs from the usual) and payload.
Script = Callable[[Order, bytes], tuple[dict[str, Any], bytes]]
# What a node makes of a message: replies, none for a message that is lost.
Node = Callable[[Message], list[Message]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages bear the identity of the process's run, which its engine sets. And waits are short."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    for name, value in {"LOST": 0.1, "AGAIN": 0.02, "LOOK": 0.002, "NODES": 0.01}.items():
        monkeypatch.setattr(module, f"{name}_SECONDS", value)


class MemoryGrid:
    """Nodes by id. What they reply lies there until it is pulled, once."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.sent: list[tuple[int, bytes]] = []
        self.waiting: list[Message] = []
        self.unreadable: set[str] = set()
        self.pulls: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            identity = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = identity
            message.metadata.__dict__["_src_node_id"] = 1
            node = message.metadata.dst_node_id
            self.sent.append((node, unpack(message.content)))
            self.waiting += self.nodes[node](message) if node in self.nodes else []
            ids.append(identity)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        self.pulls.append(len(wanted))
        found = [each for each in self.waiting if each.metadata.reply_to_message_id in wanted]
        self.waiting = [each for each in self.waiting if each not in found]
        if any(each.metadata.reply_to_message_id in self.unreadable for each in found):
            raise ValueError("Unexpected object content")  # what Flower says of a message that was tampered with
        return found


@dataclass
class World:
    """A roster of sites and their nodes; site n is at node 100 + n unless a test says otherwise."""

    folder: Path
    count: int = 3
    grid: MemoryGrid = field(default_factory=MemoryGrid)
    stop: threading.Event = field(default_factory=threading.Event)
    orders: list[tuple[Order, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.coordinator = Identity.generate()
        self.keys = [Identity.generate() for _ in range(self.count)]
        self.names = [f"site-{n}" for n in range(self.count)]
        self.roster = Roster(
            federation=system_bytes(FEDERATION_BYTES),
            epoch=1,
            coordinator=self.coordinator.public,
            min_sites=3,
            max_colluding=0,
            institutions=tuple(
                Institution(site=n, name=name, public=key.public)
                for n, (name, key) in enumerate(zip(self.names, self.keys, strict=True))
            ),
        )

    def channel(self, **options: Any) -> FieldChannel:
        given: dict[str, Any] = {
            "identity": self.coordinator,
            "roster": self.roster,
            "manifest_sha256": DIGEST,
            "run_id": "run",
            "heads": Heads(self.folder / "heads.json"),
            "orders": OrderNumbers(self.folder / "order-number.txt"),
            "stop": self.stop,
            "phase_seconds": 3.0,
            "poll_seconds": 0.005,
            "absent_seconds": 1.0,
        }
        return FieldChannel(cast(Grid, self.grid), **{**given, **options})

    def answer(self, number: int, order: Order, values: dict[str, Any], payload: bytes, key: Identity) -> bytes:
        said = {
            "federation": order.federation,
            "epoch": order.epoch,
            "manifest_sha256": order.manifest_sha256,
            "run_id": order.run_id,
            "site": number,
            "kind": "message",
            "to": order.sequence,
        }
        return seal_frame(key, Answer(**{**said, **values}), payload)

    def vault(self, number: int, script: Script | None = None) -> Node:
        """A node of a site that answers a greeting, and everything else by the script; at once and rightly without."""

        def node(message: Message) -> list[Message]:
            order, payload = open_frame(Order, self.coordinator.public, unpack(message.content))
            self.orders.append((order, payload))
            about = order.about or payload_digest(payload)
            if order.site != number:
                values, said = {"kind": "refused", "code": "context"}, b""
            elif order.kind == "hello":
                values, said = {"kind": "done"}, b""
            elif script is not None:
                values, said = script(order, payload)
            else:
                values, said = {}, DONE
            values = dict(values)
            key = values.pop("key", self.keys[number])
            frame = self.answer(number, order, {"about": about, **values}, said, key)
            return [Message(pack(frame), reply_to=message)]

        return node

    def up(self, script: Script | None = None, **nodes: Node) -> None:
        """Every site at its node; site 1 by the script."""
        for n in range(self.count):
            self.grid.nodes[100 + n] = self.vault(n, script if n == 1 else None)

    def ask(self, **options: Any) -> dict[str, Reply]:
        return by_site(self.channel(**options).exchange(dict.fromkeys(self.names, REQUEST), kind="train"), self.names)

    def kinds(self, site: int = 1) -> list[str]:
        """What the site was asked, greetings left out."""
        return [order.kind for order, _ in self.orders if order.site == site and order.kind != "hello"]


def by_site(replies: Iterator[Reply], names: list[str]) -> dict[str, Reply]:
    found = list(replies)
    assert sorted(each.site for each in found) == sorted(names)  # each exactly once
    return {each.site: each for each in found}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def only_site_1_fails(replies: dict[str, Reply], code: str) -> Reply:
    assert {site: each.code for site, each in replies.items()} == {"site-0": "", "site-1": code, "site-2": ""}
    assert replies["site-1"].envelope is None
    return replies["site-1"]


# Who is where.


def test_many_sites_are_found_by_who_signs(tmp_path: Path) -> None:
    world = World(tmp_path, count=40)
    for n in range(40):
        world.grid.nodes[5000 - 7 * n] = world.vault(n)
    replies = world.ask()
    for reply in replies.values():
        assert reply.code == ""
        assert reply.envelope is not None
        assert reply.envelope.header.counts == {"done": 1.0}
        assert (reply.bytes_up, reply.bytes_down) == (len(DONE), len(REQUEST))
    to = {order.site for order, payload in world.orders if payload}
    assert to == set(range(40))
    assert all(
        node == 5000 - 7 * open_frame(Order, world.coordinator.public, frame)[0].site
        for node, frame in world.grid.sent
        if open_frame(Order, world.coordinator.public, frame)[1]
    )


def test_a_site_that_comes_back_under_another_node_gets_its_order_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOST_SECONDS", 60.0)  # what was lost with the old node is not waited for
    world.up()

    def vanishes(message: Message) -> list[Message]:
        order, _ = open_frame(Order, world.coordinator.public, unpack(message.content))
        if order.kind == "hello":
            return world.vault(1)(message)
        del world.grid.nodes[101]
        world.grid.nodes[777] = world.vault(1)
        return []

    world.grid.nodes[101] = vanishes
    assert world.ask()["site-1"].code == ""


def test_a_site_without_a_node_is_absent_and_the_others_go_on(world: World) -> None:
    world.up()
    del world.grid.nodes[101]
    began = time.monotonic()
    only_site_1_fails(world.ask(absent_seconds=0.2), "absent")
    assert 0.2 <= time.monotonic() - began < 2.0
    assert world.kinds() == []


def test_a_site_that_is_lost_late_has_as_long_to_come_back_as_one_that_was_never_there(world: World) -> None:
    began = time.monotonic()

    def trains(order: Order, payload: bytes) -> tuple[dict[str, Any], bytes]:
        if time.monotonic() - began < 0.5:
            return {"kind": "working"}, b""
        world.grid.nodes[101] = lambda message: [Message(Error(code=3, reason="gone"), reply_to=message)]
        threading.Timer(0.2, lambda: world.grid.nodes.update({101: world.vault(1)})).start()
        return {"kind": "working"}, b""

    world.up(trains)
    assert world.ask(absent_seconds=0.4)["site-1"].code == ""
    assert time.monotonic() - began > 0.5  # longer than a site may be absent


def test_a_recorded_answer_does_not_make_a_node_another_sites(world: World) -> None:
    recorded: list[bytes] = []

    def thief(message: Message) -> list[Message]:
        return [Message(pack(recorded[0]), reply_to=message)]

    world.up()
    order = Order(
        federation=world.roster.federation.hex(), epoch=1, manifest_sha256=DIGEST, run_id="run",
        site=1, kind="hello", sequence=5,
    )  # fmt: skip
    recorded.append(world.answer(1, order, {"kind": "done"}, b"", world.keys[1]))
    world.grid.nodes[999] = thief
    replies = world.ask()
    assert {each.code for each in replies.values()} == {""}
    to_thief = [frame for node, frame in world.grid.sent if node == 999]
    assert [open_frame(Order, world.coordinator.public, frame)[1] for frame in to_thief] == [b""] * len(to_thief)


# What comes back.


def test_working_is_polled_until_the_answer_is_there(world: World) -> None:
    def works(order: Order, payload: bytes) -> tuple[dict[str, Any], bytes]:
        polls = world.kinds().count("poll")
        return ({"kind": "working", "progress": polls / 4}, b"") if polls < 3 else ({}, DONE)

    world.up(works)
    channel = world.channel()
    replies = by_site(channel.exchange(dict.fromkeys(world.names, REQUEST), kind="train"), world.names)
    assert replies["site-1"].envelope is not None
    assert world.kinds() == ["request", "poll", "poll", "poll"]
    assert [payload for order, payload in world.orders if order.kind == "poll"] == [b""] * 3
    assert {order.about for order, _ in world.orders if order.kind == "poll"} == {payload_digest(REQUEST)}
    assert channel.progress["site-1"] == 0.5


def test_a_site_that_forgot_is_given_the_payload_again(world: World) -> None:
    def forgets(order: Order, payload: bytes) -> tuple[dict[str, Any], bytes]:
        if order.kind == "poll":
            return {"kind": "refused", "code": "unknown_order"}, b""
        return ({"kind": "working"}, b"") if world.kinds().count("request") == 1 else ({}, DONE)

    world.up(forgets)
    assert world.ask()["site-1"].code == ""
    assert world.kinds() == ["request", "poll", "request"]


def test_unknown_order_to_a_payload_is_a_refusal(world: World) -> None:
    world.up(lambda order, payload: ({"kind": "refused", "code": "unknown_order"}, b""))
    only_site_1_fails(world.ask(), "unknown_order")
    assert world.kinds() == ["request"]


def test_done_is_a_reply_with_nothing_in_it(world: World) -> None:
    world.up(lambda order, payload: ({"kind": "done"}, b""))
    assert world.ask()["site-1"] == Reply("site-1", None, "", 0, len(REQUEST))


def test_lost_messages_are_sent_again(world: World) -> None:
    world.up()
    right, seen = world.grid.nodes[101], []

    def loses(message: Message) -> list[Message]:
        seen.append(message)
        _, payload = open_frame(Order, world.coordinator.public, unpack(message.content))
        return right(message) if not payload or len(seen) > 4 else []

    world.grid.nodes[101] = loses
    assert world.ask()["site-1"].code == ""
    with_payload = [order for order, payload in world.orders if order.site == 1 and payload]
    assert len(with_payload) == 1


@pytest.mark.parametrize("failed", [lambda m: Message(Error(code=3, reason="x"), reply_to=m), None])
def test_failures_on_the_way_are_tried_again(world: World, failed: Callable[[Message], Message] | None) -> None:
    """A Flower error, and a relay whose vault is not there yet."""
    world.up()
    right, count = world.grid.nodes[101], [0]

    def unsteady(message: Message) -> list[Message]:
        _, payload = open_frame(Order, world.coordinator.public, unpack(message.content))
        count[0] += bool(payload)
        if not payload or count[0] > 3:
            return right(message)
        service = Message(RecordDict({"failure": ConfigRecord({"code": "service"})}), reply_to=message)
        return [failed(message) if failed else service]

    world.grid.nodes[101] = unsteady
    assert world.ask()["site-1"].code == ""
    assert count == [4]


def test_failures_until_the_deadline_are_named(world: World) -> None:
    world.up()
    right = world.grid.nodes[101]

    def broken(message: Message) -> list[Message]:
        _, payload = open_frame(Order, world.coordinator.public, unpack(message.content))
        if not payload:
            return right(message)
        return [Message(RecordDict({"failure": ConfigRecord({"code": "service"})}), reply_to=message)]

    world.grid.nodes[101] = broken
    only_site_1_fails(world.ask(phase_seconds=0.3), "service")


def test_after_the_deadline_the_site_is_told_to_stop_once(world: World) -> None:
    world.up(lambda order, payload: ({"kind": "working"}, b""))
    only_site_1_fails(world.ask(phase_seconds=0.3), "timeout")
    assert world.kinds().count("cancel") == 1
    assert world.kinds()[-1] == "cancel"
    assert [order.about for order, _ in world.orders if order.kind == "cancel"] == [payload_digest(REQUEST)]


def test_a_refusal_is_told_with_its_reason_and_cannot_steer_the_terminal(world: World) -> None:
    reason = "adapter.rank: asked 8, allowed 4"
    world.up(lambda order, payload: ({"kind": "refused", "code": "policy", "reason": reason + "\x1b[2J\n"}, b""))
    channel = world.channel()
    replies = by_site(channel.exchange(dict.fromkeys(world.names, REQUEST), kind="train"), world.names)
    assert only_site_1_fails(replies, "policy").reason == reason + "?[2J?"
    assert channel.reasons == {"site-1": reason + "?[2J?"}


def test_a_site_that_did_not_open_an_order_can_say_why(world: World) -> None:
    unread = {"kind": "refused", "to": 0, "about": "", "run_id": "unknown", "code": "policy", "reason": "too large"}
    world.up(lambda order, payload: (unread, b""))
    assert only_site_1_fails(world.ask(), "policy").reason == "too large"


def test_a_site_under_another_manifest_can_say_so_and_nothing_else(world: World) -> None:
    world.up(lambda order, payload: ({"kind": "refused", "code": "manifest", "manifest_sha256": OTHER}, b""))
    only_site_1_fails(world.ask(), "manifest")
    world.up(lambda order, payload: ({"manifest_sha256": OTHER}, DONE))
    only_site_1_fails(world.ask(), "context")


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "another order": ({"to": 7}, "context"),
    "order zero": ({"to": 0, "about": ""}, "context"),
    "another payload": ({"about": OTHER}, "context"),
    "no payload": ({"about": ""}, "context"),
    "another federation": ({"federation": "f" * 32}, "context"),
    "another roster": ({"epoch": 2}, "context"),
    "another run": ({"run_id": "other"}, "context"),
    "another key": ({"key": Identity.generate()}, "signature"),
    "another site's name": ({"site": 2}, "signature"),
    "a site that is none": ({"site": 40}, "roster"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_answers_are_named_and_not_taken(world: World, name: str) -> None:
    values, code = FORGED[name]
    world.up(lambda order, payload: (values, DONE))
    only_site_1_fails(world.ask(), code)


def test_another_sites_answer_is_not_this_ones(world: World) -> None:
    world.up(lambda order, payload: ({"site": 2, "key": world.keys[2]}, DONE))
    only_site_1_fails(world.ask(), "context")


def nonsense(content: RecordDict) -> Node:
    return lambda message: [Message(content, reply_to=message)]


def array(data: bytes, stype: str = "numpy.ndarray") -> RecordDict:
    one = Array(dtype="uint8", shape=(len(data),), stype=stype, data=data)
    return RecordDict({"envelope": ArrayRecord({"envelope": one})})


def saved(values: Any, **header: Any) -> bytes:
    import io

    place = io.BytesIO()
    if header:
        np.lib.format.write_array_header_1_0(place, header)  # type: ignore[no-untyped-call]
    else:
        np.save(place, values)
    return place.getvalue()


BOMB = {"descr": "|u1", "fortran_order": False, "shape": (10**15,)}
NONSENSE = {
    "no record": RecordDict(),
    "nothing": array(b""),
    "an empty value": RecordDict({"envelope": ConfigRecord()}),
    "a number": RecordDict({"envelope": ConfigRecord({"envelope": 7})}),
    "a text": RecordDict({"envelope": ConfigRecord({"envelope": "text"})}),
    "another kind": array(b"abc", "pickle"),
    "a zip": array(b"PK\x03\x04" + bytes(30)),
    "more than is there": array(saved(None, **BOMB)),
    "floats": array(saved(np.zeros(3))),
    "a table": array(saved(np.zeros((3, 3), np.uint8))),
    "no frame": pack(b"short"),
    "no header": pack(b"\xff" * 200),
    "no object": pack((2).to_bytes(8, "big") + b"[]" + bytes(64)),
    "no number": pack((12).to_bytes(8, "big") + b'{"site": ""}' + bytes(64)),
    "deep": pack((60_000).to_bytes(8, "big") + b"[" * 60_000 + bytes(64)),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_from_a_relay_is_a_fixed_word_for_its_own_site(world: World, name: str) -> None:
    world.up()
    right, odd = world.grid.nodes[101], nonsense(NONSENSE[name])

    def relay(message: Message) -> list[Message]:
        _, payload = open_frame(Order, world.coordinator.public, unpack(message.content))
        return (odd if payload else right)(message)

    world.grid.nodes[101] = relay
    replies = world.ask()
    assert only_site_1_fails(replies, replies["site-1"].code).code in ("message", "malformed", "signature")


@pytest.mark.parametrize("code", ["Jane Doe owes 5 pounds", "", "a" * 81, "policy\n", 7])
def test_a_relay_cannot_send_text_as_its_code(world: World, code: Any) -> None:
    world.up()
    right = world.grid.nodes[101]

    def relay(message: Message) -> list[Message]:
        _, payload = open_frame(Order, world.coordinator.public, unpack(message.content))
        said = RecordDict({"failure": ConfigRecord({"code": code})})
        return [Message(said, reply_to=message)] if payload else right(message)

    world.grid.nodes[101] = relay
    only_site_1_fails(world.ask(), MessageError.code)


def test_a_reply_that_flower_cannot_read_stops_its_own_site_alone(world: World) -> None:
    world.up()
    right = world.grid.nodes[101]

    def tampered(message: Message) -> list[Message]:
        _, payload = open_frame(Order, world.coordinator.public, unpack(message.content))
        if payload:
            world.grid.unreadable.add(message.metadata.message_id)
        return right(message)

    world.grid.nodes[101] = tampered
    only_site_1_fails(world.ask(phase_seconds=0.5), "message")


def test_a_superlink_that_is_gone_is_raised(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.up()

    def gone(_: object) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(world.grid, "pull_messages", gone)
    with pytest.raises(ConnectionError):
        world.ask()


def test_a_second_reply_and_a_late_one_are_nobodys(world: World) -> None:
    world.up()
    right = world.grid.nodes[101]
    world.grid.nodes[101] = lambda message: right(message) * 2
    late: list[Message] = []

    def slow(message: Message) -> list[Message]:
        answers = world.vault(2)(message)
        _, payload = open_frame(Order, world.coordinator.public, unpack(message.content))
        if payload and not late:
            late.extend(answers)
            return []
        return [*answers, *late]

    world.grid.nodes[102] = slow
    channel = world.channel()
    for _ in range(2):
        replies = by_site(channel.exchange(dict.fromkeys(world.names, REQUEST), kind="train"), world.names)
        assert {each.code for each in replies.values()} == {""}


def test_the_person_may_stop_it(world: World) -> None:
    world.up(lambda order, payload: ({"kind": "working"}, b""))
    replies = world.channel().exchange(dict.fromkeys(world.names, REQUEST), kind="train")
    next(replies), next(replies)
    timer = threading.Timer(0.05, world.stop.set)
    timer.start()
    with pytest.raises(Interrupted):
        next(replies)
    timer.join()


def test_sequences_grow_over_channels_and_orders(world: World) -> None:
    world.up(lambda order, payload: ({"kind": "working"} if order.kind == "request" else {}, DONE))
    for _ in range(3):
        world.ask()
    numbers = [order.sequence for order, _ in world.orders]
    assert len(numbers) > 12
    assert numbers == sorted(set(numbers))


# The ledgers' ends.


def stated(key: Identity, site: int, number: int, mark: str = "a", *, federation: bytes = bytes(16)) -> LedgerStatement:
    return LedgerStatement.of(
        key, federation=federation, site=site, number=number, digest=mark * 64, seal=bytes(SEAL_BYTES)
    )


def test_heads_are_durable_and_only_grow(tmp_path: Path) -> None:
    path, key = tmp_path / "heads.json", Identity.generate()
    old, new = stated(key, 0, 3), stated(key, 0, 4, "b")
    heads = Heads(path)
    assert heads.of("a") == ""
    heads.saw("a", new)
    heads.saw("a", old)
    heads.saw("a", stated(key, 0, 4, "c"))
    heads.saw("b", old)
    assert [(Heads(path).of("a"), Heads(path).of("b"))] == [(new.raw.hex(), old.raw.hex())]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a": 1}', '{"a": {"number": 3, "digest": ""}}', '{"a": "00"}', '{"a": "xy"}', "\xff"]
)
def test_damaged_heads_are_not_taken_for_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "heads.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match="damaged"):
        Heads(path)


def test_what_a_site_told_is_handed_back_to_it_by_the_next_coordinator(world: World) -> None:
    head = stated(world.keys[1], 1, 9, federation=world.roster.federation).raw.hex()
    world.up(lambda order, payload: ({"ledger": head}, DONE))
    world.ask()
    assert {order.seen for order, payload in world.orders if payload} == {""}
    world.orders.clear()
    world.ask()
    assert {order.site: order.seen for order, payload in world.orders if payload} == {0: "", 1: head, 2: ""}


@pytest.mark.parametrize("lie", ["another key", "another site", "another federation", "one bit"])
def test_a_statement_that_is_not_its_sites_own_is_not_kept(world: World, lie: str) -> None:
    own, federation = world.keys[1], world.roster.federation
    said = {
        "another key": stated(world.keys[2], 1, 9, federation=federation),
        "another site": stated(world.keys[2], 2, 9, federation=federation),
        "another federation": stated(own, 1, 9),
        "one bit": stated(own, 1, 9, federation=federation),
    }[lie].raw
    if lie == "one bit":
        said = bytes([*said[:20], said[20] ^ 1, *said[21:]])
    world.up(lambda order, payload: ({"ledger": said.hex()}, DONE))
    replies = world.ask()
    assert replies["site-1"].code == ("signature" if lie in ("another key", "one bit") else "context")
    assert not (world.folder / "heads.json").exists()


# The orders' numbers.


def test_numbers_of_orders_grow_though_the_clock_is_set_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.up()
    now = time.time_ns()
    world.ask()
    monkeypatch.setattr("server.order_numbers.time.time_ns", lambda: now - 10**18)
    world.ask()  # a coordinator that was started again
    numbers = [order.sequence for order, _ in world.orders]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= 12


# Real sessions behind it.


def test_real_sessions_end_a_round_over_it_though_one_vault_is_restarted(
    tmp_path: Path, manifest_for: Callable[..., Manifest]
) -> None:
    it = Field(tmp_path, manifest_for(), secure_sum={"unsafe_unmasked": True})
    grid, forgot = MemoryGrid(), [False]

    def node(number: int) -> Node:
        def answers(message: Message) -> list[Message]:
            frame = unpack(message.content)
            order, _ = open_frame(Order, it.coordinator.public, frame)
            if number == 1 and order.kind == "poll" and not forgot[0]:
                forgot[0] = True
                it.sites[1].start()
            return [Message(pack(it.sites[number].session.answer(frame)), reply_to=message)]

        return answers

    grid.nodes = {200 - n: node(n) for n in range(3)}
    it.sites[1].vault.gate.clear()
    channel = FieldChannel(
        cast(Grid, grid), identity=it.coordinator, roster=it.roster, manifest_sha256=it.manifest.digest(),
        run_id=it.run_id, heads=Heads(tmp_path / "heads.json"), orders=OrderNumbers(tmp_path / "numbers.txt"),
        stop=threading.Event(), phase_seconds=20.0, poll_seconds=0.01,
    )  # fmt: skip
    request = encode(Envelope(header=it.header(), tensors=it.adapter))
    replies = by_site(channel.exchange(dict.fromkeys(it.names, request), kind="train"), list(it.names))
    assert forgot == [True]
    for number, name in enumerate(it.names):
        envelope = replies[name].envelope
        assert envelope is not None, replies[name]
        assert isinstance(envelope.header, RoundDone)
        assert np.array_equal(envelope.tensors["w"], it.change_of(number)["w"])


def test_looks_grow_rarer_and_no_order_that_is_due_waits_for_them() -> None:
    def pause(**out: Any) -> float:
        other = module._Asked("other", b"", "request", "", message="m", sent_at=90.0)
        return module._pause([other, module._Asked("site", b"", "request", "", **out)], 80.0, 100.0)

    assert pause(message="m", sent_at=90.0) == module.MOST_LOOK_SECONDS
    assert pause(message="m", sent_at=99.4) == pytest.approx(0.1)
    assert pause(message="m", sent_at=100.0) == module.LOOK_SECONDS
    assert pause(next_at=100.5) == pytest.approx(0.5)
    assert pause(next_at=0.0) == module.LOOK_SECONDS
