"""Every attack of the study, against the real machines: the named error at the right party, and nothing revealed.

The coordinator of these tests owns its signing key and relays everything, so it can say whatever it likes and sign it;
what it cannot do is sign as a site, unless that site colludes.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from federation import MODEL, Attempt, Federation, opened, with_policy

from common.codec.layout import Layout
from common.codec.vector import VectorSpec, decode_words, encode_body
from common.errors import (
    AdapterError,
    ChecksumMismatch,
    KeyRefused,
    MalformedMessage,
    NotFiniteValue,
    OutOfTurn,
    PolicyRefused,
    ReplayRefused,
    RerunRefused,
    SecureSumError,
    ShareRefused,
    SignatureRefused,
    SurvivorsRefused,
    TooFewSites,
    VectorRefused,
    WrongContext,
)
from common.identity import Identity
from common.secure_sum.config import RoundConfig, SumPolicy
from common.secure_sum.coordinator import Stage
from common.secure_sum.derivations import hash_survivors
from common.secure_sum.messages import (
    COORDINATOR,
    Advertise,
    Complaint,
    Confirm,
    ConfirmList,
    KeyList,
    Masked,
    Refuse,
    Reveal,
    Revealed,
    RoundStart,
    ShareForward,
    Shares,
    Survivors,
    encode,
)
from common.secure_sum.primitives import new_private_key, public_key
from common.secure_sum.site import SiteRound, refuse
from common.secure_sum.state import PeerKeys, Phase


def revealed(attempt: Attempt) -> list[int]:
    return [site for stage, site in attempt.sent if stage is Stage.REVEAL]


def sent_in(attempt: Attempt, stage: Stage) -> list[int]:
    return [site for when, site in attempt.sent if when is stage]


def ended(attempt: Attempt, kind: type[SecureSumError], *sites: int) -> None:
    """These sites, and no others, ended with this error, and hold no secret any more."""
    assert {site: type(error) for site, error in attempt.failed.items()} == dict.fromkeys(sites, kind)
    for site in sites:
        state = attempt.rounds[site].state
        assert state is None or (state.phase is Phase.OVER and not state.shares and not state.seed)


def replaced(
    federation: Federation, victims: tuple[int, ...], change: Callable[..., object]
) -> Callable[[int, bytes], bytes]:
    """The coordinator sends the victims another body, signed by itself."""

    def tamper(site: int, data: bytes) -> bytes:
        if site not in victims:
            return data
        message = opened(data, federation)
        return federation.forge(message.turn, change(message.body))  # type: ignore[arg-type]

    return tamper


# Keys.


def test_a_swapped_key_is_refused_by_whoever_sees_it() -> None:
    federation = Federation(4)
    attempt = federation.attempt().run_to(Stage.SHARES)

    def swap(body: KeyList) -> KeyList:
        original = opened(body.advertised[1], federation)
        keys = replace(original.body, masking_key=public_key(new_private_key()))
        # The coordinator has no key of site 1, so it signs with another.
        forged = encode(federation.coordinator_identity, original.turn, 1, keys)
        return KeyList((body.advertised[0], forged, *body.advertised[2:]))

    attempt.to_site = replaced(federation, (0, 2), swap)
    attempt.exchange()
    ended(attempt, SignatureRefused, 0, 2)
    assert sent_in(attempt, Stage.SHARES) == [1, 3]
    with pytest.raises(TooFewSites):
        attempt.advance()


def test_swapped_bytes_of_a_signed_key_are_refused() -> None:
    federation = Federation(4)
    attempt = federation.attempt().run_to(Stage.SHARES)
    for place in range(34, 34 + 128, 31):

        def flip(body: KeyList, place: int = place) -> KeyList:
            raw = bytearray(body.advertised[1])
            raw[place] ^= 1
            return KeyList((body.advertised[0], bytes(raw), *body.advertised[2:]))

        fresh = SiteRound(federation.sites[0], federation.stores[0])
        fresh.state = attempt.rounds[0].state
        with pytest.raises(SignatureRefused):
            fresh.receive(replaced(federation, (0,), flip)(0, attempt.outgoing[0]))


def test_own_keys_must_come_back_unchanged() -> None:
    federation = Federation(4)
    first = federation.attempt().run_to(Stage.SHARES)
    # Site 0 restarts its attempt with other keys, which it signed too.
    other = SiteRound(
        federation.sites[0], replace(federation.stores[0], kept=replace(federation.stores[0].kept, newest=(-1, -1, -1)))
    )
    again = other.start(federation.agreed, first.coordinator.start()[0])
    first.to_site = replaced(federation, (0,), lambda body: KeyList((again, *body.advertised[1:])))
    first.exchange()
    ended(first, KeyRefused, 0)


def test_a_repeated_key_is_refused() -> None:
    federation = Federation(4)
    attempt = federation.attempt()
    taken: list[Advertise] = []

    def copy(site: int, data: bytes) -> bytes:
        message = opened(data, federation)
        if site == 2:  # colludes, and takes site 1's key for its own
            return federation.forge(message.turn, replace(message.body, masking_key=taken[1].masking_key), sender=2)
        taken.append(message.body)
        return data

    attempt.to_coordinator = copy
    attempt.exchange()
    assert isinstance(attempt.refused[2], KeyRefused)
    assert attempt.coordinator.record().dropped == {2: "key"}
    # A coordinator that lets it through meets the sites.
    attempt.advance()
    message = opened(attempt.sent[Stage.ADVERTISE, 2], federation)
    copied = federation.forge(message.turn, replace(message.body, masking_key=taken[1].masking_key), sender=2)
    attempt.to_site = replaced(
        federation, (0, 1), lambda body: KeyList((*body.advertised[:2], copied, *body.advertised[2:]))
    )
    attempt.exchange()
    ended(attempt, KeyRefused, 0, 1)


@pytest.mark.parametrize("which", ["masking_key", "sealing_key"])
def test_a_key_of_low_order_is_refused(which: str) -> None:
    federation = Federation(5)
    attempt = federation.attempt()
    weak: list[bytes] = []

    def weaken(site: int, data: bytes) -> bytes:
        if site != 3:
            return data
        message = opened(data, federation)
        weak.append(federation.forge(message.turn, replace(message.body, **{which: bytes(32)}), sender=3))
        return weak[0]

    attempt.to_coordinator = weaken
    attempt.exchange()
    assert {site: type(error) for site, error in attempt.refused.items()} == {3: KeyRefused}
    attempt.advance()
    # A coordinator that relays it all the same meets the sites.
    attempt.to_site = replaced(
        federation, (0, 1), lambda body: KeyList((*body.advertised[:3], weak[0], *body.advertised[3:]))
    )
    attempt.exchange()
    ended(attempt, KeyRefused, 0, 1)


def test_a_key_list_may_not_hold_a_site_twice_or_a_site_that_was_not_invited() -> None:
    federation = Federation(6)
    attempt = federation.attempt(invited=[0, 1, 2, 3, 4]).run_to(Stage.SHARES)
    outsider = SiteRound(federation.sites[5], federation.stores[5])
    start = RoundStart(MODEL, (0, 1, 2, 3, 5), attempt.config.canonical())
    key = outsider.start(federation.agreed, federation.forge(federation.turn(), start))
    for extra in (key, opened(attempt.outgoing[0], federation).body.advertised[1]):
        fresh = SiteRound(federation.sites[0], federation.stores[0])
        fresh.state = attempt.rounds[0].state
        with pytest.raises(KeyRefused):
            fresh.receive(
                replaced(federation, (0,), lambda body, extra=extra: KeyList((*body.advertised, extra)))(
                    0, attempt.outgoing[0]
                )
            )


def test_too_short_a_key_list_is_refused() -> None:
    federation = Federation(7)
    attempt = federation.attempt().run_to(Stage.SHARES)
    attempt.to_site = replaced(federation, (0,), lambda body: KeyList(body.advertised[:4]))
    attempt.exchange()
    ended(attempt, TooFewSites, 0)


# Rounds, adapters, configurations.


def test_a_replayed_round_is_refused_also_after_a_restart() -> None:
    federation = Federation(3)
    attempt = federation.attempt(5)
    start = attempt.outgoing[0]
    attempt.finish()
    assert federation.stores[0].kept.newest == (1, 5, 0)
    saves = federation.stores[0].saves
    for _ in range(2):  # the second time from the disk, in a process that knows nothing else
        round_ = SiteRound(federation.sites[0], federation.stores[0])
        with pytest.raises(ReplayRefused):
            round_.start(federation.agreed, start)
        assert round_.state is None
    older = federation.attempt(4, 9).outgoing[0]
    with pytest.raises(ReplayRefused):
        SiteRound(federation.sites[0], federation.stores[0]).start(federation.agreed, older)
    assert federation.stores[0].saves == saves


def test_a_message_of_another_round_does_not_fit() -> None:
    federation = Federation(3)
    first = federation.attempt(1).run_to(Stage.SHARES)
    old = dict(first.outgoing)
    second = federation.attempt(2).run_to(Stage.SHARES)
    second.to_site = lambda site, data: old[site] if site == 1 else data
    second.exchange()
    ended(second, WrongContext, 1)
    # And a site's old answer does not fit at the coordinator.
    third = federation.attempt(3)
    third.to_coordinator = lambda site, data: first.sent[Stage.ADVERTISE, 1] if site == 1 else data
    third.exchange()
    assert isinstance(third.refused[1], WrongContext)
    assert third.coordinator.record().dropped == {1: "context"}


def test_another_adapter_than_the_one_named_is_refused() -> None:
    federation = Federation(4)
    attempt = federation.attempt()
    attempt.agreed[2] = replace(federation.agreed, model_hash=b"x" * 32)
    attempt.exchange()
    ended(attempt, WrongContext, 2)
    assert sent_in(attempt, Stage.ADVERTISE) == [0, 1, 3]


def attempt_with_another_adapter(federation: Federation) -> Attempt:
    """Site 3 receives another adapter, whose hash is in the RoundStart that it is sent."""
    attempt = federation.attempt()
    attempt.agreed[3] = replace(federation.agreed, model_hash=b"x" * 32)
    attempt.to_site = replaced(federation, (3,), lambda body: replace(body, model_hash=b"x" * 32))
    attempt.exchange()
    attempt.to_site = lambda site, data: data
    return attempt


def test_another_adapter_to_one_site_is_seen_by_the_coordinator_and_by_every_site() -> None:
    federation = Federation(4)
    attempt = attempt_with_another_adapter(federation)
    assert isinstance(attempt.refused[3], WrongContext)
    attempt.advance()
    # A coordinator that wants it so relays the key all the same.
    added = attempt.sent[Stage.ADVERTISE, 3]
    attempt.outgoing[3] = attempt.outgoing[0]
    attempt.to_site = replaced(federation, (0, 1, 2, 3), lambda body: KeyList((*body.advertised, added)))
    attempt.exchange()
    ended(attempt, WrongContext, 0, 1, 2, 3)
    assert sent_in(attempt, Stage.SHARES) == []


@pytest.mark.parametrize("dropped", [(), (1,)])
def test_a_vector_under_another_adapter_leaves_noise_that_is_rejected(
    dropped: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the contexts of keys not compared and shares not sealed under them, the masks would still not cancel."""
    federation = Federation(5)
    attempt = federation.attempt().run_to(Stage.SHARES)
    deceived = SiteRound(federation.sites[3], federation.stores[3])
    deceived.state = replace(attempt.rounds[3].state, context=b"x" * 32)

    def unchecked(site: object, state: object, raw: bytes) -> PeerKeys:
        message = opened(raw, federation)
        return PeerKeys(message.sender, message.body.sealing_key, message.body.masking_key)

    with monkeypatch.context() as patch:
        patch.setattr("common.secure_sum.site._checked_key", unchecked)
        deceived.receive(attempt.outgoing[3])
    attempt.run_to(Stage.MASKED)
    attempt.exchange(silent=(3, *dropped))
    attempt.rounds[3].receive(attempt.outgoing[3])
    # Site 3 masks with the pair keys of its own context; all else is as it should be.
    attempt.rounds[3].state = replace(attempt.rounds[3].state, mask_keys=deceived.state.mask_keys)
    attempt.hand_in(3, attempt.rounds[3].release(federation.bodies[3]))
    assert attempt.refused == {}
    attempt.advance()
    result = attempt.finish()
    survivors = tuple(site for site in range(5) if site not in dropped)
    assert result.record.survivors == survivors
    assert np.count_nonzero(result.words[:-2] == federation.plain_sum(survivors)) == 0
    with pytest.raises(ChecksumMismatch):
        attempt.decoded(result)


