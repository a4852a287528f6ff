"""What a manifest asks for, held against the site's policy.

Each breach is one line of setting, what is asked and what is allowed: numbers and names of settings alone, so it may be
told to the coordinator.
"""

from collections.abc import Iterator
from datetime import datetime

from client.policy import SitePolicy
from common.config.manifest import Manifest
from common.errors import PolicyBreach

__all__ = ["breaches", "require_admitted", "require_bytes", "require_hours"]


def breaches(manifest: Manifest, policy: SitePolicy, *, sites: int | None = None) -> list[str]:
    """Everything in which the manifest exceeds the policy; `sites` are the institutions of the roster, where known."""
    return [*_model(manifest, policy), *_privacy(manifest, policy), *_crowd(manifest, policy, sites)]


def require_admitted(manifest: Manifest, policy: SitePolicy, *, sites: int | None = None) -> None:
    """Refuse a manifest that exceeds the policy.

    Raises:
        PolicyBreach: with every breach, on one line.
    """
    if found := breaches(manifest, policy, sites=sites):
        raise PolicyBreach("; ".join(found))


def require_hours(policy: SitePolicy, now: datetime) -> None:
    """Refuse to begin outside the policy's hours; `now` is local time.

    Raises:
        PolicyBreach: it is outside.
    """
    windows = policy.limits.windows()
    if windows and not any(window.holds(now) for window in windows):
        raise PolicyBreach(f"limits.hours: asked {now:%a %H:%M}, allowed {', '.join(policy.limits.hours)}")


def require_bytes(policy: SitePolicy, size: int) -> None:
    """Refuse an order of so many bytes before it is looked at.

    Raises:
        PolicyBreach: it is larger than the policy allows.
    """
    if size > policy.limits.message_bytes:
        raise PolicyBreach(f"limits.message_bytes: asked {size}, allowed {policy.limits.message_bytes}")


def _model(manifest: Manifest, policy: SitePolicy) -> Iterator[str]:
    limits, weights = policy.limits, manifest.model.weights_sha256
    if limits.bases and weights not in limits.bases:
        asked = "a base whose weights are not pinned" if weights is None else weights
        yield f"model.weights_sha256: asked {asked}, allowed one of {len(limits.bases)} in limits.bases"
    if limits.tasks and manifest.task.kind not in limits.tasks:
        yield f"task.kind: asked {manifest.task.kind}, allowed {', '.join(limits.tasks)}"
    if limits.adapter_methods and manifest.adapter.method not in limits.adapter_methods:
        yield f"adapter.method: asked {manifest.adapter.method}, allowed {', '.join(limits.adapter_methods)}"
    if limits.rank is not None and manifest.adapter.rank > limits.rank:
        yield f"adapter.rank: asked {manifest.adapter.rank}, allowed {limits.rank}"
    if limits.rounds is not None and manifest.training.rounds > limits.rounds:
        yield f"training.rounds: asked {manifest.training.rounds}, allowed {limits.rounds}"


def _privacy(manifest: Manifest, policy: SitePolicy) -> Iterator[str]:
    limits, private = policy.limits, manifest.privacy
    for name, most in (("epsilon", limits.epsilon), ("delta", limits.delta)):
        if most is None:
            continue
        asked = None if private is None else float(getattr(private, name))
        if asked is None or asked > most:
            yield f"privacy.{name}: asked {'no privacy' if asked is None else format(asked, 'g')}, allowed {most:g}"
    if private is not None and private.unit != policy.population.unit:
        yield f"privacy.unit: asked {private.unit}, allowed {policy.population.unit}"
    if private is not None and private.unsafe_seed is not None:
        yield "privacy.unsafe_seed: asked noise that can be repeated, allowed none"


def _crowd(manifest: Manifest, policy: SitePolicy, sites: int | None) -> Iterator[str]:
    own, asked = policy.secure_sum, manifest.secure_sum
    if asked.unsafe_two_sites:  # each of two would learn the other's change; no policy can allow it
        yield "secure_sum.unsafe_two_sites: asked true, allowed false; two sites sum in simulations alone"
    if not asked.enabled:
        if not own.unsafe_unmasked:
            yield f"secure_sum.enabled: asked false, allowed sums over {own.min_sites} sites or more"
        if own.metrics == "none" and manifest.privacy is None:
            yield "secure_sum.metrics: asked this site's own loss and counts, allowed none"
    elif sites is not None and own.min_sites > (invited := min(sites, manifest.training.invited(sites))):
        yield f"secure_sum.min_sites: asked sums over {invited} sites, allowed {own.min_sites} or more"
