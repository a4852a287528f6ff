"""The same code as a Flower app for simulation: a relay whose vault lives in the worker's own process.

Every message says in its notes which site it is for and where that site's folder lies. In the field a site would
take neither from a coordinator; there the relay speaks to the one vault of its institution.
"""

import json
import os
from functools import lru_cache
from pathlib import Path

import torch

from client.ledger import Ledger
from client.protection import Population
from client.relay import failure
from client.resident import resident
from client.state import SiteState
from client.vault import Vault, note
from common.config.manifest import Manifest
from common.flower import ClientApp, Context, Message, ServerApp, pack, quiet, unpack
from common.messages import decode, encode
from simulations.baselines import train_alone
from simulations.profiling import profiles
from simulations.seats import at_work
from simulations.site_states import load_state, save_state
from simulations.workers import worker_begins

__all__ = ["THREADS", "client", "preload", "server"]

# Environment variable with the number of threads a worker computes with.
THREADS = "COADAPT_THREADS"

# Encoded sites kept in a worker. Memory grows with this, not with the number of sites.
CACHED_SITES = 32

client = ClientApp()
server = ServerApp()


@client.train()
@client.evaluate()
@profiles
def answer(message: Message, context: Context) -> Message:
    """Answer an envelope as the site that the notes name."""
    notes = _notes(message)
    try:
        folder, again = Path(notes["folder"]), "again" in notes
        with at_work(notes["site"]):
            vault = _vault(notes["site"], notes["folder"], notes["log"], notes["ledger"])
            reply, state = _answer(vault, unpack(message.content), load_state(folder), again=again)
        save_state(folder, state)
        return Message(pack(reply), reply_to=message)
    except Exception as error:
        note(Path(notes["log"]), error)
        return failure(message, error)


def _answer(vault: Vault, data: bytes, state: SiteState, *, again: bool) -> tuple[bytes, SiteState]:
    """`again` says that memory ran out while the site trained: nothing of that training left it, and where it was
    charged, the charge pays for the one that comes now."""
    if not again:  # the vault decodes the message itself
        return vault.answer(data, state)
    header = decode(data).header
    return vault.answer(data, state, unreleased=vault.charged(header.run_id)[-1:] == [header.round])


@client.query("baseline")
def baseline(message: Message, context: Context) -> Message:
    """Train on one folder alone, for comparison; the answer holds counts on the test records."""
    notes = _notes(message)
    try:
        folder = Path(notes["folder"])
        request = decode(unpack(message.content))
        with at_work(notes["site"]):
            reply = train_alone(request, _manifest(folder.parent), notes["site"], folder, steps=int(notes["steps"]))
        return Message(pack(encode(reply)), reply_to=message)
    except Exception as error:
        note(Path(notes["log"]), error)
        return failure(message, error)


@server.main()
def main(grid, context: Context) -> None:  # type: ignore[no-untyped-def]  # Flower's Grid
    """Run the federation of `manifest` in the app's configuration, for `flwr run`."""
    from simulations.engine import simulate_on

    simulate_on(grid, {key: str(value) for key, value in context.run_config.items()})


def _notes(message: Message) -> dict[str, str]:
    return {key: str(value) for key, value in message.content.config_records["notes"].items()}


def preload(root: Path) -> None:
    """Load the base for the sites in a folder, before the first call wants it."""
    resident(_read(root))


@lru_cache(maxsize=1)
def _manifest(root: Path) -> Manifest:
    quiet()
    worker_begins()
    torch.set_num_threads(int(os.environ.get(THREADS, "1")))
    return _read(root)


def _read(root: Path) -> Manifest:
    return Manifest.model_validate_json((root / "federation.json").read_bytes())


@lru_cache(maxsize=CACHED_SITES)
def _vault(site: str, folder: str, log: str, ledger: str) -> Vault:
    home = Path(folder)
    held_out = home / "held_out.jsonl"
    manifest = _manifest(home.parent)
    population, rank = home / "population.json", home / "rank"
    return Vault(
        site,
        manifest,
        train=home / "train.jsonl",
        held_out=held_out if held_out.exists() else None,
        log=Path(log),
        population=Population(**json.loads(population.read_bytes())) if population.exists() else None,
        ledger=Ledger(Path(ledger), simulated=True) if population.exists() else None,
        rank=int(rank.read_text(encoding="ascii")) if rank.exists() else None,
    )
