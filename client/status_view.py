"""`coadapt site status` for a person: a line for each thing, in plain words."""

import time

from rich.console import Console

from client.status import SiteStatus
from common.supervise import State

__all__ = ["print_status"]

NAMES = ("vault", "relay")


def print_status(found: SiteStatus, console: Console) -> None:
    """Print it."""

    def say(what: str, text: str) -> None:
        console.print(f"{what:<12} {text}", highlight=False, soft_wrap=True, markup=False)

    say("site", found.name)
    noted = {state.name: state for state in found.processes}
    for name in NAMES:
        state = noted.get(name)
        say(name, _process(state) if state else _not_noted(name, found))
        if name == "vault" and state is not None and state.alive and found.vault_answers == "no":
            say("", "it does not take orders: it still loads, or cannot; run/log/vault.log says")
    say("coordinator", _coordinator(found))
    run = found.run
    if run is None:
        say("run", "none was begun with this site yet")
    else:
        round_ = "" if run.round is None else f", round {run.round}"
        say("run", f"{run.run_id}{round_}: newest order ({run.kind}) {run.decision} at {run.time}")
    if found.spent is not None:
        spent = found.spent
        say(
            "privacy",
            f"epsilon {spent.epsilon:.3f} of {spent.cap:g} spent at delta {spent.delta:g} on {spent.population},"
            f" {spent.rounds} rounds paid",
        )
    for refusal in found.refusals:
        words = " ".join(word for word in (refusal.run_id, refusal.kind, refusal.code, refusal.reason) if word)
        say("refused", f"{refusal.time} {words}")
    if not found.refusals:
        say("refused", "nothing")
    if found.isolation:
        say("warning", found.isolation)
    for problem in found.problems:
        say("problem", problem)


def _process(state: State) -> str:
    again = f", started again {state.ends} times" if state.ends else ""
    if not state.alive:
        return f"is down{again}"
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(state.started))
    return f"runs since {since}, process {state.pid}{again}"


def _not_noted(name: str, found: SiteStatus) -> str:
    if name == "vault" and found.vault_answers == "yes":
        return "runs, and takes orders; started by others than coadapt site start, such as systemd"
    return "does not run by coadapt site start; under systemd: systemctl status coadapt-" + name


def _coordinator(found: SiteStatus) -> str:
    if not found.coordinator:
        return "none: this site has joined nothing yet"
    words = {
        "yes": "is connected",
        "no": "is not connected",
        "unknown": "may be connected; the relay is another user's or systemd's process, and cannot be looked into here",
    }
    return f"{found.coordinator} {words[found.connected]}"
