"""`coadapt coordinator ...`: what a person at the coordinator types, in few words; the work is done elsewhere."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from common.roster import SignedRoster
    from server.home import CoordinatorHome
    from server.status import Status

__all__ = ["coordinator"]

coordinator = typer.Typer(no_args_is_help=True, help="Run the coordinator of a federation.")

Home = Annotated[Path, typer.Option("--home", metavar="DIR", help="The folder that holds coordinator.toml.")]
Yes = Annotated[bool, typer.Option("--yes", help="Answer every question with yes.")]
Certificate = Annotated[
    Path | None, typer.Option(metavar="PEM", help="An own certificate for the gate, with its chain.")
]
Key = Annotated[Path | None, typer.Option(metavar="PEM", help="The own certificate's key.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Log JSON lines, fit for syslog.")]
HERE = Path()


@coordinator.callback()
def _coordinator() -> None:
    pass


@coordinator.command()
def init(
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where sites reach the gate.")],
    home: Home = HERE,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="What the gate listens on; default: every address.")
    ] = None,
    superlink_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Flower's own port, on loopback alone.")
    ] = None,
    certificate: Certificate = None,
    key: Key = None,
    authority: Annotated[
        Path | None, typer.Option(metavar="PEM", help="The authority of an own certificate, for the sites.")
    ] = None,
) -> None:
    """Write coordinator.toml, and make the keys and the gate's certificate; nothing is overwritten."""
    from common.tls import expiry
    from server.new_coordinator import new_coordinator

    made = new_coordinator(
        home,
        address=address,
        listen=listen,
        superlink_port=superlink_port,
        certificate=certificate,
        key=key,
        authority=authority,
    )
    _say(f"wrote {made.settings_file}, and the keys in {made.keys}: back them up")
    _say(f"the gate's certificate {expiry(made.certificate.read_bytes())[1]}")
    _say("next: coadapt coordinator admit NAME.enrolment.json for every site")


@coordinator.command()
def renew(home: Home = HERE, certificate: Certificate = None, key: Key = None) -> None:
    """Make a new certificate for the gate, from the same authority or an own one."""
    from server.home import CoordinatorHome
    from server.new_coordinator import renew_certificate

    words = renew_certificate(CoordinatorHome(home), certificate=certificate, key=key)
    _say(f"the new certificate {words}; start the gate again: coadapt coordinator stop, coadapt coordinator start")


@coordinator.command()
def admit(
    enrolment: Annotated[Path, typer.Argument(metavar="ENROLMENT", help="A site's NAME.enrolment.json.")],
    home: Home = HERE,
    fingerprint: Annotated[
        str | None, typer.Option(help="The fingerprint as the site read it out; it must be this one.")
    ] = None,
    yes: Yes = False,
) -> None:
    """Admit an institution, once its fingerprint was compared by phone."""
    from common.identity import fingerprint as compute
    from common.questions import confirm, require_read_out
    from server.enrolment import admit as put
    from server.enrolment import read_enrolment
    from server.home import CoordinatorHome

    place = CoordinatorHome(home)
    paper = read_enrolment(place, enrolment)
    shown = compute(bytes.fromhex(paper.public_key))
    if fingerprint is not None:
        require_read_out(fingerprint, shown, what=f"the fingerprint of {paper.name}")
    else:
        _say(f"{paper.name} has the fingerprint {shown}")
        confirm(
            f"Does {paper.name} read out the same, on a number that you know?",
            yes=yes,
            flag="--fingerprint or --yes",
            refused=f"{paper.name} was not admitted; nothing was written",
        )
    put(place, paper)
    _say(f"admitted {paper.name}; next: coadapt coordinator roster federation.toml, when all are there")


@coordinator.command()
def roster(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The federation.toml that sites agree to.")],
    home: Home = HERE,
    epoch: Annotated[int | None, typer.Option(min=1, help="Number of the roster; default: the next.")] = None,
) -> None:
    """Make a roster of all admitted institutions, and the invitation that they are asked to sign."""
    from common.enrolment import spoken
    from server.enrolment import make_roster
    from server.home import CoordinatorHome

    place = CoordinatorHome(home)
    signed = make_roster(place, manifest, epoch=epoch)
    for entry in signed.roster.institutions:
        _say(f"site {entry.site}: {entry.name}")
    _say(f"roster of epoch {signed.roster.epoch}, to compare by phone: {spoken(signed.roster.digest())}")
    _say(f"wrote {place.invitation}; send it to every site, and take their consents: coadapt coordinator consent")


@coordinator.command()
def consent(
    files: Annotated[list[Path], typer.Argument(metavar="CONSENT...", help="Sites' NAME.consent.json.")],
    home: Home = HERE,
) -> None:
    """Add sites' signatures to the roster and the invitation."""
    from server.enrolment import collect
    from server.home import CoordinatorHome

    place = CoordinatorHome(home)
    _say_signed(place, collect(place, files))


