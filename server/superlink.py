"""Flower's SuperLink on loopback: how it is started, and what the coordinator asks of its control API.

    python -P -m server.superlink FOLDER      of the coordinator

Flower's control API has no authentication, so whoever has an account on this host may use it; nobody else reaches it.
The certificate is made anew at each start, for 127.0.0.1 alone: the gate's own need not name the loopback.
"""

import datetime
import hashlib
import ipaddress
import os
import sys
import time
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.app_bundle import app_bundle
from common.errors import CoadaptError, ServiceError
from server.home import CoordinatorHome, load_settings

__all__ = ["Control", "superlink_command", "superlink_environment", "write_loopback_certificate"]

CERTIFICATE_DAYS = 397
COORDINATOR_HOME = "COADAPT_COORDINATOR_HOME"


def write_loopback_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a key and its own certificate for 127.0.0.1 in `folder`: `loopback.pem` and `loopback.key` (0600)."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Coadapt SuperLink on loopback")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    paths = folder / "loopback.pem", folder / "loopback.key"
    paths[1].unlink(missing_ok=True)
    with open(os.open(paths[1], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(private)
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return paths


def superlink_command(home: CoordinatorHome, port: int) -> list[str]:
    """How Flower's SuperLink is started, after `write_loopback_certificate`."""
    folder = home.database.parent.absolute()
    command = [str(Path(sys.executable).parent / "flower-superlink")]
    command += ["--ssl-ca-certfile", str(folder / "loopback.pem"), "--ssl-certfile", str(folder / "loopback.pem")]
    command += ["--ssl-keyfile", str(folder / "loopback.key"), "--enable-supernode-auth"]
    command += ["--database", str(home.database.absolute()), "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--disable-runtime-dependency-installation"]


def superlink_environment(home: CoordinatorHome) -> dict[str, str]:
    """The environment of the SuperLink, and of the coordinator's app which it starts."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home.database.parent.absolute()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
        COORDINATOR_HOME: str(home.folder.absolute()),
    }


class Control:
    """The SuperLink's control API on loopback. Every method raises ServiceError where it cannot be reached."""

    def __init__(self, home: CoordinatorHome, port: int) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        certificate = home.database.parent / "loopback.pem"
        try:
            self._client = ControlHttpClient.from_server_address(
                server_address=f"127.0.0.1:{port}",
                insecure=False,
                root_certificates=certificate.read_bytes(),
                interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            )
        except OSError as error:
            raise ServiceError(f"{certificate} is missing; start the SuperLink: `coadapt coordinator start`") from error

    def _call(self, method: str, request: Any) -> Any:
        import httpx

        try:
            return getattr(self._client, method)(request)
        except (httpx.HTTPError, RuntimeError) as error:
            raise ServiceError(f"the SuperLink did not do {method} ({type(error).__name__}); see its log") from error

    def wait(self, seconds: float = 60.0) -> None:
        """Return once the SuperLink answers."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.nodes()
            except ServiceError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return

    def register(self, name: str, node_key: str) -> int:
        """Let the node with this OpenSSH line in; its number in Flower. A node that is in already stays."""
        from flwr.proto.control_pb2 import RegisterNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        public = serialization.load_ssh_public_key(node_key.encode())
        key = public_key_to_bytes(public)  # type: ignore[arg-type]
        for node, (_, _, known) in self.nodes().items():
            if known == key:
                return node
        return int(self._call("RegisterNode", RegisterNodeRequest(public_key=key, name=name)).node_id)

    def unregister(self, node: int) -> None:
        """Let a node out."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._call("UnregisterNode", UnregisterNodeRequest(node_id=node))

    def nodes(self) -> dict[int, tuple[str, str, bytes]]:
        """Registered nodes: number to name, status (`online`, `offline`, ...) and public key (PEM bytes)."""
        from flwr.proto.control_pb2 import ListNodesRequest

        found = self._call("ListNodes", ListNodesRequest()).nodes_info
        return {int(node.node_id): (node.name, node.status, node.public_key) for node in found}

    def submit(self, config: dict[str, str], bundle: bytes | None = None) -> int:
        """Start a run of the app bundle; its number in Flower.

        Raises:
            ServiceError: Flower did not take it.
        """
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        content = app_bundle() if bundle is None else bundle
        fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        answer = self._call("StartRun", StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(config))))
        if not answer.HasField("run_id"):
            raise ServiceError("the SuperLink did not start the run; see its log")
        return int(answer.run_id)

    def status(self, run: int) -> tuple[str, str, str]:
        """A run's status (`pending`, `starting`, `running`, `finished`), sub-status and details."""
        from flwr.proto.control_pb2 import ListRunsRequest

        found = self._call("ListRuns", ListRunsRequest(run_id=run)).run_dict[run].status
        return found.status, found.sub_status, found.details

    def stop(self, run: int) -> None:
        """Stop a run."""
        from flwr.proto.control_pb2 import StopRunRequest

        self._call("StopRun", StopRunRequest(run_id=run))


def main(arguments: list[str]) -> int:  # noqa: RET503
    """Become Flower's SuperLink, in a folder in which no package lies that an app could take for its own."""
    if len(arguments) != 1:
        print("the coordinator's folder is wanted", file=sys.stderr)
        return 64
    home = CoordinatorHome(Path(arguments[0]))
    try:
        port = load_settings(home).superlink_port
    except CoadaptError as error:
        print(error, file=sys.stderr)
        return 78
    write_loopback_certificate(home.database.parent)
    command, environment = superlink_command(home, port), superlink_environment(home)
    os.chdir(home.database.parent)
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
