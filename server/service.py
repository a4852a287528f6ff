"""The coordinator's processes: how they are started here, and as a service of systemd or in a container."""

import contextlib
import socket
import time
from pathlib import Path

from common.errors import ServiceError
from common.framing import framed
from common.supervise import Program, module_command
from common.systemd import container_file, quoted, service_unit, write_files
from common.tls import split_address
from server.home import CoordinatorHome, CoordinatorSettings, load_settings

__all__ = ["coordinator_programs", "wait_until_open", "write_services"]

USER = "coadapt-coordinator"

# Ports below 1024 are root's without it.
LOW_PORT = (("CapabilityBoundingSet", "CAP_NET_BIND_SERVICE"), ("AmbientCapabilities", "CAP_NET_BIND_SERVICE"))


def coordinator_programs(home: CoordinatorHome, *, log_json: bool = False) -> list[Program]:
    """SuperLink (loopback) and gate (public). With `log_json` they print JSON lines alone."""
    folder = str(home.folder.absolute())
    option = ["--log-json"] if log_json else []
    programs = [
        Program(name="superlink", command=module_command("server.superlink", folder)),
        Program(name="gate", command=module_command("server.gate", folder, *option)),
    ]
    return [framed(program) for program in programs] if log_json else programs


def write_services(home: CoordinatorHome, into: Path, *, log_json: bool = False) -> list[Path]:
    """Write two units for one user, and a container file.

    Raises:
        EnrolmentError: a file is there already.
        ManifestError: coordinator.toml breaks a rule.
    """
    port = split_address(load_settings(home).listen)[1]
    folder = quoted(str(home.folder.absolute()))
    superlink, gate = coordinator_programs(home, log_json=log_json)
    option = ["--log-json"] if log_json else []
    shared = [
        # What frames a program's lines gets the signal together with it.
        *([("KillMode", "control-group")] if log_json else []),
        ("User", USER),
        ("Group", USER),
        ("WorkingDirectory", folder),
        ("ReadWritePaths", folder),
        ("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6"),
    ]
    files = {
        "coadapt-superlink.service": service_unit("Coadapt SuperLink (loopback)", superlink.command, settings=shared),
        "coadapt-gate.service": service_unit(
            "Coadapt gate",
            gate.command,
            settings=[*shared, *(LOW_PORT if port < 1024 else ())],
            after=("network-online.target", "coadapt-superlink.service"),
            wanted=("network-online.target", "coadapt-superlink.service"),
        ),
        "Containerfile.coordinator": container_file(
            ["coadapt", "coordinator", "start", "--foreground", "--home", "/home/coadapt", *option],
            users=[USER],
            note="The coordinator: publish the gate's port and no other; its folder as a volume.",
            port=port,
        ),
    }
    return write_files(into, files)


def wait_until_open(home: CoordinatorHome, settings: CoordinatorSettings, *, seconds: float = 120.0) -> None:
    """Return when the gate takes connections, which it does after the SuperLink knows every admitted node.

    Raises:
        ServiceError: it does not come up.
    """
    host, port = split_address(settings.listen)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((_reachable(host), port), timeout=2):
            return
        time.sleep(0.2)
    raise ServiceError(f"the gate does not listen on {settings.listen} after {seconds:.0f} seconds; see {home.logs}")


def _reachable(host: str) -> str:
    """Where this machine reaches what listens on every address."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
