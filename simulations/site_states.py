"""What simulated sites remember between rounds, each in its own folder: whichever Flower node plays a site next.

In the field a node is one site's, and the state lies in Flower's context. In a simulation nodes are as many as sites
train at once, and a context would hold, and carry from process to process, what every site that it played remembers.
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from client.state import SiteState

__all__ = ["load_state", "save_state"]

FACTS, KEPT = "state.json", "kept.safetensors"


def load_state(folder: Path) -> SiteState:
    """The state that was saved last; that of a site which has not taken part yet where none was."""
    if not (folder / FACTS).exists():
        return SiteState()
    state = SiteState(**json.loads((folder / FACTS).read_bytes()))
    return replace(state, kept=(folder / KEPT).read_bytes()) if (folder / KEPT).exists() else state


def save_state(folder: Path, state: SiteState) -> None:
    """Save it for the site's next message. The folder ends with the run, so nothing of this must survive a crash."""
    if state.kept:
        (folder / KEPT).write_bytes(state.kept)
    else:
        (folder / KEPT).unlink(missing_ok=True)
    facts = {name: value for name, value in asdict(state).items() if name != "kept"}
    (folder / f"{FACTS}.new").write_text(json.dumps(facts), encoding="utf-8")
    os.replace(folder / f"{FACTS}.new", folder / FACTS)