LOOSER: list[tuple[str, dict[str, object]]] = [
    ("threshold", {"threshold": 6, "share_threshold": 6}),
    ("max_colluding", {"max_colluding": 1}),
    ("least_honest", {"least_honest": 1}),
    ("min_sites", {"min_sites": 4}),
    ("survive", {"min_sites": 11}),
    ("graph", {"share_threshold": 2}),
    ("graph", {"neighbours": 2}),
    ("words", {"words": 3}),
    ("bits", {"bits": 20}),
    ("lane bits", {"lane_bits": 16}),
    ("weights", {"weights": 2}),
    ("rounding", {"rounding": 1}),
    ("vector spec", {"spec_digest": bytes(32)}),
    ("schema", {"schema_digest": bytes(32)}),
    ("manifest", {"manifest_hash": bytes(32)}),
    ("privacy mechanism", {"dp_digest": b"d" * 32}),
    ("invited", {"sites": 9}),
]


@pytest.mark.parametrize(("word", "change"), LOOSER)
def test_a_configuration_looser_than_agreed_is_refused(word: str, change: dict[str, object]) -> None:
    federation = Federation(10, colluding=2, min_sites=5)
    attempt = federation.attempt()
    config = replace(attempt.config, **change)  # type: ignore[arg-type]
    attempt.to_site = replaced(federation, (4,), lambda body: replace(body, config=config.canonical()))
    attempt.exchange()
    ended(attempt, PolicyRefused, 4)
    assert word in str(attempt.failed[4])
    answer = refuse(federation.sites[4], federation.turn(), attempt.failed[4])
    assert opened(answer, federation).body == Refuse("sum_policy")
    attempt.hand_in(4, answer)
    assert attempt.coordinator.record().dropped == {4: "refused:sum_policy"}


