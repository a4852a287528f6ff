"""`coadapt site ...`: what a person at a site types, in few words; the work is done elsewhere."""

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

PolicyPath = Annotated[
    Path | None, typer.Argument(metavar="POLICY", help="A site.toml; default: the one in --home.", show_default=False)
]
Home = Annotated[Path, typer.Option("--home", metavar="DIR", help="The site's folder, which holds site.toml.")]
Into = Annotated[Path, typer.Option("--into", metavar="DIR", help="Folder for the file.")]
Yes = Annotated[bool, typer.Option("--yes", help="Answer every question with yes, or with its default.")]
RelayUser = Annotated[str | None, typer.Option(metavar="USER", help="User of the relay, by name or number; as root.")]
VaultUser = Annotated[
    str | None, typer.Option(metavar="USER", help="User of the vault; default: the owner of site.toml.")
]
LogJson = Annotated[
    bool,
    typer.Option("--log-json", help="Log JSON lines, fit for syslog; none quotes a record."),
]
HERE = Path()


@site.callback()
def _site() -> None:
    pass


@site.command()
def init(
    home: Home = HERE,
    name: Annotated[str | None, typer.Option(help="Name of the site; default: the folder's.")] = None,
    train: Annotated[str | None, typer.Option(help="File of the records to train on.")] = None,
    held_out: Annotated[str | None, typer.Option(help="File of records to measure on.")] = None,
    population: Annotated[str | None, typer.Option(help="Name of the population, such as 'patients'.")] = None,
    unit: Annotated[str | None, typer.Option(help="What is protected: record, or what the unit column names.")] = None,
    units: Annotated[str | None, typer.Option(help="Number of units, rounded, as it may be published.")] = None,
    epsilon: Annotated[str | None, typer.Option(help="Most that all federations may spend on a unit.")] = None,
    delta: Annotated[str | None, typer.Option(help="Chance that the bound fails; below 1 / units.")] = None,
    yes: Yes = False,
) -> None:
    """Write an annotated site.toml and make the site's keys; nothing is overwritten."""
    from client.new_site import new_site

    made = new_site(
        home,
        name=name,
        train=train,
        held_out=held_out,
        population=population,
        unit=unit,
        units=units,
        epsilon=epsilon,
        delta=delta,
        yes=yes,
    )
    _say(f"wrote {made.policy} and the keys in {made.keys} and {made.relay}; read the one, back up the others")
    _say("next: coadapt site enroll")


@site.command()
def enroll(home: Home = HERE, into: Into = HERE) -> None:
    """Write NAME.enrolment.json for the coordinator, and show the fingerprint to compare by phone."""
    from client.enrolment import enroll as write
    from client.home import SiteHome

    path, shown = write(SiteHome(home), into)
    _say(f"wrote {path}; send it to the coordinator, it holds no secret")
    _say(f"fingerprint to compare by phone: {shown}")


@site.command()
def join(
    invitation: Annotated[Path, typer.Argument(metavar="INVITATION", help="The coordinator's invitation.json.")],
    home: Home = HERE,
    into: Into = HERE,
    digest: Annotated[
        str | None, typer.Option(help="The roster's digest as the others read it out; it must be this one.")
    ] = None,
    yes: Yes = False,
) -> None:
    """Look at an invitation, and consent to it; with everybody's signature in it, join."""
    from client.home import SiteHome
    from client.joining import consent, finish, read_invitation
    from client.joining_view import print_offer
    from common.enrolment import spoken
    from common.questions import confirm, require_read_out

    place = SiteHome(home)
    offer = read_invitation(place, invitation)
    shown = spoken(offer.roster.digest())
    if digest is not None:
        require_read_out(digest, shown, what="the roster's digest")
    if offer.second:
        agreed = finish(place, offer)
        _say(f"joined {offer.manifest.name}: every institution signed the roster {shown}")
        _say(f"manifest {agreed.manifest_sha256}; next: coadapt site check, then coadapt site start")
        return
    print_offer(offer, Console())
    confirm(
        f"Do the others read out the roster's digest {shown}, and does this site consent?",
        yes=yes,
        refused="not consented; nothing was written",
    )
    path = consent(place, offer, into)
    _say(f"wrote {path}; send it to the coordinator, and join again with the invitation that comes back")


@site.command()
def check(
    home: Home = HERE,
    offline: Annotated[bool, typer.Option("--offline", help="Leave the network out.")] = False,
) -> None:
    """Look at policy, keys, data, base model, machine, network and certificates before anything starts."""
    from client.check import check_site
    from client.home import SiteHome
    from common.findings import print_findings

    if print_findings(check_site(SiteHome(home), offline=offline), Console()):
        raise typer.Exit(1)


