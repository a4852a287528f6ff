"""Whole small federations through secure sums: what the coordinator learns, and that it is the same mean."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from vaults import Federation, Manifests, agreed, folder

from client.ledger import Ledger
from common.config.manifest import Manifest
from common.errors import PolicyRefused, RoundError, RunError
from common.messages import Envelope, Evaluate, Project, RoundStart
from common.progress import SiteFailed, SiteFinished, SumOpened
from common.secure_sum.messages import Kind, Masked, Message, read
from server.coordinator import Coordinator
from server.run_store import RunStore
from simulations.secure_sites import require_crowd

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

FOUR = ("north", "south", "west", "east")


def heard(it: Federation) -> list[Message]:
    """Every message that the coordinator was given, read with its sender's key."""
    roster = it.consortium.roster
    return [read(reply.data, roster.public_key_of) for reply in it.masked]


@pytest.mark.parametrize("weighting", ["uniform", "records"])
@pytest.mark.parametrize("method", ["separate", "alternate"])
def test_one_round_is_the_plain_mean_up_to_rounding(
    tmp_path: Path, manifest_for: Manifests, method: str, weighting: str
) -> None:
    aggregation = {"method": method, "weighting": weighting}
    manifest = agreed(manifest_for, method, 1, aggregation=aggregation, secure_sum={"most_records": 48})
    plain = Federation(folder(tmp_path, "plain"), manifest)
    secure = Federation(folder(tmp_path, "secure"), manifest, secure=True)
    wanted, found = plain.coordinator.run(), secure.coordinator.run()
    (start,) = {request.header.model_dump_json() for _, request, _ in secure.sent if _starts(request)}
    ranges = RoundStart.model_validate_json(start).ranges
    assert wanted.keys() == found.keys()
    for name, array in found.items():
        if name not in ranges:  # did not train
            assert np.array_equal(array, wanted[name])
            continue
        # Each site's value is off by less than one step; 24 records of at most 48 halve the weight and double the step.
        step = 2 * ranges[name] / (2**16 - 1) * (2 if weighting == "records" else 1)
        assert np.abs(array - wanted[name]).max() < step + 1e-6
        assert np.abs(array - secure.first[name]).max() < ranges[name]
    moved = max(float(np.abs(wanted[name] - plain.first[name]).max()) for name in wanted)
    assert moved > 0.01  # so that the comparison says something


def _starts(request: Envelope) -> bool:
    return isinstance(request.header, RoundStart)


@pytest.mark.parametrize("method", ["alternate", "ffa", "sketch", "dense"])
def test_every_method_learns_through_sums(tmp_path: Path, manifest_for: Manifests, method: str) -> None:
    manifest = agreed(manifest_for, method, 4)
    plain = Federation(folder(tmp_path, "plain"), manifest)
    secure = Federation(folder(tmp_path, "secure"), manifest, secure=True)
    before = plain.loss(plain.first)
    wanted, found = plain.loss(plain.coordinator.run()), secure.loss(secure.coordinator.run())
    assert wanted < 0.9 * before
    assert found == pytest.approx(wanted, abs=0.02 * before)
    sums = [(event.round, len(event.survivors)) for event in secure.events if isinstance(event, SumOpened)]
    in_training = [(number, 3) for number in range(1, 5) for _ in range(2 if method == "sketch" else 1)]
    assert sums == [*in_training, (4, 3)]  # and one of the counts of the last adapter


def test_the_coordinator_is_given_messages_of_the_protocol_alone(tmp_path: Path, manifest_for: Manifests) -> None:
    it = Federation(tmp_path, agreed(manifest_for, "separate", 2), secure=True, held_out=True)
    it.coordinator.run()
    assert all(reply.envelope is None for reply in it.masked)
    kinds = Counter(type(message.body).kind for message in heard(it))
    each = 3 * (2 + 1)  # three sites; two rounds, and the last adapter is measured
    wanted = (Kind.ADVERTISE, Kind.SHARES, Kind.MASKED, Kind.CONFIRM, Kind.REVEAL)
    assert kinds == dict.fromkeys(wanted, each)
    # Of what a site made of its records the coordinator has nothing but the vector, whose bytes are uniform.
    vectors = [np.frombuffer(m.body.vector, np.uint8) for m in heard(it) if isinstance(m.body, Masked)]
    for vector in vectors:
        if len(vector) > 4096:
            counts = np.bincount(vector, minlength=256)
            chi_square = float(((counts - len(vector) / 256) ** 2 / (len(vector) / 256)).sum())
            assert abs(chi_square - 255) < 6 * np.sqrt(2 * 255)
    for done in it.coordinator.rounds[1:]:
        assert all((answer.records, answer.loss, answer.seconds) == (None, None, None) for answer in done.answers)
    # The sites themselves know, and a simulation may look.
    assert {answer.records for done in it.secure.as_seen(it.coordinator.rounds)[1:] for answer in done.answers} == {24}
    assert len([event for event in it.events if isinstance(event, SiteFinished)]) == 6


