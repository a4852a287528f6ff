"""A ledger that was put back from a copy: coordinator and peers show it, and nobody can invent it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sum_attempts import Attempt
from vault_field import STEPS, Field, SiteHere

from client.ledger import Account, Charge, Ledger
from common.bounds import bounds
from common.config.manifest import Manifest
from common.errors import MalformedMessage, SecureSumError, SignatureRefused, WrongContext
from common.frames import Answer
from common.identity import Identity
from common.ledger_statement import STATEMENT_BYTES, LedgerStatement
from common.roster import FEDERATION_BYTES
from common.secure_sum.messages import (
    COORDINATOR,
    MOST_HANDED_BACK,
    Advertise,
    Confirm,
    ConfirmList,
    KeyList,
    Refuse,
    Turn,
    encode,
    read,
)
from common.secure_sum.witness import witnessed


@pytest.fixture
def it(tmp_path: Path, manifest_for: Callable[..., Manifest]) -> Field:
    training = {"rounds": 6, "local_steps": 4, "learning_rate": 0.02, "weight_decay": 0.0}
    manifest = manifest_for(
        training=training,
        aggregation={"method": "separate", "weighting": "uniform"},
        secure_sum={"enabled": True},
        privacy={"epsilon": 50.0, "delta": 1e-3},
    )
    return Field(tmp_path, manifest)


def begun(it: Field, number: int, attempt: int = 0) -> Attempt:
    return Attempt(it, it.header(number, ranges=bounds(it.manifest, it.adapter, number)), attempt)


def spend(site: SiteHere, times: int = 1) -> None:
    """Charges that come of no round here."""
    assert site.ledger is not None
    for _ in range(times):
        site.ledger.charge(Account("people", 1e6, 1e-3), Charge("people", "record", "f", "0" * 64, "r", 1, STEPS), [])


def copied(site: SiteHere) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (site.folder / "ledger").iterdir()}


def put_back(site: SiteHere, copy: dict[Path, bytes]) -> None:
    for path, data in copy.items():
        path.write_bytes(data)
    site.ledger = Ledger(site.folder / "ledger")
    site.start()


def private_files(site: SiteHere) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (site.folder / "runs").glob(".*")}


def refused(it: Field, answer: Answer, code: str, site: int = 0) -> None:
    assert (answer.kind, answer.code) == ("refused", code)
    line = it.sites[site].audit()[-1]
    assert (line.decision, line.code) == ("refused", code)


def statement(it: Field, site: int, **values: Any) -> LedgerStatement:
    """A site's own, by default as true as it looks: `key` signs in its place."""
    ledger: Ledger = values.pop("ledger", it.sites[0].ledger)
    said: dict[str, Any] = {"federation": it.roster.federation, "site": site, "number": 9, "digest": "d" * 64, **values}
    key = said.pop("key", None) or it.keys[site]
    seal = ledger.seal(said["federation"], said["number"], said["digest"])
    return LedgerStatement.of(key, seal=seal, **said)


# The coordinator hands back.


def test_a_copy_stops_the_vault_until_the_newest_is_back(it: Field) -> None:
    site = it.sites[0]
    begun(it, 1).to_the_end()
    copy = copied(site)
    begun(it, 2).to_the_end()
    it.say(0, "hello")
    assert LedgerStatement.parse(bytes.fromhex(it.seen[0])).number == 2
    newest = copied(site)
    put_back(site, copy)
    refused(it, it.say(0, "request", begun(it, 3).out[0])[0], "snapshot")
    it.forgets = True
    site.start()
    refused(it, it.say(0, "hello")[0], "snapshot")  # not only while the coordinator reminds it
    assert site.vault.trained == 0
    put_back(site, newest)
    assert it.say(0, "hello")[0].kind == "done"


def test_another_ledger_in_its_place_stops_the_vault_too(it: Field, tmp_path: Path) -> None:
    begun(it, 1).to_the_end()
    it.say(0, "hello")
    it.sites[0].ledger = Ledger(tmp_path / "fresh")
    it.sites[0].start()
    refused(it, it.say(0, "hello")[0], "snapshot")
    spend(it.sites[0], 3)
    refused(it, it.say(0, "hello")[0], "snapshot")


