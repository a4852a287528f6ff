"""`coadapt site status`: what runs here, whether the coordinator is reached, how far the run is, what is spent.

All of it is read from files and from the system; nobody is asked and nothing of a record is looked at.
"""

import contextlib
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from client.audit_log import AuditLine, read_audit
from client.home import SiteHome
from client.isolation import isolated
from client.ledger import Ledger
from client.policy import load_policy
from client.proxy import proxy_for
from client.service import processes_folder
from common.errors import CoadaptError
from common.supervise import State, states
from common.tls import split_address

__all__ = ["Refusal", "Run", "SiteStatus", "Spent", "status_of"]

MOST_REFUSALS = 3
_ANSWERS_SECONDS = 2.0

# What cannot be seen, since another user's process or file would have to be looked into, is said so.
Seen = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class Run:
    """The newest run that something was asked for; `round` None: nothing but greetings."""

    run_id: str
    round: int | None
    kind: str
    decision: str
    time: str


@dataclass(frozen=True)
class Refusal:
    """An order that was refused: the audit log's words."""

    time: str
    kind: str
    run_id: str
    code: str
    reason: str


@dataclass(frozen=True)
class Spent:
    """Epsilon of the population: what all federations spent, and what the policy's cap is; rounds that were paid."""

    population: str
    epsilon: float
    cap: float
    delta: float
    rounds: int


@dataclass(frozen=True)
class SiteStatus:
    """Everything that the command shows. `problems` are lines on what could not be read."""

    name: str
    processes: list[State]
    vault_answers: Seen
    coordinator: str
    connected: Seen
    run: Run | None
    spent: Spent | None
    refusals: list[Refusal]
    isolation: str
    problems: list[str]


def status_of(home: SiteHome) -> SiteStatus:
    """Read it.

    Raises:
        ManifestError: there is no site here, or its policy breaks a rule.
    """
    policy = load_policy(home.policy)
    problems: list[str] = []
    address = ""
    with _told(problems):
        address = home.agreement().address if home.agreement_file.exists() else ""
    processes = states(processes_folder(home))
    lines: list[AuditLine] = []
    with _told(problems):
        lines = list(read_audit(home.audit))
    spent = None
    with _told(problems):
        spent = _spent(Path(policy.ledger), policy.population.name, policy.population.epsilon, policy.population.delta)
    asked = [line for line in lines if line.run_id and line.kind not in ("hello", "app")]
    refused = deque((line for line in lines if line.decision == "refused"), maxlen=MOST_REFUSALS)
    return SiteStatus(
        name=policy.name,
        processes=processes,
        vault_answers=_answers(home.socket),
        coordinator=address,
        connected=_connected(processes, address) if address else "no",
        run=_run(lines, asked[-1]) if asked else None,
        spent=spent,
        refusals=[Refusal(line.time, line.kind, line.run_id, line.code, line.reason) for line in refused],
        isolation=isolated(home),
        problems=problems,
    )


@contextlib.contextmanager
def _told(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except CoadaptError as error:
        problems.extend(str(error).splitlines())
    except PermissionError as error:
        problems.append(f"{error.filename} is another user's: look as that user, or as root")


def _run(lines: list[AuditLine], last: AuditLine) -> Run:
    """The round is that of the newest line of this run that names one: a poll names none."""
    rounds = [line.round for line in lines if line.run_id == last.run_id and line.round is not None]
    return Run(last.run_id, rounds[-1] if rounds else None, last.kind, last.decision, last.time)


def _spent(folder: Path, population: str, cap: float, delta: float) -> Spent:
    from common.privacy.accounting import rdp_epsilon

    charges = []
    if folder.exists():
        charges = [entry.charge for entry in Ledger(folder).entries() if entry.charge.population == population]
    epsilon = rdp_epsilon([charge.steps for charge in charges], delta)
    return Spent(population, epsilon, cap, delta, len(charges))


def _answers(path: Path) -> Seen:
    """Whether somebody takes connections at the vault's socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_ANSWERS_SECONDS)
        try:
            probe.connect(str(path))
        except PermissionError:
            return "unknown"
        except OSError:
            return "no"
    return "yes"


def _connected(processes: list[State], address: str) -> Seen:
    """Whether the relay, or what it started, has a connection to the gate, or to the proxy on the way there."""
    relay = next((state for state in processes if state.name == "relay" and state.alive), None)
    if relay is None:
        return "no" if processes else "unknown"  # under systemd nothing is noted here
    host, port = split_address(address)
    try:
        root = psutil.Process(relay.pid)
        # The relay's own environment says which way it takes, and not that of whoever asks.
        proxy = proxy_for(host, root.environ())
        wanted = port if proxy is None else proxy.port
        tree = [root, *root.children(recursive=True)]
        ports = set().union(*map(_remote_ports, tree))
    except psutil.AccessDenied:
        return "unknown"
    except (psutil.NoSuchProcess, CoadaptError):
        return "no"
    return "yes" if wanted in ports else "no"


def _remote_ports(process: psutil.Process) -> set[int]:
    """Ports of other machines that a process has connections to."""
    found = process.net_connections("tcp")
    return {each.raddr.port for each in found if each.status == psutil.CONN_ESTABLISHED and each.raddr}
