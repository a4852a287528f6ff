"""A site's folder: where its policy, keys, agreement, ledger, logs and the state of its runs lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.durable import write_text
from common.errors import EnrolmentError, SignatureRefused
from common.identity import Identity

__all__ = ["Agreement", "SiteHome"]

_DIGEST = r"^[0-9a-f]{64}$"


class Agreement(BaseModel):
    """What a person at the site agreed to with `coadapt site join`: nothing else is answered."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    roster_sha256: str = Field(pattern=_DIGEST)
    manifest_sha256: str = Field(pattern=_DIGEST, description="`Manifest.digest()`")
    app_sha256: str = Field(pattern=_DIGEST, description="the only app bundle that Flower may run here")
    address: str = Field(description="HOST:PORT of the coordinator's gate")
    joined: str = Field(description="when, as ISO 8601 in UTC")


@dataclass(frozen=True)
class SiteHome:
    """The folder that holds `site.toml`."""

    folder: Path

    @property
    def policy(self) -> Path:
        """`site.toml`."""
        return self.folder / "site.toml"

    @property
    def keys(self) -> Path:
        """Folder of the keys, 0700; each file 0600."""
        return self.folder / "keys"

    @property
    def signing_key(self) -> Path:
        """The institution's Ed25519 key: 64 hex digits and a newline."""
        return self.keys / "signing.key"

    @property
    def node_key(self) -> Path:
        """The key with which Flower knows the node: EC P-384, OpenSSH PEM; the public line is in `node.pub`."""
        return self.folder / "relay" / "node.key"

    @property
    def rounding_key(self) -> Path:
        """32 bytes in hex that this site alone knows (`client/secure_site.py`)."""
        return self.keys / "rounding.key"

    @property
    def federation(self) -> Path:
        """Folder of what was agreed."""
        return self.folder / "federation"

    @property
    def roster(self) -> Path:
        """The roster with every signature."""
        return self.federation / "roster.json"

    @property
    def manifest(self) -> Path:
        """The manifest as it was agreed."""
        return self.federation / "federation.toml"

    @property
    def certificate(self) -> Path:
        """The authority of the gate's certificate; missing or empty where the system knows it."""
        return self.folder / "relay" / "coordinator.pem"

    @property
    def agreement_file(self) -> Path:
        """`Agreement` as JSON."""
        return self.federation / "agreement.json"

    @property
    def runs(self) -> Path:
        """Folder of a folder for each run: the vault's durable state, 0700."""
        return self.folder / "runs"

    @property
    def fetched(self) -> Path:
        """Folder of a folder for each run whose result was fetched."""
        return self.folder / "fetched"

    @property
    def socket(self) -> Path:
        """The vault's Unix socket. Its folder admits the relay's group and nobody else."""
        return self.folder / "relay" / "vault.sock"

    @property
    def relay(self) -> Path:
        """The only folder that the relay may read: node key, certificate, agreement's copy, socket."""
        return self.folder / "relay"

    @property
    def log(self) -> Path:
        """The vault's own log, which may hold anything but leaves never."""
        return self.folder / "log" / "vault.log"

    @property
    def audit(self) -> Path:
        """Append-only: every order, answered or refused, and why."""
        return self.folder / "log" / "audit.jsonl"

    def identity(self) -> Identity:
        """The institution's key.

        Raises:
            EnrolmentError: it is missing or damaged.
        """
        try:
            return Identity(bytes.fromhex(self.signing_key.read_text(encoding="ascii").strip()))
        except (OSError, ValueError, SignatureRefused) as error:
            raise EnrolmentError(
                f"{self.signing_key} cannot be used ({type(error).__name__}); `coadapt site init` makes a site's keys"
            ) from error

    def agreement(self) -> Agreement:
        """What was agreed.

        Raises:
            EnrolmentError: the site has joined nothing yet, or the file is damaged.
        """
        try:
            return Agreement.model_validate_json(self.agreement_file.read_bytes())
        except FileNotFoundError as error:
            raise EnrolmentError(
                f"this site has joined no federation: {self.agreement_file} is missing; `coadapt site join` makes it"
            ) from error
        except (OSError, ValidationError) as error:
            raise EnrolmentError(f"{self.agreement_file} is damaged; join again with `coadapt site join`") from error

    def agree(self, agreement: Agreement) -> None:
        """Write down what was agreed."""
        write_text(self.agreement_file, agreement.model_dump_json(indent=2) + "\n")