@pytest.mark.parametrize(
    ("lie", "code"),
    [
        ("unsigned", "signature"),
        ("another key", "signature"),
        ("one bit", "signature"),
        ("another site", "context"),
        ("another federation", "context"),
        ("another version", "malformed"),
        ("entries of nothing", "malformed"),
    ],
)
def test_a_false_end_is_refused_and_changes_nothing(it: Field, lie: str, code: str) -> None:
    begun(it, 1).to_the_end()
    it.say(0, "hello")
    good = statement(it, 0).raw
    said = {
        "unsigned": good[:-64] + bytes(64),
        "another key": statement(it, 0, key=Identity.generate()).raw,
        "one bit": bytes([*good[:20], good[20] ^ 1, *good[21:]]),
        "another site": bytes.fromhex(it.seen[1]),
        "another federation": statement(it, 0, federation=bytes(FEDERATION_BYTES)).raw,
        "another version": b"\2" + good[1:],
        "entries of nothing": good[:19] + bytes(8) + good[27:],
    }[lie]
    before = private_files(it.sites[0])
    for kind in ("hello", "request", "cancel"):
        payload = begun(it, 2).out[0] if kind == "request" else b""
        refused(it, it.say(0, kind, payload, seen=said.hex())[0], code)
    assert private_files(it.sites[0]) == before
    assert it.sites[0].vault.trained == 1
    assert it.say(0, "hello")[0].kind == "done"
    it.sites[0].start()
    it.forgets = True
    assert begun(it, 2).to_the_end()


def test_an_end_that_is_no_statement_at_all_is_refused(it: Field) -> None:
    order = it.order(0, "hello")
    head = order[8:].replace(b'"seen":""', b'"seen":"00"')
    body = (int.from_bytes(order[:8], "big") + 2).to_bytes(8, "big") + head[:-64]
    frame = body + it.coordinator.sign(b"coadapt order 1", body)
    refused(it, it.give(0, frame)[0], "malformed")


def test_an_older_end_is_true_and_stops_nothing(it: Field) -> None:
    it.say(0, "hello")
    seen = [it.seen[0]]
    for number in (1, 2):
        begun(it, number).to_the_end()
        it.say(0, "hello")
        seen.append(it.seen[0])
    assert len(set(seen)) == 3
    for old in [*reversed(seen), seen[2]]:
        assert it.say(0, "hello", seen=old)[0].kind == "done"
    it.forgets = True
    assert begun(it, 3).to_the_end()


def test_an_institution_with_a_new_key_gets_back_what_its_ledger_sealed(it: Field) -> None:
    """Its number and key are others then; the ledger that it took along tells that the words are its own."""
    former, site = Identity.generate(), it.sites[0]
    spend(site)
    copy = copied(site)
    spend(site)
    assert site.ledger is not None
    number, digest = site.ledger.head()
    said = statement(it, 7, key=former, number=number, digest=digest).raw.hex()
    assert it.say(0, "hello", seen=said)[0].kind == "done"
    put_back(site, copy)
    refused(it, it.say(0, "hello", seen=said)[0], "snapshot")


# Peers hand back, where the coordinator forgets or hides it.


def test_peers_show_a_copy_though_the_coordinator_hides_it(it: Field) -> None:
    it.forgets = True
    site = it.sites[0]
    begun(it, 1).to_the_end()
    copy = copied(site)
    begun(it, 2).to_the_end()  # that round's charge is in the Confirm alone
    newest = copied(site)
    put_back(site, copy)
    attempt = begun(it, 3)
    attempt.ask()
    attempt.go_on()
    _, said = it.say(0, "message", attempt.out[0])
    assert read(said, it.roster.public_key_of).body == Refuse("snapshot")
    assert it.sites[0].audit()[-1].code == "snapshot"
    refused(it, it.say(0, "message", attempt.out[0], sequence=10**6)[0], "snapshot")
    it.clock = 10**6
    site.start()
    refused(it, it.say(0, "hello")[0], "snapshot")  # and it stays so
    put_back(site, newest)
    assert it.say(0, "hello")[0].kind == "done"
    assert begun(it, 4).to_the_end()


def test_peers_remember_over_restarts(it: Field) -> None:
    it.forgets = True
    begun(it, 1).to_the_end()
    for site in it.sites:
        site.start()
        file = site.folder / "runs" / f".ledgers-{it.roster.federation.hex()}.json"
        assert file.stat().st_mode & 0o777 == 0o600
    attempt = begun(it, 2)
    for number, (_, said) in attempt.ask().items():
        body = read(said, it.roster.public_key_of).body
        assert isinstance(body, Advertise)
        assert sorted(body.seen) == [other for other in range(3) if other != number]
        assert {LedgerStatement.verified(each, it.roster, other).number for other, each in body.seen.items()} == {1}


def test_a_damaged_memory_of_ledgers_stops_the_vault(it: Field) -> None:
    begun(it, 1).to_the_end()
    file = it.sites[0].folder / "runs" / f".ledgers-{it.roster.federation.hex()}.json"
    for data in (b"", file.read_bytes()[:-9], file.read_bytes().replace(b'"1":', b'"7":', 1), b'{"peers":{"1":"00"}}'):
        file.write_bytes(data)
        with pytest.raises(Exception, match="damaged"):
            it.sites[0].start()


def by_peer(it: Field, raw: bytes, **values: Any) -> bytes:
    """A peer's message with other values, signed by that peer: it works with the coordinator."""
    message = read(raw, it.roster.public_key_of)
    body = type(message.body)(**{**vars(message.body), **values})
    return encode(it.keys[message.sender], message.turn, message.sender, body)


