"""Sites as witnesses of each other's ledgers: what goes along in a secure sum, so that hiding it takes all of them.

A site's statement of its ledger's end (`common/ledger_statement.py`) is in its signed Advertise, and as it is after the
round's charge in its signed Confirm. Its peers remember the newest and hand it back in their own Advertise of a later
sum. A coordinator can leave none of it out without leaving out the peer, nor change it.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from common.ledger_statement import LedgerStatement
from common.roster import Roster
from common.secure_sum.messages import MOST_HANDED_BACK, Advertise, Turn

__all__ = ["Witness", "require_statements", "witnessed"]


class Witness(Protocol):
    """What a site tells and remembers of ledgers, where there are any."""

    def says(self) -> bytes:
        """This site's own statement of now."""

    def recalls(self, sites: Sequence[int]) -> Mapping[int, bytes]:
        """The newest statement that is remembered of each of these sites, where one is."""

    def hears(self, said: Mapping[int, bytes], handed_back: Sequence[bytes]) -> None:
        """Remember peers' statements durably, and hold those that were handed back against the own ledger.

        Raises:
            SnapshotRefused: the own ledger is older than a true one of these.
            SecureSumError: one is no true statement of whom it says.
        """


def witnessed(invited: Sequence[int], site: int, turn: Turn) -> tuple[int, ...]:
    """The sites whose statements `site` hands back in this attempt: all others, or where they are many the next few
    around a ring, others in each sum, so that every site has as many witnesses as it is one for."""
    ring = sorted(invited)
    place = ring.index(site)
    others = [*ring[place + 1 :], *ring[:place]]
    if len(others) <= MOST_HANDED_BACK:
        return tuple(sorted(others))
    start = turn.round % len(others)
    return tuple(sorted([*others, *others][start : start + MOST_HANDED_BACK]))


def require_statements(body: Advertise, site: int, roster: Roster) -> None:
    """Refuse an Advertise of `site` with a statement in it that is not true.

    Raises:
        MalformedMessage, WrongContext, SignatureRefused: see `LedgerStatement.verified`.
    """
    said = {**body.seen, site: body.ledger} if body.ledger else body.seen
    for peer, statement in said.items():
        LedgerStatement.verified(statement, roster, peer)
