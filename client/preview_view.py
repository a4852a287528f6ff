"""What a person sees of a preview."""

import dataclasses
import json

from rich.console import Console

from client.preview import Preview

__all__ = ["print_preview"]


def print_preview(found: Preview, console: Console, *, as_json: bool) -> None:
    """As lines, or as one JSON object with nothing left out."""
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    say(f"{found.site} in {found.federation}: one round of {found.seconds:.1f} s; nothing left, nothing was charged")
    if found.secure:
        say(f"among {found.sites - 1} made-up sites that send zeros; in the field nobody's part is known")
    else:
        say("secure sums are OFF: everything below is read by the coordinator")
    if not found.private:
        say("there is NO differential privacy in this federation")
    say("in clear around every message:")
    for name, text in found.frame.items():
        say(f"    {name}: {text}")
    for sent in found.sent:
        say(f"{sent.kind}, {sent.bytes} bytes")
        for name, text in sent.clear.items():
            say(f"    in clear    {name}: {text}")
        for name, text in sent.masked.items():
            say(f"    random, hash, sealed or masked    {name}: {text}")
    say(f"{len(found.sent)} messages, {sum(sent.bytes for sent in found.sent)} bytes up")
    if found.error is not None:
        say(f"the opened sum is this site's own part to within {found.error:.3g} of any value, as the grid rounds it")
