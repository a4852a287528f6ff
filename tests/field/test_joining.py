"""Four institutions enrol, are admitted, sign one roster and join, by commands alone; and what is refused."""

import json
import re
from pathlib import Path

import pytest
from enrolled import ADDRESS, NAMES, Hospitals, run, said, words_of

from client.home import SiteHome
from client.joining import Pending
from common import questions
from common.app_bundle import app_digest
from common.config.loading import load_manifest
from common.enrolment import Consent, Enrolment, Invitation, read_paper
from common.errors import EnrolmentError, PolicyBreach, RosterRefused, SignatureRefused
from common.identity import Identity, fingerprint
from common.roster import SignedRoster, verify_roster
from server.enrolment import require_roster
from server.home import CoordinatorHome


def altered(path: Path, **changes: object) -> Path:
    """The paper with other fields; signatures stay as they are."""
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))
    return path


def test_four_sites_enrol_are_admitted_sign_and_join(hospitals: Hospitals) -> None:
    hospitals.join_all()
    coordinator = CoordinatorHome(hospitals.coordinator)
    roster = require_roster(coordinator, load_manifest(coordinator.manifest))
    assert [entry.name for entry in roster.institutions] == sorted(NAMES)
    for name in NAMES:
        home = SiteHome(hospitals.site(name))
        agreement, signed = home.agreement(), SignedRoster.from_json(home.roster.read_bytes())
        own = home.identity().public
        assert verify_roster(signed, own_key=own, pinned=bytes.fromhex(agreement.roster_sha256)) == roster
        assert agreement.manifest_sha256 == load_manifest(home.manifest).digest()
        assert agreement.manifest_sha256 == load_manifest(hospitals.manifest).digest()
        assert (agreement.app_sha256, agreement.address) == (app_digest(), ADDRESS)
        assert home.certificate.read_bytes() == coordinator.authority.read_bytes()
        assert (home.relay / "agreement.json").read_bytes() == home.agreement_file.read_bytes()
    # Joining once more changes nothing but the time of it.
    assert "joined" in hospitals.join("north")


def test_every_question_has_a_flag_and_without_it_nobody_is_asked(hospitals: Hospitals) -> None:
    hospitals.init()
    paper = hospitals.enroll("north")
    with pytest.raises(EnrolmentError, match=r"Nobody can be asked here: give --fingerprint or --yes$"):
        run("coordinator", "admit", paper, "--home", hospitals.coordinator)
    hospitals.admit_all()
    invitation = hospitals.invite()
    with pytest.raises(EnrolmentError, match=r"does this site consent\? Nobody can be asked here: give --yes$"):
        run("site", "join", invitation, "--home", hospitals.site("north"), "--into", hospitals.papers)
    with pytest.raises(EnrolmentError, match="give --units"):
        run("site", "init", "--home", hospitals.folder / "other", "--yes")
    assert not (hospitals.folder / "other").exists()
    assert not (hospitals.papers / "north.consent.json").exists()


def test_a_person_at_a_terminal_is_asked(hospitals: Hospitals, monkeypatch: pytest.MonkeyPatch) -> None:
    hospitals.init()
    paper = hospitals.enroll("north")
    asked: list[str] = []
    monkeypatch.setattr(questions, "interactive", lambda: True)
    monkeypatch.setattr(questions.typer, "confirm", lambda question: bool(asked.append(question)))
    with pytest.raises(EnrolmentError, match="north was not admitted; nothing was written"):
        run("coordinator", "admit", paper, "--home", hospitals.coordinator)
    assert list((hospitals.coordinator / "admitted").iterdir()) == []
    assert asked == ["Does north read out the same, on a number that you know?"]
    monkeypatch.setattr(questions.typer, "confirm", lambda question: True)
    run("coordinator", "admit", paper, "--home", hospitals.coordinator)
    assert (hospitals.coordinator / "admitted" / "north.json").exists()