@pytest.mark.parametrize("policy", [SumPolicy(min_sites=6), SumPolicy(max_colluding=3), SumPolicy(least_honest=3)])
def test_a_site_may_ask_for_more_than_its_roster(policy: SumPolicy) -> None:
    federation = Federation(10, colluding=2, min_sites=5)
    with_policy(federation, 4, policy)
    attempt = federation.attempt()
    attempt.exchange()
    ended(attempt, PolicyRefused, 4)


def test_a_looser_policy_is_refused() -> None:
    for values in (
        {"min_sites": 2},
        {"least_honest": 1},
        {"max_colluding": -1},
        {"min_sites": 1, "unsafe_two_sites": True},
    ):
        with pytest.raises(PolicyRefused):
            SumPolicy(**values)  # type: ignore[arg-type]


def test_more_sites_than_the_lanes_hold_are_refused() -> None:
    federation = Federation(5, sites_most=4)
    with pytest.raises(PolicyRefused, match="lanes"):
        federation.attempt()


@pytest.mark.parametrize("invited", [(1, 2, 3, 4), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5)])
def test_the_invited_are_the_site_and_others_of_the_roster(invited: tuple[int, ...]) -> None:
    federation = Federation(5)
    attempt = federation.attempt()
    attempt.to_site = replaced(federation, (0,), lambda body: replace(body, invited=invited))
    attempt.exchange()
    ended(attempt, PolicyRefused, 0)


def test_only_the_coordinator_of_the_roster_starts_a_round() -> None:
    federation = Federation(3)
    start = opened(federation.attempt().outgoing[0], federation)
    site = federation.sites[0]
    stranger = encode(Identity.generate(), start.turn, COORDINATOR, start.body)
    peer = federation.forge(start.turn, start.body, sender=1)
    other = federation.forge(replace(start.turn, federation=b"G" * 16), start.body)
    epoch = federation.forge(replace(start.turn, epoch=2), start.body)
    for data, kind in (
        (stranger, SignatureRefused),
        (peer, WrongContext),
        (other, WrongContext),
        (epoch, WrongContext),
    ):
        with pytest.raises(kind):
            SiteRound(site, federation.stores[0]).start(federation.agreed, data)
    assert federation.stores[0].saves == 0


# Shares.


def test_shares_that_were_tampered_with_end_in_a_complaint() -> None:
    federation = Federation(5)
    attempt = federation.attempt().run_to(Stage.MASKED)

    def flip(body: ShareForward) -> ShareForward:
        sealed = dict(body.sealed)
        sealed[3] = bytes([sealed[3][0] ^ 1]) + sealed[3][1:]
        return replace(body, sealed=sealed)

    attempt.to_site = replaced(federation, (1,), flip)
    attempt.exchange()
    ended(attempt, ShareRefused, 1)
    assert attempt.failed[1].sites == (3,)  # type: ignore[attr-defined]
    complaint = attempt.rounds[1].refuse(attempt.failed[1])
    body = opened(complaint, federation).body
    assert body == Complaint(3, attempt.rounds[0].state.keys_hash)
    attempt.hand_in(1, complaint)
    assert attempt.coordinator.record().dropped == {1: "complaint:3"}
    # The others go on without it.
    attempt.to_site = lambda site, data: data
    attempt.advance()
    assert np.array_equal(attempt.finish().words[:-2], federation.plain_sum((0, 2, 3, 4)))


