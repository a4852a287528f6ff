import math
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.codec.state import AdapterState, state_digest
from common.config.manifest import Manifest
from common.errors import AdapterError, RoundError
from common.messages import Envelope, Evaluate, Evaluated, Refused, RoundDone, RoundStart, decode
from common.progress import Event, PhaseStarted, RoundFinished, RoundStarted, RoundValidated, SiteFailed, SiteFinished
from server.channel import Interrupted, Reply
from server.coordinator import Coordinator
from server.run_store import RunStore

# What a site does with a request: answer, or not.
Site = Callable[[str, Envelope], Envelope | Reply]

FIRST: AdapterState = {"a": np.float32([0.0, 8.0])}
# Which way each site pulls, and the records it has.
PULL = {"north": [1.0, 0.0], "south": [0.0, 4.0], "west": [-3.0, 2.0]}
RECORDS = {"north": 10, "south": 30, "west": 60}


def header_of(request: Envelope, **other: Any) -> dict[str, Any]:
    names = {"manifest_sha256", "run_id", "round", "adapter_sha256"}
    return {**request.header.model_dump(include=names), **other}


def change(site: str, request: Envelope) -> AdapterState:
    return {"a": np.float32(PULL[site]) * np.float32(request.header.round)}


def done(request: Envelope, site: str, *, tensors: AdapterState | None = None, **other: Any) -> Envelope:
    facts = {"records": RECORDS[site], "examples": 5, "loss": 1.0 / request.header.round, "seconds": 0.5}
    counts = {"records": 1.0, "correct": 0.0, "loss_sum": 0.0}
    private: dict[str, Any] = {"noise_multiplier": None, "sampling_rate": None}
    header = RoundDone(**header_of(request, **{**facts, "counts": counts, **private, **other}))
    return Envelope(header=header, tensors=change(site, request) if tensors is None else tensors)


def right(site: str, request: Envelope) -> Envelope:
    """Train as asked; measured are as many right answers as the adapter's first number says."""
    counts = {"records": 10.0, "correct": float(abs(request.tensors["a"][0])), "loss_sum": 20.0}
    if isinstance(request.header, Evaluate):
        return Envelope(header=Evaluated(**header_of(request), counts=counts))
    return done(request, site, counts=counts)


class Sites:
    """A channel to sites in memory, answering in their order. `odd` are sites that do something else, in training."""

    def __init__(self, odd: Mapping[str, Site] | None = None, measure: Mapping[str, Site] | None = None) -> None:
        self.odd = odd or {}
        self.measure = measure or {}
        self.requests: list[tuple[str, str, Envelope]] = []

    def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
        for site, data in requests.items():
            request = decode(data)
            self.requests.append((kind, site, request))
            answer = (self.odd if kind == "train" else self.measure).get(site, right)(site, request)
            yield answer if isinstance(answer, Reply) else Reply(site, answer, "", 100, len(data))


def store_in(folder: Path) -> RunStore:
    return RunStore(folder / "run", lambda where, state: save_file(state, where / "adapter_model.safetensors"))


class World:
    """A coordinator with everything around it."""

    def __init__(self, folder: Path, manifest: Manifest, sites: Sites, names: tuple[str, ...] = tuple(PULL)) -> None:
        self.events: list[Event] = []
        self.sites, self.store = sites, store_in(folder)
        self.coordinator = Coordinator(
            manifest,
            run_id="test-run",
            sites=names,
            first=FIRST,
            channel=sites,
            store=self.store,
            report=self.events.append,
        )

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


MakeManifest = Callable[..., Manifest]


@pytest.fixture
def world(tmp_path: Path, manifest_for: MakeManifest) -> Callable[..., World]:
    def make(sites: Sites | None = None, rounds: int = 2, **tables: Any) -> World:
        manifest = manifest_for(training={"rounds": rounds}, **tables)
        return World(tmp_path, manifest, sites or Sites())

    return make


def weighted(weights: Mapping[str, float], factor: float = 1.0) -> np.ndarray[Any, Any]:
    parts = [weight * np.float64(PULL[site]) for site, weight in weights.items()]
    return factor * np.sum(parts, axis=0) / sum(weights.values())