@pytest.mark.parametrize("lie", ["of others", "of itself"])
def test_a_peer_that_lies_is_left_out_by_the_coordinator_and_believed_by_nobody(it: Field, lie: str) -> None:
    it.forgets = True
    begun(it, 1).to_the_end()
    before = private_files(it.sites[0])
    false = statement(it, 0, key=it.keys[1]).raw
    values = {"seen": {0: false}} if lie == "of others" else {"ledger": statement(it, 1, key=Identity.generate()).raw}
    attempt = begun(it, 2)
    answers = attempt.ask(0, 2)
    _, said = it.settled(1, attempt.out[1])
    changed = by_peer(it, said, **values)
    with pytest.raises(SignatureRefused):
        attempt.round.receive(1, changed)
    assert attempt.round.record().dropped[1] == "signature"
    # A coordinator that passes it on all the same stops this attempt and nothing else.
    keys = KeyList(tuple(answers[n][1] if n != 1 else changed for n in range(3)))
    _, said = it.say(0, "message", encode(it.coordinator, attempt.round.turn, COORDINATOR, keys))
    assert read(said, it.roster.public_key_of).body == Refuse("signature")
    after = private_files(it.sites[0])
    assert {path: data for path, data in after.items() if "ledgers" in path.name} == {
        path: data for path, data in before.items() if "ledgers" in path.name
    }
    assert begun(it, 3).to_the_end()


def test_a_false_word_in_a_confirmation_reveals_nothing(it: Field) -> None:
    attempt = begun(it, 1)
    for _ in range(3):
        attempt.ask()
        attempt.go_on()
    answers = {n: it.settled(n, attempt.out[n])[1] for n in range(3)}
    changed = by_peer(it, answers[1], ledger=statement(it, 1, key=Identity.generate()).raw)
    with pytest.raises(SignatureRefused):
        attempt.round.receive(1, changed)
    body = ConfirmList((answers[0], changed, answers[2]))
    _, said = it.say(0, "message", encode(it.coordinator, attempt.round.turn, COORDINATOR, body))
    assert read(said, it.roster.public_key_of).body == Refuse("signature")
    honest = read(answers[0], it.roster.public_key_of).body
    assert isinstance(honest, Confirm)
    assert LedgerStatement.verified(honest.ledger, it.roster, 0).number == 1


def test_a_statement_of_another_site_in_its_own_place_is_refused(it: Field) -> None:
    begun(it, 1).to_the_end()
    attempt = begun(it, 2)
    _, said = it.settled(1, attempt.out[1])
    other = read(it.settled(2, attempt.out[2])[1], it.roster.public_key_of).body
    assert isinstance(other, Advertise)
    with pytest.raises(WrongContext):
        attempt.round.receive(1, by_peer(it, said, ledger=other.ledger))


# Form.


@given(data=st.binary(min_size=0, max_size=2 * STATEMENT_BYTES))
def test_bytes_are_a_statement_or_malformed(data: bytes) -> None:
    try:
        found = LedgerStatement.parse(data)
    except MalformedMessage:
        return
    assert found.raw == data


@given(
    number=st.integers(0, 2**64 - 1),
    digest=st.binary(min_size=32, max_size=32),
    site=st.integers(0, 2047),
    flip=st.integers(0, 8 * STATEMENT_BYTES - 1),
)
def test_a_statement_reads_as_it_was_written_and_no_bit_may_change(
    number: int, digest: bytes, site: int, flip: int
) -> None:
    key = Identity(bytes(range(32)))
    made = LedgerStatement.of(
        key, federation=bytes(16), site=site, number=number, digest=digest.hex() if number else "", seal=digest
    )
    assert LedgerStatement.parse(made.raw) == made
    made.require_signed(key.public)
    data = bytearray(made.raw)
    data[flip // 8] ^= 1 << flip % 8
    with pytest.raises(SecureSumError):
        LedgerStatement.parse(bytes(data)).require_signed(key.public)


@given(sites=st.sets(st.integers(0, 2047), min_size=2, max_size=60), number=st.integers(0, 10**6))
def test_every_site_has_as_many_witnesses_as_it_is_one_for(sites: set[int], number: int) -> None:
    invited = sorted(sites)
    for round_number in range(number, number + len(invited)):
        turn = Turn(bytes(16), 1, round_number, 0)
        chosen = {site: witnessed(invited, site, turn) for site in invited}
        most = min(len(invited) - 1, MOST_HANDED_BACK)
        assert all(len(set(found)) == most and site not in found for site, found in chosen.items())
        assert all(sum(site in found for found in chosen.values()) == most for site in invited)
    turns = [Turn(bytes(16), 1, number + n, 0) for n in range(len(invited))]
    met = {peer for turn in turns for peer in witnessed(invited, invited[0], turn)}
    assert met == set(invited) - {invited[0]}
