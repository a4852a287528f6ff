import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.relay import failure, relay
from client.resident import resident
from client.sampling import batches
from client.state import SiteState
from client.training.loop import Outcome
from client.vault import Vault, note
from common.adapters import first_state, get_state, set_state
from common.codec.state import AdapterState, state_digest
from common.config.manifest import Columns, Manifest
from common.data_files import write_records
from common.errors import MessageError
from common.evaluation import measure
from common.flower import ConfigRecord, Context, Message, RecordDict, pack, unpack
from common.messages import (
    Envelope,
    Evaluate,
    Evaluated,
    Project,
    Projected,
    Refused,
    RoundDone,
    RoundStart,
    decode,
    encode,
)
from common.records import InstructionRecord, Record, TextRecord, TokensRecord

# PEFT 0.21 asks Transformers 5.23 in a way that Transformers will drop in its version 6.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Manifests = Callable[..., Manifest]
KINDS = ["text-classification", "token-classification", "causal-lm"]
SECRET = "zqxsecret"  # in every record, so that it would be seen in what leaves
TRAINING = {"rounds": 3, "local_steps": 2, "batch_size": 4, "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def _no_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.resident._loaded", {})


def records_of(kind: str, count: int, first: int = 0) -> list[Record]:
    made: list[Record] = []
    for place in range(first, first + count):
        words = ["the", "tenant", SECRET, f"number{place}"][place % 2 :]
        made.append(
            {
                "text-classification": TextRecord(unit=SECRET, text=" ".join(words), label="abc"[place % 3]),
                "token-classification": TokensRecord(
                    unit=SECRET, tokens=(*words, str(place)), tags=("B-Disease", *["O"] * len(words))
                ),
                "causal-lm": InstructionRecord(
                    unit=SECRET, instruction=f"Which {place}?", input="", output=" ".join(words)
                ),
            }[kind]
        )
    return made


