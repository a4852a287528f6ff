"""`coadapt site ...`: what a person at a site types."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # the ledger's accountant takes seconds to import
    from client.ledger import Entry

__all__ = ["site"]

site = typer.Typer(no_args_is_help=True, help="Run one institution's side of a federation.")

PolicyPath = Annotated[Path, typer.Argument(metavar="POLICY", help="A site.toml.")]


@site.callback()
def _site() -> None:
    pass


@site.command()
def ledger(policy: PolicyPath = Path("site.toml")) -> None:
    """Show what privacy was spent, and what is left, by population, federation and run."""
    from client.ledger import Ledger
    from client.policy import load_policy

    agreed = load_policy(policy)
    folder = Path(agreed.ledger)
    console = Console()
    if not folder.exists():
        console.print(f"nothing is spent: there is no ledger in {folder} yet", highlight=False, soft_wrap=True)
        return
    book = Ledger(folder)
    entries = book.entries()
    account = agreed.account()
    names = list(dict.fromkeys([account.name, *(entry.charge.population for entry in entries)]))
    for name in names:
        own = [entry for entry in entries if entry.charge.population == name]
        cap = account.epsilon if name == account.name else None
        _print_account(console, name, own, cap, account.delta)
    simulated = sum(entry.simulated for entry in entries)
    if simulated:
        console.print(f"{simulated} of {len(entries)} entries are simulated: no person stands behind them")


@site.command()
def audit(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="A federation.toml with [privacy].")],
    policy: PolicyPath = Path("site.toml"),
    canaries: Annotated[int, typer.Option(min=1, help="How many canaries, at least 1,000.")] = 1000,
    epsilon: Annotated[float, typer.Option(help="The claim that is tested, at most 1.")] = 1.0,
    rounds: Annotated[int | None, typer.Option(min=1, help="Train so many rounds instead of the manifest's.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="A run's adapter: also test whether it tells your records from others.")
    ] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="Override a key: training.rounds=3.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    unsafe_without_noise: Annotated[
        bool, typer.Option("--unsafe-without-noise", help="Leave the noise off, to see that the audit would notice.")
    ] = False,
) -> None:
    """Test the privacy of training on your own records; the model is thrown away, and nothing leaves the site."""
    from client.site_audit import print_audit

    print_audit(
        manifest,
        policy,
        overrides=assignments or (),
        canaries=canaries,
        epsilon=epsilon,
        rounds=rounds,
        adapter=adapter,
        as_json=as_json,
        unsafe_without_noise=unsafe_without_noise,
    )


def _print_account(console: Console, name: str, entries: "Sequence[Entry]", cap: float | None, delta: float) -> None:
    """A line for each run, and the sum, which is less than the runs' figures added up."""
    from common.privacy.accounting import prv_epsilon, rdp_epsilon

    table = Table(box=None, pad_edge=False, title=f"population {escape(name)}", title_justify="left")
    for heading in ("federation", "run", "unit", "rounds", "steps", "epsilon", "tighter bound"):
        table.add_column(heading, justify="left" if heading in {"federation", "run", "unit"} else "right")
    runs = dict.fromkeys((entry.charge.federation, entry.charge.run_id, entry.charge.unit) for entry in entries)
    for run in [*runs, None]:
        own = [
            entry.charge
            for entry in entries
            if run in {None, (entry.charge.federation, entry.charge.run_id, entry.charge.unit)}
        ]
        history = [charge.steps for charge in own]
        words = [escape(word) for word in run] if run else ["all together", "", ""]
        table.add_row(
            *words,
            str(len(own)),
            str(sum(steps.count for steps in history)),
            f"{rdp_epsilon(history, delta):.3f}",
            f"{prv_epsilon(history, delta):.3f}",
        )
    console.print(table)
    if cap is not None:
        spent = rdp_epsilon([entry.charge.steps for entry in entries], delta)
        line = f"cap {cap:g} at delta {delta:g}: {spent:.3f} spent, {max(0.0, cap - spent):.3f} left"
        console.print(line, highlight=False, soft_wrap=True)
