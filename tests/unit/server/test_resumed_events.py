"""Events of a resumed run: each fact of a round stands once in the stream, over a crash at any event."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from resuming import Clock, Crash, World
from test_resume import manifest_of

from common.config.manifest import Manifest
from common.progress import Event, RoundValidated, RunStarted, SiteFailed, SiteFinished, SumOpened
from server.resumed_events import OnlyNew


def failed(site: str, number: int = 1, code: str = "timeout") -> SiteFailed:
    return SiteFailed(round=number, site=site, code=code)


def test_what_stands_there_is_not_written_again_and_what_is_new_is() -> None:
    said: list[Event] = []
    sink = OnlyNew([failed("a"), failed("a"), failed("b", 2)], said.append)
    started = RunStarted(run_id="r", federation="f", sites=(), rounds=1, metrics=(), trainable_parameters=1)
    again = [failed("a"), failed("a"), failed("a"), failed("b"), failed("b", 2), failed("a", code="lost"), started]
    for event in again:
        sink(event)
    assert said == [again[2], again[3], again[5], started]


def test_beginnings_are_told_by_every_process() -> None:
    said: list[Event] = []
    started = RunStarted(run_id="r", federation="f", sites=(), rounds=1, metrics=(), trainable_parameters=1)
    OnlyNew([started], said.append)(started)
    assert said == [started]


@pytest.mark.parametrize("secure", [True, False])
def test_killed_at_any_moment_a_run_tells_each_fact_once(
    tmp_path: Path, manifest_for: Callable[..., Manifest], secure: bool
) -> None:
    manifest = manifest_of(manifest_for, rounds=2, method="separate", secure=secure)
    undisturbed, clock = World(tmp_path / "undisturbed", manifest), Clock()
    undisturbed.folder.parent.mkdir()
    undisturbed.process(clock)
    twice = 0
    for moment in range(2, clock.now + 1, 5):
        world, kept = World(tmp_path / str(moment), manifest), list[Event]()
        world.folder.parent.mkdir()
        for life in (Clock(moment), Clock()):
            written = len(kept)
            world.events = cast(Any, SimpleNamespace(append=OnlyNew(list(kept), kept.append)))
            with contextlib.suppress(Crash):
                world.process(life)
        assert facts_in(kept) == facts_in(undisturbed.events), moment
        twice += any(isinstance(event, SumOpened | SiteFinished) for event in kept[:written])
    assert twice  # some crashes came after facts were told


def facts_in(events: list[Event]) -> list[tuple[Any, ...]]:
    """What is alike in two runs: names, rounds and sites; a sum's transcript is another in each."""
    kinds = (SumOpened, SiteFinished, RoundValidated)
    return sorted(
        (event.name(), vars(event)["round"], str(vars(event).get("site")))
        for event in events
        if isinstance(event, kinds)
    )
