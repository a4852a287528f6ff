"""Who is invited to a round: all sites, or as many as the manifest says, drawn anew for every round.

The draw follows from the manifest's seed and the round's number, so a resumed run invites the same sites, and everybody
can tell beforehand who is invited when. Nothing about privacy rests on it: a site charges each round that it trains in
as if it had been certain to be invited, and never one that it is not invited to.
"""

from collections.abc import Sequence

from common.config.manifest import Manifest
from common.errors import ManifestError
from common.randomness import seeded

__all__ = ["participants", "require_participants"]


def participants(manifest: Manifest, sites: Sequence[str], number: int) -> tuple[str, ...]:
    """The sites that round `number` invites, in the order of `sites`; every set of them has the same chance."""
    count = manifest.training.invited(len(sites))
    if count >= len(sites):
        return tuple(sites)
    drawn = seeded(manifest.training.seed, "participants", number).choice(len(sites), count, replace=False)
    return tuple(sites[place] for place in sorted(drawn))


def require_participants(manifest: Manifest, sites: int) -> None:
    """Refuse a manifest that invites more sites than there are, or too few for its own rules.

    Raises:
        ManifestError: it does.
    """
    asked, count = manifest.training.participants, manifest.training.invited(sites)
    if asked == "all":
        return
    if count > sites:
        raise ManifestError([f"training.participants: must be at most the {sites} sites that there are, found {asked}"])
    least = manifest.least_participants
    if count < least:
        raise ManifestError(
            [
                f"training.participants: {asked} invites {count} of {sites} sites; secure_sum.min_sites and"
                f" aggregation.min_sites want {least} or more in a round"
            ]
        )
