"""Flower's SuperLink on loopback: started as a process of its own, and asked over its control API.

    python -m server.superlink HOME

It listens on 127.0.0.1 alone, under a certificate that is made for it here, since nobody else talks to it: the gate,
and whoever may start processes on this machine. It knows nodes by their registered keys and keeps its database.
"""

import contextlib
import hashlib
import os
import ssl
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from common.app_bundle import app_bundle
from common.durable import write_bytes
from common.errors import EnrolmentError, ServiceError
from common.private_files import private_folder, write_key
from common.tls import expiry, new_authority, new_server
from server.home import CoordinatorHome, CoordinatorSettings, load_settings

__all__ = ["HOME", "Control", "FlowerRun", "NodeState", "loopback_certificate", "main", "superlink_url"]

# Environment variable by which the server app learns whose run it is.
HOME = "COADAPT_COORDINATOR_HOME"

LOOPBACK = "127.0.0.1"
READY_SECONDS = 60.0
_SECONDS = 30.0


def superlink_url(settings: CoordinatorSettings) -> str:
    """Where the SuperLink listens."""
    return f"https://{LOOPBACK}:{settings.superlink_port}"


def loopback_certificate(home: CoordinatorHome) -> Path:
    """The authority's certificate of the loopback connection."""
    return home.database.parent / "loopback.pem"


def main(arguments: Sequence[str] | None = None) -> int:
    """Become the SuperLink; returns only where that fails."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    home = CoordinatorHome(Path(folder).absolute())
    settings = load_settings(home)
    private_folder(home.database.parent)
    certificate, key = _certificate(home)
    neutral = (
        home.database.parent / "empty"
    )  # Flower's workers take modules from their folder before the installed ones
    neutral.mkdir(exist_ok=True)
    os.chdir(neutral)
    command = [
        *(sys.executable, "-P", "-c", "from flwr.superlink.cli import flower_superlink; flower_superlink()"),
        *("--ssl-ca-certfile", str(loopback_certificate(home)), "--ssl-certfile", str(certificate)),
        *("--ssl-keyfile", str(key), "--enable-supernode-auth", "--database", str(home.database)),
        *("--host", LOOPBACK, "--port", str(settings.superlink_port)),
        "--disable-runtime-dependency-installation",
    ]
    os.execve(sys.executable, command, _environment(home))  # no shell, and nothing from outside in it


def _environment(home: CoordinatorHome) -> dict[str, str]:
    return {
        **os.environ,
        **_direct(),
        HOME: str(home.folder),
        "FLWR_HOME": str(home.database.parent / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Flower finds its own commands by name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _direct() -> dict[str, str]:
    """NO_PROXY with the loopback in it: where HTTPS_PROXY is set, Flower's own calls here must stay here."""
    names = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY", ""), LOOPBACK, "localhost"]
    value = ",".join(name for name in names if name)
    return {"NO_PROXY": value, "no_proxy": value}


@contextlib.contextmanager
def _without_proxy() -> Iterator[None]:
    """Flower's client reads the environment when it is made, and takes no word on it."""
    before = {name: os.environ.get(name) for name in _direct()}
    os.environ.update(_direct())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _certificate(home: CoordinatorHome) -> tuple[Path, Path]:
    """The loopback certificate and its key, made anew where there is none or it ends soon."""
    folder = home.database.parent
    certificate, key, authority = folder / "server.pem", folder / "server.key", loopback_certificate(home)
    if (
        not (certificate.exists() and key.exists() and authority.exists())
        or expiry(certificate.read_bytes())[0] != "ok"
    ):
        signs = new_authority("Coadapt loopback")
        pair = new_server(signs, ["localhost", LOOPBACK])
        key.unlink(missing_ok=True)
        write_key(key, pair.key)
        write_bytes(certificate, pair.certificate)
        write_bytes(authority, signs.certificate)
    return certificate, key


# What Flower says of a run that is not in its database, and what it is called here.
_NO_SUCH_RUN = "Run ID not found"
_UNKNOWN = "finished:unknown"


@dataclass(frozen=True)
class NodeState:
    """A registered node: Flower's id and status ("registered", "online", "offline"), and when it last came or went."""

    node: int
    name: str
    status: str
    since: str


