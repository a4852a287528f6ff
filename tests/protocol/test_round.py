"""Honest rounds: the sum is exact, the record names the survivors, and a state can move between processes."""

import numpy as np
import pytest
from federation import Federation, Memory
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codec.fixed_point import step_of
from common.codec.layout import Layout
from common.errors import OutOfTurn, SecureSumError, TooFewSites
from common.secure_sum import site as site_machine
from common.secure_sum.config import SumPolicy
from common.secure_sum.coordinator import Stage
from common.secure_sum.primitives import seal
from common.secure_sum.state import Phase, SiteMemory, SiteState


def test_ten_sites_two_drop_after_sharing_and_one_is_late() -> None:
    federation = Federation(10)
    attempt = federation.attempt()
    attempt.run_to(Stage.MASKED)
    late: list[bytes] = []

    def hold_back(site: int, data: bytes) -> bytes | None:
        if site == 8:
            late.append(data)
            return None
        return data

    attempt.to_coordinator = hold_back
    attempt.exchange(silent=(2, 5))
    assert not attempt.coordinator.ready
    assert attempt.coordinator.enough
    attempt.advance()
    before = attempt.coordinator._sum.copy()
    attempt.hand_in(8, late[0])
    assert isinstance(attempt.refused[8], OutOfTurn)
    assert np.array_equal(attempt.coordinator._sum, before)
    attempt.to_coordinator = lambda site, data: data
    result = attempt.finish()
    survivors = (0, 1, 3, 4, 6, 7, 9)

    assert np.array_equal(result.words[:-2], federation.plain_sum(survivors))
    assert result.record.survivors == survivors
    assert dict(result.record.dropped) == {2: "silent:masked", 5: "silent:masked", 8: "late"}
    assert result.record.faults == {}
    assert result.count == 7
    decoded = attempt.decoded(result)
    assert decoded.extras == {
        "examples": sum(100.0 + site for site in survivors),
        "loss": sum(0.25 * site for site in survivors),
    }
    assert attempt.failed == {}


def test_everybody_answers() -> None:
    federation = Federation(5)
    attempt = federation.attempt()
    for _ in range(4):
        assert not attempt.coordinator.ready
        attempt.exchange()
        assert attempt.coordinator.ready
        attempt.advance()
    result = attempt.finish()
    assert attempt.coordinator.ready
    assert np.array_equal(result.words[:-2], federation.plain_sum(tuple(range(5))))
    assert result.record.bytes_in == sum(len(data) for data in attempt.sent.values())
    assert result.record.list_hash == attempt.rounds[0].state.list_hash


def test_only_those_invited_take_part() -> None:
    federation = Federation(7)
    result = federation.attempt(invited=[0, 2, 3, 6]).finish()
    assert np.array_equal(result.words[:-2], federation.plain_sum((0, 2, 3, 6)))


def test_a_part_of_an_adapter_is_summed_within_its_error() -> None:
    federation = Federation(4, layout=Layout((("only.B", (40, 4)),)))
    attempt = federation.attempt()
    result = attempt.finish({1: Stage.MASKED})
    decoded = attempt.decoded(result)
    exact = np.zeros((40, 4))
    for site in (0, 2, 3):
        levels = federation.spec.lanes.unpack(federation.bodies[site][:-2], 160)
        exact += (levels * step_of(2.0, federation.spec.bits) - 2.0).reshape(40, 4)
    assert np.abs(decoded.state["only.B"] - exact).max() < 1e-9


def test_two_sites_if_both_say_so() -> None:
    policy = SumPolicy(min_sites=2, unsafe_two_sites=True)
    federation = Federation(2, min_sites=2, policy=policy)
    result = federation.attempt().finish()
    assert np.array_equal(result.words[:-2], federation.plain_sum((0, 1)))
    careful = Federation(2, min_sites=2)
    attempt = careful.attempt()
    attempt.exchange()
    assert [error.code for error in attempt.failed.values()] == ["sum_policy"] * 2


@pytest.mark.slow
def test_above_128_sites_the_graph_is_sparse() -> None:
    federation = Federation(131)
    attempt = federation.attempt()
    assert 0 < attempt.config.neighbours < 60
    lost = dict.fromkeys(range(3, 131, 20), Stage.MASKED)
    result = attempt.finish(lost | {1: Stage.SHARES, 4: Stage.CONFIRM, 5: Stage.REVEAL})
    survivors = tuple(site for site in range(131) if site not in {*lost, 1})
    assert attempt.failed == {}
    assert result.record.survivors == survivors
    assert np.array_equal(result.words[:-2], federation.plain_sum(survivors))
    attempt.decoded(result)


STAGES = st.sampled_from(list(Stage))


