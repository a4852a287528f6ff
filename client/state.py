"""What a site remembers between rounds."""

from dataclasses import dataclass

__all__ = ["SiteState"]


@dataclass(frozen=True)
class SiteState:
    """The records drawn so far over all rounds, and the last round that the site took part in.

    `checked` has a bit for each phase of training whose pre-flight check the site has done in this run (`Phase` in
    `common/contribution.py`). `kept` are the trained pairs of the last round, as safetensors, while a second sum of
    the round may ask for them; empty otherwise.
    """

    cursor: int = 0
    last_round: int = 0
    checked: int = 0
    kept: bytes = b""
