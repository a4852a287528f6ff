"""The vault's session: whole sums over orders and answers, kills at every stage, and everything that is refused."""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sum_attempts import Attempt
from vault_field import NOON, Field

from client.run_folder import RunFolder
from common.bounds import bounds
from common.config.manifest import Manifest
from common.errors import CoadaptError
from common.frames import Answer, open_frame, payload_digest
from common.identity import Identity
from common.messages import Envelope, Project, RoundDone, decode, encode
from common.randomness import seeded, system_bytes
from common.secure_sum.messages import Masked, Refuse, read
from common.secure_sum.state import SiteMemory

Manifests = Callable[..., Manifest]
Fields = Callable[..., Field]
PRIVATE = {"epsilon": 50.0, "delta": 1e-3}


@pytest.fixture
def field(tmp_path: Path, manifest_for: Manifests) -> Fields:
    def make(*, private: bool = False, secure: bool = True, sites: int = 3, **tables: Any) -> Field:
        training = {"rounds": 4, "local_steps": 4, "learning_rate": 0.02, "weight_decay": 0.0}
        manifest = manifest_for(
            training=training,
            aggregation={"method": "separate", "weighting": "uniform"},
            secure_sum={"enabled": secure},
            **({"privacy": PRIVATE} if private else {}),
        )
        return Field(tmp_path / str(len(list(tmp_path.iterdir()))), manifest, sites=sites, **tables)

    return make


def begun(it: Field, number: int = 1, attempt: int = 0, sites: Sequence[int] = ()) -> Attempt:
    """An attempt whose ranges are what the sites allow."""
    header = it.header(number, ranges=bounds(it.manifest, it.adapter, number))
    return Attempt(it, header, attempt, sites=sites)


def up_to_vectors(it: Field, number: int = 1, attempt: int = 0, sites: Sequence[int] = ()) -> Attempt:
    """The same, with the list of shares due next: the vectors are asked for then."""
    found = begun(it, number, attempt, sites)
    for _ in range(2):
        found.ask()
        found.go_on()
    return found


# Whole sums.


@pytest.mark.parametrize("private", [False, True])
def test_a_sum_of_three_sessions_is_the_mean_of_what_they_made(field: Fields, private: bool) -> None:
    it = field(private=private)
    sums = it.sums()
    for number in (1, 2):
        found = sums.first(it.header(number), it.adapter, {"w": (12,)})
        assert not found.failures
        times = number if private else 1  # a vault stand-in with noise answers otherwise every time
        assert found.mean["w"] == pytest.approx(np.full(12, 2e-4 * times), abs=2e-5)
    for site in it.sites:
        assert site.vault.trained == 2
        assert [line.decision for line in site.audit()].count("refused") == 0
        assert {line.kind for line in site.audit()} <= {"request", "message", "poll"}
        if private:
            assert site.vault.charged("run-1") == [1, 2]


def test_without_secure_sums_the_envelope_itself_is_the_answer(field: Fields) -> None:
    it = field(secure=False, secure_sum={"unsafe_unmasked": True})
    payload = encode(Envelope(header=it.header(), tensors=it.adapter))
    answer, said = it.settled(0, payload)
    assert answer.kind == "message"
    assert isinstance(decode(said).header, RoundDone)
    assert np.array_equal(decode(said).tensors["w"], it.change_of(0)["w"])
    it.sites[0].start()  # killed and started again: the same payload in a new order gets the same answer
    assert it.settled(0, payload)[1] == said
    assert it.sites[0].vault.trained == 0


def test_the_same_order_and_the_same_payload_get_the_same_answer(field: Fields) -> None:
    it = field()
    attempt = begun(it)
    frame = it.order(0, "request", attempt.out[0])
    first = it.sites[0].session.answer(frame)
    assert it.sites[0].session.answer(frame) == first
    assert it.say(0, "request", attempt.out[0])[1] == it.read(0, first)[1]
    assert it.say(0, "poll", about=payload_digest(attempt.out[0]))[1] == it.read(0, first)[1]
    attempt.to_the_end()
    for name in it.names:
        assert it.sites[it.names.index(name)].vault.trained == 1