@given(data=st.data(), count=st.integers(3, 9), colluding=st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_any_dropouts_give_the_exact_sum_or_nothing(data: st.DataObject, count: int, colluding: int) -> None:
    federation = Federation(count, colluding=min(colluding, count - 2))
    attempt = federation.attempt()
    lost = data.draw(st.dictionaries(st.integers(0, count - 1), STAGES, max_size=count))
    config, order = attempt.config, list(Stage)
    present = {
        stage: sum(order.index(lost.get(site, Stage.REVEAL)) > place or site not in lost for site in range(count))
        for place, stage in enumerate(order)
    }
    needed = dict.fromkeys(order[:3], config.least_survivors) | {Stage.CONFIRM: config.threshold}
    above = (
        all(present[stage] >= least for stage, least in needed.items()) and present[Stage.REVEAL] >= config.threshold
    )
    survivors = tuple(
        site for site in range(count) if site not in lost or order.index(lost[site]) > order.index(Stage.MASKED)
    )
    if above:
        result = attempt.finish(lost)
        assert np.array_equal(result.words[:-2], federation.plain_sum(survivors))
        assert result.record.survivors == survivors
        attempt.decoded(result)
        return
    with pytest.raises(TooFewSites):
        attempt.finish(lost)
    # Below the threshold no share is out, unless all that is missing is shares themselves.
    revealed = [key for key in attempt.sent if key[0] is Stage.REVEAL]
    assert len(revealed) < config.threshold
    if not all(present[stage] >= least for stage, least in needed.items()):
        assert revealed == []


def test_a_state_moves_between_processes() -> None:
    federation = Federation(4)
    attempt = federation.attempt()
    seen = set()

    def move(site: int, data: bytes) -> bytes:
        state = attempt.rounds[site].state
        if state is not None:
            moved = SiteState.from_bytes(state.to_bytes())
            assert moved == state
            attempt.rounds[site].state = moved
            seen.add(state.phase)
        return data

    attempt.to_site = move
    result = attempt.finish({3: Stage.MASKED})
    assert np.array_equal(result.words[:-2], federation.plain_sum((0, 1, 2)))
    assert seen == {Phase.KEYS, Phase.SHARES, Phase.SURVIVORS, Phase.CONFIRMATIONS}
    memory = federation.stores[0].kept
    assert SiteMemory.from_bytes(memory.to_bytes()) == memory
    for kind in (SiteState, SiteMemory):
        for bad in (b"", b"{}", b"[]", memory.to_bytes()[:-1], memory.to_bytes().replace(b"newest", b"oldest")):
            with pytest.raises(SecureSumError):
                kind.from_bytes(bad)


def test_secrets_are_forgotten_and_not_printed() -> None:
    federation = Federation(3)
    attempt = federation.attempt()
    attempt.run_to(Stage.SHARES)
    state = attempt.rounds[0].state
    secrets = {state.seed, state.sealing_key, state.masking_key}
    assert all(len(secret) == 32 for secret in secrets)
    assert not any(secret.hex() in repr(state) or repr(secret) in repr(state) for secret in secrets)
    attempt.run_to(Stage.CONFIRM)
    kept = attempt.rounds[0].state.to_bytes()
    assert not any(secret.hex().encode() in kept for secret in secrets)
    assert attempt.rounds[0].state.mask_keys == ()
    assert len(attempt.rounds[0].state.shares) == 3
    attempt.finish()
    assert attempt.rounds[0].state.phase is Phase.OVER
    assert attempt.rounds[0].state.shares == ()


def test_memory_is_on_the_disk_before_an_answer_is_out() -> None:
    class Full(Memory):
        def save(self, memory: SiteMemory) -> None:
            raise OSError("no space left")

    federation = Federation(3)
    attempt = federation.attempt()
    attempt.rounds[1]._store = Full(federation.stores[1].kept)
    with pytest.raises(OSError, match="no space"):
        attempt.exchange()
    assert (Stage.ADVERTISE, 1) not in attempt.sent
    attempt = federation.attempt(2)
    attempt.run_to(Stage.MASKED)
    attempt.rounds[1]._store = Full(federation.stores[1].kept)
    with pytest.raises(OSError, match="no space"):
        attempt.exchange()
    assert (Stage.MASKED, 1) not in attempt.sent
    assert attempt.rounds[1].state.phase is Phase.OVER


def test_no_key_seals_twice_under_one_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[bytes, bytes]] = []

    def spy(key: bytes, nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
        used.append((key, nonce))
        return seal(key, nonce, plaintext, associated)

    monkeypatch.setattr(site_machine, "seal", spy)
    federation = Federation(5)
    for number, again in ((1, 0), (1, 1), (2, 0)):
        federation.attempt(number, again).run_to(Stage.MASKED)
    assert len(used) == 3 * 5 * 4
    assert len(set(used)) == len(used)


def test_no_mask_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[list[tuple[bytes, int]]] = []
    real = site_machine.apply_masks

    def spy(words: object, given_: list[tuple[bytes, int]]) -> None:
        masks.append(given_)
        real(words, given_)

    monkeypatch.setattr(site_machine, "apply_masks", spy)
    federation = Federation(4, policy=SumPolicy(noised_at_site=True))
    for number, again in ((1, 0), (1, 1), (2, 0)):
        federation.attempt(number, again).run_to(Stage.CONFIRM)
    every = [key for given_ in masks for key, _ in given_]
    # Three attempts of four sites, each with a mask of its own and one half of three pairs.
    assert len(every) == 3 * 4 * 4
    assert len(set(every)) == 3 * (4 + 6)
    for place in range(3):
        signs: dict[bytes, list[int]] = {}
        for given_ in masks[4 * place : 4 * place + 4]:
            for key, sign in given_:
                signs.setdefault(key, []).append(sign)
        assert sorted(sorted(both) for both in signs.values()) == [[-1, 1]] * 6 + [[1]] * 4


def test_a_transcript_is_the_same_for_the_same_messages_alone() -> None:
    federation = Federation(3)
    one, other = federation.attempt(1).finish().record, federation.attempt(2).finish().record
    assert one.transcript != other.transcript
    assert one.turn != other.turn