@site.command()
def preview(home: Home = HERE, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Run one round by itself against made-up sites, and show everything that would leave; nothing does."""
    from client.home import SiteHome
    from client.preview import preview as rehearse
    from client.preview_view import print_preview

    print_preview(rehearse(SiteHome(home)), Console(), as_json=as_json)


@site.command()
def start(
    home: Home = HERE,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and end with this command.")] = False,
    relay_user: RelayUser = None,
    vault_user: VaultUser = None,
    log_json: LogJson = False,
) -> None:
    """Start vault and relay, and keep them running."""
    from client.home import SiteHome
    from client.isolation import default_vault_user, find_users, isolate, isolated
    from client.service import logs_folder, processes_folder, site_programs
    from client.site_keys import require_private_keys
    from common.supervise import launch, supervise

    place = SiteHome(home.absolute())
    require_private_keys(place)
    place.agreement()
    users = None
    if relay_user is not None:
        users = find_users(vault_user or default_vault_user(place), relay_user)
        isolate(place, users)
    if apart := isolated(place):
        _say(f"warning: {apart}")
    programs = site_programs(place, users, log_json=log_json)
    if foreground:
        supervise(programs, processes_folder(place), logs_folder(place), log_json=log_json)
        return
    launch(programs, processes_folder(place), logs_folder(place), log_json=log_json)
    _say(f"vault and relay run; what they print is in {logs_folder(place)}; coadapt site stop ends them")


@site.command()
def stop(home: Home = HERE) -> None:
    """Stop vault and relay; what they were at is resumed or refused when they start again, nothing is lost."""
    from client.home import SiteHome
    from client.service import processes_folder
    from common.supervise import stop as end

    _say("stopped" if end(processes_folder(SiteHome(home.absolute()))) else "nothing ran")


@site.command()
def status(
    home: Home = HERE, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
) -> None:
    """Show what runs, whether the coordinator is reached, how far the run is, what is spent and what was refused."""
    import dataclasses
    import json

    from client.home import SiteHome
    from client.status import status_of
    from client.status_view import print_status

    found = status_of(SiteHome(home.absolute()))
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    print_status(found, Console())


@site.command()
def isolate(
    relay_user: Annotated[str, typer.Option(metavar="USER", help="User of the relay, by name or number.")],
    home: Home = HERE,
    vault_user: VaultUser = None,
) -> None:
    """Give the site's files to two users, so that the relay's reads its own folder alone; as root, once."""
    from client.home import SiteHome
    from client.isolation import default_vault_user, find_users
    from client.isolation import isolate as give

    place = SiteHome(home.absolute())
    give(place, find_users(vault_user or default_vault_user(place), relay_user))
    _say(f"{place.folder} belongs to the vault's user, and {place.relay} is open to the relay's group")


@site.command()
def log(
    home: Home = HERE,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest lines.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Show what was asked of this site, what it answered or refused, and why."""
    from client.home import SiteHome
    from client.log_view import print_log

    print_log(SiteHome(home), Console(), last=last, as_json=as_json)


@site.command()
def fetch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's name, as the coordinator tells it.")],
    home: Home = HERE,
) -> None:
    """Bring a finished run's adapter, and its compact model where there is one, verified, into fetched/RUN."""
    from client.fetching import fetch as bring
    from client.home import SiteHome

    for part in bring(SiteHome(home), run):
        what = f"fetched, {part.size} bytes" if part.brought else "here already, and as the coordinator signed it"
        _say(f"{part.part}: {part.folder} ({what})")


@site.command()
def service(home: Home = HERE, into: Into = Path("services"), log_json: LogJson = False) -> None:
    """Write systemd units for two users, and container files."""
    from client.home import SiteHome
    from client.service import write_services

    for path in write_services(SiteHome(home.absolute()), into, log_json=log_json):
        _say(f"wrote {path}")


@site.command()
def ledger(policy: PolicyPath = None, home: Home = HERE) -> None:
    """Show what privacy was spent, and what is left, by population, federation and run."""
    from client.ledger import Ledger
    from client.policy import load_policy

    agreed = load_policy(policy or home / "site.toml")
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
    policy: PolicyPath = None,
    home: Home = HERE,
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
        policy or home / "site.toml",
        overrides=assignments or (),
        canaries=canaries,
        epsilon=epsilon,
        rounds=rounds,
        adapter=adapter,
        as_json=as_json,
        unsafe_without_noise=unsafe_without_noise,
    )


def _say(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


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