def test_a_site_that_trains_says_so_and_can_be_called_off(field: Fields) -> None:
    it = field()
    for site in it.sites:
        site.vault.gate.clear()
    attempt = up_to_vectors(it)
    digest = payload_digest(attempt.out[0])
    answer, said = it.say(0, "message", attempt.out[0])
    assert (answer.kind, said) == ("working", b"")
    answer, _ = it.say(0, "poll", about=digest)
    assert answer.kind == "working"
    assert 0 <= answer.progress < 1
    assert it.say(0, "cancel", about=digest)[0].kind == "done"
    assert it.say(0, "poll", about=digest)[0].code == "unknown_order"
    it.sites[0].executor.submit(lambda: None).result(timeout=10)  # the thread is free, though the gate is closed
    for site in it.sites:
        site.vault.gate.set()
    assert begun(it, attempt=1).to_the_end().state["w"] == pytest.approx(np.full(12, 6e-4), abs=6e-5)
    assert [site.vault.trained for site in it.sites] == [2, 1, 1]


# Kills. A new session on the same folder knows what a new process would.


@pytest.mark.parametrize("private", [False, True])
def test_killed_in_training_it_trains_again_on_the_same_charge(field: Fields, private: bool) -> None:
    it = field(private=private)
    it.sites[0].vault.gate.clear()
    attempt = up_to_vectors(it)
    assert it.say(0, "message", attempt.out[0])[0].kind == "working"
    old = it.sites[0].vault
    it.sites[0].start()
    assert it.say(0, "poll", about=payload_digest(attempt.out[0]))[0].code == "unknown_order"
    assert it.say(0, "message", attempt.out[0])[0].code == "unknown_attempt"
    assert it.say(0, "request", b"")[0].code == "message"
    begun(it, attempt=1).to_the_end()
    assert it.sites[0].vault.trained == 1
    if private:
        assert it.sites[0].vault.charged("run-1") == [1]
    old.gate.set()


def test_the_request_of_an_attempt_whose_keys_are_gone_is_not_answered_anew(field: Fields) -> None:
    it = field()
    attempt = begun(it)
    attempt.ask()
    it.sites[0].start()
    assert it.say(0, "request", attempt.out[0])[0].code == "unknown_attempt"
    memory = SiteMemory.from_bytes((it.sites[0].folder / "runs" / "run-1" / "memory.json").read_bytes())
    assert memory.newest == (1, 3, 0)


@pytest.mark.parametrize("private", [False, True])
def test_killed_after_training_it_neither_trains_nor_charges_again(field: Fields, private: bool) -> None:
    it = field(private=private)
    attempt = begun(it)
    attempt.ask()
    it.sites[0].executor.shutdown(wait=True)
    work = RunFolder(it.sites[0].folder / "runs" / "run-1", it.roster.federation).load_work()
    assert work.stage == "done"
    it.sites[0].start()
    begun(it, attempt=1).to_the_end()
    assert it.sites[0].vault.trained == 0
    if private:
        assert it.sites[0].vault.charged("run-1") == [1]


def test_killed_after_release_without_noise_the_round_is_over(field: Fields) -> None:
    it = field()
    attempt = up_to_vectors(it)
    attempt.ask(0)
    it.sites[0].start()
    again = begun(it, attempt=1)
    assert it.say(0, "request", again.out[0])[0].code == "rerun"
    assert not (it.sites[0].folder / "runs" / "run-1" / "words.bin").exists()
    assert begun(it, 2).to_the_end().state["w"] == pytest.approx(np.full(12, 6e-4), abs=6e-5)


@pytest.mark.parametrize("killed", [False, True])
def test_with_noise_the_identical_vector_is_masked_again_and_nothing_else(field: Fields, killed: bool) -> None:
    it = field(private=True)
    attempt = up_to_vectors(it)
    (vector,) = (said for _, said in attempt.ask(0).values())
    words = (it.sites[0].folder / "runs" / "run-1" / "words.bin").read_bytes()
    if killed:
        it.sites[0].start()
    trained = it.sites[0].vault.trained
    second = up_to_vectors(it, attempt=1)
    answers = second.ask()
    masked = read(answers[0][1], it.roster.public_key_of).body
    before = read(vector, it.roster.public_key_of).body
    assert isinstance(masked, Masked)
    assert isinstance(before, Masked)
    assert masked.vector != before.vector  # other masks
    second.go_on()
    assert second.to_the_end().state["w"] == pytest.approx(np.full(12, 6e-4), abs=6e-5)
    assert it.sites[0].vault.trained == trained
    assert it.sites[0].vault.charged("run-1") == [1]
    assert (it.sites[0].folder / "runs" / "run-1" / "words.bin").read_bytes() == words
    assert begun(it, 2).to_the_end()
    assert (it.sites[0].folder / "runs" / "run-1" / "words.bin").read_bytes() != words  # older ones are not kept


