"""Where a round's time went: the cuts add up, and lie where the processes wrote that they are."""

import json
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.audit_log import AuditLog
from common.errors import RunError
from common.progress import Event, RoundFinished, RoundStarted, StageFinished, SumOpened
from common.secure_sum.coordinator import Stage
from simulations.benchmarks.latency_phases import LEGS, Marks, gate_marks, round_parts, round_seconds, vault_marks
from simulations.benchmarks.round_latency import _figures

SITES = ("north", "south", "east")
GAP, OPENING, STORING = 0.1, 0.05, 0.2
steps = st.lists(st.floats(0.01, 5.0), min_size=len(LEGS) - 1, max_size=len(LEGS) - 1)
# For each stage and site how long each leg took; the last leg, waiting for the slowest, follows from them.
lasting = st.lists(st.lists(steps, min_size=3, max_size=3), min_size=len(Stage), max_size=len(Stage))


def played(lasting: list[list[list[float]]], began: float = 1e6, number: int = 4) -> tuple[list[Event], Marks, float]:
    """What the processes of a round would have written, and when it ended."""
    events: list[Event] = [RoundStarted(time=began, round=number, sites=SITES)]
    kinds: tuple[list[float], ...] = ([], [], [], [])
    now = began
    for stage, sites in zip(Stage, lasting, strict=True):
        now += GAP
        waited = {}
        for name, legs in zip(SITES, sites, strict=True):
            for place, kind in enumerate(kinds):
                kind.append(now + sum(legs[: place + 1]))
            waited[name] = sum(legs)
        seconds = max(waited.values())
        now += seconds
        events.append(StageFinished(time=now, round=number, stage=stage.value, seconds=seconds, waited=waited))
    opened = SumOpened(time=now + OPENING, round=number, survivors=SITES, dropped=(), threshold=3, transcript="")
    whole = {"train_loss": None, "answered": 3, "failed": 0, "bytes_up": 0, "bytes_down": 0, "seconds": 0.0}
    end = now + OPENING + STORING
    return [*events, opened, RoundFinished(time=end, round=number, **whole)], Marks(*kinds), end - began  # type: ignore[arg-type]


@given(lasting)
def test_parts_add_up_to_the_round_and_legs_to_its_stages(times: list[list[list[float]]]) -> None:
    events, marks, seconds = played(times)
    parts = round_parts(events, 4, marks)
    assert round_seconds(events, 4) == pytest.approx(seconds)
    legs = {name: value for name, value in parts.items() if name.startswith("leg_")}
    stages = {name: value for name, value in parts.items() if name.startswith("stage_")}
    assert set(legs) == {f"leg_{name}" for name in LEGS}
    assert set(stages) == {f"stage_{stage.value}" for stage in Stage}
    assert sum(parts.values()) - sum(legs.values()) == pytest.approx(seconds)
    assert sum(legs.values()) == pytest.approx(sum(stages.values()), abs=1e-6)
    assert parts["between_stages"] == pytest.approx(len(Stage) * GAP, abs=1e-6)
    assert parts["opening"] == pytest.approx(OPENING, abs=1e-6)
    assert parts["storing"] == pytest.approx(STORING, abs=1e-6)
    for place, name in enumerate(LEGS[:-1]):
        wanted = sum(fmean(legs[place] for legs in sites) for sites in times)
        assert parts[f"leg_{name}"] == pytest.approx(wanted, abs=1e-6), name


def test_a_stage_in_which_a_site_was_asked_twice_is_not_cut() -> None:
    events, marks, _ = played([[[0.5] * 5] * 3] * len(Stage))
    again = Marks([*marks.taken, marks.taken[0]], marks.fetched, marks.answered, marks.brought)
    parts = round_parts(events, 4, again)
    assert parts["leg_asked_again"] == pytest.approx(parts["stage_advertise"])
    assert parts["leg_fetching"] == pytest.approx(4 * 0.5)


def test_other_rounds_do_not_count() -> None:
    first, marks, _ = played([[[0.5] * 5] * 3] * len(Stage), number=3)
    events, later, seconds = played([[[0.25] * 5] * 3] * len(Stage), began=2e6)
    both = Marks(*([*one, *other] for one, other in zip(vars(marks).values(), vars(later).values(), strict=True)))
    assert round_parts([*first, *events], 4, both) == pytest.approx(round_parts(events, 4, later))
    assert round_seconds([*first, *events], 4) == pytest.approx(seconds)


def test_a_round_that_did_not_end_has_no_parts() -> None:
    events, marks, _ = played([[[0.5] * 5] * 3] * len(Stage))
    with pytest.raises(RunError, match="did not end"):
        round_parts(events[:-1], 4, marks)
    with pytest.raises(RunError, match="no phases"):
        round_parts([events[0], events[-1]], 4, marks)


def test_the_logs_say_when(tmp_path: Path) -> None:
    requests = [
        (1.0, "pull-messages", 0.1, 0),
        (2.0, "pull-messages", 0.1, 464),
        (3.0, "pull-object", 0.1, 164),
        (4.0, "confirm-message-received", 0.1, 0),
        (5.0, "push-messages", 0.25, 442),
    ]
    lines = [
        {
            "time": datetime.fromtimestamp(moment, UTC).isoformat(),
            "event": "request",
            "path": f"/v1/fleet/{name}",
            "seconds": seconds,
            "bytes_out": size,
        }
        for moment, name, seconds, size in requests
    ]
    lines.append({**lines[1], "event": "refused"})
    log = tmp_path / "gate.log"
    log.write_text("\n".join(["something else", *map(json.dumps, lines)]) + "\n")
    assert gate_marks(log) == Marks(taken=[2.0], fetched=[4.0], brought=[4.75])

    before = datetime.now(UTC).timestamp()
    audit = AuditLog(tmp_path / "audit.jsonl")
    for decision, kind in (("answered", "hello"), ("working", "message"), ("refused", "poll"), ("answered", "poll")):
        audit.add(decision, kind=kind)  # type: ignore[arg-type]
    audit.close()
    (moment,) = vault_marks([tmp_path / "audit.jsonl"])
    assert before - 0.001 <= moment <= datetime.now(UTC).timestamp()


def test_figures_are_medians_and_the_ratio_of_one_run() -> None:
    stock = [[[2.0, 3.0, 2.0, 3.0], [4.0, 4.0, 4.0, 8.0]], [[3.0, 3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0]]]
    parts = [{"leg_fetching": 1.0, "leg_asked_again": 2.0}, {"leg_fetching": 2.0}, {"leg_fetching": 3.0}, {}]
    figures = _figures([[5.0, 6.0], [3.0, 4.0]], stock, parts)
    assert figures["rounds"] == 4
    assert (figures["round_seconds"], figures["stock_round_seconds"]) == (4.5, 11.0)  # of 3 4 5 6, and of 4 10 12 20
    assert figures["ratio"] == pytest.approx(4.5 / 11, abs=1e-4)
    assert (figures["ratio_least"], figures["ratio_most"]) == (pytest.approx(5.5 / 15, abs=1e-4), 3.5 / 8)
    assert (figures["leg_fetching_seconds"], figures["leg_asked_again_seconds"]) == (1.5, 0.5)
    assert [figures[f"stock_phase_{n}_seconds"] for n in (1, 2, 3, 4)] == [2.5, 2.75, 2.5, 3.75]