@pytest.mark.parametrize("weighting", ["records", "uniform"])
def test_two_rounds_are_the_hand_computation(world: Callable[..., World], weighting: str) -> None:
    it = world(aggregation={"weighting": weighting})
    final = it.coordinator.run()
    weights = RECORDS if weighting == "records" else dict.fromkeys(RECORDS, 1)
    one = FIRST["a"] + weighted(weights)
    two = one + weighted(weights, factor=2)  # in round 2 every site goes twice as far
    np.testing.assert_allclose(final["a"], two, rtol=1e-6)
    for number, wanted in enumerate((FIRST["a"], one, two)):
        np.testing.assert_allclose(it.store.load_round(number)["a"], wanted, rtol=1e-6)
    assert [each.number for each in it.coordinator.rounds] == [0, 1, 2]


def test_a_server_step_goes_beyond_the_mean(world: Callable[..., World]) -> None:
    it = world(aggregation={"weighting": "uniform", "server_learning_rate": 2.0, "server_momentum": 0.5})
    final = it.coordinator.run()
    first_step = weighted(dict.fromkeys(PULL, 1.0))
    second_step = 0.5 * first_step + weighted(dict.fromkeys(PULL, 1.0), factor=2)
    np.testing.assert_allclose(final["a"], FIRST["a"] + 2 * first_step + 2 * second_step, rtol=1e-6)


def test_every_site_gets_the_same_adapter_of_the_last_round(world: Callable[..., World]) -> None:
    it = world()
    it.coordinator.run()
    sent = [(kind, site, request.header.round) for kind, site, request in it.sites.requests]
    assert sent == [
        *(("train", site, number) for number in (1, 2) for site in PULL),
        *(("evaluate", site, 2) for site in PULL),
    ]
    for kind, _, request in it.sites.requests:
        before = request.header.round - (kind == "train")
        assert state_digest(request.tensors) == request.header.adapter_sha256
        assert request.header.adapter_sha256 == state_digest(it.store.load_round(before))
        assert isinstance(request.header, RoundStart if kind == "train" else Evaluate)


def test_events_come_in_order_and_hold_what_happened(world: Callable[..., World]) -> None:
    it = world()
    it.coordinator.run()
    names = [event.name() for event in it.events]
    one_round = ["round_started", *["site_finished"] * 3, "round_validated", "round_finished"]
    assert names == [*one_round * 2, "phase_started", "round_validated"]
    assert [event.round for event in it.of(RoundValidated)] == [0, 1, 2]
    assert it.of(PhaseStarted)[0].phase == "validation"
    assert it.of(RoundStarted)[0].sites == tuple(PULL)
    finished = it.of(RoundFinished)[1]
    assert (finished.round, finished.answered, finished.failed, finished.train_loss) == (2, 3, 0, 0.5)
    assert finished.bytes_up == 300
    assert finished.bytes_down == 3 * it.of(SiteFinished)[3].bytes_down
    times = [event.time for event in it.events]
    assert times == sorted(times)


def test_validation_is_of_summed_counts_and_of_the_adapter_that_was_sent(world: Callable[..., World]) -> None:
    # Means of figures would be (0 + 1/2 + 1) / 3 = 0.5; summed counts give (0 + 1 + 30) / 36.
    shown = {"north": (0.0, 4.0), "south": (1.0, 2.0), "west": (30.0, 30.0)}

    def odd(site: str, request: Envelope) -> Envelope:
        correct, records = shown[site]
        counts = {"records": records, "correct": correct, "loss_sum": records * request.header.round}
        return done(request, site, counts=counts)

    it = world(Sites(dict.fromkeys(PULL, odd)), evaluation={"metrics": ["accuracy", "loss"]})
    it.coordinator.run()
    first, second, last = it.of(RoundValidated)
    assert (first.round, first.figures) == (0, {"accuracy": 31 / 36, "loss": 1.0})
    assert (second.round, second.figures["loss"]) == (1, 2.0)
    # The last adapter is measured by a request of its own, which `right` answers: |a[0]| of 10 at each site.
    assert last.figures["accuracy"] == pytest.approx(abs(it.store.load_round(2)["a"][0]) / 10)


def test_sites_without_held_out_records_leave_no_figures(world: Callable[..., World]) -> None:
    def silent(site: str, request: Envelope) -> Envelope:
        if isinstance(request.header, Evaluate):
            return Envelope(header=Evaluated(**header_of(request), counts={}))
        return done(request, site, counts={})

    it = world(Sites(dict.fromkeys(PULL, silent), dict.fromkeys(PULL, silent)))
    it.coordinator.run()
    assert it.of(RoundValidated) == []
    assert not it.of(SiteFailed)
    assert it.coordinator.selected_round() == 2