class Site:
    """A vault over files, and what a coordinator would ask it."""

    def __init__(self, folder: Path, manifest: Manifest, *, held_out: int = 5) -> None:
        self.manifest = manifest
        self.log = folder / "logs" / "site.log"
        kind, columns = manifest.task.kind, Columns()
        write_records(folder / "train.jsonl", records_of(kind, 11), columns)
        write_records(folder / "held_out.jsonl", records_of(kind, held_out, 50), columns)
        self.vault = Vault(
            "site-1",
            manifest,
            train=folder / "train.jsonl",
            held_out=folder / "held_out.jsonl" if held_out else None,
            log=self.log,
        )
        self.first = first_state(resident(manifest).model, 0)

    def header(self, tensors: AdapterState, **changes: Any) -> dict[str, Any]:
        return {
            "manifest_sha256": self.manifest.digest(),
            "run_id": "run",
            "round": 1,
            "adapter_sha256": state_digest(tensors),
            **changes,
        }

    def start(self, tensors: AdapterState | None = None, **changes: Any) -> bytes:
        state = self.first if tensors is None else tensors
        header = RoundStart(**{"evaluate": True, "accepted": 0, **self.header(state, **changes)})
        return encode(Envelope(header=header, tensors=state))

    def ask(self, data: bytes, state: SiteState | None = None) -> tuple[Envelope, SiteState, bytes]:
        answer, after = self.vault.answer(data, state or SiteState())
        return decode(answer), after, answer

    def logged(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def site(tmp_path: Path, manifest_for: Manifests) -> Site:
    return Site(tmp_path, manifest_for(training=TRAINING))


class TestRound:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_answer_is_the_change_of_the_adapter(self, tmp_path: Path, manifest_for: Manifests, kind: str) -> None:
        site = Site(tmp_path, manifest_for(kind, training=TRAINING))
        reply, state, data = site.ask(site.start())
        after = get_state(resident(site.manifest).model)
        assert isinstance(reply.header, RoundDone)
        assert sorted(reply.tensors) == list(site.first)
        for name, change in reply.tensors.items():
            np.testing.assert_array_equal(change, after[name] - site.first[name])
            if "lora_A" not in name:
                assert np.abs(change).max() > 0
        heads = [name for name in reply.tensors if "lora_" not in name]
        assert len(heads) == (0 if kind == "causal-lm" else 2)
        header = reply.header
        assert (header.records, header.examples, header.round, header.run_id) == (11, 8, 1, "run")
        assert header.adapter_sha256 == state_digest(site.first)
        assert header.manifest_sha256 == site.manifest.digest()
        assert math.isfinite(header.loss)
        assert header.seconds > 0
        assert state == SiteState(cursor=8, last_round=1)
        assert SECRET.encode() not in data
        assert site.logged() == ""

    def test_counts_are_of_the_adapter_that_came(self, site: Site, tmp_path: Path) -> None:
        rng = np.random.Generator(np.random.PCG64(0))
        tensors = {name: rng.normal(0, 0.3, a.shape).astype(np.float32) for name, a in site.first.items()}
        reply, _, _ = site.ask(site.start(tensors))
        ready = resident(site.manifest)
        set_state(ready.model, tensors)
        examples = ready.task.encode(records_of("text-classification", 5, 50)).examples
        expected = measure(ready.model, ready.task, examples, batch_size=64, precision="fp32")
        assert isinstance(reply.header, RoundDone)
        assert reply.header.counts == pytest.approx(expected)
        assert reply.header.counts["records"] == 5

    def test_nothing_is_measured_unless_asked(self, site: Site) -> None:
        reply, _, _ = site.ask(site.start(evaluate=False))
        assert isinstance(reply.header, RoundDone)
        assert reply.header.counts == {}

    @pytest.mark.parametrize(("held_out", "most", "measured"), [(0, 500, None), (5, 3, 3), (5, 500, 5)])
    def test_held_out_records_may_be_none_and_are_limited(
        self, tmp_path: Path, manifest_for: Manifests, held_out: int, most: int, measured: int | None
    ) -> None:
        manifest = manifest_for(training=TRAINING, evaluation={"max_records": most})
        site = Site(tmp_path, manifest, held_out=held_out)
        for data in (site.start(), encode(Envelope(header=Evaluate(**site.header(site.first)), tensors=site.first))):
            reply, _, _ = site.ask(data)
            assert isinstance(reply.header, RoundDone | Evaluated)
            assert reply.header.counts.get("records") == measured

    def test_equal_requests_give_equal_answers(self, tmp_path: Path, manifest_for: Manifests) -> None:
        manifest = manifest_for(training=TRAINING, adapter={"dropout": 0.3})
        site = Site(tmp_path, manifest)
        one, _, _ = site.ask(site.start())
        other, _, _ = site.ask(site.start())
        later, _, _ = site.ask(site.start(round=2))
        assert state_digest(one.tensors) == state_digest(other.tensors) != state_digest(later.tensors)

    def test_rounds_go_on_in_the_records(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[list[int]] = []
        steps: list[tuple[int, int]] = []

        def fake(model: Any, task: Any, examples: Any, source: Any, section: Any, **rest: Any) -> Outcome:
            drawn.extend(islice(source, rest["steps"]))
            steps.append((rest["first_step"], rest["total_steps"]))
            return Outcome(1.0, rest["steps"] * section.batch_size, 0.1)

        monkeypatch.setattr("client.round.train", fake)
        state = SiteState()
        for number in (1, 2, 3):
            reply, state, _ = site.ask(site.start(round=number), state)
            assert isinstance(reply.header, RoundDone)
        assert state == SiteState(cursor=24, last_round=3)
        assert drawn == list(islice(batches(11, 4, seed=0, site="site-1", cursor=0), 6))
        assert steps == [(0, 6), (2, 6), (4, 6)]

    def test_a_round_may_be_missed(self, site: Site) -> None:
        reply, state, _ = site.ask(site.start(round=3), SiteState(cursor=8, last_round=1))
        assert isinstance(reply.header, RoundDone)
        assert state == SiteState(cursor=16, last_round=3)

    def test_evaluating_answers_counts_and_moves_nothing(self, site: Site) -> None:
        data = encode(Envelope(header=Evaluate(**site.header(site.first, round=3)), tensors=site.first))
        before = SiteState(cursor=8, last_round=3)
        reply, state, answer = site.ask(data, before)
        assert isinstance(reply.header, Evaluated)
        assert reply.header.counts["records"] == 5
        assert (reply.header.round, reply.tensors) == (3, {})
        assert state == before
        assert SECRET.encode() not in answer


class TestRefusal:
    def check(self, site: Site, data: bytes, code: str, state: SiteState | None = None) -> Refused:
        before = state or SiteState()
        reply, after, answer = site.ask(data, before)
        assert isinstance(reply.header, Refused)
        assert reply.header.code == code
        assert reply.header.manifest_sha256 == site.manifest.digest()
        assert reply.tensors == {}
        assert after == before
        assert SECRET.encode() not in answer
        assert b"number" not in answer
        assert "Traceback (most recent call last)" in site.logged()
        return reply.header

    def test_another_manifest(self, site: Site) -> None:
        self.check(site, site.start(manifest_sha256="0" * 64), "message")

    @pytest.mark.parametrize(("number", "last"), [(1, 1), (1, 2), (0, 0), (4, 0)])
    def test_a_round_out_of_turn(self, site: Site, number: int, last: int) -> None:
        header = self.check(site, site.start(round=number), "message", SiteState(cursor=8, last_round=last))
        assert header.round == number
        assert f"round {number} must follow round {last} and be at most 3" in site.logged()

    @pytest.mark.parametrize("kind", [RoundStart, Evaluate])
    def test_an_adapter_that_is_not_the_one_announced(self, site: Site, kind: Any) -> None:
        extra = {"evaluate": True, "accepted": 0} if kind is RoundStart else {}
        header = kind(**site.header(site.first, adapter_sha256="0" * 64), **extra)
        self.check(site, encode(Envelope(header=header, tensors=site.first)), "message")

    def test_an_adapter_of_another_shape(self, site: Site) -> None:
        name = next(iter(site.first))
        self.check(site, site.start({**site.first, name: np.zeros((2, 2), np.float32)}), "adapter")
        self.check(site, site.start({}), "adapter")

    def test_an_adapter_that_makes_the_loss_no_number(self, site: Site) -> None:
        broken = {name: np.full_like(array, np.nan) for name, array in site.first.items()}
        self.check(site, site.start(broken), "not_finite_loss")
        reply, _, _ = site.ask(site.start())  # the next round is none the worse
        assert isinstance(reply.header, RoundDone)

    def test_what_a_site_does_not_answer(self, site: Site) -> None:
        common = site.header(site.first)
        for header in (Evaluated(**common, counts={}), Refused(**common, code="x")):
            self.check(site, encode(Envelope(header=header, tensors=site.first)), "message")

    @pytest.mark.parametrize("name", ["KeyError", "Größenfehler", "E" * 100])
    def test_an_error_that_nobody_expected(self, site: Site, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        kind: Any = type(name, (Exception,), {})

        def broken(*_: Any, **__: Any) -> None:
            raise kind(f"cannot use {SECRET} number50")

        monkeypatch.setattr("client.round.train", broken)
        reply = self.check(site, site.start(), "unexpected:" + name.replace("ö", "_").replace("ß", "_")[:60])
        assert reply.round == 1
        assert f"cannot use {SECRET} number50" in site.logged()  # the log stays at the site
        assert "in broken" in site.logged()

    def test_an_error_of_the_task(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        task: Any = resident(site.manifest).task

        def losses(output: Any, batch: Any) -> None:
            raise RuntimeError(f"{SECRET} {batch.examples}")

        monkeypatch.setattr(task, "losses", losses, raising=False)
        self.check(site, site.start(), "unexpected:RuntimeError")

    def test_a_log_that_cannot_be_written_stops_nothing(self, site: Site) -> None:
        site.log.parent.parent.joinpath("logs").write_text("a file where the folder should be")
        reply, _, _ = site.ask(site.start(round=0))
        assert isinstance(reply.header, Refused)

    def test_errors_are_added_to_the_log(self, tmp_path: Path) -> None:
        for text in ("first", "second"):
            note(tmp_path / "new" / "log", ValueError(text))
        assert (tmp_path / "new" / "log").read_text() == "ValueError: first\n\nValueError: second\n\n"


class Counter:
    """Answers with the request reversed and moves the state on, as far as a relay can tell a vault."""

    def answer(self, data: bytes, state: SiteState) -> tuple[bytes, SiteState]:
        return data[::-1], SiteState(cursor=state.cursor + 8, last_round=state.last_round + 1)


def context() -> Context:
    return Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


class TestRelay:
    @pytest.fixture(autouse=True)
    def _in_a_task(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # What Flower sets in the process of an app; a message takes its sender from there.
        for name in ("run_id", "node_id", "task_id"):
            monkeypatch.setattr(f"flwr.supercore.task_identity.TaskIdentity._{name}", 1)

    def message(self, data: bytes) -> Message:
        return Message(pack(data), 2, "train")

    def test_the_state_travels_in_the_context(self) -> None:
        ours, others = context(), context()
        for number in (1, 2, 3):
            reply = relay(self.message(b"abc"), ours, Counter())  # a vault of its own each time: it keeps no state
            assert unpack(reply.content) == b"cba"
            assert dict(ours.state.config_records["site"]) == vars(SiteState(8 * number, number))
        relay(self.message(b"abc"), others, Counter())
        assert others.state.config_records["site"]["last_round"] == 1

    def test_a_reply_belongs_to_its_message(self) -> None:
        message = self.message(b"abc")
        message.metadata.__dict__["_message_id"] = "question"  # as Flower's server sets it
        for reply in (relay(message, context(), Counter()), failure(message, MessageError("x"))):
            assert reply.metadata.reply_to_message_id == "question"
            assert not reply.has_error()

    def test_through_flower_to_a_vault_and_back(self, site: Site) -> None:
        ours = context()
        first = decode(unpack(relay(self.message(site.start()), ours, site.vault).content))
        again = decode(unpack(relay(self.message(site.start()), ours, site.vault).content))
        assert isinstance(first.header, RoundDone)
        assert isinstance(again.header, Refused)  # the round was answered before
        assert dict(ours.state.config_records["site"]) == vars(SiteState(8, 1))

    def test_what_a_second_sum_needs_travels_in_the_context_too(self, tmp_path: Path, manifest_for: Manifests) -> None:
        def opened() -> Site:  # in a simulation another process may get the second message
            return Site(tmp_path, manifest_for(training=TRAINING, aggregation={"method": "sketch"}))

        ours, site = context(), opened()
        first = decode(unpack(relay(self.message(site.start()), ours, site.vault).content))
        basis = {name: np.linalg.qr(a)[0].astype(np.float32) for name, a in first.tensors.items() if "lora_Y" in name}
        ask = encode(Envelope(header=Project(**site.header(site.first)), tensors=basis))
        state = ours.state.config_records["site"]["kept"]
        second = decode(unpack(relay(self.message(ask), ours, opened().vault).content))
        assert isinstance(second.header, Projected), site.logged()
        assert isinstance(state, bytes)
        assert len(state) > 4 * sum(array.size for name, array in site.first.items() if "lora" in name)
        assert ours.state.config_records["site"]["kept"] == b""

    def test_a_message_without_an_envelope_is_refused(self) -> None:
        ours = context()
        with pytest.raises(MessageError, match="carries no envelope"):
            relay(Message(RecordDict({"x": ConfigRecord({})}), 2, "train"), ours, Counter())
        assert "site" not in ours.state.config_records

    def test_a_failure_is_a_fixed_word(self) -> None:
        for error, code in ((MessageError(SECRET), "message"), (ValueError(SECRET), "unexpected:ValueError")):
            content = failure(self.message(b"abc"), error).content
            assert dict(content.config_records["failure"]) == {"code": code}
            assert SECRET not in str(content)
