import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Error
from flwr.supercore.task_identity import TaskIdentity

from common.flower import SMALL_BYTES, ConfigRecord, Grid, Message, RecordDict, pack, unpack
from common.messages import Envelope, Evaluated, decode, encode
from server.channel import FlowerChannel, Interrupted, Reply

SECRET = "Jane Doe owes 5 pounds"
HEADER = {"manifest_sha256": "0" * 64, "run_id": "run", "round": 1, "adapter_sha256": "1" * 64}
NODES = {f"site-{number}": 100 + number for number in range(5)}
REQUESTS = {site: f"request of {site}".encode() for site in NODES}

# What a node makes of a message: an answer, or None if it never answers.
Node = Callable[[Message], Message | None]


def answer(message: Message) -> Message:
    """Answer with counts that tell which node it was."""
    header = Evaluated(**HEADER, counts={"node": float(message.metadata.dst_node_id)})
    return Message(pack(encode(Envelope(header=header))), reply_to=message)


@pytest.fixture(autouse=True)
def _in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages bear the identity of the process's run, which its engine sets."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class FakeGrid:
    """Nodes in memory. Each pull gives the answer of the newest message that is out, so the order turns around."""

    def __init__(self, nodes: Mapping[int, Node] | None = None, *, per_pull: int = 1) -> None:
        self.nodes, self.per_pull = nodes or {}, per_pull
        self.sent: list[tuple[int, str, RecordDict]] = []
        self.out: dict[str, Message] = {}
        self.most_out = 0
        self.pulled: list[list[str]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            identity = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = identity
            message.metadata.__dict__["_src_node_id"] = 1
            self.sent.append((message.metadata.dst_node_id, message.metadata.message_type, message.content))
            self.out[identity] = message
            ids.append(identity)
        self.most_out = max(self.most_out, len(self.out))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulled.append(list(message_ids))
        replies = []
        for identity in [one for one in reversed(list(self.out)) if one in self.pulled[-1]][: self.per_pull]:
            reply = self.nodes.get(self.out[identity].metadata.dst_node_id, answer)(self.out[identity])
            if reply is not None:
                del self.out[identity]
                replies.append(reply)
        return replies


def channel(grid: FakeGrid, **options: Any) -> FlowerChannel:
    given = {"stop": threading.Event(), "poll_seconds": 0.001, **options}
    return FlowerChannel(cast(Grid, grid), NODES, **given)


def exchange(grid: FakeGrid, **options: Any) -> list[Reply]:
    return list(channel(grid, **options).exchange(REQUESTS, kind="train"))


def test_every_site_gets_its_request_and_is_known_by_its_answer() -> None:
    grid = FakeGrid()
    replies = exchange(grid)
    assert [(node, kind, unpack(content)) for node, kind, content in grid.sent] == [
        (NODES[site], "train", data) for site, data in REQUESTS.items()
    ]
    assert [reply.site for reply in replies] == list(REQUESTS)[::-1]  # as they came
    for reply in replies:
        assert reply.envelope is not None
        assert reply.envelope.header.counts == {"node": float(NODES[reply.site])}
        assert reply.code == ""
        assert reply.bytes_up == len(encode(reply.envelope))
        assert reply.bytes_down == len(REQUESTS[reply.site])


def test_tensors_travel_unchanged() -> None:
    tensors = {"a": np.float32([[1.5, -0.0], [3e-40, 7.0]])}
    data = encode(Envelope(header=Evaluated(**HEADER, counts={}), tensors=tensors))
    echo: Node = lambda message: Message(message.content, reply_to=message)  # noqa: E731
    (reply,) = channel(FakeGrid({100: echo})).exchange({"site-0": data}, kind="evaluate")
    assert reply.envelope is not None
    assert reply.envelope.tensors["a"].tobytes() == tensors["a"].tobytes()
    assert reply.bytes_up == reply.bytes_down == len(data)


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_no_more_are_out_than_allowed_and_all_are_sent_in_order(in_flight: int) -> None:
    grid = FakeGrid()
    replies = exchange(grid, in_flight=in_flight)
    assert grid.most_out == in_flight
    assert [node for node, _, _ in grid.sent] == list(NODES.values())
    assert sorted(reply.site for reply in replies) == sorted(NODES)
    if in_flight == 1:
        assert [reply.site for reply in replies] == list(NODES)


def test_without_a_limit_all_are_out_at_once() -> None:
    grid = FakeGrid()
    exchange(grid)
    assert grid.most_out == len(NODES)


def test_only_what_is_still_out_is_asked_for() -> None:
    grid = FakeGrid()
    exchange(grid)
    assert [len(ids) for ids in grid.pulled] == [5, 4, 3, 2, 1]


def test_two_sites_may_share_a_node() -> None:
    grid = FakeGrid()
    pair = FlowerChannel(cast(Grid, grid), {"one": 100, "two": 100}, stop=threading.Event(), poll_seconds=0.001)
    replies = list(pair.exchange({"one": b"1", "two": b"22"}, kind="train"))
    assert {(reply.site, reply.bytes_down) for reply in replies} == {("one", 1), ("two", 2)}


def test_notes_go_beside_the_envelope_of_their_site_only() -> None:
    grid = FakeGrid()
    exchange(grid, notes={"site-1": {"folder": "/somewhere"}})
    with_notes = {node: dict(content.config_records["notes"]) for node, _, content in grid.sent if len(content) > 1}
    assert with_notes == {101: {"folder": "/somewhere"}}


def never(message: Message) -> None:
    return None


@pytest.mark.parametrize("in_flight", [None, 2, 1])
def test_silence_becomes_a_timeout_of_every_unanswered_site_once(in_flight: int | None) -> None:
    # With two in flight the silent ones block the line, and sites that were never asked have not answered either.
    grid = FakeGrid({NODES["site-1"]: never, NODES["site-2"]: never}, per_pull=5)
    replies = exchange(grid, timeout_seconds=0.05, in_flight=in_flight)
    assert sorted(reply.site for reply in replies) == sorted(NODES)
    lost = {reply.site for reply in replies if reply.code}
    assert lost >= {"site-1"}
    assert {None: {"site-1", "site-2"}, 2: set(NODES) - {"site-0"}, 1: set(NODES) - {"site-0"}}[in_flight] >= lost
    for reply in replies:
        if reply.site in lost:
            assert reply == Reply(reply.site, None, "timeout", 0, len(REQUESTS[reply.site]))


def raises(code: int) -> Node:
    return lambda message: Message(Error(code=code, reason=f"ValueError: {SECRET}"), reply_to=message)


def fails(message: Message) -> Message:
    return Message(RecordDict({"failure": ConfigRecord({"code": "unexpected:KeyError"})}), reply_to=message)


def garbles(message: Message) -> Message:
    return Message(pack(b"no envelope, but " + SECRET.encode()), reply_to=message)


def empty(message: Message) -> Message:
    return Message(RecordDict({"words": ConfigRecord({"said": SECRET})}), reply_to=message)


@pytest.mark.parametrize(
    ("node", "code"),
    [
        (raises(0), "flower_0"),
        (raises(3), "flower_3"),
        (fails, "unexpected:KeyError"),
        (garbles, "message"),
        (empty, "message"),
    ],
)
def test_a_failure_is_a_fixed_word_and_never_its_text(node: Node, code: str) -> None:
    replies = {reply.site: reply for reply in exchange(FakeGrid({NODES["site-2"]: node}))}
    assert replies["site-2"] == Reply("site-2", None, code, 0, len(REQUESTS["site-2"]))
    assert SECRET not in repr(replies)
    assert "Jane" not in repr(replies)
    assert all(replies[site].envelope is not None for site in NODES if site != "site-2")


def test_a_site_cannot_send_text_as_its_code() -> None:
    def tells(message: Message) -> Message:
        return Message(RecordDict({"failure": ConfigRecord({"code": SECRET})}), reply_to=message)

    (reply,) = (reply for reply in exchange(FakeGrid({NODES["site-2"]: tells})) if reply.site == "site-2")
    assert reply.envelope is None
    assert reply.code == "message"


def test_a_wish_to_stop_is_heard_before_anything_is_sent() -> None:
    stop = threading.Event()
    stop.set()
    grid = FakeGrid()
    with pytest.raises(Interrupted):
        exchange(grid, stop=stop)
    assert grid.sent == []


def test_a_wish_to_stop_is_heard_while_sites_are_silent() -> None:
    stop = threading.Event()
    timer = threading.Timer(0.05, stop.set)
    replies: Iterator[Reply] = channel(FakeGrid({NODES["site-4"]: never}, per_pull=5), stop=stop).exchange(
        REQUESTS, kind="train"
    )
    got = [next(replies) for _ in range(4)]
    timer.start()
    with pytest.raises(Interrupted):
        next(replies)
    timer.join()
    assert len(got) == 4


def test_nobody_to_ask_is_nothing_to_wait_for() -> None:
    assert list(channel(FakeGrid()).exchange({}, kind="train")) == []


def test_what_the_channel_sends_is_what_a_site_unpacks() -> None:
    data = encode(Envelope(header=Evaluated(**HEADER, counts={"n": 1.0})))
    grid = FakeGrid()
    list(channel(grid).exchange({"site-0": data}, kind="query.baseline"))
    assert grid.sent[0][1] == "query.baseline"
    assert decode(unpack(grid.sent[0][2])).header.counts == {"n": 1.0}


@pytest.mark.parametrize("size", [0, 1, SMALL_BYTES, SMALL_BYTES + 1])
def test_small_and_large_envelopes_come_out_as_they_went_in(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
    content = pack(data)
    assert unpack(content) == data
    assert bool(content.array_records) == (size > SMALL_BYTES)  # in pieces, which a single value is not