def test_shares_for_another_site_do_not_open() -> None:
    federation = Federation(5)
    attempt = federation.attempt().run_to(Stage.MASKED)
    for_two = opened(attempt.outgoing[2], federation).body.sealed
    attempt.to_site = replaced(federation, (1,), lambda body: replace(body, sealed={**body.sealed, 3: for_two[3]}))
    attempt.exchange()
    ended(attempt, ShareRefused, 1)


@pytest.mark.parametrize(
    ("peers", "kind"),
    [((0, 1, 2, 3), SurvivorsRefused), ((0, 1, 4), TooFewSites), ((0, 1, 2, 3, 4, 6), SurvivorsRefused)],
)
def test_the_sites_that_shared_are_this_one_and_others_with_keys(
    peers: tuple[int, ...], kind: type[SecureSumError]
) -> None:
    federation = Federation(7)
    attempt = federation.attempt()
    attempt.exchange(silent=(6,))
    attempt.advance()
    attempt.run_to(Stage.MASKED)
    attempt.to_site = replaced(
        federation,
        (4,),
        lambda body: ShareForward(peers, {site: body.sealed.get(site, bytes(82)) for site in peers if site != 4}),
    )
    attempt.exchange()
    ended(attempt, kind, 4)


def test_a_neighbours_share_may_not_be_withheld() -> None:
    federation = Federation(5)
    attempt = federation.attempt().run_to(Stage.MASKED)
    attempt.to_site = replaced(
        federation,
        (0,),
        lambda body: replace(body, sealed={site: data for site, data in body.sealed.items() if site != 2}),
    )
    attempt.exchange()
    ended(attempt, ShareRefused, 0)


def wrong_reveals(federation: Federation, attempt: Attempt, liars: tuple[int, ...]) -> None:
    def lie(site: int, data: bytes) -> bytes:
        message = opened(data, federation)
        if site not in liars:
            return data
        shares = {
            peer: (which, bytes([share[0] ^ 1]) + share[1:]) for peer, (which, share) in message.body.shares.items()
        }
        return federation.forge(message.turn, Reveal(message.body.list_hash, shares), sender=site)

    attempt.to_coordinator = lie


def test_a_wrong_share_is_found_and_its_site_named() -> None:
    federation = Federation(10)
    attempt = federation.attempt().run_to(Stage.REVEAL, {9: Stage.MASKED})
    wrong_reveals(federation, attempt, (1,))
    attempt.exchange()
    result = attempt.coordinator.open_sum()
    assert np.array_equal(result.words[:-2], federation.plain_sum(tuple(range(9))))
    assert result.record.faults == {1: "share"}


def test_too_many_wrong_shares_open_nothing() -> None:
    federation = Federation(4)
    attempt = federation.attempt().run_to(Stage.REVEAL)
    wrong_reveals(federation, attempt, (1, 3))
    attempt.exchange()
    with pytest.raises(ShareRefused):
        attempt.coordinator.open_sum()


def test_shares_other_than_those_due_are_refused() -> None:
    federation = Federation(5)
    attempt = federation.attempt().run_to(Stage.REVEAL, {4: Stage.MASKED})

    def change(site: int, data: bytes) -> bytes:
        message = opened(data, federation)
        shares = dict(message.body.shares)
        if site == 0:
            shares[4] = (Revealed.SEED, shares[4][1])
        elif site == 1:
            del shares[2]
        else:
            return data
        return federation.forge(message.turn, Reveal(message.body.list_hash, shares), sender=site)

    attempt.to_coordinator = change
    attempt.exchange()
    assert {site: type(error) for site, error in attempt.refused.items()} == {0: ShareRefused, 1: ShareRefused}
    with pytest.raises(TooFewSites):
        attempt.coordinator.open_sum()


# Survivors.


def survivors_without(*gone: int) -> Callable[[Survivors], Survivors]:
    return lambda body: replace(
        body, vector_hashes={site: value for site, value in body.vector_hashes.items() if site not in gone}
    )


def test_a_living_site_said_to_be_gone_refuses() -> None:
    federation = Federation(10)
    attempt = federation.attempt().run_to(Stage.CONFIRM)
    attempt.to_site = replaced(federation, tuple(range(10)), survivors_without(4))
    attempt.exchange()
    assert type(attempt.failed[4]) is SurvivorsRefused
    assert set(attempt.failed) == {4}
    assert attempt.rounds[4].state.phase is Phase.OVER


def test_two_lists_of_survivors_reveal_nothing() -> None:
    """Half of the sites are told that site 9 is gone; neither list gets the signatures that it needs."""
    federation = Federation(10)
    attempt = federation.attempt().run_to(Stage.CONFIRM)
    attempt.to_site = replaced(federation, (0, 1, 2, 3, 4), survivors_without(9))
    attempt.exchange()
    assert attempt.failed == {}
    assert {type(attempt.refused[site]) for site in range(5)} == {SurvivorsRefused}
    with pytest.raises(TooFewSites):
        attempt.advance()
    # The coordinator hands out what it has: all ten signatures to everybody.
    every = ConfirmList(tuple(attempt.sent[Stage.CONFIRM, site] for site in range(10)))
    five = ConfirmList(tuple(attempt.sent[Stage.CONFIRM, site] for site in range(5, 10)))
    for site, body, kind in ((0, every, SurvivorsRefused), (5, every, SurvivorsRefused), (6, five, TooFewSites)):
        with pytest.raises(kind) as caught:
            attempt.rounds[site].receive(federation.forge(federation.turn(), body))
        assert attempt.rounds[site].state.phase is Phase.OVER
        if kind is SurvivorsRefused:  # the other list under a site's signature is evidence
            evidence = opened(caught.value.evidence, federation)
            assert evidence.body.list_hash != opened(attempt.sent[Stage.CONFIRM, site], federation).body.list_hash