def test_the_fingerprint_that_was_read_out_must_be_the_papers(hospitals: Hospitals) -> None:
    hospitals.init()
    paper = hospitals.enroll("north")
    heard = words_of(json.loads(paper.read_text())["public_key"])
    assert heard in said("site", "enroll", "--home", hospitals.site("north"), "--into", hospitals.papers)
    wrong = heard[:-1] + ("0" if heard[-1] != "0" else "1")
    with pytest.raises(EnrolmentError, match="somebody changed it on the way"):
        run("coordinator", "admit", paper, "--home", hospitals.coordinator, "--fingerprint", wrong)
    assert list((hospitals.coordinator / "admitted").iterdir()) == []
    spelled = heard.upper().replace(" ", "  ")
    run("coordinator", "admit", paper, "--home", hospitals.coordinator, "--fingerprint", spelled)


def test_an_enrolment_of_another_key_is_refused(hospitals: Hospitals) -> None:
    hospitals.init()
    stranger = Identity.generate().public.hex()
    other_node = json.loads(hospitals.enroll("south").read_text())["node_key"]
    for change in ({"public_key": stranger}, {"name": "north2"}, {"node_key": other_node}):
        paper = hospitals.enroll("north")
        with pytest.raises(EnrolmentError, match="is not signed by the key that it names"):
            run("coordinator", "admit", altered(paper, **change), "--home", hospitals.coordinator, "--yes")
    assert list((hospitals.coordinator / "admitted").iterdir()) == []


def test_a_second_enrolment_of_a_name_or_key_is_refused(hospitals: Hospitals) -> None:
    hospitals.init()
    admit = ("coordinator", "admit", "--home", hospitals.coordinator, "--yes")
    first = hospitals.enroll("north")
    run(*admit, first)
    with pytest.raises(EnrolmentError, match="north is admitted already, with these very keys"):
        run(*admit, first)
    thief, node = Identity.generate(), json.loads(hospitals.enroll("south").read_text())["node_key"]
    second = hospitals.papers / "second.json"
    second.write_text(Enrolment.of(thief, "north", node).to_json())
    with pytest.raises(EnrolmentError, match="another institution is admitted as 'north'"):
        run(*admit, second)
    own = SiteHome(hospitals.site("north")).identity()
    second.write_text(Enrolment.of(own, "north-again", node).to_json())
    with pytest.raises(EnrolmentError, match="a key of 'north-again' is that of 'north'"):
        run(*admit, second)
    stolen = json.loads(first.read_text())["node_key"]
    second.write_text(Enrolment.of(thief, "thief", stolen).to_json())
    with pytest.raises(EnrolmentError, match="a key of 'thief' is that of 'north'"):
        run(*admit, second)


def test_keys_that_others_may_read_are_refused(hospitals: Hospitals) -> None:
    hospitals.init()
    home = SiteHome(hospitals.site("north"))
    for path, loose, rule in (
        (home.signing_key, 0o640, "0600"),
        (home.rounding_key, 0o604, "0600"),
        (home.node_key, 0o660, "0600"),
        (home.keys, 0o750, "0700"),
        (home.relay, 0o755, "0750"),
    ):
        tight = path.stat().st_mode & 0o777
        path.chmod(loose)
        with pytest.raises(EnrolmentError, match=rf"{re.escape(str(path))} has mode .* may have at most {rule}: chmod"):
            hospitals.enroll("north")
        path.chmod(tight)
    hospitals.enroll("north")


def test_nothing_is_overwritten(hospitals: Hospitals) -> None:
    hospitals.init()
    home = SiteHome(hospitals.site("north"))
    key = home.signing_key.read_bytes()
    with pytest.raises(EnrolmentError, match="exists already"):
        hospitals.init_site("north")
    home.policy.unlink()
    with pytest.raises(EnrolmentError, match="exists already"):
        hospitals.init_site("north")
    assert home.signing_key.read_bytes() == key
    with pytest.raises(EnrolmentError, match="exists already"):
        run("coordinator", "init", "--home", hospitals.coordinator, "--address", ADDRESS)


@pytest.fixture
def invited(hospitals: Hospitals) -> Hospitals:
    """All consented, and three of four signatures are in."""
    hospitals.init()
    hospitals.admit_all()
    hospitals.invite()
    for name in NAMES:
        hospitals.join(name)
    assert "still missing: west" in hospitals.consent("north", "south", "east")
    return hospitals


