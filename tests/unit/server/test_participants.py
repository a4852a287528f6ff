"""Who is invited to a round: drawn evenly, the same again after a crash, and nobody else is asked or missed."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from resuming import RANK, RECORDS, Clock, Crash, World
from test_coordinator import Sites, store_in

from client.admission import breaches
from client.policy import SitePolicy
from common.codec.state import AdapterState, state_digest
from common.config.loading import load_manifest
from common.config.manifest import Manifest
from common.errors import ManifestError, PolicyRefused, RoundError
from common.progress import Event, RoundFinished, RoundStarted, SiteFailed, SumOpened
from server.channel import Reply
from server.coordinator import Coordinator
from server.participants import participants, require_participants
from simulations.secure_sites import require_crowd

Manifests = Callable[..., Manifest]
FOUR = tuple(RECORDS)


def inviting(manifest_for: Manifests, asked: int | float | str, **tables: Any) -> Manifest:
    training = {"participants": asked, **tables.pop("training", {})}
    return manifest_for(training=training, **tables)


def test_all_are_invited_unless_the_manifest_says_otherwise(manifest_for: Manifests) -> None:
    sites = ["b", "a", "c"]
    assert participants(manifest_for(), sites, 1) == ("b", "a", "c")
    assert participants(inviting(manifest_for, 3), sites, 7) == ("b", "a", "c")


@pytest.mark.parametrize(
    ("asked", "sites", "count"), [(50, 1000, 50), (0.05, 1000, 50), (0.1, 36, 4), (0.29, 100, 29), (0.001, 20, 1)]
)
def test_so_many_are_invited_or_such_a_share(
    manifest_for: Manifests, asked: int | float, sites: int, count: int
) -> None:
    manifest = inviting(manifest_for, asked, aggregation={"min_sites": 1})
    drawn = participants(manifest, [f"site-{number}" for number in range(sites)], 3)
    assert len(drawn) == len(set(drawn)) == count
    assert list(drawn) == sorted(drawn, key=lambda name: int(name.removeprefix("site-")))


def test_a_draw_follows_from_seed_and_round_alone(manifest_for: Manifests) -> None:
    sites = [f"site-{number}" for number in range(200)]
    manifest = inviting(manifest_for, 20)
    rounds = [participants(manifest, sites, number) for number in range(1, 30)]
    assert rounds == [participants(manifest, sites, number) for number in range(1, 30)]
    assert len(set(rounds)) == len(rounds)
    assert participants(inviting(manifest_for, 20, training={"seed": 1}), sites, 1) != rounds[0]
    # What has nothing to do with the draw does not change it.
    assert participants(inviting(manifest_for, 20, training={"local_steps": 3}), sites, 1) == rounds[0]


def test_every_site_and_every_pair_of_sites_is_drawn_as_often(manifest_for: Manifests) -> None:
    sites, invited, rounds = [f"s{number}" for number in range(12)], 4, 6000
    manifest = inviting(manifest_for, invited)
    drawn = [participants(manifest, sites, number) for number in range(rounds)]
    singles = Counter(site for each in drawn for site in each)
    pairs = Counter(pair for each in drawn for pair in itertools.combinations(each, 2))
    for counts, chance, kinds in ((singles, 4 / 12, 12), (pairs, 4 * 3 / (12 * 11), 66)):
        error = math.sqrt(rounds * chance * (1 - chance))
        assert len(counts) == kinds
        assert max(abs(count - rounds * chance) for count in counts.values()) < 5 * error


class Run:
    """A coordinator over four sites in memory, and what it reported."""

    def __init__(self, folder: Path, manifest: Manifest, sites: Sites, names: tuple[str, ...] = FOUR) -> None:
        self.sites, self.events = sites, list[Event]()
        self.coordinator = Coordinator(
            manifest,
            run_id="run",
            sites=names,
            first={"a": np.float32([0.0, 8.0])},
            channel=sites,
            store=store_in(folder),
            report=self.events.append,
        )

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


THREE = ("north", "south", "west")


def test_only_the_invited_are_asked_and_nobody_else_is_missed(tmp_path: Path, manifest_for: Manifests) -> None:
    manifest = inviting(manifest_for, 2, training={"rounds": 5})
    run = Run(tmp_path, manifest, Sites(), THREE)
    run.coordinator.run()
    for number, started in enumerate(run.of(RoundStarted), start=1):
        asked = {
            site for kind, site, request in run.sites.requests if (kind, request.header.round) == ("train", number)
        }
        assert asked == set(started.sites) == set(participants(manifest, THREE, number))
    assert {len(event.sites) for event in run.of(RoundStarted)} == {2}
    assert [(event.answered, event.failed) for event in run.of(RoundFinished)] == [(2, 0)] * 5
    assert run.of(SiteFailed) == []
    # The last adapter is measured by those whom another round would have invited.
    measured = {site for kind, site, _ in run.sites.requests if kind == "evaluate"}
    assert measured == set(participants(manifest, THREE, 6))
    assert set(run.coordinator.rounds[-1].counts) == measured


def test_too_few_answers_of_the_invited_end_the_run(tmp_path: Path, manifest_for: Manifests) -> None:
    manifest = inviting(manifest_for, 2, training={"rounds": 1})
    silent = participants(manifest, THREE, 1)[0]
    sites = Sites({silent: lambda site, request: Reply(site, None, "timeout", 0, 1)})
    with pytest.raises(RoundError, match=r"round 1: 1 of 2 sites answered, aggregation.min_sites wants 2"):
        Run(tmp_path, manifest, sites, THREE).coordinator.run()


@pytest.mark.parametrize("secure", [False, True])
def test_a_resumed_run_invites_the_same_and_ends_bit_for_bit_as_the_undisturbed(
    tmp_path: Path, manifest_for: Manifests, secure: bool
) -> None:
    manifest = manifest_for(
        adapter={"rank": RANK},
        training={"rounds": 4, "participants": 3},
        aggregation={"method": "separate"},
        evaluation={"metrics": ["accuracy"]},
        secure_sum={"enabled": secure},
    )

    def world(name: str) -> World:
        (tmp_path / name).mkdir()
        return World(tmp_path / name, manifest, sites=FOUR)

    clock, whole = Clock(), world("whole")
    wanted = whole.process(clock)
    for moment in range(2, clock.now, max(1, clock.now // 6)):
        it = world(f"killed at {moment}")
        with pytest.raises(Crash):
            it.process(Clock(moment))
        found: AdapterState = it.process()
        assert state_digest(found) == state_digest(wanted)
        # A site trains in the rounds that it is invited to, and once in each.
        assert sorted(it.trainers.trained) == sorted(
            (site, number) for number in range(1, 5) for site in participants(manifest, FOUR, number)
        )
    if secure:
        sums = [event for event in whole.events if isinstance(event, SumOpened)]
        invited = [set(participants(manifest, FOUR, number)) for number in range(1, 6)]
        assert [set(event.survivors) for event in sums] == invited
        assert all(event.dropped == () for event in sums)


@pytest.mark.parametrize(
    ("asked", "sites", "tables", "words"),
    [
        (50, 20, {}, "training.participants: must be at most the 20 sites that there are, found 50"),
        (0.1, 20, {"secure_sum": {"enabled": True}}, "0.1 invites 2 of 20 sites; secure_sum.min_sites and"),
        (0.1, 20, {"aggregation": {"min_sites": 3}}, "aggregation.min_sites want 3 or more in a round"),
    ],
)
def test_what_cannot_be_invited_is_one_line(
    manifest_for: Manifests, tmp_path: Path, asked: int | float, sites: int, tables: dict[str, Any], words: str
) -> None:
    manifest = inviting(manifest_for, asked, **tables)
    for refused in (require_participants, require_crowd):
        with pytest.raises(ManifestError) as found:
            refused(manifest, sites)
        assert words in str(found.value)
        assert len(str(found.value).splitlines()) <= 2  # the line itself, and the one above that counts them


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ("participants = 2", "training.participants must be at least 3"),
        ("participants = 0", "an integer of at least 1"),
        ("participants = 1.5", "above 0 and below 1"),
        ('participants = "some"', "'all'"),
    ],
)
def test_a_manifest_that_invites_nobody_or_too_few_is_refused(tmp_path: Path, training: str, words: str) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(
        f'version = 1\nname = "x"\n[task]\nkind = "text-classification"\nlabels = ["a", "b"]\n[training]\n{training}\n',
        encoding="utf-8",
    )
    with pytest.raises(ManifestError) as found:
        load_manifest(path)
    assert words in str(found.value)


def test_the_crowd_that_a_sum_needs_is_counted_among_the_invited(manifest_for: Manifests) -> None:
    colluding = {"enabled": True, "min_sites": 3, "max_colluding": 2}
    require_crowd(manifest_for(secure_sum=colluding), 20)
    require_crowd(inviting(manifest_for, 10, secure_sum=colluding), 20)
    with pytest.raises(PolicyRefused, match="collud"):
        require_crowd(inviting(manifest_for, 3, secure_sum=colluding), 20)


def test_a_site_that_insists_on_a_larger_crowd_does_not_join(manifest_for: Manifests, tmp_path: Path) -> None:
    policy = SitePolicy.model_validate(
        {
            "version": 1,
            "name": "north",
            "data": {"train": str(tmp_path / "train.jsonl")},
            "population": {"name": "people", "unit": "record", "units": 100, "epsilon": 8.0, "delta": 1e-3},
            "secure_sum": {"min_sites": 12},
        }
    )
    crowd = {"secure_sum": {"enabled": True}}
    asked = [breaches(inviting(manifest_for, count, **crowd), policy, sites=20) for count in ("all", 12, 10)]
    named = [[line for line in each if line.startswith("secure_sum.min_sites")] for each in asked]
    assert named == [[], [], ["secure_sum.min_sites: asked sums over 10 sites, allowed 12 or more"]]
