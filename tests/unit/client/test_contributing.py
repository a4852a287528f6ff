"""A real vault under every method of aggregation: what trains, what leaves, and what a second sum asks for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.ledger import Ledger
from client.protection import Population
from client.resident import resident
from client.state import SiteState
from client.vault import Vault
from common.adapters import first_state, get_state
from common.codec.state import AdapterState, state_digest
from common.config.manifest import Columns, Manifest
from common.contribution import contribution, contribution_shapes, projection, projection_shapes
from common.data_files import write_records
from common.factors import factor_of, newest, scale
from common.messages import Envelope, Project, Projected, Refused, RoundDone, RoundStart, decode, encode
from common.records import TextRecord
from server.aggregation.ffa import begun_anew

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Manifests = Callable[..., Manifest]
METHODS = ["separate", "alternate", "ffa", "sketch", "dense"]
TRAINING = {"rounds": 9, "local_steps": 2, "batch_size": 4, "learning_rate": 0.01}
RANK = 2


class Site:
    """A vault over 24 records, and what is said to it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest, self.folder, self.private = manifest, folder, manifest.privacy is not None
        records = [TextRecord(unit=f"u {n}", text=f"clause {n} of it", label="abc"[n % 3]) for n in range(24)]
        write_records(folder / "train.jsonl", records, Columns())
        self.ledger = Ledger(folder / "ledger") if self.private else None
        self.vault = Vault(
            "site-1",
            manifest,
            train=folder / "train.jsonl",
            held_out=None,
            log=folder / "log",
            population=Population("people", 24, 100.0, 1e-3) if self.private else None,
            ledger=self.ledger,
        )
        self.model = resident(manifest).model
        self.first = first_state(self.model, 0)
        self.state = SiteState()

    def header(self, number: int, adapter: AdapterState) -> dict[str, Any]:
        about = {"manifest_sha256": self.manifest.digest(), "run_id": "run", "round": number}
        return {**about, "adapter_sha256": state_digest(adapter)}

    def ask(self, header: Any, tensors: AdapterState) -> Envelope:
        answer, self.state = self.vault.answer(encode(Envelope(header=header, tensors=tensors)), self.state)
        return decode(answer)

    def train(self, number: int, accepted: int, adapter: AdapterState | None = None) -> Envelope:
        tensors = self.first if adapter is None else adapter
        return self.ask(RoundStart(**self.header(number, tensors), evaluate=False, accepted=accepted), tensors)

    def said(self) -> str:
        return (self.folder / "log").read_text() if (self.folder / "log").exists() else ""


@pytest.fixture
def site(tmp_path: Path, manifest_for: Manifests) -> Callable[..., Site]:
    def make(method: str, *, private: bool = False, adapter: str = "lora", **training: Any) -> Site:
        section = {"rank": RANK, "method": adapter, "virtual_tokens": 2}
        tables: dict[str, Any] = {"training": {**TRAINING, **training}, "adapter": section}
        if private:
            tables["privacy"] = {"epsilon": 50.0, "delta": 1e-3}
        return Site(tmp_path, manifest_for(aggregation={"method": method}, **tables))

    return make


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_contribution_is_made_of_what_trained(site: Callable[..., Site], method: str, private: bool) -> None:
    it = site(method, private=private, head_rounds=1)
    for number in (1, 2, 3):
        answer = it.train(number, number - 1)
        assert isinstance(answer.header, RoundDone), it.said()
        after = get_state(it.model)
        shapes = {name: array.shape for name, array in after.items()}
        assert {n: a.shape for n, a in answer.tensors.items()} == contribution_shapes(it.manifest, shapes, number - 1)
        wanted = contribution(it.manifest, it.first, after, number - 1)
        for name, array in answer.tensors.items():
            np.testing.assert_array_equal(array, wanted[name])
        moved = {factor_of(name) for name in after if not np.array_equal(after[name], it.first[name])}
        expected = {
            "head": {""},
            "alternate2": {"", "B"},
            "alternate3": {"", "A"},
            "ffa2": {"", "B"},
            "ffa3": {"", "B"},
        }
        assert moved == expected.get("head" if number == 1 else f"{method}{number}", {"", "A", "B"})
        assert bool(it.state.kept) == (method == "sketch" and number > 1)