@coordinator.command()
def start(
    home: Home = HERE,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and end with this command.")] = False,
    log_json: LogJson = False,
) -> None:
    """Start the SuperLink on loopback and the gate on the public port, and keep them running."""
    from common.errors import ServiceError
    from common.supervise import launch, supervise
    from common.tls import expiry
    from server.home import CoordinatorHome, load_settings
    from server.new_coordinator import require_private_keys
    from server.service import coordinator_programs, wait_until_open

    place = CoordinatorHome(home.absolute())
    settings = load_settings(place)
    require_private_keys(place)
    level, words = expiry(place.certificate.read_bytes())
    if level == "problem":
        raise ServiceError(f"the gate's certificate {words}: coadapt coordinator renew")
    if level == "warning":
        _say(f"warning: the gate's certificate {words}: coadapt coordinator renew")
    programs = coordinator_programs(place, log_json=log_json)
    if foreground:
        supervise(programs, place.processes, place.logs, log_json=log_json)
        return
    launch(programs, place.processes, place.logs, log_json=log_json)
    wait_until_open(place, settings)
    _say(f"the gate listens on {settings.listen}; what it prints is in {place.logs}")


@coordinator.command()
def stop(home: Home = HERE) -> None:
    """Stop gate and SuperLink; a run that goes on is resumed with coadapt run --resume."""
    from common.supervise import stop as end
    from server.home import CoordinatorHome

    _say("stopped" if end(CoordinatorHome(home.absolute()).processes) else "nothing ran")


@coordinator.command()
def status(
    home: Home = HERE, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
) -> None:
    """Show what runs, which sites are in, and how far the newest run is."""
    import dataclasses
    import json

    from server.home import CoordinatorHome, load_settings
    from server.status import status_of

    place = CoordinatorHome(home)
    load_settings(place)  # which says where there is no coordinator at all
    found = status_of(place)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    _print_status(found, Console())


@coordinator.command()
def revoke(
    site: Annotated[str, typer.Argument(metavar="SITE", help="Name of an admitted institution.")],
    home: Home = HERE,
    yes: Yes = False,
) -> None:
    """Take an institution out; the others need a new roster before the next run."""
    from common.questions import confirm
    from server.enrolment import revoke as take_out
    from server.home import CoordinatorHome

    place = CoordinatorHome(home)
    confirm(f"Take {site} out of the federation?", yes=yes, refused=f"{site} stays; nothing was written")
    take_out(place, site)
    _say(f"{site} is revoked; its node is refused from the next start on: coadapt coordinator stop, then start")
    _say(f"no run begins with the present roster: coadapt coordinator roster {place.manifest}")


@coordinator.command()
def publish(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of a finished run.")],
    home: Home = HERE,
    compact: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Its compact model; default: compact/ in the run's folder.")
    ] = None,
) -> None:
    """Sign a finished run's adapter and compact model, so that its sites can fetch them."""
    from server.home import CoordinatorHome
    from server.publishing import publish as sign

    listing = sign(CoordinatorHome(home), run, compact=compact)
    _say(f"published {len(listing.files)} files, {listing.size} bytes; sites type: coadapt site fetch {run}")


@coordinator.command()
def service(
    home: Home = HERE,
    into: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files.")] = Path("services"),
    log_json: LogJson = False,
) -> None:
    """Write systemd units and a container file."""
    from server.home import CoordinatorHome
    from server.service import write_services

    for path in write_services(CoordinatorHome(home.absolute()), into, log_json=log_json):
        _say(f"wrote {path}")


def _say(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def _say_signed(home: "CoordinatorHome", signed: "SignedRoster") -> None:
    from server.enrolment import missing_signatures

    missing, count = missing_signatures(signed), len(signed.roster.institutions)
    if missing:
        _say(f"{count - len(missing)} of {count} signed; still missing: {', '.join(missing)}")
    else:
        _say(f"all {count} signed; send {home.invitation} to every site again, so that they join; then: coadapt run")


def _print_status(found: "Status", console: Console) -> None:
    for process in found.processes:
        since = f"since {_when(process.started)}, process {process.pid}" if process.alive else "is down"
        again = f", started again {process.ends} times" if process.ends else ""
        _say(f"{process.name:<11}{since}{again}")
    if not found.processes:
        _say("nothing runs: coadapt coordinator start")
    _say(f"certificate{found.certificate[1]:>{len(found.certificate[1]) + 1}}")
    _say(f"roster     {'none yet' if found.epoch is None else f'epoch {found.epoch}'}")
    table = Table(box=None, pad_edge=False)
    for heading in ("site", "number", "signed", "last answer", "errors"):
        table.add_column(heading)
    for site in found.sites:
        number = "not in the roster" if site.number is None else str(site.number)
        seen = "-" if site.last_seen is None else _when(site.last_seen)
        words = ", ".join(f"{word} x{count}" for word, count in sorted(site.failures.items())) or "-"
        table.add_row(escape(site.name), number, "yes" if site.signed else "no", seen, escape(words))
    console.print(table)
    run = found.run
    if run is None:
        _say("no run yet")
        return
    _say(
        f"run {run.run_id}: {run.status}, round {run.round} of {run.rounds}, phase {run.phase or '-'},"
        f" {run.bytes_up} bytes up and {run.bytes_down} down, last event {_when(run.last_event)}"
    )
    if run.reason:
        _say(f"reason: {run.reason}")


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
