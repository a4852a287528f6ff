"""The run on a terminal and in a log: every event, any width, odd names, and a terminal left as it was."""

import io
import math
from collections.abc import Sequence

import pytest
from rich.console import Console
from summary_samples import sample

from common.progress import (
    BaselineFinished,
    BatchHalved,
    Event,
    PhaseStarted,
    ResourcesUsed,
    RoundFinished,
    RoundLost,
    RoundRejected,
    RoundStarted,
    RoundValidated,
    RunStarted,
    RunStopped,
    SiteFailed,
    SiteFinished,
    SlotClosed,
    WorkersPlanned,
)
from simulations.live import LiveView, print_table
from simulations.summary import ClosedSlot, Halving, MemoryFacts
from simulations.wording import best_places, duration_text, figure_text, metric_title, size_text

SITES = ("north", "south", "west")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def started(sites: tuple[str, ...] = SITES, rounds: int = 3) -> RunStarted:
    return RunStarted(
        run_id="r1",
        federation="clinics",
        sites=sites,
        rounds=rounds,
        metrics=("accuracy", "macro_f1", "loss"),
        trainable_parameters=309_520,
    )


def one_round(number: int, sites: tuple[str, ...] = SITES, failed: tuple[str, ...] = ()) -> list[Event]:
    answered = [site for site in sites if site not in failed]
    accuracy = 0.2 + 0.2 * number
    return [
        RoundStarted(round=number, sites=sites),
        *(SiteFailed(round=number, site=site, code="timeout") for site in failed),
        *(
            SiteFinished(
                round=number,
                site=site,
                train_loss=1 / number,
                examples=320,
                seconds=3.0,
                bytes_up=10**6,
                bytes_down=10**6,
            )
            for site in answered
        ),
        RoundValidated(
            round=number - 1, figures={"accuracy": accuracy, "macro_f1": accuracy - 0.05, "loss": 2 - accuracy}
        ),
        RoundFinished(
            round=number,
            train_loss=1 / number,
            answered=len(answered),
            failed=len(failed),
            bytes_up=10**6 * len(answered),
            bytes_down=10**6 * len(sites),
            seconds=14.0 + number,
        ),
    ]


def whole_run() -> list[Event]:
    return [
        PhaseStarted(phase="start-up"),
        started(),
        PhaseStarted(phase="rounds"),
        *one_round(1),
        *one_round(2, failed=("west",)),
        *one_round(3),
        PhaseStarted(phase="test"),
        BaselineFinished(baseline="federated", figures={"accuracy": 0.9, "loss": 0.4}),
        RunStopped(status="finished"),
    ]


