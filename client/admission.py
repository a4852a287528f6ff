"""What a manifest asks beyond a site's policy."""

from client.policy import SitePolicy
from common.config.manifest import Manifest

__all__ = ["breaches"]


def breaches(manifest: Manifest, policy: SitePolicy, *, sites: int | None = None) -> list[str]:
    """Everything in which the manifest exceeds the policy; `sites` are the institutions of the roster, where known."""
    found: list[str] = []
    private = manifest.privacy
    if private is not None and private.unit != policy.population.unit:
        found.append(f"privacy.unit is {private.unit!r}, the population consists of {policy.population.unit!r}")
    if private is not None and private.epsilon > policy.population.epsilon:
        found.append(f"privacy.epsilon is {private.epsilon:g}, at most {policy.population.epsilon:g} is allowed")
    if sites is not None and policy.secure_sum.min_sites > sites:
        found.append(f"the roster has {sites} sites, at least {policy.secure_sum.min_sites} are wanted")
    if manifest.secure_sum.unsafe_two_sites:
        found.append("secure_sum.unsafe_two_sites is true, three sites or more are wanted")
    return found