def test_the_identical_vector_is_masked_among_fewer_sites_too(field: Fields) -> None:
    it = field(private=True, sites=4)
    up_to_vectors(it).ask(0, 1)  # then the others are gone, and site 3 for good
    found = begun(it, attempt=1, sites=(0, 1, 2)).to_the_end()
    assert found.state["w"] == pytest.approx(np.full(12, 6e-4), abs=6e-5)
    assert [site.vault.trained for site in it.sites] == [1, 1, 1, 1]


def test_a_released_vector_is_not_masked_for_another_request(field: Fields) -> None:
    it = field(private=True)
    up_to_vectors(it).ask()
    it.adapter = {"w": np.full(12, 1e-5, np.float32)}
    other = up_to_vectors(it, attempt=1)
    _, said = it.settled(0, other.out[0])
    body = read(said, it.roster.public_key_of).body
    assert body == Refuse("rerun")
    assert [line.code for line in it.sites[0].audit() if line.decision == "refused"] == ["rerun"]


def test_a_folder_that_does_not_know_what_left_releases_nothing(field: Fields) -> None:
    it = field(private=True)
    up_to_vectors(it).ask()
    work = it.sites[0].folder / "runs" / "run-1" / "work.bin"
    work.unlink()
    (it.sites[0].folder / "runs" / "run-1" / "memory.json").unlink()
    it.sites[0].start()
    second = up_to_vectors(it, attempt=1)
    _, said = it.settled(0, second.out[0])
    assert read(said, it.roster.public_key_of).body == Refuse("rerun")
    assert it.sites[0].vault.trained == 0


def test_training_that_failed_is_not_repeated_on_its_charge(field: Fields) -> None:
    it = field(private=True)
    it.sites[0].vault.error = "not_finite_loss"
    attempt = up_to_vectors(it)
    _, said = it.settled(0, attempt.out[0])
    assert read(said, it.roster.public_key_of).body == Refuse("not_finite_loss")
    it.sites[0].vault.error = ""
    second = up_to_vectors(it, attempt=1)
    _, said = it.settled(0, second.out[0])
    assert read(said, it.roster.public_key_of).body == Refuse("rerun")
    assert it.sites[0].vault.trained == 1


def test_files_of_a_run_are_their_owners_alone(field: Fields) -> None:
    it = field(private=True)
    begun(it).to_the_end()
    run = it.sites[0].folder / "runs" / "run-1"
    assert run.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in run.iterdir()} == {"memory.json", "run.json", "sums.json", "words.bin", "work.bin"}
    assert {path.stat().st_mode & 0o777 for path in run.iterdir()} == {0o600}


@pytest.mark.parametrize("name", ["memory.json", "run.json", "sums.json", "work.bin", "words.bin"])
def test_a_damaged_file_of_a_run_stops_the_run(field: Fields, name: str) -> None:
    it = field(private=True)
    up_to_vectors(it).ask(0)
    path = it.sites[0].folder / "runs" / "run-1" / name
    path.write_bytes(path.read_bytes()[:-7])
    it.sites[0].start()
    try:
        second = up_to_vectors(it, attempt=1)
        _, said = it.settled(0, second.out[0])
        body = read(said, it.roster.public_key_of).body
    except CoadaptError:  # it refused to begin, so that two are left
        refused = [line for line in it.sites[0].audit() if line.decision == "refused"]
        assert {line.code for line in refused} == {"run"}
    else:
        assert isinstance(body, Refuse) or name == "work.bin"  # the vector that left is in another file


# Refusals. Each leaves a line.


def refused(it: Field, answer: Answer, code: str, *, reason: str = "", site: int = 0) -> None:
    assert (answer.kind, answer.code) == ("refused", code)
    assert reason in answer.reason
    line = it.sites[site].audit()[-1]
    assert (line.decision, line.code, line.reason) == ("refused", code, answer.reason)


def test_orders_of_others_and_for_others_are_refused(field: Fields) -> None:
    it = field()
    payload = begun(it).out[0]
    foreign = it.order(0, "request", payload, key=Identity.generate())
    refused(it, it.give(0, foreign)[0], "signature")
    refused(it, it.say(0, "request", payload, key=it.keys[1])[0], "signature")
    refused(it, it.say(0, "request", payload, federation="0" * 32)[0], "context")
    refused(it, it.say(0, "request", payload, epoch=2)[0], "context")
    refused(it, it.say(0, "request", payload, site=1)[0], "context")
    refused(it, it.say(0, "request", payload, manifest_sha256="0" * 64)[0], "manifest")
    answer = it.sites[0].session.answer(it.order(0, "hello"))
    refused(it, it.read(0, it.sites[0].session.answer(answer))[0], "signature")  # an answer is no order
    refused(it, it.give(0, b"")[0], "malformed")
    assert [site.vault.trained for site in it.sites] == [0, 0, 0]
    assert not (it.sites[0].folder / "runs" / "run-1").exists()