def test_figures_over_all_sites_are_those_of_the_plain_run(tmp_path: Path, manifest_for: Manifests) -> None:
    manifest = agreed(manifest_for, "separate", 1)
    plain = Federation(folder(tmp_path, "plain"), manifest, held_out=True)
    secure = Federation(folder(tmp_path, "secure"), manifest, secure=True, held_out=True)
    for it in (plain, secure):
        it.coordinator.run()
    first = [it.coordinator.validation(it.coordinator.rounds[0]) for it in (plain, secure)]
    assert first[0] == pytest.approx(first[1], abs=1e-5)  # the same adapter; extras have twenty binary places
    assert secure.coordinator.rounds[0].counts.keys() == {"all sites"}
    assert secure.coordinator.rounds[0].counts["all sites"]["records"] == 15
    assert secure.coordinator.rounds[1].train_loss == pytest.approx(plain.coordinator.rounds[1].train_loss, abs=1e-5)
    last = [it.coordinator.validation(it.coordinator.rounds[1])["loss"] for it in (plain, secure)]
    assert last[0] == pytest.approx(last[1], rel=1e-3)


def test_a_site_that_fails_is_left_out_of_the_sum(tmp_path: Path, manifest_for: Manifests) -> None:
    def fails(site: str, request: Envelope) -> bool:
        return site == "west" and request.header.round == 2

    manifest = agreed(manifest_for, "separate", 3)
    plain = Federation(folder(tmp_path, "plain"), manifest, sites=FOUR, fails=fails)
    secure = Federation(folder(tmp_path, "secure"), manifest, sites=FOUR, fails=fails, secure=True)
    wanted, found = plain.coordinator.run(), secure.coordinator.run()
    for it in (plain, secure):
        failed = [(event.round, event.site, event.code) for event in it.events if isinstance(event, SiteFailed)]
        assert failed == [(2, "west", "timeout")]
        assert [len(done.answers) for done in it.coordinator.rounds] == [0, 4, 3, 4]
    assert secure.loss(found) == pytest.approx(plain.loss(wanted), rel=0.02)


def test_too_few_for_a_sum_end_the_run_and_nothing_is_opened(tmp_path: Path, manifest_for: Manifests) -> None:
    it = Federation(
        tmp_path,
        agreed(manifest_for, "separate", 3),
        secure=True,
        fails=lambda site, request: site == "west" and request.header.round == 2,
    )
    with pytest.raises(
        RoundError, match=r"round 2: no secure sum over 3 sites: 2 sites .*: west \(timeout\)$"
    ) as error:
        it.coordinator.run()
    assert "\n" not in str(error.value)
    assert [event.round for event in it.events if isinstance(event, SumOpened)] == [1]
    reveals = [message for message in heard(it) if type(message.body).kind is Kind.REVEAL]
    assert {message.turn.round for message in reveals} == {3}  # sums are numbered three a round: none in round 2
    assert it.coordinator._store.load_round(1).keys() == it.first.keys()


def test_a_second_sum_over_fewer_sites_is_never_given(tmp_path: Path, manifest_for: Manifests) -> None:
    it = Federation(
        tmp_path,
        agreed(manifest_for, "sketch", 2),
        secure=True,
        sites=FOUR,
        fails=lambda site, request: site == "west" and isinstance(request.header, Project),
    )
    with pytest.raises(RoundError, match=r"round 1: no secure sum over 4 sites: 3 sites .*west \(timeout\)"):
        it.coordinator.run()