def test_a_roster_with_one_signature_missing_is_refused_at_the_second_pass(invited: Hospitals) -> None:
    with pytest.raises(RosterRefused, match=r"site 3 \(west\) has not signed the roster; every one must"):
        invited.join("north")
    assert not SiteHome(invited.site("north")).agreement_file.exists()
    place = CoordinatorHome(invited.coordinator)
    manifest = load_manifest(place.manifest)
    with pytest.raises(RosterRefused, match="has not signed"):
        require_roster(place, manifest)
    assert "all 4 signed" in invited.consent("west")
    assert "joined" in invited.join("north")


def resigned(hospitals: Hospitals, **changes: str) -> None:
    """A coordinator that sends something else under the same roster, and signs it."""
    home = CoordinatorHome(hospitals.coordinator)
    paper = read_paper(Invitation, home.invitation.read_bytes(), source="invitation")
    parts = {"address": paper.address, "certificate": paper.certificate, "manifest": paper.manifest, **changes}
    home.invitation.write_text(Invitation.of(home.identity(), SignedRoster.from_json(paper.roster), **parts).to_json())


@pytest.mark.parametrize("what", ["manifest", "address", "certificate"])
def test_what_changed_since_the_consent_is_refused(invited: Hospitals, what: str) -> None:
    invited.consent("west")
    paper = json.loads((invited.coordinator / "invitation.json").read_text())
    changed = {
        "manifest": paper["manifest"].replace("# What all sides", "# what all sides"),  # one character, in a comment
        "address": "127.0.0.2:19092",
        "certificate": (invited.coordinator / "tls" / "server.pem").read_text(),
    }[what]
    assert changed != paper[what]
    resigned(invited, **{what: changed})
    with pytest.raises(EnrolmentError, match=rf"the invitation's {what} changed since this site consented to it"):
        invited.join("north")
    assert not SiteHome(invited.site("north")).agreement_file.exists()
    resigned(invited, **{what: paper[what]})
    assert "joined" in invited.join("north")


def test_an_invitation_that_the_coordinator_did_not_sign_is_refused(invited: Hospitals) -> None:
    invited.consent("west")
    path = invited.coordinator / "invitation.json"
    manifest = json.loads(path.read_text())["manifest"]
    altered(path, manifest=manifest.replace("rounds = 2", "rounds = 3"))
    with pytest.raises(SignatureRefused):
        invited.join("north")


def test_a_joined_site_takes_a_later_epoch_and_no_other_roster_of_the_same(invited: Hospitals) -> None:
    invited.consent("west")
    invited.join("north")
    before = (invited.coordinator / "invitation.json").read_text()
    run("coordinator", "roster", invited.manifest, "--home", invited.coordinator)
    assert "wrote" in invited.join("north")  # a new consent, while the old agreement still holds
    pending = Pending.model_validate_json((invited.site("north") / "federation" / "pending.json").read_text())
    assert (pending.epoch, pending.joined) == (2, False)
    assert SiteHome(invited.site("north")).agreement().roster_sha256 != pending.roster_sha256
    (invited.coordinator / "invitation.json").write_text(before)
    with pytest.raises(RosterRefused, match="this site consented to another one of epoch 2"):
        invited.join("north")
    with pytest.raises(EnrolmentError, match="the epoch must be later than 2"):
        run("coordinator", "roster", invited.manifest, "--home", invited.coordinator, "--epoch", 2)


def test_consents_that_do_not_fit_are_refused_and_none_is_taken(invited: Hospitals) -> None:
    good = invited.papers / "west.consent.json"
    paper = Consent.model_validate_json(good.read_text())
    stranger = Identity.generate()
    roster = SignedRoster.from_json((invited.coordinator / "roster.json").read_bytes()).roster
    bad = invited.papers / "bad.consent.json"
    for change, rule in (
        ({"signature": roster.sign(stranger).hex()}, "is not signed by west's key"),
        ({"site": 2}, "there is no site 2 named 'west'"),
        ({"roster_sha256": "0" * 64}, "is a consent to another roster than the one of epoch 1"),
    ):
        bad.write_text(paper.model_copy(update=change).to_json())
        with pytest.raises(EnrolmentError, match=rule):
            run("coordinator", "consent", good, bad, "--home", invited.coordinator)
        assert 3 not in SignedRoster.from_json((invited.coordinator / "roster.json").read_bytes()).signatures