def test_an_envelope_of_another_run_is_refused(field: Fields) -> None:
    it = field()
    payload = begun(it).out[0]
    refused(it, it.say(0, "request", payload, run_id="run-2")[0], "message")
    refused(it, it.say(0, "message", b"\x01abc")[0], "unknown_attempt")
    refused(it, it.say(0, "poll", about="0" * 64)[0], "unknown_order")
    begun(it).ask(0)
    refused(it, it.say(0, "message", b"\x01abc")[0], "malformed")
    header = Project(**it.header().spoken_of())
    refused(it, it.say(0, "request", encode(Envelope(header=header, tensors=it.adapter)))[0], "message")


def test_old_orders_are_refused_over_restarts_too(field: Fields) -> None:
    it = field()
    attempt = begun(it)
    old = it.order(0, "hello")
    attempt.ask(0)
    refused(it, it.give(0, old)[0], "replay")
    it.sites[0].start()
    refused(it, it.give(0, old)[0], "replay")
    refused(it, it.say(0, "cancel", sequence=it.clock - 1)[0], "replay")
    assert it.say(0, "hello")[0].kind == "done"


def test_what_is_too_large_is_refused_unread(field: Fields) -> None:
    it = field(limits={"message_bytes": 1 << 16})
    answer, _ = it.say(0, "request", bytes(1 << 16))
    refused(it, answer, "policy", reason="allowed 65536")


def test_a_breach_of_policy_says_what_is_asked_and_what_is_allowed(field: Fields) -> None:
    it = field(limits={"rounds": 3, "tasks": ("causal-lm",)})
    for kind in ("hello", "request"):
        answer, _ = it.say(0, kind, begun(it).out[0] if kind == "request" else b"")
        refused(it, answer, "policy", reason="training.rounds: asked 4, allowed 3")
        assert "task.kind: asked text-classification, allowed causal-lm" in answer.reason
    assert it.sites[0].vault.trained == 0


def test_training_begins_in_working_hours_and_then_goes_on(field: Fields) -> None:
    it = field(limits={"hours": ("mon-fri 18:00-06:00",)})
    attempt = begun(it)
    answer, _ = it.say(0, "request", attempt.out[0])
    refused(it, answer, "policy", reason="limits.hours: asked Wed 12:00, allowed mon-fri 18:00-06:00")
    for site in it.sites:
        site.now = datetime(2026, 11, 25, 23, 0)
    attempt.ask()
    attempt.go_on()
    for site in it.sites:
        site.now = datetime(2026, 11, 26, 6, 0)
    assert attempt.to_the_end().state["w"] == pytest.approx(np.full(12, 6e-4), abs=6e-5)
    refused(it, it.say(0, "request", begun(it, 2).out[0])[0], "policy")


def test_a_second_run_without_privacy_is_a_second_look(field: Fields) -> None:
    it = field()
    begun(it).to_the_end()
    it.run_id = "run-2"
    for _ in range(2):
        answer, _ = it.say(0, "request", begun(it).out[0])
        refused(it, answer, "policy", reason="limits.plain_runs: asked run 2 of one manifest, allowed 1")
        it.sites[0].start()
    it.run_id = "run-1"  # which goes on
    assert begun(it, 2).to_the_end()


def test_a_second_run_is_possible_with_privacy_or_the_sites_word(field: Fields) -> None:
    for it in (field(private=True), field(limits={"plain_runs": 2})):
        begun(it).to_the_end()
        it.run_id = "run-2"
        begun(it).to_the_end()
        it.run_id = "run-1"  # nor does a run between two make the numbers of the first begin anew
        answer, _ = it.say(0, "request", begun(it).out[0])
        refused(it, answer, "unknown_attempt")


def test_runs_round_from_keys_of_their_own(field: Fields) -> None:
    it = field(limits={"plain_runs": 2})
    bodies = []
    for it.run_id in ("run-1", "run-2"):
        attempt = up_to_vectors(it)
        attempt.ask()
        attempt.go_on()
        bodies.append(attempt.to_the_end().state["w"])
    assert not np.array_equal(*bodies)
    assert bodies[0] == pytest.approx(bodies[1], abs=6e-5)


