"""The events of a run that is resumed: what an earlier process wrote of the round that goes on is not written again."""

import dataclasses
from collections import Counter
from collections.abc import Iterable

from common.progress import (
    Event,
    EventSink,
    RoundLost,
    RoundRejected,
    RoundValidated,
    SiteFailed,
    SiteFinished,
    SumOpened,
)

__all__ = ["OnlyNew"]

# What comes of sites' answers, which are replayed from a journal or given a second time. Beginnings are always told.
_FACTS = (SumOpened, SiteFailed, SiteFinished, RoundValidated, RoundRejected, RoundLost)


class OnlyNew:
    """An EventSink before another one. Each of the events `before` keeps one that is equal but for its time away."""

    def __init__(self, before: Iterable[Event], to: EventSink) -> None:
        self._known, self._to = Counter(_said(event) for event in before if isinstance(event, _FACTS)), to

    def __call__(self, event: Event) -> None:
        """Pass it on, unless it was written before."""
        said = _said(event)
        if self._known[said]:
            self._known[said] -= 1
        else:
            self._to(event)


def _said(event: Event) -> str:
    return f"{event.name()} {dataclasses.asdict(dataclasses.replace(event, time=0.0))}"