def test_colluding_sites_that_sign_both_lists_do_not_open_both_secrets() -> None:
    """n = 10, c = 3: sites 0 to 2 sign whatever the coordinator wants, and it splits the seven honest ones."""
    federation = Federation(10, colluding=3)
    attempt = federation.attempt().run_to(Stage.CONFIRM)
    honest = range(3, 10)
    told = {site: survivors_without(9) if site < 6 else survivors_without() for site in honest}
    lists = {site: told[site](opened(attempt.outgoing[site], federation).body) for site in honest}
    signed = {}
    for site in honest:
        signed[site] = attempt.rounds[site].receive(federation.forge(federation.turn(), lists[site]))
    kinds = set()
    for site in honest:
        hash_ = opened(signed[site], federation).body.list_hash
        same = [other for other in honest if opened(signed[other], federation).body.list_hash == hash_]
        forged = [federation.forge(federation.turn(), Confirm(hash_), sender=colluding) for colluding in (0, 1, 2)]
        data = federation.forge(federation.turn(), ConfirmList((*forged, *(signed[other] for other in same))))
        if site < 6:  # three honest votes and three colluding ones are fewer than seven
            with pytest.raises(TooFewSites):
                attempt.rounds[site].receive(data)
        else:
            answer = attempt.rounds[site].receive(data)
            assert answer is not None
            kinds.add(opened(answer, federation).body.shares[9][0])
    assert kinds == {Revealed.SEED}


def test_overlapping_lists_cannot_be_said() -> None:
    """Flower's SecAgg+ took one list of living and one of dead sites; here a site is in the one list or it is not.

    So the attack is to ask twice: by a list with site 9, and by one without.
    """
    federation = Federation(10)
    attempt = federation.attempt().run_to(Stage.CONFIRM)
    without = federation.forge(federation.turn(), survivors_without(9)(opened(attempt.outgoing[0], federation).body))
    for order in ((attempt.outgoing[0], without), (without, attempt.outgoing[0])):
        round_ = SiteRound(federation.sites[0], federation.stores[0])
        round_.state = attempt.rounds[0].state
        assert round_.receive(order[0]) is not None
        with pytest.raises(OutOfTurn):
            round_.receive(order[1])
        with pytest.raises(OutOfTurn):  # the attempt is over, also for the list that it signed
            round_.receive(order[0])
    raw = bytearray(attempt.outgoing[1])
    listed = opened(attempt.outgoing[1], federation).body
    twice = Survivors(listed.peers_hash, listed.vector_hashes)
    packed = twice.encode()
    entry = packed[34:68]
    again = packed[:32] + (11).to_bytes(2, "little") + packed[34:68] + entry + packed[68:]

    class Raw(Survivors):
        def encode(self) -> bytes:
            return again

    assert raw
    with pytest.raises(MalformedMessage):
        attempt.rounds[1].receive(federation.forge(federation.turn(), Raw(listed.peers_hash, {})))


def test_every_site_reveals_one_share_of_each_peer_and_only_once() -> None:
    federation = Federation(6)
    attempt = federation.attempt().run_to(Stage.REVEAL, {5: Stage.MASKED})
    messages = dict(attempt.outgoing)
    attempt.exchange()
    for site in range(5):
        body = opened(attempt.sent[Stage.REVEAL, site], federation).body
        assert {peer: which for peer, (which, _) in body.shares.items()} == {
            peer: Revealed.KEY if peer == 5 else Revealed.SEED for peer in range(6)
        }
        with pytest.raises(OutOfTurn):
            attempt.rounds[site].receive(messages[site])


def test_too_few_survivors_are_refused_whatever_the_coordinator_says() -> None:
    federation = Federation(10)
    attempt = federation.attempt().run_to(Stage.CONFIRM)
    attempt.to_site = replaced(federation, tuple(range(10)), survivors_without(6, 7, 8, 9))
    attempt.exchange()
    # Those left out refuse as well.
    assert {type(attempt.failed[site]) for site in range(6)} == {TooFewSites}
    assert sent_in(attempt, Stage.CONFIRM) == []


@pytest.mark.parametrize(("gone", "refused"), [(3, False), (4, True)])
def test_the_smallest_crowd_is_exactly_the_threshold(gone: int, refused: bool) -> None:
    federation = Federation(10)
    attempt = federation.attempt().run_to(Stage.CONFIRM)
    attempt.to_site = replaced(federation, (0,), survivors_without(*range(10 - gone, 10)))
    attempt.exchange()
    assert (0 in attempt.failed) == refused


@pytest.mark.parametrize(("count", "refused"), [(7, False), (6, True)])
def test_exactly_the_threshold_must_confirm(count: int, refused: bool) -> None:
    federation = Federation(10)
    attempt = federation.attempt().run_to(Stage.REVEAL)
    attempt.to_site = replaced(federation, (0,), lambda body: ConfirmList(body.confirmed[:count]))
    attempt.exchange()
    assert (0 in attempt.failed) == refused
    if refused:
        ended(attempt, TooFewSites, 0)


def test_the_sites_own_policy_counts_too() -> None:
    federation = Federation(10)
    attempt = federation.attempt().run_to(Stage.CONFIRM)
    with_policy(federation, 0, SumPolicy(min_sites=9))
    attempt.rounds[0].site = federation.sites[0]
    attempt.to_site = replaced(federation, (0,), survivors_without(8, 9))
    attempt.exchange()
    ended(attempt, TooFewSites, 0)


def test_a_false_list_of_survivors_is_refused() -> None:
    federation = Federation(10)
    attempt = federation.attempt()
    attempt.exchange()
    attempt.advance()
    attempt.exchange(silent=(9,))
    attempt.advance()
    attempt.run_to(Stage.CONFIRM)
    changes = {
        0: lambda body: replace(body, vector_hashes={**body.vector_hashes, 0: bytes(32)}),  # another vector of its own
        1: lambda body: replace(body, vector_hashes={**body.vector_hashes, 9: bytes(32)}),  # a site without shares
        2: lambda body: replace(body, peers_hash=bytes(32)),
    }
    attempt.to_site = lambda site, data: (
        replaced(federation, (site,), changes[site])(site, data) if site in changes else data
    )
    attempt.exchange()
    ended(attempt, SurvivorsRefused, 0, 1, 2)


