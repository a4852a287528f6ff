"""What a simulated run's units have paid so far, by its simulated ledgers; real ones lie at the sites alone."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from server.watching.folder import RunFolder, Spent
from server.watching.tail import read_after

__all__ = ["spent_in"]

# A ledger is opened for each; of a crowd the first ones stand for the others, whose rounds are as many.
MOST_LEDGERS = 64


def spent_in(run: RunFolder) -> Spent:
    """A function that tells epsilon by site while the run goes on, for the first sites of its roster."""

    def spent() -> Mapping[str, float]:
        promise = run.promise()
        started = next((each for each in read_after(run.events, 0).events if each["event"] == "run_started"), None)
        if promise is None or started is None:
            return {}
        found = {}
        for number, site in enumerate(started["sites"][:MOST_LEDGERS], start=1):  # named by `sites.lay_out`
            head = run.path / "ledgers" / str(number) / "ledger.head"
            if head.exists():  # written after the first charge: opening a ledger would make one
                found[site] = _epsilon(head.parent, head.read_bytes(), promise["delta"])
        return found

    return spent


@lru_cache(maxsize=MOST_LEDGERS)
def _epsilon(ledger: Path, _head: bytes, delta: float) -> float:
    """`_head` changes with every charge, so that a ledger is read once for each."""
    from client.ledger import Ledger
    from common.privacy.accounting import merged, rdp_epsilon  # takes torch, and so seconds

    entries = Ledger(ledger, simulated=True).entries()
    return rdp_epsilon(merged(entry.charge.steps for entry in entries), delta)
