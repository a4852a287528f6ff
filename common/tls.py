"""Certificates of the gate: an own authority, a server's certificate from it, or an own pair; and how long they last.

Keys are EC P-256; signatures ECDSA with SHA-256. An own authority signs servers and nothing else: it is constrained to
no further authority, and its key is needed only to make or renew the server's certificate, so it may lie elsewhere.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import EnrolmentError
from common.findings import Level

__all__ = [
    "Pair",
    "expiry",
    "new_authority",
    "new_server",
    "own_pair",
    "read_certificates",
    "require_issued",
    "split_address",
]

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397  # as long as clients commonly accept
WARN_DAYS = 30

# A site whose clock is a little behind must not find the certificate too young.
BACKDATED = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Pair:
    """A certificate, with its chain where it has one, and its private key; both PEM. The key is a secret."""

    certificate: bytes
    key: bytes


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 address stands in brackets.

    Raises:
        EnrolmentError: it is none.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise EnrolmentError(f"{address!r} is no address: write HOST:PORT, such as federation.example.org:9092")
    return host, int(port)


def new_authority(name: str, *, days: int = AUTHORITY_DAYS) -> Pair:
    """A self-signed authority for the servers of one federation."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Coadapt authority of {name}"[:64])])
    certificate = (
        _started(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Pair(certificate.public_bytes(serialization.Encoding.PEM), _key_bytes(key))


def new_server(authority: Pair, hosts: Sequence[str], *, days: int = SERVER_DAYS) -> Pair:
    """A server's certificate for these DNS names and IP addresses, never valid for longer than the authority.

    Raises:
        EnrolmentError: the authority's key is not its certificate's, or it has expired.
    """
    above, signer = _matching(authority, "the authority")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    if above.not_valid_after_utc <= _now():
        raise EnrolmentError(f"the authority's certificate expired on {above.not_valid_after_utc:%Y-%m-%d}; make one")
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(_elliptic(signer).public_key())
    certificate = (
        _started(subject, above.subject, key.public_key(), days, most=above.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(identifier, critical=False)
        .sign(_elliptic(signer), hashes.SHA256())
    )
    chain = certificate.public_bytes(serialization.Encoding.PEM) + authority.certificate
    return Pair(chain, _key_bytes(key))


def own_pair(certificate: bytes, key: bytes, *, host: str) -> Pair:
    """A certificate that an institution has from elsewhere, with its key.

    Raises:
        EnrolmentError: one cannot be read, they do not belong together, it has expired, or it is not for `host`.
    """
    pair = Pair(certificate, key)
    leaf, _ = _matching(pair, "the certificate")
    if leaf.not_valid_after_utc <= _now():
        raise EnrolmentError(f"the certificate expired on {leaf.not_valid_after_utc:%Y-%m-%d}; get a new one")
    names = _names_of(leaf)
    if not any(_covers(name, host) for name in names):
        raise EnrolmentError(f"the certificate is not for {host!r} but for {', '.join(names) or 'no name at all'}")
    return pair


def require_issued(certificate: bytes, authority: bytes) -> None:
    """Refuse a certificate that none of the authority file's certificates signed directly or through its chain.

    Raises:
        EnrolmentError: it is from elsewhere.
    """
    chain = read_certificates(certificate, "the certificate")
    trusted = read_certificates(authority, "the authority")
    current = chain[0]
    for _ in range(len(chain) + 1):
        if any(_signed_by(current, above) for above in trusted):
            return
        above = next((one for one in chain[1:] if one != current and _signed_by(current, one)), None)
        if above is None:
            break
        current = above
    raise EnrolmentError("the server's certificate does not come from the authority that sites are given")


def read_certificates(data: bytes, what: str) -> list[x509.Certificate]:
    """Every certificate of a PEM file, the first one first.

    Raises:
        EnrolmentError: there is none.
    """
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise EnrolmentError(f"{what} cannot be read: a PEM file of certificates is needed") from error


def expiry(certificate: bytes, *, now: datetime.datetime | None = None) -> tuple[Level, str]:
    """How long a PEM certificate still holds, as ok, warning or problem, and in words.

    Raises:
        EnrolmentError: it cannot be read.
    """
    leaf = read_certificates(certificate, "the certificate")[0]
    now, end = now or _now(), leaf.not_valid_after_utc
    days = (end - now).days
    if leaf.not_valid_before_utc > now:
        return "problem", f"is valid only from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on: check the clock"
    if end <= now:
        return "problem", f"expired on {end:%Y-%m-%d}; renew it"
    if days < WARN_DAYS:
        return "warning", f"expires on {end:%Y-%m-%d}, in {days} days; renew it"
    return "ok", f"is valid until {end:%Y-%m-%d}"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _started(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    *,
    most: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    end = _now() + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - BACKDATED)
        .not_valid_after(end if most is None else min(end, most))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _matching(pair: Pair, what: str) -> tuple[x509.Certificate, CertificateIssuerPrivateKeyTypes]:
    """The first certificate and the key, which must be its own."""
    leaf = read_certificates(pair.certificate, what)[0]
    try:
        key = serialization.load_pem_private_key(pair.key, None)
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise EnrolmentError(f"{what}'s key cannot be read: an unencrypted PEM key is needed") from error
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != leaf.public_key().public_bytes(*form):
        raise EnrolmentError(f"{what} and the key do not belong together; name the key that it was made with")
    return leaf, key  # type: ignore[return-value]  # a key of a certificate is one that signs


def _elliptic(key: CertificateIssuerPrivateKeyTypes) -> ec.EllipticCurvePrivateKey:
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise EnrolmentError("the authority's key is no EC key; Coadapt makes its own authority")
    return key


def _names_of(leaf: x509.Certificate) -> list[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _covers(name: str, host: str) -> bool:
    if name.startswith("*."):  # a wildcard stands for one label (RFC 6125, section 6.4.3)
        return host.lower().partition(".")[2] == name[2:].lower()
    return name.lower() == host.lower()


def _signed_by(certificate: x509.Certificate, above: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(above)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