@pytest.mark.parametrize("bad", ["twice", "stranger", "other attempt", "other kind", "unsigned"])
def test_confirmations_are_counted_once_each_of_survivors_alone(bad: str) -> None:
    federation = Federation(10)
    attempt = federation.attempt().run_to(Stage.REVEAL, {9: Stage.MASKED})
    list_hash = opened(attempt.sent[Stage.CONFIRM, 0], federation).body.list_hash
    turn = federation.turn()

    def change(body: ConfirmList) -> ConfirmList:
        extra = {
            "twice": body.confirmed[-1],
            "stranger": federation.forge(turn, Confirm(list_hash), sender=9),
            "other attempt": federation.forge(replace(turn, attempt=1), Confirm(list_hash), sender=8),
            "other kind": federation.forge(turn, Refuse("x" * 31), sender=8),
            "unsigned": encode(Identity.generate(), turn, 8, Confirm(list_hash)),
        }[bad]
        return ConfirmList((*body.confirmed[:6], extra))

    attempt.to_site = replaced(federation, (0,), change)
    if bad == "twice":
        attempt.to_site = replaced(federation, (0,), lambda body: ConfirmList((*body.confirmed[:6], body.confirmed[5])))
    attempt.exchange()
    kinds = {"other attempt": WrongContext, "other kind": WrongContext, "unsigned": SignatureRefused}
    ended(attempt, kinds.get(bad, SurvivorsRefused), 0)