def drawn(events: Sequence[Event], width: int = 100, height: int = 40) -> str:
    """The last picture of a run, without colours."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    view = LiveView(console)
    for event in events:
        view(event)
    with console.capture() as capture:
        console.print(view._picture())
    return capture.get()


def test_a_log_gets_one_line_for_each_event_worth_it() -> None:
    file = io.StringIO()
    with LiveView(Console(file=file)) as view:
        for event in whole_run():
            view(event)
    assert file.getvalue().splitlines() == [
        "phase start-up",
        "clinics  3 sites, 3 rounds, 309,520 parameters  r1",
        "phase rounds",
        "round 0/3  validation  accuracy 0.400  macro f1 0.350  loss 1.600",
        "round 1/3  train loss 1.000  3 sites  6.0 MB  15 s  about 30 s left",
        "round 2/3  west sat out: timeout",
        "round 1/3  validation  accuracy 0.600  macro f1 0.550  loss 1.400",
        "round 2/3  train loss 0.500  2 of 3 sites  5.0 MB  16 s  about 16 s left",
        "round 2/3  validation  accuracy 0.800  macro f1 0.750  loss 1.200",
        "round 3/3  train loss 0.333  3 sites  6.0 MB  17 s",
        "phase test",
        "test set  federated  accuracy 0.900  loss 0.400",
        "finished",
    ]


def test_a_rejected_round_is_told_with_the_guards_figures_and_marked() -> None:
    rejected = RoundRejected(round=2, setting="max_norm", value=3.5, bound=1.0)
    events = [started(), *one_round(1), rejected, *one_round(2)]
    file = io.StringIO()
    with LiveView(Console(file=file)) as view:
        for event in events:
            view(event)
    assert "round 2/3  rejected: max_norm allows 1.000, found 3.500; the adapter stays" in file.getvalue().splitlines()
    assert "2 rejected" in drawn(events)
    assert "rejected" not in drawn([started(), *one_round(1), *one_round(2)])


def test_a_lost_round_is_told_with_its_reason_and_marked() -> None:
    events = [started(), *one_round(1), RoundLost(round=2, reason="1 site answered, 2 must"), *one_round(2)]
    file = io.StringIO()
    with LiveView(Console(file=file)) as view:
        for event in events:
            view(event)
    assert "round 2/3  lost: 1 site answered, 2 must; the adapter stays" in file.getvalue().splitlines()
    assert "2 lost" in drawn(events)
    assert "lost" not in drawn([started(), *one_round(1), *one_round(2)])


def test_rejected_rounds_are_named_below_the_table() -> None:
    summary = sample()
    rounds = [
        f.model_copy(update={"rejected": "max_norm: 9 is above 3"} if f.round == 2 else {}) for f in summary.rounds
    ]
    file = io.StringIO()
    print_table(summary.model_copy(update={"rounds": rounds}), Console(file=file))
    assert "round 2 was rejected: max_norm: 9 is above 3" in file.getvalue().splitlines()


def test_a_log_line_is_never_wrapped_and_never_styled() -> None:
    file = io.StringIO()
    with LiveView(Console(file=file, width=20)) as view:
        view(RunStopped(status="failed", reason="[red]round 3[/red]: 1 site answered, 2 must :warning: " + "x" * 50))
    assert file.getvalue() == "failed: [red]round 3[/red]: 1 site answered, 2 must :warning: " + "x" * 50 + "\n"


def test_a_name_cannot_steer_the_terminal_nor_break_an_encoding() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    with LiveView(Console(file=file)) as view:
        view(SiteFailed(round=1, site="\x1b[2Jsüd\r", code="timeout"))
    file.flush()
    assert raw.getvalue().decode() == "round 1/0  ?[2Js?d? sat out: timeout\n"


def test_the_picture_shows_sites_rounds_and_the_best() -> None:
    picture = drawn(whole_run()[:-3])
    lines = picture.splitlines()
    assert lines[0].startswith("clinics  rounds  run r1")
    assert lines[1].startswith("round 3/3")
    assert any(line.split() == ["north", "done", "0.333", "960", "6.0", "MB"] for line in lines)
    assert any(line.split() == ["2", "0.800*", "0.750*", "1.200*", "0.500"] for line in lines)
    assert any(line.split() == ["3", "-", "-", "-", "0.333"] for line in lines)


def test_the_picture_shows_states_and_time_left() -> None:
    events = [started(), *one_round(1), *one_round(2, failed=("west",))[:3]]
    picture = drawn(events)
    assert "about" in picture
    assert "left" in picture
    assert [line.split()[:2] for line in picture.splitlines() if line.startswith(SITES)] == [
        ["north", "done"],
        ["south", "training"],
        ["west", "failed:"],
    ]


def test_a_site_that_is_not_invited_waits() -> None:
    assert "waiting" in drawn([started(), *one_round(1), RoundStarted(round=2, sites=("north", "south"))])


PLANNED = WorkersPlanned(workers=2, plan=("GPU 0: 2 workers, 8 records at once, 5.0 GB of 8.0 GB",))
HALVED = BatchHalved(round=1, site="west", before=8, after=4)
CLOSED = SlotClosed(round=1, site="west", device="GPU 0", left=1)


def test_the_plan_is_shown_until_there_is_more_to_say() -> None:
    assert "GPU 0: 2 workers, 8 records at once" in drawn([started(), PLANNED])
    assert "8 records at once" not in drawn([started(), PLANNED, *one_round(1)])


def test_the_picture_shows_what_the_run_uses_and_how_long_its_phases_take() -> None:
    used = ResourcesUsed(processors=0.94, memory=3_100_000_000, gpus=(0.5,), gpu_memory=(5_000_000_000,))
    phases = [PhaseStarted(phase="start-up", time=100.0), PhaseStarted(phase="rounds", time=108.0)]
    told = drawn([started(), *phases, used, *one_round(1)])
    assert "processors 94%, memory 3.1 GB, GPU 0 50%, 5.0 GB, start-up 8.0 s, rounds" in told
    ended = drawn([started(), *phases, used, RunStopped(status="finished", time=188.0)])
    assert "start-up 8.0 s, rounds 1 m 20 s" in ended
    assert "processors" not in ended


def test_want_of_memory_is_told_in_the_picture_and_in_a_log() -> None:
    assert "west computes on 4 records at once, not 8" in drawn([started(), HALVED])
    assert "memory: at most 1 worker at once on GPU 0" in drawn([started(), HALVED, CLOSED])
    file = io.StringIO()
    view = LiveView(Console(file=file, width=200))
    for event in [started(), PLANNED, HALVED, CLOSED]:
        view(event)
    assert file.getvalue().splitlines()[1:] == [
        "2 workers  GPU 0: 2 workers, 8 records at once, 5.0 GB of 8.0 GB",
        "round 1/3  memory: west computes on 4 records at once, not 8",
        "round 1/3  memory: at most 1 worker at once on GPU 0",
    ]


def test_want_of_memory_stands_below_the_table() -> None:
    file = io.StringIO()
    memory = MemoryFacts(
        measured=True,
        devices=[],
        notes=[],
        halvings=[Halving(round=2, site="west", before=8, after=4)],
        closed_slots=[ClosedSlot(round=2, site="west", device="GPU 0", left=1)],
    )
    print_table(sample(table=[], failures=[], memory=memory), Console(file=file, width=200))
    assert file.getvalue().splitlines()[1:] == [
        "memory ran out for west in round 2: 4 records at once instead of 8, same results",
        "memory ran out for west in round 2 again: at most 1 worker at once on GPU 0 from then on",
    ]


def test_the_picture_says_how_the_run_ended() -> None:
    assert "interrupted: Ctrl-C" in drawn([started(), RunStopped(status="interrupted", reason="Ctrl-C")])
    assert "test set: federated measured" in drawn(whole_run())


@pytest.mark.parametrize("width", [10, 40, 60, 120])
@pytest.mark.parametrize("height", [5, 24])
def test_the_picture_fits_any_terminal(width: int, height: int) -> None:
    names = ("[bold]x[/", "病院" * 16, "n" * 64, "a\x1b[2Jb", *(f"site-{number}" for number in range(60)))
    events = [started(names, rounds=30), *(event for number in range(1, 31) for event in one_round(number, names))]
    events += one_round(3, names, failed=("site-59",))[:20]
    for end in range(0, len(events), 97):
        picture = drawn(events[:end], width, height)
        assert "\x1b" not in picture
        assert all(len(line) <= width for line in picture.splitlines())
    lines = drawn(events, width, height).splitlines()
    # Two tables have a least size; from a usual terminal on, all fits.
    assert len(lines) <= max(height, 20)
    if width >= 40:
        assert any(line.startswith("site-59") for line in lines)
        assert any("more:" in line for line in lines)


@pytest.mark.parametrize("width", [40, 120])
def test_live_draws_and_gives_the_terminal_back(width: int) -> None:
    file = io.StringIO()
    with LiveView(Console(file=file, force_terminal=True, width=width, height=30, legacy_windows=False)) as view:
        for event in whole_run():
            view(event)
    assert file.getvalue().count(HIDE) == 1
    assert file.getvalue().rindex(SHOW) > file.getvalue().rindex("clinics")
    assert "finished" in file.getvalue()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_gives_the_terminal_back_and_goes_on(error: type[BaseException]) -> None:
    file = io.StringIO()
    view = LiveView(Console(file=file, force_terminal=True, width=80, height=30))
    with pytest.raises(error), view:
        raise error
    assert file.getvalue().rindex(SHOW) > file.getvalue().rindex(HIDE)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    file = io.StringIO()
    with LiveView(Console(file=file, force_terminal=True)) as view:
        view(PhaseStarted(phase="rounds"))
    assert file.getvalue() == "phase rounds\n"


def test_the_table_in_a_log_is_aligned() -> None:
    file = io.StringIO()
    print_table(sample(), Console(file=file))
    assert file.getvalue().splitlines() == [
        "On the test set; * best; lower is better: loss",
        "                        accuracy   macro f1    loss   examples seen",
        "untuned                    0.020      0.020   2.160               0",
        "local only (mean)          0.700      0.700   0.800           9,600",
        "local only (best site)     0.780      0.780   0.640           9,600",
        "federated                  0.910      0.910   0.380           9,600",
        "centralised                0.930*     0.930*  0.340*          9,600",
        "hospital-3 sat out round 2: timeout",
    ]


@pytest.mark.parametrize("width", [40, 59, 60, 80, 120])
@pytest.mark.parametrize("task", ["text-classification", "token-classification", "causal-lm"])
def test_the_table_on_a_terminal_is_whole(width: int, task: str) -> None:
    file = io.StringIO()
    summary = sample(task=task)
    print_table(summary, Console(file=file, force_terminal=True, width=width, color_system=None))
    printed = file.getvalue()
    assert all(len(line) <= width for line in printed.splitlines())
    for row in summary.table:
        assert row.name in printed
    assert printed.count("*") == len(summary.metrics) + 1
    assert printed.count(f"{figure_text(summary.table[-1].figures['loss'])}*") >= 1
    assert "hospital-3 sat out round 2: timeout" in printed.replace("\n", " ")


def test_an_empty_table_and_many_absences() -> None:
    file = io.StringIO()
    failures = [{"round": number, "site": "[b]west", "code": "timeout"} for number in (1, 3)]
    print_table(sample(table=[], failures=failures), Console(file=file, force_terminal=True, width=40))
    assert file.getvalue().splitlines() == [
        "No figures on the test set.",
        "[b]west sat out rounds 1, 3: timeout",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (4.23, "4.2 s"),
        (9.96, "10 s"),
        (59.6, "1 m"),
        (80, "1 m 20 s"),
        (3599.7, "1 h"),
        (7500, "2 h 5 m"),
        (math.nan, "unknown"),
        (math.inf, "unknown"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (999.7, "1.0 kB"), (3_100_000, "3.1 MB"), (152_400, "152 kB"), (2.5e15, "2,500.0 TB")],
)
def test_sizes(size: float, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.000"),
        (0.91, "0.910"),
        (-0.5, "-0.500"),
        (0.0001, "1.0e-04"),
        (12.345, "12.35"),
        (1234.5, "1,234.5"),
        (1e12, "1.00e+12"),
        (math.nan, "NaN"),
        (-math.inf, "-inf"),
    ],
)
def test_figures(value: float | None, text: str) -> None:
    assert figure_text(value) == text


def test_the_best_is_lowest_for_losses_and_shared_by_equals() -> None:
    assert best_places([0.5, 0.9, None, math.nan, 0.90001], "accuracy") == {1, 4}
    assert best_places([0.5, 0.9, -math.inf], "loss") == {0}
    assert best_places([None, math.nan], "loss") == set()
    assert metric_title("bits_per_byte") == "bits per byte"
    assert metric_title("a.b:my_score") == "my score"