@dataclass(frozen=True)
class FlowerRun:
    """A run as Flower knows it."""

    number: int
    status: str
    details: str

    @property
    def over(self) -> bool:
        """Whether its app has ended, for all that Flower knows."""
        return self.status.startswith("finished")

    @property
    def known(self) -> bool:
        """Whether Flower's database holds it: one that was lost or put back may not."""
        return self.status != _UNKNOWN


class Control:
    """The SuperLink's control API, on loopback. Use as a context manager.

    Raises:
        ServiceError: the SuperLink does not answer, or refuses.
    """

    def __init__(self, home: CoordinatorHome) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._settings = load_settings(home)
        authority = loopback_certificate(home)
        if not authority.exists():
            raise ServiceError("the SuperLink was never started here; `coadapt coordinator start` starts it")
        self._verify = ssl.create_default_context(cafile=str(authority))
        with _without_proxy():
            self._client = ControlHttpClient.from_server_address(
                server_address=f"{LOOPBACK}:{self._settings.superlink_port}",
                insecure=False,
                root_certificates=str(authority),
                interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            )

    def __enter__(self) -> "Control":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def wait_until_ready(self, *, seconds: float = READY_SECONDS) -> None:
        """Return when the SuperLink answers."""
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

    def nodes(self) -> list[NodeState]:
        """The registered nodes."""
        from flwr.proto.control_pb2 import ListNodesRequest

        with _told():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [
            NodeState(
                node.node_id,
                getattr(node, "name", "") or "",
                node.status,
                node.last_activated_at or node.registered_at,
            )
            for node in found
            if node.status != "unregistered"
        ]

    def keep(self, node_keys: Mapping[str, str]) -> None:
        """Let the nodes with these keys (OpenSSH lines, by site name) in, and no others; those that are known stay."""
        from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest

        wanted = {_key_bytes(line): name for name, line in node_keys.items()}
        with _told():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
            known = {bytes(node.public_key): node.node_id for node in found if node.status != "unregistered"}
            for key in wanted.keys() - known.keys():
                self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=wanted[key]))
            for key in known.keys() - wanted.keys():
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=known[key]))

    def submit(self, run_id: str) -> int:
        """Have Flower start the coordinator's app for a run; Flower's number for it."""
        return self.start(app_bundle(), {"run": run_id})

    def start(self, bundle: bytes, settings: dict[str, str]) -> int:
        """Have Flower start the app in a bundle; sites admit none but `app_bundle()`."""
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})),
            override_config=user_config_to_proto(dict[str, bool | float | int | str](settings)),
        )
        with _told():
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise ServiceError("the SuperLink did not start the run; log/superlink.log says why")
        return int(answer.run_id)

    def run(self, number: int) -> FlowerRun:
        """How a run is doing."""
        from flwr.common.serde import run_from_proto
        from flwr.proto.control_pb2 import ListRunsRequest

        try:
            with _told():
                answer = self._client.ListRuns(ListRunsRequest(run_id=number))
        except ServiceError as error:
            why = error.__cause__
            if not isinstance(why, httpx.HTTPStatusError) or why.response.status_code != httpx.codes.NOT_FOUND:
                raise
            if _NO_SUCH_RUN not in why.response.text:
                raise
            return FlowerRun(number, _UNKNOWN, "Flower's database does not hold it")
        (found,) = (run_from_proto(each) for each in answer.run_dict.values())
        status = found.status
        return FlowerRun(number, ":".join(part for part in (status.status, status.sub_status) if part), status.details)

    def stop(self, number: int) -> None:
        """Have Flower end a run's app."""
        from flwr.proto.control_pb2 import StopRunRequest

        with _told():
            self._client.StopRun(StopRunRequest(run_id=number))


def _key_bytes(line: str) -> bytes:
    """A node's key in the form that Flower registers.

    Raises:
        EnrolmentError: it is none.
    """
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    try:
        key = load_ssh_public_key(line.encode())
    except ValueError as error:
        raise EnrolmentError("a node's key is no OpenSSH line; ask the site for a new enrolment") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise EnrolmentError("a node's key must be of an elliptic curve; ask the site for a new enrolment")
    return bytes(public_key_to_bytes(key))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Say in one line what the SuperLink refused."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        text = error.response.text[:300].replace("\n", " ")
        raise ServiceError(f"the SuperLink refuses ({error.response.status_code}): {text}") from error
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise ServiceError(
            f"the SuperLink does not answer ({type(error).__name__}); `coadapt coordinator start` starts it"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
