"""The coordinator's processes: how they are started here, and as a service of systemd or in a container."""

from pathlib import Path

from common.supervise import Program, module_command
from common.systemd import container_file, quoted, service_unit, write_files
from common.tls import split_address
from server.home import CoordinatorHome, load_settings

__all__ = ["coordinator_programs", "write_services"]

USER = "coadapt-coordinator"

# Ports below 1024 are root's without it.
LOW_PORT = (("CapabilityBoundingSet", "CAP_NET_BIND_SERVICE"), ("AmbientCapabilities", "CAP_NET_BIND_SERVICE"))


def coordinator_programs(home: CoordinatorHome) -> list[Program]:
    """SuperLink (loopback) and gate (public)."""
    folder = str(home.folder.absolute())
    return [
        Program(name="superlink", command=module_command("server.superlink", folder)),
        Program(name="gate", command=module_command("server.gate", folder)),
    ]


def write_services(home: CoordinatorHome, into: Path) -> list[Path]:
    """Write two units for one user, and a container file.

    Raises:
        EnrolmentError: a file is there already.
        ManifestError: coordinator.toml breaks a rule.
    """
    port = split_address(load_settings(home).listen)[1]
    folder = quoted(str(home.folder.absolute()))
    superlink, gate = coordinator_programs(home)
    shared = [
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
            ["coadapt", "coordinator", "start", "--foreground", "--home", "/home/coadapt"],
            users=[USER],
            note="The coordinator: publish the gate's port and no other; its folder as a volume.",
            port=port,
        ),
    }
    return write_files(into, files)
