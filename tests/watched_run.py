"""A run's folder as a run leaves it, for tests of what looks at runs; its events are made up."""

from pathlib import Path

from common.progress import (
    BaselineFinished,
    Event,
    EventLog,
    PhaseStarted,
    RoundFinished,
    RoundRejected,
    RoundStarted,
    RoundValidated,
    RunStarted,
    RunStopped,
    SiteFailed,
    SiteFinished,
    StageFinished,
)

SITES = ("Klinik Süd", "<b>North</b>", "mercy")
METRICS = ("accuracy", "loss")
BEGAN = 1_790_000_000.0

PRIVATE = '[privacy]\nepsilon = 8.0\ndelta = 1e-5\nunit = "patient"\n'


def beginning(rounds: int = 4, run_id: str = "one") -> list[Event]:
    """The run begins; it reaches its rounds after 9 seconds."""
    return [
        RunStarted(
            time=BEGAN,
            run_id=run_id,
            federation="city-hospitals",
            sites=SITES,
            rounds=rounds,
            metrics=METRICS,
            trainable_parameters=1234,
        ),
        PhaseStarted(time=BEGAN, phase="start-up"),
        PhaseStarted(time=BEGAN + 9, phase="rounds"),
    ]


def a_round(number: int) -> list[Event]:
    """A round of 20 seconds; in the second one a site fails, and a guard rejects it."""
    time = BEGAN + 9 + 20 * (number - 1)
    failing = SITES[1] if number == 2 else None
    answered = [site for site in SITES if site != failing]
    events: list[Event] = [
        RoundStarted(time=time, round=number, sites=SITES),
        RoundValidated(time=time, round=number - 1, figures=figures(number - 1)),
    ]
    if failing:
        events.append(SiteFailed(time=time + 5, round=number, site=failing, code="timeout"))
    events += [
        SiteFinished(
            time=time + 12, round=number, site=site, train_loss=2 / number, examples=32, seconds=11.0, bytes_up=1000,
            bytes_down=2000,
        )
        for site in answered
    ]  # fmt: skip
    events.append(StageFinished(time=time + 14, round=number, stage="vector", seconds=14.0, waited={"mercy": 13.5}))
    if failing:
        events.append(RoundRejected(time=time + 15, round=number, setting="max_norm", value=3.5, bound=2.0))
    events.append(
        RoundFinished(
            time=time + 20, round=number, train_loss=2 / number, answered=len(answered), failed=3 - len(answered),
            bytes_up=3000, bytes_down=6000, seconds=20.0,
        )
    )  # fmt: skip
    return events


def ending(rounds: int, status: str = "finished", reason: str = "") -> list[Event]:
    """The last adapter is measured, and the run stops."""
    time = BEGAN + 9 + 20 * rounds
    return [
        RoundValidated(time=time, round=rounds, figures=figures(rounds)),
        PhaseStarted(time=time, phase="test"),
        BaselineFinished(time=time + 3, baseline="federated", figures={"accuracy": 0.875, "loss": 0.5}),
        RunStopped(time=time + 4, status=status, reason=reason),
    ]


def whole(rounds: int = 4, run_id: str = "one") -> list[Event]:
    """A finished run."""
    return [
        *beginning(rounds, run_id),
        *(event for number in range(rounds) for event in a_round(number + 1)),
        *ending(rounds),
    ]


def figures(number: int) -> dict[str, float]:
    """Figures of a round's adapter on held-out records."""
    return {"accuracy": 0.25 + number / 8, "loss": 2.0 - number / 4}


def write(folder: Path, events: list[Event], *, manifest: str = PRIVATE) -> Path:
    """A run's folder with these events."""
    (folder / "rounds").mkdir(parents=True, exist_ok=True)
    (folder / "federation.toml").write_text(manifest, encoding="utf-8")
    log = EventLog(folder / "events.jsonl")
    for event in events:
        log(event)
    log.close()
    return folder
