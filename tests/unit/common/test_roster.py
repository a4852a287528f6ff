from dataclasses import replace

import pytest

from common.errors import RosterRefused
from common.identity import Identity
from common.roster import Institution, Roster, SignedRoster, verify_roster

IDENTITIES = [Identity(bytes([number + 1]) * 32) for number in range(6)]
COORDINATOR = Identity(b"\xaa" * 32)


def roster_of(count: int = 5, *, min_sites: int = 3, max_colluding: int = 0) -> Roster:
    return Roster(
        federation=b"F" * 16,
        epoch=7,
        coordinator=COORDINATOR.public,
        min_sites=min_sites,
        max_colluding=max_colluding,
        institutions=tuple(
            Institution(site=site, name=f"Klinik {site} é", public=IDENTITIES[site].public) for site in range(count)
        ),
    )


def signed_by_all(roster: Roster) -> SignedRoster:
    signatures = {
        entry.site: IDENTITIES[entry.site].sign(b"coadapt roster/1", roster.digest()) for entry in roster.institutions
    }
    return SignedRoster(roster=roster, signatures=signatures)


def accept(signed: SignedRoster, own: Identity = IDENTITIES[0], pinned: bytes | None = None, **flags: bool) -> Roster:
    return verify_roster(signed, own_key=own.public, pinned=pinned or signed.roster.digest(), **flags)


def test_a_roster_that_all_signed_is_accepted_by_all_in_it() -> None:
    signed = signed_by_all(roster_of())
    for own in (*IDENTITIES[:5], COORDINATOR):
        assert accept(signed, own) == signed.roster
    assert signed.roster.site_of(IDENTITIES[3].public) == 3
    assert signed.roster.public_key_of(3) == IDENTITIES[3].public
    assert signed.roster.sign(IDENTITIES[2]) == signed.signatures[2]
    for missing in (5, 65535):
        with pytest.raises(RosterRefused):
            signed.roster.public_key_of(missing)


def test_the_own_key_must_be_in_it() -> None:
    with pytest.raises(RosterRefused, match="own key"):
        accept(signed_by_all(roster_of()), IDENTITIES[5])


def test_it_must_be_the_one_that_was_compared() -> None:
    with pytest.raises(RosterRefused, match="compared"):
        accept(signed_by_all(roster_of()), pinned=roster_of(4).digest())


@pytest.mark.parametrize("site", range(5))
def test_every_signature_is_needed_and_must_be_its_own(site: int) -> None:
    signed = signed_by_all(roster_of())
    without = {other: signature for other, signature in signed.signatures.items() if other != site}
    with pytest.raises(RosterRefused, match=f"site {site} .* has not signed"):
        accept(replace(signed, signatures=without))
    for wrong in (
        signed.signatures[(site + 1) % 5],
        bytes(64),
        b"",
        IDENTITIES[site].sign(b"other", signed.roster.digest()),
    ):
        with pytest.raises(RosterRefused, match=f"signature of site {site}"):
            accept(replace(signed, signatures={**signed.signatures, site: wrong}))


def test_a_signature_of_nobody_in_it_is_refused() -> None:
    signed = signed_by_all(roster_of())
    with pytest.raises(RosterRefused, match="site 5"):
        accept(replace(signed, signatures={**signed.signatures, 5: bytes(64)}))


def test_an_added_entry_breaks_the_signatures_of_the_others() -> None:
    signed = signed_by_all(roster_of())
    added = Institution(site=5, name="Not a clinic", public=IDENTITIES[5].public)
    larger = replace(signed.roster, institutions=(*signed.roster.institutions, added))
    signatures = {**signed.signatures, 5: larger.sign(IDENTITIES[5])}
    with pytest.raises(RosterRefused, match="signature of site 0"):
        accept(SignedRoster(roster=larger, signatures=signatures))


def entry(place: int, **changes: object) -> Institution:
    return replace(roster_of(6).institutions[place], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"institutions": (entry(0), entry(1), entry(2), entry(3, public=IDENTITIES[0].public))},
        {"institutions": (entry(0), entry(1), entry(2), entry(3, site=2))},
        {"institutions": (entry(0), entry(2), entry(1), entry(3))},
        {"institutions": (entry(0), entry(1), entry(2), entry(3, name="Klinik 0 é"))},
        {"institutions": (entry(0), entry(1), entry(2), entry(3, name=""))},
        {"institutions": (entry(0), entry(1), entry(2), entry(3, name="a\nb"))},
        {"institutions": (entry(0), entry(1), entry(2), entry(3, name="x" * 201))},
        {"institutions": (entry(0), entry(1), entry(2), entry(3, public=bytes(31)))},
        {"institutions": (entry(0), entry(1), entry(2), entry(3, site=2048))},
        {"institutions": (entry(0), entry(1))},
        {"coordinator": IDENTITIES[1].public},
        {"federation": b"F" * 15},
        {"epoch": 2**32},
        {"epoch": -1},
        {"min_sites": 2},
        {"min_sites": 6},
        {"max_colluding": 4},
        {"max_colluding": 3, "institutions": tuple(entry(site) for site in range(4))},
        {"max_colluding": -1},
    ],
)
def test_a_roster_that_breaks_a_rule_is_refused(changes: dict[str, object]) -> None:
    roster = replace(roster_of(), **changes)  # type: ignore[arg-type]
    try:
        signed = signed_by_all(roster)
        pinned = roster.digest()
    except Exception:  # it cannot even be written down
        signed, pinned = SignedRoster(roster=roster), bytes(32)
    with pytest.raises(RosterRefused):
        accept(signed, pinned=pinned)


def test_more_colluding_sites_need_a_larger_threshold() -> None:
    for colluding in range(4):
        accept(signed_by_all(roster_of(max_colluding=colluding)))


def test_two_sites_only_with_the_flag() -> None:
    signed = signed_by_all(roster_of(2, min_sites=2))
    with pytest.raises(RosterRefused, match="3 to"):
        accept(signed)
    assert accept(signed, unsafe_two_sites=True) == signed.roster


def test_everything_in_it_is_in_its_hash() -> None:
    roster = roster_of()
    changed = [
        roster,
        replace(roster, federation=b"G" * 16),
        replace(roster, epoch=8),
        replace(roster, coordinator=IDENTITIES[5].public),
        replace(roster, min_sites=4),
        replace(roster, max_colluding=1),
        roster_of(4),
        replace(roster, institutions=(*roster.institutions[:4], entry(4, name="Other"))),
        replace(roster, institutions=(*roster.institutions[:4], entry(4, public=IDENTITIES[5].public))),
        replace(roster, institutions=(*roster.institutions[:4], entry(5))),
    ]
    assert len({one.digest() for one in changed}) == len(changed)


def test_the_file_form_and_back() -> None:
    signed = signed_by_all(roster_of())
    assert SignedRoster.from_json(signed.to_json()) == signed
    half = replace(signed, signatures={0: signed.signatures[0]})
    assert SignedRoster.from_json(half.to_json()) == half


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ('"version": 1', '"version": 2'),
        ('"epoch": 7', '"epoch": "7"'),
        ('"epoch": 7', '"epoch": 7, "more": 1'),
        ('"epoch": 7,', ""),
        ('"federation": "46', '"federation": "'),
        ('"site": 3', '"site": -3'),
        ("{", "["),
    ],
)
def test_a_file_that_is_none_is_refused(find: str, put: str) -> None:
    text = signed_by_all(roster_of()).to_json()
    assert find in text
    with pytest.raises(RosterRefused, match="cannot be read"):
        SignedRoster.from_json(text.replace(find, put, 1))