def refuse(site: str, request: Envelope) -> Envelope:
    return Envelope(header=Refused(**header_of(request), code="unexpected:KeyError"))


def lose(site: str, request: Envelope) -> Reply:
    return Reply(site, None, "timeout", 0, 10)


def speak_of(**other: Any) -> Site:
    return lambda site, request: done(request, site, **other)


def other_shape(site: str, request: Envelope) -> Envelope:
    return done(request, site, tensors={"a": np.float32([1.0, 1.0, 1.0])})


BAD: dict[str, tuple[Site, str]] = {
    "refused": (refuse, "unexpected:KeyError"),
    "lost": (lose, "timeout"),
    "another round": (speak_of(round=7), "message"),
    "another run": (speak_of(run_id="other"), "message"),
    "another adapter": (speak_of(adapter_sha256="0" * 64), "message"),
    "another manifest": (speak_of(manifest_sha256="0" * 64), "message"),
    "another kind": (lambda site, request: Envelope(header=Evaluated(**header_of(request), counts={})), "message"),
    "nan change": (speak_of(tensors={"a": np.float32([math.nan, 1.0])}), "adapter"),
    "nan loss": (speak_of(loss=math.nan), "adapter"),
    "infinite loss": (speak_of(loss=math.inf), "adapter"),
    "another shape": (other_shape, "adapter"),
    "no tensors": (speak_of(tensors={}), "adapter"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_sits_out_and_the_others_go_on(world: Callable[..., World], case: str) -> None:
    bad, code = BAD[case]
    it = world(Sites({"south": bad}))
    final = it.coordinator.run()
    weights = {site: RECORDS[site] for site in ("north", "west")}
    np.testing.assert_allclose(final["a"], FIRST["a"] + 3 * weighted(weights), rtol=1e-6)
    assert [(event.round, event.site, event.code) for event in it.of(SiteFailed)] == [
        (1, "south", code),
        (2, "south", code),
    ]
    assert [each.failures for each in it.coordinator.rounds] == [{}, {"south": code}, {"south": code}]
    assert [(event.answered, event.failed) for event in it.of(RoundFinished)] == [(2, 1), (2, 1)]
    assert {event.site for event in it.of(SiteFinished)} == {"north", "west"}
    # Its counts stay out as well, though it may have sent some.
    assert it.coordinator.rounds[0].counts.keys() == {"north", "west"}


def test_a_site_that_failed_once_takes_part_again(world: Callable[..., World]) -> None:
    def late(site: str, request: Envelope) -> Envelope:
        return refuse(site, request) if request.header.round == 1 else right(site, request)

    it = world(Sites({"south": late}))
    final = it.coordinator.run()
    one = FIRST["a"] + weighted({site: RECORDS[site] for site in ("north", "west")})
    np.testing.assert_allclose(final["a"], one + weighted(RECORDS, factor=2), rtol=1e-6)


def test_too_few_sites_end_the_run_and_leave_the_rounds_before(world: Callable[..., World]) -> None:
    def gone(site: str, request: Envelope) -> Envelope | Reply:
        return lose(site, request) if request.header.round == 2 else right(site, request)

    it = world(Sites({"south": gone, "west": gone}), rounds=3)
    with pytest.raises(RoundError) as error:
        it.coordinator.run()
    said = str(error.value)
    assert "round 2: 1 of 3 sites answered, aggregation.min_sites wants 2" in said
    assert "south (timeout), west (timeout)" in said
    np.testing.assert_allclose(it.store.load_round(1)["a"], FIRST["a"] + weighted(RECORDS), rtol=1e-6)
    assert sorted(path.name for path in (it.store.folder / "rounds").iterdir()) == ["0000", "0001"]
    # What the one site measured of round 1 is known all the same.
    assert [event.round for event in it.of(RoundValidated)] == [0, 1]


def test_a_federation_of_one_needs_one(tmp_path: Path, manifest_for: MakeManifest) -> None:
    it = World(tmp_path, manifest_for(training={"rounds": 1}), Sites(), names=("south",))
    np.testing.assert_allclose(it.coordinator.run()["a"], FIRST["a"] + PULL["south"])


def test_all_may_be_wanted(world: Callable[..., World]) -> None:
    with pytest.raises(RoundError, match=r"2 of 3 sites answered, aggregation.min_sites wants 3"):
        world(Sites({"west": refuse}), aggregation={"min_sites": 3}).coordinator.run()


def test_a_site_that_cannot_measure_the_last_adapter_is_told_of(world: Callable[..., World]) -> None:
    it = world(Sites(measure={"north": refuse, "south": lose, "west": speak_of(counts={"records": 1.0})}))
    it.coordinator.run()
    failed = [(event.round, event.site, event.code) for event in it.of(SiteFailed)]
    assert failed == [(2, "north", "unexpected:KeyError"), (2, "south", "timeout"), (2, "west", "message")]
    assert [event.round for event in it.of(RoundValidated)] == [0, 1]


def selecting(world: Callable[..., World], metric: str, values: list[float], select: str = "best") -> int:
    """The selected round, where `metric` has the given values from round 0."""

    def show(site: str, request: Envelope) -> Envelope:
        training = isinstance(request.header, RoundStart)
        value = values[request.header.round - training]
        counts = {"records": 1.0, "correct": value, "loss_sum": value}
        if training:
            return done(request, site, counts=counts)
        return Envelope(header=Evaluated(**header_of(request), counts=counts))

    sites = Sites(dict.fromkeys(PULL, show), dict.fromkeys(PULL, show))
    it = world(sites, rounds=len(values) - 1, evaluation={"metrics": [metric], "select": select})
    final = it.coordinator.run()
    selected: int = it.coordinator.selected_round()
    np.testing.assert_array_equal(final["a"], it.store.load_round(selected)["a"])
    return selected


NAN = math.nan


@pytest.mark.parametrize(
    ("metric", "values", "selected"),
    [
        ("accuracy", [0.1, 0.6, 0.4], 1),
        ("accuracy", [0.1, 0.6, 0.6, 0.2], 1),  # the first of equals
        ("accuracy", [0.9, 0.6, 0.4], 0),
        ("loss", [3.0, 1.0, 2.0], 1),  # lower is better
        ("loss", [3.0, 2.0, 1.0], 2),
        ("loss", [NAN, 2.0, 1.0, NAN], 2),
        ("accuracy", [NAN, 0.2, NAN], 1),
        ("accuracy", [NAN, NAN, NAN], 2),  # nothing known: the last
    ],
)
def test_the_best_round_is_selected(
    world: Callable[..., World], metric: str, values: list[float], selected: int
) -> None:
    assert selecting(world, metric, values) == selected


def test_the_last_round_is_selected_by_default(world: Callable[..., World]) -> None:
    assert selecting(world, "accuracy", [0.9, 0.8, 0.1], select="last") == 2


def test_a_wish_to_stop_goes_through_and_leaves_finished_rounds(world: Callable[..., World]) -> None:
    def stop(site: str, request: Envelope) -> Envelope:
        if request.header.round == 2:
            raise Interrupted
        return right(site, request)

    it = world(Sites({"west": stop}))
    with pytest.raises(Interrupted):
        it.coordinator.run()
    assert [each.number for each in it.coordinator.rounds] == [0, 1]
    it.store.load_round(1)
    assert it.coordinator.selected_round() == 1


@pytest.mark.parametrize(
    ("every", "asked"), [(1, [True] * 5), (2, [True, False, True, False, True]), (9, [True, *[False] * 4])]
)
def test_sites_measure_only_as_often_as_agreed(world: Callable[..., World], every: int, asked: list[bool]) -> None:
    def obey(site: str, request: Envelope) -> Envelope:
        return done(request, site, counts={"records": 1.0, "correct": 1.0} if request.header.evaluate else {})

    it = world(Sites(dict.fromkeys(PULL, obey)), rounds=5, evaluation={"every": every, "metrics": ["accuracy"]})
    it.coordinator.run()
    assert [request.header.evaluate for kind, site, request in it.sites.requests if kind == "train"][::3] == asked
    measured = [number for number, wanted in enumerate(asked) if wanted]
    assert [event.round for event in it.of(RoundValidated)] == [*measured, 5]  # the last adapter is always measured


@pytest.mark.parametrize("meanwhile", [False, True])
def test_with_public_records_no_site_is_asked_to_measure(
    tmp_path: Path, manifest_for: Callable[..., Manifest], meanwhile: bool
) -> None:
    manifest = manifest_for(training={"rounds": 3}, evaluation={"every": 2, "metrics": ["accuracy"]})
    sites, seen = Sites(), []

    def public(adapter: AdapterState) -> dict[str, float]:
        seen.append(state_digest(adapter))
        return {"records": 4.0, "correct": float(len(seen))}

    store = store_in(tmp_path)
    coordinator = Coordinator(
        manifest,
        run_id="run",
        sites=list(PULL),
        first=FIRST,
        channel=sites,
        store=store,
        report=lambda event: None,
        public=public,
        public_meanwhile=meanwhile,
    )
    coordinator.run()
    assert [coordinator.validation(done).get("accuracy") for done in coordinator.rounds] == [0.25, None, 0.5, 0.75]
    assert seen == [state_digest(store.load_round(number)) for number in (0, 2, 3)]
    asked = [request.header for _, _, request in sites.requests]
    assert all(isinstance(header, RoundStart) and not header.evaluate for header in asked)


def test_no_site_waits_for_figures_on_public_records(tmp_path: Path, manifest_for: Callable[..., Manifest]) -> None:
    """Measuring begins before the sites are asked, and ends after they were: each waits for the other here."""
    begun, asked = threading.Event(), threading.Event()

    class Waiting(Sites):
        def exchange(self, requests: Mapping[str, bytes], *, kind: str) -> Iterator[Reply]:
            assert begun.wait(20)
            asked.set()
            yield from super().exchange(requests, kind=kind)

    def public(adapter: AdapterState) -> dict[str, float]:
        begun.set()
        assert asked.wait(20)
        return {"records": 4.0, "correct": 1.0}

    coordinator = Coordinator(
        manifest_for(training={"rounds": 2}),
        run_id="run",
        sites=list(PULL),
        first=FIRST,
        channel=Waiting(),
        store=store_in(tmp_path),
        report=lambda event: None,
        public=public,
        public_meanwhile=True,
    )
    coordinator.run()
    assert [coordinator.validation(done)["accuracy"] for done in coordinator.rounds] == [0.25] * 3


def test_a_failure_on_public_records_ends_the_run(tmp_path: Path, manifest_for: Callable[..., Manifest]) -> None:
    def public(adapter: AdapterState) -> dict[str, float]:
        raise AdapterError("does not fit")

    for meanwhile in (False, True):
        coordinator = Coordinator(
            manifest_for(training={"rounds": 2}),
            run_id="run",
            sites=list(PULL),
            first=FIRST,
            channel=Sites(),
            store=store_in(tmp_path / str(meanwhile)),
            report=lambda event: None,
            public=public,
            public_meanwhile=meanwhile,
        )
        with pytest.raises(AdapterError, match="does not fit"):
            coordinator.run()


def test_the_last_round_is_the_mean_of_the_last_adapters(tmp_path: Path, manifest_for: MakeManifest) -> None:
    results = {}
    for last in (1, 3):
        tables = {"training": {"rounds": 5}, "aggregation": {"average_last": last, "server_momentum": 0.5}}
        results[last] = World(tmp_path / str(last), manifest_for(**tables), Sites())
        results[last].coordinator.run()
    plain, averaged = results[1], results[3]
    for number in range(5):  # rounds before the last one go on from what they were, not from means
        np.testing.assert_array_equal(
            averaged.store.load_round(number)["a"], plain.store.load_round(number)["a"], strict=True
        )
    expected = np.mean([plain.store.load_round(number)["a"].astype(np.float64) for number in (3, 4, 5)], axis=0)
    assert not np.allclose(expected, plain.coordinator.adapter["a"])
    np.testing.assert_allclose(averaged.store.load_round(5)["a"], expected, rtol=1e-6)
    # It is the result, and what the sites measure at the end.
    assert averaged.coordinator.selected_round() == 5
    np.testing.assert_array_equal(averaged.coordinator.adapter["a"], averaged.store.load_round(5)["a"])
    measured = [request for kind, _, request in averaged.sites.requests if kind == "evaluate"]
    assert all(np.array_equal(request.tensors["a"], averaged.coordinator.adapter["a"]) for request in measured)
    assert measured


def test_an_adapter_that_a_rejected_round_left_is_not_measured_again(world: Callable[..., World]) -> None:
    """Counts of one adapter from two crowds would tell those of the site by which they differ."""
    it = world(rounds=3, aggregation={"max_norm": 1e-9, "max_rejected": 4})
    it.coordinator.run()
    asked = [request.header for _, _, request in it.sites.requests]
    assert [header.evaluate for header in asked if isinstance(header, RoundStart)] == [True] * 3 + [False] * 6
    assert not [header for header in asked if isinstance(header, Evaluate)]
    counts = [done.counts for done in it.coordinator.rounds]
    assert counts[0].keys() == PULL.keys()
    assert all(each == counts[0] for each in counts)
    assert len({header.adapter_sha256 for header in asked}) == 1
