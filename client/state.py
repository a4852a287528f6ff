"""What a site remembers between rounds."""

from dataclasses import dataclass

__all__ = ["SiteState"]


@dataclass(frozen=True)
class SiteState:
    """The records drawn so far over all rounds, and the last round that the site took part in."""

    cursor: int = 0
    last_round: int = 0
