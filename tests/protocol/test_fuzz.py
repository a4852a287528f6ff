"""A hundred thousand mutated messages at every parser and at both machines: named errors, no hang, no growth of memory.

Half of them are signed again after the change by whoever could have sent them, so that they pass the signature and
reach the parsers and the rules behind.
"""

import copy
import gc
import time
from collections import Counter

import numpy as np
import psutil
import pytest
from federation import Attempt, Federation, opened

from common.errors import MessageError, SecureSumError
from common.identity import SIGNATURE_BYTES
from common.randomness import seeded
from common.secure_sum.coordinator import CoordinatorRound, Stage, _Books
from common.secure_sum.messages import COORDINATOR, Complaint, Kind, Refuse
from common.secure_sum.site import release, start, step
from common.secure_sum.state import SiteState

COUNT = 100_000
MOST_GROWTH_KIBIBYTES = 48 * 1024
MOST_SECONDS_EACH = 2.0
LABEL = b"secsum/1"
EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def snapshot(coordinator: CoordinatorRound) -> CoordinatorRound:
    other = copy.copy(coordinator)
    other._answers = {stage: dict(answers) for stage, answers in coordinator._answers.items()}
    other._books = _Books(dropped=dict(coordinator._books.dropped))
    other._sum = coordinator._sum.copy()
    return other


class Corpus:
    """Valid messages of every type, and both machines in every state."""

    def __init__(self) -> None:
        self.federation = Federation(4)
        attempt = self.federation.attempt()
        self.attempt: Attempt = attempt
        self.to_site: list[bytes] = []
        self.to_coordinator: list[bytes] = []
        self.states: list[SiteState] = []
        self.coordinators: list[CoordinatorRound] = []
        for stage in Stage:
            self.to_site.append(attempt.outgoing[0])
            self.coordinators.append(snapshot(attempt.coordinator))
            attempt.exchange(silent=(3,) if stage is Stage.MASKED else ())
            self.to_coordinator.append(attempt.sent[stage, 0])
            self.states.append(attempt.rounds[0].state)
            if stage is not Stage.REVEAL:
                attempt.advance()
        turn = self.federation.turn()
        for body in (Refuse("policy"), Complaint(1, bytes(32))):
            self.to_coordinator.append(self.federation.forge(turn, body, sender=0))

    def kinds(self) -> set[int]:
        return {data[1] for data in (*self.to_site, *self.to_coordinator)}


def resident_kibibytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss) // 1024


def mutated(data: bytes, others: list[bytes], draws: np.random.Generator) -> bytes:
    """One to three changes: flipped bits, numbers at their edges, cuts, additions, repeats, parts of others."""
    raw = bytearray(data)
    for _ in range(int(draws.integers(1, 4))):
        place = int(draws.integers(len(raw) + 1)) if raw else 0
        other = others[int(draws.integers(len(others)))]
        match int(draws.integers(8)):
            case 0 if raw:
                raw[place % len(raw)] ^= 1 << int(draws.integers(8))
            case 1:
                del raw[place:]
            case 2:
                raw[place:place] = draws.bytes(int(draws.integers(1, 40)))
            case 3:
                size = int(draws.choice([1, 2, 4, 8]))
                raw[place : place + size] = (EDGES[int(draws.integers(len(EDGES)))] % 2 ** (8 * size)).to_bytes(
                    size, "little"
                )
            case 4:
                del raw[place : place + int(draws.integers(1, 100))]
            case 5:
                raw[place:] = other[place:]
            case 6:
                length = int(draws.integers(1, 300))
                raw[place:place] = raw[place : place + length]
            case _:
                raw[1:2] = bytes([int(draws.integers(16))])
    return bytes(raw)


def signed_again(federation: Federation, raw: bytes, sender: int) -> bytes:
    identity = federation.coordinator_identity if sender == COORDINATOR else federation.identities[sender]
    content = raw[:-SIGNATURE_BYTES]
    return content + identity.sign(LABEL, content)


def one_by_one(count: int, seed: int) -> Counter[str]:
    """Feed `count` mutated messages; how each ended."""
    corpus, draws, ends = Corpus(), seeded(seed, "fuzz"), Counter[str]()
    federation, site = corpus.federation, corpus.federation.sites[0]
    memory = federation.stores[0].kept
    earlier = type(memory)(memory.federation)
    everything = [*corpus.to_site, *corpus.to_coordinator]
    for number in range(count):
        at_site = number % 2 == 0
        pool = corpus.to_site if at_site else corpus.to_coordinator
        choice = int(draws.integers(len(pool)))
        raw = mutated(pool[choice], everything, draws)
        signed = draws.random() < 0.5
        if signed:
            raw = signed_again(federation, raw, COORDINATOR if at_site else 0)
        genuine = raw in everything
        # Mostly the state that waits for this message, else any.
        which = choice if draws.random() < 0.8 else int(draws.integers(len(Stage)))
        began = time.perf_counter()
        try:
            if not at_site:
                snapshot(corpus.coordinators[min(which, len(Stage) - 1)]).receive(0, raw)
            elif which == 0:
                start(site, earlier, federation.agreed, raw)
            else:
                step(site, corpus.states[which - 1], raw)
            ends["taken"] += 1
            assert signed or genuine, "a message was taken that nobody signed"
        except (SecureSumError, MessageError) as error:
            ends[error.code] += 1
        assert time.perf_counter() - began < MOST_SECONDS_EACH
    return ends


def test_the_corpus_has_every_message() -> None:
    assert Corpus().kinds() == {int(kind) for kind in Kind}


def test_a_few_mutated_messages_end_in_named_errors() -> None:
    ends = one_by_one(2_000, seed=1)
    # They reach the rules behind the parsers.
    assert {"malformed", "signature", "context", "out_of_turn", "survivors", "share"} <= set(ends)


@pytest.mark.slow
def test_a_hundred_thousand_mutated_messages_end_in_named_errors() -> None:
    one_by_one(2_000, seed=2)
    before = resident_kibibytes()
    ends = one_by_one(COUNT, seed=3)
    after = resident_kibibytes()
    assert sum(ends.values()) == COUNT
    assert after - before < MOST_GROWTH_KIBIBYTES
    assert ends["taken"] < COUNT / 5
    assert len(ends) >= 8


def test_states_and_vectors_out_of_turn_end_in_named_errors() -> None:
    corpus = Corpus()
    site, memory = corpus.federation.sites[0], corpus.federation.stores[0].kept
    ended = 0
    for state in corpus.states:
        for body in (corpus.federation.bodies[0], np.zeros(0, np.uint64), np.zeros(5)):
            try:
                release(site, state, memory, body)
            except SecureSumError:
                ended += 1
    assert ended == 3 * len(corpus.states)
    assert opened(corpus.to_site[0], corpus.federation).sender == COORDINATOR
