"""What a person sees before consenting: the institutions, and what the manifest asks beside what the policy allows."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.joining import Offer
from client.policy import SitePolicy
from common.config.manifest import Manifest
from common.enrolment import spoken
from common.identity import fingerprint

__all__ = ["asked_and_allowed", "print_offer"]


def print_offer(offer: Offer, console: Console) -> None:
    """Roster, manifest and the comparison of both with the policy."""
    roster, manifest = offer.roster, offer.manifest
    for name, value in (
        ("federation", f"{manifest.name} ({roster.federation.hex()}), epoch {roster.epoch}"),
        ("coordinator", f"{offer.invitation.address}, key {fingerprint(roster.coordinator)}"),
        ("roster's digest", spoken(roster.digest())),
        ("manifest's digest", spoken(bytes.fromhex(manifest.digest()))),
    ):
        console.print(f"{name:<19}{value}", soft_wrap=True, highlight=False, markup=False)
    console.print()
    table = Table(box=None, pad_edge=False)
    for heading in ("site", "institution", "fingerprint", "signed"):
        table.add_column(heading, no_wrap=heading == "fingerprint")
    for entry in roster.institutions:
        you = " (this site)" if entry.site == offer.site else ""
        signed = "yes" if entry.site in offer.signed.signatures else "not yet"
        table.add_row(str(entry.site), escape(entry.name) + you, fingerprint(entry.public), signed)
    console.print(table)
    console.print()
    compared = Table(box=None, pad_edge=False)
    for heading in ("what", "the manifest asks", "site.toml allows"):
        compared.add_column(heading)
    for row in asked_and_allowed(manifest, offer.policy):
        compared.add_row(*map(escape, row))
    console.print(compared)
    if not manifest.secure_sum.enabled:
        console.print("secure sums are OFF: the coordinator sees this site's own change", style="bold")
    if manifest.privacy is None:
        console.print("there is NO differential privacy: a model can tell about single records", style="bold")


def asked_and_allowed(manifest: Manifest, policy: SitePolicy) -> list[tuple[str, str, str]]:
    """A row for each thing that a policy can limit; whether it does is `breaches`' to say."""
    private, population, crowd, own = manifest.privacy, policy.population, manifest.secure_sum, policy.secure_sum
    training = manifest.training
    limits = policy.model_dump().get("limits", {})

    def limit(name: str) -> str:
        value = limits.get(name)
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value)) or "any"
        return "any" if value is None else str(value)

    return [
        ("base", f"{manifest.model.base} ({str(manifest.model.weights_sha256)[:16]}...)", limit("bases")),
        ("task", manifest.task.kind, limit("tasks")),
        ("adapter", manifest.adapter.method, limit("adapter_methods")),
        ("rank", str(manifest.adapter.rank), limit("rank")),
        ("rounds", f"{training.rounds} of {training.local_steps} steps of {training.batch_size}", limit("rounds")),
        ("protected unit", "nothing" if private is None else private.unit, population.unit),
        (
            "epsilon",
            "no bound" if private is None else f"{private.epsilon:g} at delta {private.delta:g}",
            f"{population.epsilon:g} at delta {population.delta:g}, of all federations together",
        ),
        ("smallest crowd", f"{crowd.min_sites} sites" if crowd.enabled else "no sum", f"{own.min_sites} sites"),
        ("who may collude", f"{crowd.max_colluding} sites", f"{own.max_colluding} sites"),
        (
            "figures that leave",
            "none" if private is not None else "loss, counts on held-out records",
            "none" if private is not None else own.metrics,
        ),
    ]