def test_a_sparse_graph_checks_every_half_neighbourhood(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.secure_sum import graph

    # Twelve sites on a ring of four neighbours, as if that were enough.
    monkeypatch.setattr("common.secure_sum.config.choose_degree", lambda *_: graph.Degree(4, 3, 0))
    federation = Federation(12)
    attempt = federation.attempt().run_to(Stage.CONFIRM)
    keys_hash = attempt.rounds[0].state.keys_hash
    ring = graph.draw_ring(keys_hash, range(12), attempt.config.degree)
    attempt.to_site = replaced(federation, (ring.order[0],), survivors_without(ring.order[5]))
    attempt.exchange()
    ended(attempt, SurvivorsRefused, ring.order[0])


# Vectors.


def test_a_late_vector_is_thrown_away() -> None:
    federation = Federation(5)
    attempt = federation.attempt().run_to(Stage.MASKED)
    attempt.exchange(silent=(4,))
    round_ = attempt.rounds[4]
    round_.receive(attempt.outgoing[4])
    attempt.advance()
    late = round_.release(federation.bodies[4])
    total = attempt.coordinator._sum.copy()
    attempt.hand_in(4, late)
    assert isinstance(attempt.refused[4], OutOfTurn)
    assert np.array_equal(attempt.coordinator._sum, total)
    words = np.frombuffer(opened(late, federation).body.vector, "<u8")
    held = [value for value in vars(attempt.coordinator).values() if isinstance(value, np.ndarray)]
    assert not any(np.array_equal(value, words) for value in held)
    assert attempt.coordinator.record().dropped == {4: "late"}
    assert np.array_equal(attempt.finish().words[:-2], federation.plain_sum((0, 1, 2, 3)))


@pytest.mark.parametrize("bad", ["short", "long", "hash", "peers", "odd"])
def test_a_vector_that_is_not_whole_drops_its_site(bad: str) -> None:
    federation = Federation(5)
    attempt = federation.attempt().run_to(Stage.MASKED)

    def damage(site: int, data: bytes) -> bytes:
        if site != 2:
            return data
        if bad == "odd":
            return data[:-65] + data[-64:]
        message = opened(data, federation)
        vector = bytes(message.body.vector)
        body = {
            "short": replace(message.body, vector=vector[:-8]),
            "long": replace(message.body, vector=vector + bytes(8)),
            "hash": replace(message.body, vector=bytes([vector[0] ^ 1]) + vector[1:]),
            "peers": replace(message.body, peers_hash=bytes(32)),
        }[bad]
        if bad in ("short", "long"):
            from common.secure_sum.derivations import hash_vector

            body = replace(body, vector_hash=hash_vector(body.vector))
        return federation.forge(message.turn, body, sender=2)

    attempt.to_coordinator = damage
    attempt.exchange()
    kind = {"peers": WrongContext, "odd": SignatureRefused}.get(bad, VectorRefused)
    assert {site: type(error) for site, error in attempt.refused.items()} == {2: kind}
    assert attempt.coordinator.record().dropped == {2: kind.code}
    attempt.hand_in(2, attempt.sent[Stage.MASKED, 2])  # the right one afterwards does not count
    attempt.to_coordinator = lambda site, data: data
    attempt.advance()
    assert np.array_equal(attempt.finish().words[:-2], federation.plain_sum((0, 1, 3, 4)))


def test_a_second_vector_does_not_count() -> None:
    federation = Federation(4)
    attempt = federation.attempt().run_to(Stage.MASKED)
    attempt.exchange()
    message = opened(attempt.sent[Stage.MASKED, 1], federation)
    attempt.hand_in(1, attempt.sent[Stage.MASKED, 1])
    attempt.hand_in(1, federation.forge(message.turn, message.body, sender=1))
    assert isinstance(attempt.refused[1], OutOfTurn)
    attempt.advance()
    assert np.array_equal(attempt.finish().words[:-2], federation.plain_sum((0, 1, 2, 3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_number_never_becomes_a_vector(bad: float) -> None:
    federation = Federation(4)
    attempt = federation.attempt().run_to(Stage.MASKED)
    attempt.exchange(silent=(2,))
    attempt.rounds[2].receive(attempt.outgoing[2])
    state = {"a": np.zeros((3, 5), np.float32), "b": np.full(7, bad, np.float32)}
    with pytest.raises(NotFiniteValue) as caught:
        attempt.rounds[2].release(encode_body(state, {"examples": 1, "loss": 0}, federation.spec))
    attempt.hand_in(2, attempt.rounds[2].refuse(caught.value))
    assert attempt.coordinator.record().dropped == {2: "refused:not_finite"}
    attempt.advance()
    assert np.array_equal(attempt.finish().words[:-2], federation.plain_sum((0, 1, 3)))


def test_values_of_any_size_saturate_and_never_wrap_or_carry() -> None:
    federation = Federation(5)
    huge = {"a": np.full((3, 5), 3e38, np.float32), "b": np.full(7, -3e38, np.float32)}
    for site in range(5):
        federation.bodies[site] = encode_body(huge, {"examples": 1e308, "loss": -1e308}, federation.spec)
    attempt = federation.attempt()
    decoded = attempt.decoded(attempt.finish())
    assert decoded.state["a"] == pytest.approx(np.full((3, 5), 5 * 2.0))
    assert decoded.state["b"] == pytest.approx(np.full(7, -5 * 2.0))
    assert decoded.extras["examples"] == pytest.approx(5 * 2.0**32)
    assert decoded.extras["loss"] == pytest.approx(-5 * 2.0**32)


@pytest.mark.parametrize("body", [np.zeros(3, np.uint64), np.zeros(14, np.float64), np.zeros((1, 14), np.uint64)])
def test_a_vector_of_another_form_is_not_masked(body: np.ndarray) -> None:
    federation = Federation(3)
    attempt = federation.attempt().run_to(Stage.MASKED)
    attempt.exchange(silent=(0,))
    attempt.rounds[0].receive(attempt.outgoing[0])
    with pytest.raises(VectorRefused):
        attempt.rounds[0].release(body)
    assert attempt.rounds[0].state.phase is Phase.OVER


def test_another_layout_is_another_round() -> None:
    federation = Federation(3)
    attempt = federation.attempt()
    other = VectorSpec.of(Layout((("a", (5, 3)), ("b", (7,)))), 2.0, 3, extras=("examples", "loss"))
    attempt.agreed[1] = replace(federation.agreed, spec=other)
    attempt.exchange()
    ended(attempt, PolicyRefused, 1)
    with pytest.raises(AdapterError):
        encode_body({"a": np.zeros((3, 5), np.float32)}, {"examples": 0, "loss": 0}, federation.spec)


def test_a_sum_of_another_round_is_not_decoded() -> None:
    federation = Federation(3)
    result = federation.attempt().finish()
    with pytest.raises(ChecksumMismatch):
        decode_words(result.words, result.count, federation.spec, b"x" * 32)


# Again.


def test_a_second_sum_in_one_round_is_not_given_without_noise() -> None:
    """The coordinator has the sum of ten and wants the sum of nine, to subtract."""
    federation = Federation(10)
    federation.attempt(1, 0).finish()
    again = federation.attempt(1, 1, invited=list(range(9)))
    again.exchange()
    ended(again, RerunRefused, *range(9))
    assert sent_in(again, Stage.ADVERTISE) == []


def test_before_a_vector_left_a_retry_is_free() -> None:
    federation = Federation(4)
    federation.attempt(1, 0).run_to(Stage.MASKED)
    federation.bodies = [federation.encode(site) for site in range(4)]
    assert np.array_equal(federation.attempt(1, 1).finish().words[:-2], federation.plain_sum((0, 1, 2, 3)))


def test_with_noise_of_its_own_only_the_identical_vector_is_masked_anew() -> None:
    federation = Federation(5, policy=SumPolicy(noised_at_site=True))
    first = federation.attempt(1, 0)
    first.run_to(Stage.CONFIRM)
    second = federation.attempt(1, 1).run_to(Stage.MASKED)
    kept = federation.bodies[2]
    federation.bodies[2] = federation.encode(2)  # rounded anew
    assert not np.array_equal(kept, federation.bodies[2])
    second.exchange()
    ended(second, RerunRefused, 2)
    assert (Stage.MASKED, 2) not in second.sent
    federation.bodies[2] = kept
    third = federation.attempt(1, 2)
    result = third.finish()
    assert np.array_equal(result.words[:-2], federation.plain_sum(tuple(range(5))))
    # The masks are new, so the same vector looks like another.
    one = np.frombuffer(opened(first.sent[Stage.MASKED, 0], federation).body.vector, "<u8")
    other = np.frombuffer(opened(third.sent[Stage.MASKED, 0], federation).body.vector, "<u8")
    assert not np.any(one == other)
    # In the next round everybody may say something new.
    federation.bodies[2] = federation.encode(2)
    federation.attempt(2, 0).finish()


def test_of_two_attempts_at_once_only_the_newer_gives_a_vector() -> None:
    """Both are ready for a vector; if both got one, their survivors could differ by one site."""
    federation = Federation(4)
    older = federation.attempt(1, 0).run_to(Stage.MASKED)
    newer = federation.attempt(1, 1).run_to(Stage.MASKED)
    older.exchange()
    ended(older, OutOfTurn, 0, 1, 2, 3)
    assert sent_in(older, Stage.MASKED) == []
    newer.finish()


def test_a_restart_forgets_keys_and_answers_nothing_of_the_old_attempt() -> None:
    federation = Federation(4)
    attempt = federation.attempt().run_to(Stage.CONFIRM)
    restarted = SiteRound(federation.sites[1], federation.stores[1])
    with pytest.raises(OutOfTurn):
        restarted.receive(attempt.outgoing[1])
    with pytest.raises(ReplayRefused):
        restarted.start(federation.agreed, attempt.coordinator.start()[1])
    with pytest.raises(OutOfTurn):
        restarted.release(federation.bodies[1])
    with pytest.raises(OutOfTurn):
        restarted.refuse(OutOfTurn("nothing"))


# Turns and senders.


def test_a_site_takes_each_message_in_its_turn_alone() -> None:
    federation = Federation(3)
    attempt = federation.attempt()
    messages = {}
    for stage in list(Stage)[:-1]:
        messages[stage] = attempt.outgoing[0]
        attempt.exchange()
        attempt.advance()
    messages[Stage.REVEAL] = attempt.outgoing[0]
    fresh = federation.attempt(2)
    states = {}
    for stage in list(Stage)[:-1]:
        fresh.exchange()
        states[stage] = fresh.rounds[0].state
        fresh.advance()
    turn = federation.turn(2)
    for state in states.values():
        for stage, data in messages.items():
            body = opened(data, federation).body
            round_ = SiteRound(federation.sites[0], federation.stores[0])
            round_.state = state
            awaited = {
                Phase.KEYS: KeyList,
                Phase.SHARES: ShareForward,
                Phase.SURVIVORS: Survivors,
                Phase.CONFIRMATIONS: ConfirmList,
            }
            if isinstance(body, awaited[state.phase]):
                continue
            with pytest.raises(OutOfTurn):
                round_.receive(federation.forge(turn, body))
            assert round_.state.phase is Phase.OVER
            assert stage in messages
    with pytest.raises(OutOfTurn):
        attempt.rounds[0].start(federation.agreed, messages[Stage.ADVERTISE])
    with pytest.raises(OutOfTurn):
        SiteRound(federation.sites[0], federation.stores[0]).start(federation.agreed, messages[Stage.SHARES])


def test_a_site_cannot_speak_for_another() -> None:
    federation = Federation(4)
    attempt = federation.attempt()
    attempt.to_coordinator = lambda site, data: attempt.sent[Stage.ADVERTISE, 0] if site == 1 else data
    attempt.exchange()
    assert isinstance(attempt.refused[1], WrongContext)
    assert 1 not in attempt.coordinator.answered
    assert 0 in attempt.coordinator.answered
    stranger = encode(
        Identity.generate(), federation.turn(), 2, opened(attempt.sent[Stage.ADVERTISE, 2], federation).body
    )
    fresh = federation.attempt(2)
    fresh.hand_in(2, stranger)
    assert isinstance(fresh.refused[2], SignatureRefused)
    fresh.hand_in(9, stranger)
    assert isinstance(fresh.refused[9], OutOfTurn)
    assert fresh.coordinator.record().dropped == {2: "signature"}


def test_the_coordinator_takes_each_message_in_its_turn_alone() -> None:
    federation = Federation(4)
    done = federation.attempt(1)
    done.finish()
    attempt = federation.attempt(2)
    for stage in Stage:
        for other in Stage:
            if other is not stage:
                body = opened(done.sent[other, 0], federation).body
                with pytest.raises(OutOfTurn):
                    attempt.coordinator.receive(0, federation.forge(federation.turn(2), body, sender=0))
        with pytest.raises(MalformedMessage):
            attempt.coordinator.receive(3, federation.forge(federation.turn(2), KeyList(()), sender=3))
        attempt.exchange(silent=(3,))
        if stage is not Stage.REVEAL:
            attempt.advance()
    assert np.array_equal(attempt.coordinator.open_sum().words[:-2], federation.plain_sum((0, 1, 2)))
    with pytest.raises(OutOfTurn):
        attempt.coordinator.advance()


def test_a_site_that_shares_with_others_than_its_neighbours_is_dropped() -> None:
    federation = Federation(5)
    attempt = federation.attempt().run_to(Stage.SHARES)

    def cut(site: int, data: bytes) -> bytes:
        message = opened(data, federation)
        if site == 1:
            sealed = {peer: value for peer, value in message.body.sealed.items() if peer != 3}
            return federation.forge(message.turn, replace(message.body, sealed=sealed), sender=1)
        if site == 2:
            return federation.forge(message.turn, Shares(bytes(32), message.body.sealed), sender=2)
        return data

    attempt.to_coordinator = cut
    attempt.exchange()
    assert {site: type(error) for site, error in attempt.refused.items()} == {1: ShareRefused, 2: WrongContext}
    with pytest.raises(TooFewSites):
        attempt.advance()


def test_a_refusal_is_taken_once_and_not_after_an_answer() -> None:
    federation = Federation(5)
    attempt = federation.attempt()
    attempt.hand_in(0, federation.forge(federation.turn(), Refuse("policy"), sender=0))
    assert attempt.coordinator.record().dropped == {0: "refused:policy"}
    attempt.exchange(silent=(0,))
    attempt.hand_in(1, federation.forge(federation.turn(), Refuse("policy"), sender=1))
    assert isinstance(attempt.refused[1], OutOfTurn)
    assert attempt.coordinator.ready
    attempt.advance()
    assert np.array_equal(attempt.finish().words[:-2], federation.plain_sum((1, 2, 3, 4)))


def test_a_confirmation_of_another_list_is_a_fault_and_not_counted() -> None:
    federation = Federation(5)
    attempt = federation.attempt().run_to(Stage.CONFIRM)
    attempt.to_coordinator = lambda site, data: (
        federation.forge(federation.turn(), Confirm(bytes(32)), sender=3) if site == 3 else data
    )
    attempt.exchange()
    assert attempt.coordinator.ready
    attempt.advance()
    result = attempt.finish()
    assert result.record.faults == {3: "survivors"}
    assert 3 in result.record.survivors


def test_hashes_of_lists_tell_every_difference() -> None:
    base = {1: b"a" * 32, 2: b"b" * 32}
    lists = [base, {1: b"a" * 32}, {1: b"b" * 32, 2: b"a" * 32}, {1: b"a" * 32, 3: b"b" * 32}, {}]
    assert len({hash_survivors(bytes(32), one) for one in lists} | {hash_survivors(b"x" * 32, base)}) == len(lists) + 1


def test_a_round_configuration_has_one_form() -> None:
    config = Federation(4).attempt().config
    assert RoundConfig.parse(config.canonical()) == config
    for bad in (b"", config.canonical()[:-1], config.canonical() + b"\0", replace(config, version=2).canonical()):
        with pytest.raises(MalformedMessage):
            RoundConfig.parse(bad)


def test_a_masked_vector_says_nothing_it_should_not() -> None:
    federation = Federation(3)
    attempt = federation.attempt().run_to(Stage.CONFIRM)
    body: Masked = opened(attempt.sent[Stage.MASKED, 0], federation).body
    words = np.frombuffer(body.vector, "<u8")
    assert not np.any(words[:-2] == federation.bodies[0])
    assert len(body.vector) == 8 * federation.spec.words