def test_a_site_refuses_a_request_that_is_not_masked(tmp_path: Path, manifest_for: Manifests) -> None:
    it = Federation(tmp_path, agreed(manifest_for, "separate", 1), secure=True)
    it.coordinator.run()
    bare = Evaluate(**it.sent[0][1].header.spoken_of())
    site = it.consortium.sites["north"]
    with pytest.raises(Exception, match="this site sends masked ones alone"):
        site.start(Envelope(header=bare, tensors=it.first))
    # Nor does it take an old request for a new one.
    request = next(request for name, request, _ in it.sent if name == "north")
    with pytest.raises(Exception, match="is not newer than what was answered last"):
        site.start(request)


def test_with_privacy_the_sum_carries_the_noised_change_and_public_numbers(
    tmp_path: Path, manifest_for: Manifests
) -> None:
    manifest = agreed(manifest_for, "auto", 3, privacy={"epsilon": 50.0, "delta": 1e-3})
    it = Federation(tmp_path, manifest, secure=True, held_out=True)
    it.coordinator.run()
    assert it.logs() == ""
    assert [len(done.answers) for done in it.coordinator.rounds] == [0, 3, 3, 3]
    assert all(not done.counts and done.train_loss is None for done in it.coordinator.rounds)
    for site in it.sites:
        assert sum(steps.count for steps in Ledger(tmp_path / f"{site}.ledger").spent(site)) == 12


def test_two_sites_are_no_crowd(manifest_for: Manifests) -> None:
    def refused(manifest: Manifest, sites: int) -> str:
        with pytest.raises(PolicyRefused) as error:
            require_crowd(manifest, sites)
        return str(error.value)

    assert "secure_sum.min_sites = 3 sites or more, found 2" in refused(manifest_for(secure_sum={"enabled": True}), 2)
    assert "= 5 sites or more, found 4" in refused(manifest_for(secure_sum={"enabled": True, "min_sites": 5}), 4)
    many = {"enabled": True, "max_colluding": 5}
    assert "6 sites of which 5 may collude: at least two must not" in refused(manifest_for(secure_sum=many), 6)
    require_crowd(manifest_for(secure_sum=many), 7)
    require_crowd(manifest_for(secure_sum={"enabled": True}), 3)
    require_crowd(manifest_for(secure_sum={"enabled": False}), 1)
    two = {"enabled": True, "min_sites": 2, "unsafe_two_sites": True}
    require_crowd(manifest_for(secure_sum=two), 2)


def test_two_sites_can_be_summed_where_they_want_it(tmp_path: Path, manifest_for: Manifests) -> None:
    manifest = agreed(manifest_for, "separate", 1, secure_sum={"min_sites": 2, "unsafe_two_sites": True})
    it = Federation(tmp_path, manifest, secure=True, sites=("north", "south"))
    it.coordinator.run()
    assert [len(event.survivors) for event in it.events if isinstance(event, SumOpened)] == [2, 2]


def test_requests_hold_the_sums_first_message_and_the_ranges(tmp_path: Path, manifest_for: Manifests) -> None:
    it = Federation(tmp_path, agreed(manifest_for, "separate", 2), secure=True)
    it.coordinator.run()
    starts = [request.header for name, request, _ in it.sent if name == "north" and _starts(request)]
    assert all(isinstance(start, RoundStart) and start.secure_sum for start in starts)
    one, two = (start.ranges for start in starts if isinstance(start, RoundStart))
    assert one.keys() == two.keys() == it.first.keys()
    assert any(two[name] < one[name] for name in one)  # the first mean told how far values really go


def test_a_coordinator_never_falls_back_to_seeing_single_sites(tmp_path: Path, manifest_for: Manifests) -> None:
    it = Federation(tmp_path, agreed(manifest_for, "separate", 1))
    with pytest.raises(RunError, match=r"secure_sum\.enabled and the way that contributions are collected must agree"):
        Coordinator(
            agreed(manifest_for, "separate", 1, secure_sum={"enabled": True}),
            run_id="run",
            sites=it.sites,
            first=it.first,
            channel=it,
            store=RunStore(tmp_path / "other", lambda where, state: None),
            report=it.events.append,
        )