@pytest.mark.parametrize(("adapter", "private"), [("lora", False), ("lora", True), ("lora+prompt", True)])
def test_a_stack_stays_and_the_pair_on_top_trains(site: Callable[..., Site], adapter: str, private: bool) -> None:
    it = site("ffa", private=private, adapter=adapter)  # one engine of gradients is for layers, the other maps
    rng = np.random.Generator(np.random.PCG64(0))
    deep = {n: rng.normal(0, 0.1, a.shape).astype(np.float32) for n, a in it.first.items()}
    for _ in range(2):
        deep = begun_anew(deep, RANK, 0)
    answer = it.train(1, 0, deep)
    assert isinstance(answer.header, RoundDone), it.said()  # with privacy the pre-flight check has compared gradients
    after, before = get_state(it.model), newest(deep, RANK)
    assert {factor_of(name) for name in answer.tensors} == {"", "B"}
    for name, array in answer.tensors.items():
        np.testing.assert_array_equal(array, after[name] - before[name])
        assert np.abs(array).max() > 0


@pytest.mark.parametrize("private", [False, True])
def test_a_second_sum_is_answered_once(site: Callable[..., Site], private: bool) -> None:
    it = site("sketch", private=private)
    first = it.train(1, 0)
    basis = {n: np.linalg.qr(a)[0].astype(np.float32) for n, a in first.tensors.items() if "lora_Y" in n}
    spent = len(it.ledger.entries()) if it.ledger else 0
    second = it.ask(Project(**it.header(1, it.first)), basis)
    assert isinstance(second.header, Projected), it.said()
    after = get_state(it.model)
    shapes = {name: array.shape for name, array in after.items()}
    assert {n: a.shape for n, a in second.tensors.items()} == projection_shapes(it.manifest, shapes, 0)
    pairs = {name: array for name, array in after.items() if factor_of(name)}
    for name, array in projection(scale(it.manifest.adapter), pairs, basis).items():
        np.testing.assert_array_equal(second.tensors[name], array)
    assert it.state.kept == b""
    again = it.ask(Project(**it.header(1, it.first)), basis)
    assert isinstance(again.header, Refused)
    assert again.header.code == "message"
    assert (len(it.ledger.entries()) if it.ledger else 0) == spent  # and it costs no privacy


def test_a_second_sum_must_be_of_the_last_round(site: Callable[..., Site]) -> None:
    it = site("sketch")
    first = it.train(1, 0)
    basis = {n: np.linalg.qr(a)[0].astype(np.float32) for n, a in first.tensors.items() if "lora_Y" in n}
    for number in (0, 2):
        answer = it.ask(Project(**it.header(number, it.first)), basis)
        assert isinstance(answer.header, Refused)
    wrong = it.ask(Project(**it.header(1, it.first)), dict(list(basis.items())[1:]))
    assert isinstance(wrong.header, Refused)
    assert wrong.header.code == "adapter"
    assert isinstance(it.ask(Project(**it.header(1, it.first)), basis).header, Projected)  # it may still be given


@pytest.mark.parametrize("accepted", [2, 3, 99])
def test_more_aggregations_than_rounds_are_refused_before_anything_is_charged(
    site: Callable[..., Site], accepted: int
) -> None:
    it = site("alternate", private=True)
    answer = it.train(2, accepted)
    assert isinstance(answer.header, Refused)
    assert answer.header.code == "message"
    assert "follows on fewer aggregations" in it.said()
    assert it.ledger is not None
    assert it.ledger.entries() == []
    assert isinstance(it.train(2, 0).header, RoundDone)  # a round that was rejected does not count


def test_what_trains_is_checked_once_for_each_phase(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    it, checked = site("alternate", private=True, head_rounds=1), []
    monkeypatch.setattr("client.round.check_gradients", lambda *_: checked.append(number))
    for number, accepted in ((1, 0), (2, 1), (3, 1), (5, 2), (6, 3), (7, 4)):
        assert isinstance(it.train(number, accepted).header, RoundDone)
    assert checked == [1, 2, 5]