def test_a_second_attempt_goes_on_after_hours_where_training_is_over(field: Fields) -> None:
    it = field(private=True, limits={"hours": ("mon-fri 18:00-06:00",)})
    for site in it.sites:
        site.now = datetime(2026, 11, 25, 23, 0)
    up_to_vectors(it).ask(0, 1)
    for site in it.sites:
        site.executor.shutdown(wait=True)
        site.now = NOON
    it.sites[1].start()
    it.sites[2].start()
    found = begun(it, attempt=1).to_the_end()  # 0 and 1 have let a vector go, 2 has trained and let none go
    assert found.state["w"] == pytest.approx(np.full(12, 6e-4), abs=6e-5)
    assert [site.vault.trained for site in it.sites] == [1, 0, 0]
    refused(it, it.say(0, "request", begun(it, 2).out[0])[0], "policy", reason="limits.hours")


def test_what_was_broken_off_does_not_begin_again_after_hours(field: Fields) -> None:
    it = field(private=True, limits={"hours": ("mon-fri 18:00-06:00",)})
    for site in it.sites:
        site.now = datetime(2026, 11, 25, 23, 0)
        site.vault.gate.clear()
    up_to_vectors(it)
    for site in it.sites:
        site.now = NOON
    answer, _ = it.say(0, "request", begun(it, attempt=1).out[0])
    assert answer.kind == "message"  # it goes on with what it began in its hours
    it.sites[1].start()  # killed in training, which would have to begin anew
    refused(it, it.say(1, "request", begun(it, attempt=2).out[1])[0], "policy", reason="limits.hours", site=1)
    it.sites[0].vault.error = "not_finite_loss"
    it.sites[0].vault.gate.set()
    it.sites[0].executor.shutdown(wait=True)
    refused(it, it.say(0, "request", begun(it, attempt=3).out[0])[0], "policy", reason="limits.hours")


def test_text_of_errors_stays_at_the_site(field: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    it = field(private=True)

    def fails(*_: object, **__: object) -> None:
        raise ValueError("Zanzibar")

    monkeypatch.setattr(it.sites[0].vault, "answer", fails)
    attempt = up_to_vectors(it)
    answer, said = it.settled(0, attempt.out[0])
    assert read(said, it.roster.public_key_of).body == Refuse("unexpected:ValueError")
    log, audit = (it.sites[0].folder / "log" / name for name in ("vault.log", "audit.jsonl"))
    assert "Zanzibar" in log.read_text()
    assert "Zanzibar" not in audit.read_text() + str(answer)


def test_what_cannot_be_logged_is_not_answered(field: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    it = field()
    frame = it.order(0, "request", begun(it).out[0])
    monkeypatch.setattr("client.audit_log.os.fsync", full_disk)
    answer, said = it.give(0, frame)
    assert (answer.kind, answer.code, said) == ("refused", "run", b"")


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_mutated_orders_get_an_answer_and_nothing_else(field: Fields) -> None:
    """5,000 orders: bytes changed after signing, and bytes changed before, by a coordinator that lies."""
    it = field(private=True)
    site, rng = it.sites[0], seeded(0, "orders")
    begun(it).ask()
    real = [frame for frame in it.frames if len(frame) > 200]
    payloads = [begun(it, attempt=1).out[0], b"", *(open_frame_payload(it, frame) for frame in real[:3])]
    kinds = ("hello", "request", "message", "poll", "cancel")
    codes = set()
    for turn in range(5000):
        if turn % 2:
            frame = mutated(rng, real[turn % len(real)])
        else:
            data = mutated(rng, payloads[turn // 2 % len(payloads)])
            frame = it.order(0, kinds[turn // 2 % 5], data, about="0" * 64 if turn % 3 else "")
        answer, _ = it.read(0, site.session.answer(frame))
        assert answer.kind in ("refused", "done", "message")
        codes.add(answer.code)
    assert {"signature", "malformed", "message", "unknown_order"} <= codes
    assert not any(code.startswith("unexpected") for code in codes)
    assert len(site.audit()) > 5000
    assert site.vault.charged("run-1") in ([], [1])
    begun(it, 2).to_the_end()


def open_frame_payload(it: Field, frame: bytes) -> bytes:
    from common.frames import Order

    return open_frame(Order, it.coordinator.public, frame)[1]


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Some bytes changed, cut, doubled or put in."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(0, len(out) + 1))
        match int(rng.integers(4)):
            case 0 if place < len(out):
                out[place] ^= 1 << int(rng.integers(8))
            case 1:
                del out[place : place + int(rng.integers(1, 40))]
            case 2:
                out[place:place] = system_bytes(int(rng.integers(1, 20)))
            case _:
                out += out[place : place + 10]
    return bytes(out)