def test_a_stranger_cannot_join_and_a_policy_is_enforced(invited: Hospitals) -> None:
    invited.init_site("stranger")
    with pytest.raises(RosterRefused, match="own key is not in the roster"):
        invited.join("stranger")
    home = SiteHome(invited.site("west"))
    text = home.policy.read_text()
    home.policy.write_text(re.sub(r"(?m)^(# )?min_sites = 3", "min_sites = 9", text))
    with pytest.raises(PolicyBreach, match="9"):
        invited.join("west")


def test_the_digest_that_was_read_out_must_be_the_rosters(hospitals: Hospitals) -> None:
    hospitals.init()
    hospitals.admit_all()
    shown = said("coordinator", "roster", hospitals.manifest, "--home", hospitals.coordinator)
    digest = re.search(r"to compare by phone: ([0-9a-f ]+)", shown)
    assert digest is not None
    with pytest.raises(EnrolmentError, match="the roster's digest is"):
        hospitals.join("north", "--digest", "dead beef")
    seen = hospitals.join("north", "--digest", digest[1].strip())
    assert digest[1].strip() in seen
    for name in NAMES:
        key = SiteHome(hospitals.site(name)).identity().public
        assert fingerprint(key) in seen


def test_a_revoked_site_is_out_and_keeps_its_number(invited: Hospitals) -> None:
    invited.consent("west")
    shown = said("coordinator", "revoke", "east", "--home", invited.coordinator, "--yes")
    assert "no run begins with the present roster" in shown
    place = CoordinatorHome(invited.coordinator)
    manifest = load_manifest(place.manifest)
    with pytest.raises(EnrolmentError, match="east is in the roster and not admitted any more"):
        require_roster(place, manifest)
    with pytest.raises(EnrolmentError, match="'east' is not admitted"):
        run("coordinator", "revoke", "east", "--home", invited.coordinator, "--yes")
    before = {e.name: e.site for e in SignedRoster.from_json(place.roster.read_bytes()).roster.institutions}
    run("coordinator", "roster", invited.manifest, "--home", invited.coordinator)
    after = {e.name: e.site for e in SignedRoster.from_json(place.roster.read_bytes()).roster.institutions}
    assert after == {name: number for name, number in before.items() if name != "east"}
    run("coordinator", "revoke", "west", "--home", invited.coordinator, "--yes")
    run("coordinator", "revoke", "north", "--home", invited.coordinator, "--yes")
    with pytest.raises(EnrolmentError, match=r"min_sites = 3 institutions or more, 1 are admitted: south"):
        run("coordinator", "roster", invited.manifest, "--home", invited.coordinator)


def test_a_manifest_without_digests_is_refused(hospitals: Hospitals) -> None:
    hospitals.init()
    hospitals.admit_all()
    text = re.sub(r'(?m)^weights_sha256 = ".*"$', "", hospitals.manifest.read_text())
    hospitals.manifest.write_text(text)
    with pytest.raises(EnrolmentError, match=r"does not pin model.weights_sha256.*`coadapt init`"):
        hospitals.invite()


@pytest.mark.parametrize(
    ("table", "setting", "words"),
    [
        ("evaluation", 'public = "public.jsonl"', r"does not pin evaluation.public_sha256"),
        ("secure_sum", "unsafe_two_sites = true", r"unsafe_two_sites is for simulations alone"),
    ],
)
def test_what_no_institution_may_agree_to_is_refused_at_the_coordinator_and_at_sites(
    hospitals: Hospitals, monkeypatch: pytest.MonkeyPatch, table: str, setting: str, words: str
) -> None:
    hospitals.init()
    hospitals.admit_all()
    key = setting.split(" =", 1)[0]
    text = re.sub(rf"(?m)^(# )?{key} =.*\n", "", hospitals.manifest.read_text())
    hospitals.manifest.write_text(text.replace(f"[{table}]\n", f"[{table}]\n{setting}\n"))
    with pytest.raises(EnrolmentError, match=words):
        hospitals.invite()
    # A coordinator that invites to it all the same.
    monkeypatch.setattr("server.enrolment._require_pinned", lambda *_: None)
    monkeypatch.setattr("server.enrolment._require_crowd", lambda *_: None)
    hospitals.invite()
    refused = r"does not pin evaluation.public" if table == "evaluation" else r"unsafe_two_sites: asked true, allowed"
    with pytest.raises((EnrolmentError, PolicyBreach), match=refused):
        hospitals.join("north")
