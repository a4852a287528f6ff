"""The coordinator's folder: settings, keys, certificates, who is admitted, and the runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from common.config.loading import load_document
from common.config.section import Section
from common.errors import EnrolmentError, SignatureRefused
from common.identity import Identity

__all__ = ["CoordinatorHome", "CoordinatorSettings", "load_settings"]


class CoordinatorSettings(Section):
    """A whole `coordinator.toml`."""

    version: Literal[1] = Field(description="version of this file's format")
    address: str = Field(
        pattern=r"^[A-Za-z0-9.\-\[\]:]{1,255}:[0-9]{1,5}$", description="HOST:PORT under which sites reach the gate"
    )
    listen: str = Field(
        "0.0.0.0:9092",
        pattern=r"^[A-Za-z0-9.\-\[\]:]{1,255}:[0-9]{1,5}$",
        description="HOST:PORT that the gate listens on",
    )
    superlink_port: int = Field(9093, ge=1, le=65535, description="Flower's SuperLink listens here, on loopback alone")
    most_request_bytes: int = Field(
        64 << 20, ge=1 << 20, description="largest request that the gate lets in, in bytes; Flower sends pieces of 5 MB"
    )
    requests_per_second: float = Field(50.0, gt=0, description="most requests a second that the gate takes of one host")
    phase_seconds: float = Field(3600.0, gt=0, description="how long a site may take for training or a message")
    poll_seconds: float = Field(1.0, gt=0, description="how long the coordinator waits before it asks a site again")
    attempts: int = Field(2, ge=1, le=16, description="how often a secure sum is tried before the run stops")


@dataclass(frozen=True)
class CoordinatorHome:
    """The folder that holds `coordinator.toml`."""

    folder: Path

    @property
    def settings_file(self) -> Path:
        """`coordinator.toml`."""
        return self.folder / "coordinator.toml"

    @property
    def keys(self) -> Path:
        """Folder of the keys, 0700; each file 0600."""
        return self.folder / "keys"

    @property
    def signing_key(self) -> Path:
        """The coordinator's Ed25519 key: 64 hex digits and a newline."""
        return self.keys / "signing.key"

    @property
    def authority_key(self) -> Path:
        """The certificate authority's key, PEM; missing where an own certificate is used."""
        return self.keys / "authority.key"

    @property
    def server_key(self) -> Path:
        """The gate's key, PEM."""
        return self.keys / "server.key"

    @property
    def authority(self) -> Path:
        """The authority's certificate, PEM; empty where the sites' systems know it."""
        return self.folder / "tls" / "authority.pem"

    @property
    def certificate(self) -> Path:
        """The gate's certificate with its chain, PEM."""
        return self.folder / "tls" / "server.pem"

    @property
    def manifest(self) -> Path:
        """The manifest that was sent to the sites."""
        return self.folder / "federation.toml"

    @property
    def admitted(self) -> Path:
        """Folder of the admitted enrolments, NAME.json each."""
        return self.folder / "admitted"

    @property
    def roster(self) -> Path:
        """The roster with the signatures collected so far."""
        return self.folder / "roster.json"

    @property
    def invitation(self) -> Path:
        """What is sent to every site."""
        return self.folder / "invitation.json"

    @property
    def database(self) -> Path:
        """The SuperLink's database."""
        return self.folder / "superlink" / "state.db"

    @property
    def runs(self) -> Path:
        """Folder of the runs."""
        return self.folder / "runs"

    @property
    def published(self) -> Path:
        """Folder of what finished runs give to their sites; the gate serves from it alone."""
        return self.folder / "published"

    @property
    def processes(self) -> Path:
        """Folder of the running processes' ids."""
        return self.folder / "run"

    @property
    def logs(self) -> Path:
        """Folder of the logs."""
        return self.folder / "log"

    def identity(self) -> Identity:
        """The coordinator's key.

        Raises:
            EnrolmentError: it is missing or damaged.
        """
        try:
            return Identity(bytes.fromhex(self.signing_key.read_text(encoding="ascii").strip()))
        except (OSError, ValueError, SignatureRefused) as error:
            raise EnrolmentError(
                f"{self.signing_key} cannot be used ({type(error).__name__}); `coadapt coordinator init` makes the keys"
            ) from error


def load_settings(home: CoordinatorHome) -> CoordinatorSettings:
    """Read and check `coordinator.toml`.

    Raises:
        ManifestError: with every problem, one line each.
    """
    return load_document(home.settings_file, CoordinatorSettings, advice="`coadapt coordinator init` writes one")
