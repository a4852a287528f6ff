"""`coadapt coordinator init` and `renew`: settings, the signing key, and the gate's certificate."""

from pathlib import Path

from common.config.annotate import annotated_document
from common.durable import write_bytes, write_text
from common.errors import EnrolmentError
from common.identity import Identity
from common.private_files import private_folder, require_private, write_key
from common.tls import Pair, expiry, new_authority, new_server, own_pair, split_address
from server.home import CoordinatorHome, CoordinatorSettings, load_settings

__all__ = ["new_coordinator", "renew_certificate", "require_private_keys"]

HEADER = """\
How this host runs a federation's coordinator. No site sees this file.
A key that is left out has its default."""


def new_coordinator(
    folder: Path,
    *,
    address: str,
    listen: str | None,
    superlink_port: int | None,
    certificate: Path | None,
    key: Path | None,
    authority: Path | None,
) -> CoordinatorHome:
    """Make a coordinator in `folder`. Without an own certificate it becomes its own authority.

    `authority` is the PEM file that sites are to trust with an own certificate; without one their systems' authorities.

    Raises:
        EnrolmentError: there is one already, or certificate and key cannot be used for the address.
        ManifestError: a setting breaks a rule.
    """
    home = CoordinatorHome(folder)
    host, port = split_address(address)
    split_address(listen or address)
    for path in (home.settings_file, home.signing_key, home.server_key):
        if path.exists():
            raise EnrolmentError(f"{path} exists already: {folder} holds a coordinator; name another with --home")
    _require_both(certificate, key)
    values: dict[str, object] = {"version": 1, "address": address, "listen": listen or f"0.0.0.0:{port}"}
    if superlink_port is not None:
        values["superlink_port"] = superlink_port
    settings = CoordinatorSettings.model_validate(values)
    own: Pair | None = None
    if certificate is not None and key is not None:
        own = own_pair(_read(certificate), _read(key), host=host)
    private_folder(home.folder)
    for each in (home.keys, home.processes, home.logs, home.database.parent):
        private_folder(each)
    for each in (home.admitted, home.runs, home.certificate.parent):
        each.mkdir(parents=True, exist_ok=True)
    write_key(home.signing_key, Identity.generate().private_bytes().hex().encode() + b"\n")
    if own is None:
        made = new_authority(host)
        write_key(home.authority_key, made.key)
        write_bytes(home.authority, made.certificate)
        own = new_server(made, [host])
    else:
        write_bytes(home.authority, b"" if authority is None else _read(authority))
    write_key(home.server_key, own.key)
    write_bytes(home.certificate, own.certificate)
    write_text(home.settings_file, annotated_document(settings, HEADER))
    return home


def renew_certificate(home: CoordinatorHome, *, certificate: Path | None, key: Path | None) -> str:
    """Replace the gate's certificate and key; how long the new one holds, in words. The authority stays, so sites do
    nothing; the gate must be started again.

    Raises:
        EnrolmentError: there is no authority's key and no pair was given, or the pair cannot be used.
    """
    _require_both(certificate, key)
    host, _ = split_address(load_settings(home).address)
    if certificate is not None and key is not None:
        pair = own_pair(_read(certificate), _read(key), host=host)
    elif not home.authority_key.exists():
        raise EnrolmentError(
            f"{home.authority_key} is not here: give --certificate and --key, or bring the authority's key back"
        )
    else:
        pair = new_server(Pair(_read(home.authority), _read(home.authority_key)), [host])
    # The old key is put aside, not overwritten: until the gate is started again it still serves with it.
    aside = home.server_key.with_name("server.key.old")
    home.server_key.replace(aside)
    write_key(home.server_key, pair.key)
    write_bytes(home.certificate, pair.certificate)
    return expiry(pair.certificate)[1]


def require_private_keys(home: CoordinatorHome) -> None:
    """Refuse keys that others may read.

    Raises:
        EnrolmentError: with the first one and what to do.
    """
    require_private(home.keys, most=0o700)
    for path in (home.signing_key, home.server_key, home.authority_key):
        if path.exists() or path == home.signing_key:
            require_private(path)


def _require_both(certificate: Path | None, key: Path | None) -> None:
    if (certificate is None) != (key is None):
        raise EnrolmentError("an own certificate needs its key: give --certificate and --key together")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EnrolmentError(f"{path} cannot be read: {error.strerror}") from error
