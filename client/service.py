"""A site's processes: how they are started here, and as services of systemd or in containers."""

import sys
from pathlib import Path

from client.home import SiteHome
from client.isolation import Users
from client.policy import SitePolicy, load_policy
from common.framing import framed
from common.supervise import Program, module_command
from common.systemd import container_file, quoted, service_unit, write_files

__all__ = ["logs_folder", "processes_folder", "site_programs", "write_services"]

VAULT_USER, RELAY_USER = "coadapt-vault", "coadapt-relay"


def processes_folder(home: SiteHome) -> Path:
    """Where the supervisor notes what runs."""
    return home.folder / "run"


def logs_folder(home: SiteHome) -> Path:
    """Where what the processes print goes; it stays at the site like the vault's own log."""
    return home.folder / "run" / "log"


def site_programs(home: SiteHome, users: Users | None, *, log_json: bool = False) -> list[Program]:
    """Vault and relay; without `users` both run as whoever starts them. With `log_json` they print JSON lines alone."""
    folder = str(home.folder.absolute())
    flower = {"FLWR_HOME": str((home.relay / "flower").absolute())}
    vault = Program(
        name="vault",
        command=module_command("client.vault_service", folder, *(["--log-json"] if log_json else [])),
        user=None if users is None else users.vault,
    )
    relay = Program(
        name="relay",
        command=module_command("client.node", folder),
        environment=flower,
        user=None if users is None else users.relay,
    )
    return [framed(vault, private=home.log.absolute()), framed(relay)] if log_json else [vault, relay]


def write_services(home: SiteHome, into: Path, *, log_json: bool = False) -> list[Path]:
    """Write two units, for two users, and a container file for each process.

    Raises:
        EnrolmentError: a file is there already.
        ManifestError: site.toml breaks a rule.
    """
    policy = load_policy(home.policy)
    folder = home.folder.absolute()
    vault, relay = site_programs(home, None, log_json=log_json)
    # The containers' programs are those of a site whose folder is a volume of theirs.
    inside = site_programs(SiteHome(Path("/home/coadapt")), None, log_json=log_json)
    entries = [["python" if word == sys.executable else word for word in program.command] for program in inside]
    # What frames a program's lines gets the signal together with it.
    ends = [("KillMode", "control-group")] if log_json else []
    files_of_people = (policy.data.train, policy.data.held_out, policy.data.withdrawn)
    data = sorted({str(Path(file).parent) for file in files_of_people if file is not None})
    outside = [place for place in data if not Path(place).is_relative_to(folder)]
    ledger = Path(policy.ledger)
    # Its user may open none of these; this holds even where a mode was changed by hand.
    own = [home.keys, home.federation, home.runs, home.log.parent, ledger]
    closed = [*(place.absolute() for place in own), *map(Path, outside)]
    writable = [folder, *([] if ledger.is_relative_to(folder) else [ledger])]
    files = {
        f"{VAULT_USER}.service": service_unit(
            f"Coadapt vault of {policy.name}",
            vault.command,
            settings=[
                *ends,
                ("User", VAULT_USER),
                # Its own group is the relay's, so that the socket it makes is the relay's group's; the umask keeps
                # every other file to the vault.
                ("Group", RELAY_USER),
                ("WorkingDirectory", quoted(str(folder))),
                ("ReadWritePaths", " ".join(quoted(str(place)) for place in writable)),
                *([("ReadOnlyPaths", " ".join(map(quoted, outside)))] if outside else []),
                # The relay alone goes to the network: the vault speaks over its Unix socket, and where several cards
                # compute its processes find each other on this machine's own interface.
                ("RestrictAddressFamilies", "AF_UNIX AF_INET AF_NETLINK" if _several_cards(policy) else "AF_UNIX"),
                ("IPAddressDeny", "any"),
                *([("IPAddressAllow", "localhost")] if _several_cards(policy) else []),
            ],
            after=("local-fs.target",),
            wanted=(),
            environment={"HF_HUB_OFFLINE": "1"},
        ),
        f"{RELAY_USER}.service": service_unit(
            f"Coadapt relay of {policy.name}",
            relay.command,
            settings=[
                *ends,
                ("User", RELAY_USER),
                ("Group", RELAY_USER),
                ("WorkingDirectory", quoted(str(folder / "relay"))),
                ("ReadWritePaths", quoted(str(folder / "relay" / "flower"))),
                ("InaccessiblePaths", " ".join(quoted(f"-{place}") for place in closed)),
                ("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6"),
            ],
            after=("network-online.target", f"{VAULT_USER}.service"),
            wanted=("network-online.target", f"{VAULT_USER}.service"),
            environment=dict(relay.environment),
        ),
        "Containerfile.vault": container_file(
            entries[0],
            users=[VAULT_USER, RELAY_USER],
            note="The vault: no network (--network none); the site's folder and data as volumes, data read-only.",
        ),
        "Containerfile.relay": container_file(
            entries[1],
            users=[RELAY_USER],
            note="The relay: mount the site's relay folder alone, as /home/coadapt/relay; it may reach the gate.",
        ),
    }
    return write_files(into, files)


def _several_cards(policy: SitePolicy) -> bool:
    """Whether more than one GPU will compute on this machine, as far as its device files tell without torch."""
    if policy.training.gpus == "auto":
        return len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1
    return policy.training.gpus > 1
