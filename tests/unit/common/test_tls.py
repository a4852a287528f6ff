"""Certificates: a real handshake is the oracle for what we make, and what does not fit is refused."""

import datetime
import ipaddress
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.reach import reach
from common.errors import EnrolmentError
from common.tls import (
    Pair,
    expiry,
    new_authority,
    new_server,
    own_pair,
    read_certificates,
    require_issued,
    split_address,
)

DAY = datetime.timedelta(days=1)


class Listener:
    """A TLS server on a free port that answers every request with a 404 and a date."""

    def __init__(self, folder: Path, pair: Pair, date: datetime.datetime | None = None) -> None:
        (folder / "cert.pem").write_bytes(pair.certificate)
        (folder / "key.pem").write_bytes(pair.key)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        when = (date or datetime.datetime.now(datetime.UTC)).strftime("%a, %d %b %Y %H:%M:%S GMT")
        self.answer = f"HTTP/1.1 404 Not Found\r\nDate: {when}\r\nContent-Length: 0\r\n\r\n".encode()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self.socket.accept()
                with plain, self.context.wrap_socket(plain, server_side=True) as secure:
                    secure.recv(4096)
                    secure.sendall(self.answer)
            except ssl.SSLError:
                continue
            except OSError:
                return

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(5)


def look(
    folder: Path, pair: Pair, authority: bytes, host: str = "127.0.0.1", **more: datetime.datetime
) -> dict[str, str]:
    """Levels by what was looked at, of a real handshake."""
    (folder / "authority.pem").write_bytes(authority)
    listener = Listener(folder, pair, **more)
    try:
        found = list(reach(f"{host}:{listener.port}", folder / "authority.pem"))
    finally:
        listener.close()
    return {finding.what: finding.level for finding in found}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_client_that_trusts_the_authority_accepts_the_server(tmp_path: Path, host: str) -> None:
    authority = new_authority("test")
    found = look(tmp_path, new_server(authority, [host]), authority.certificate, host)
    assert found == {"network": "ok", "certificate": "ok", "clock": "ok"}


def test_another_authority_or_name_is_refused(tmp_path: Path) -> None:
    authority, other = new_authority("test"), new_authority("test")
    assert look(tmp_path, new_server(other, ["127.0.0.1"]), authority.certificate)["network"] == "problem"
    assert look(tmp_path, new_server(authority, ["127.0.0.2"]), authority.certificate)["network"] == "problem"
    with pytest.raises(EnrolmentError, match="does not come from the authority"):
        require_issued(new_server(other, ["127.0.0.1"]).certificate, authority.certificate)
    require_issued(new_server(authority, ["127.0.0.1"]).certificate, authority.certificate)


def test_a_clock_that_is_off_is_seen(tmp_path: Path) -> None:
    authority = new_authority("test")
    pair, now = new_server(authority, ["127.0.0.1"]), datetime.datetime.now(datetime.UTC)
    for apart, level in ((70, "warning"), (-70, "warning"), (400, "problem"), (10, "ok")):
        date = now - datetime.timedelta(seconds=apart)
        assert look(tmp_path, pair, authority.certificate, date=date)["clock"] == level


def test_nobody_there_is_a_problem(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (found,) = reach(f"127.0.0.1:{port}", tmp_path / "none.pem")
    assert (found.level, found.what) == ("problem", "network")


def test_the_servers_certificate_is_no_authority_and_ends_with_its_authority() -> None:
    authority = new_authority("test", days=10)
    leaf, above = read_certificates(new_server(authority, ["a.example", "10.0.0.1"]).certificate, "it")
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert leaf.not_valid_after_utc == above.not_valid_after_utc
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.0.0.1")]
    usage = above.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.digital_signature) == (True, False)
    assert above.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_an_own_certificate_must_belong_to_its_key_and_name() -> None:
    authority = new_authority("test")
    one, two = new_server(authority, ["a.example"]), new_server(authority, ["*.b.example"])
    assert own_pair(one.certificate, one.key, host="A.example") == one
    assert own_pair(two.certificate, two.key, host="x.b.example") == two
    with pytest.raises(EnrolmentError, match="do not belong together"):
        own_pair(one.certificate, two.key, host="a.example")
    for host in ("b.example", "x.y.b.example", "a.example"):
        with pytest.raises(EnrolmentError, match=rf"is not for '{host}' but for \*\.b\.example"):
            own_pair(two.certificate, two.key, host=host)
    for certificate, key in ((b"nothing", one.key), (one.certificate, b"nothing")):
        with pytest.raises(EnrolmentError, match="cannot be read"):
            own_pair(certificate, key, host="a.example")
    secret = serialization.load_pem_private_key(one.key, None)
    locked = secret.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    with pytest.raises(EnrolmentError, match="an unencrypted PEM key is needed"):
        own_pair(one.certificate, locked, host="a.example")


def test_expiry_is_said_in_words_before_it_comes() -> None:
    pair, now = new_server(new_authority("test"), ["a.example"]), datetime.datetime.now(datetime.UTC)
    assert expiry(pair.certificate)[0] == "ok"
    level, words = expiry(pair.certificate, now=now + 380 * DAY)
    assert (level, words.split(",")[1]) == ("warning", " in 16 days; renew it")
    level, words = expiry(pair.certificate, now=now + 398 * DAY)
    assert (level, words.startswith("expired on")) == ("problem", True)
    assert expiry(pair.certificate, now=now - DAY)[0] == "problem"


def test_an_expired_pair_or_authority_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "old")])
    now = datetime.datetime.now(datetime.UTC)
    old = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * DAY)
        .not_valid_after(now - DAY)
        .sign(key, hashes.SHA256())
    )
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pair = Pair(old.public_bytes(serialization.Encoding.PEM), key.private_bytes(*form))
    with pytest.raises(EnrolmentError, match="expired on"):
        own_pair(pair.certificate, pair.key, host="old")
    with pytest.raises(EnrolmentError, match="expired on"):
        new_server(pair, ["a.example"])


def test_an_address_is_a_host_and_a_port() -> None:
    assert split_address("a.example:9092") == ("a.example", 9092)
    assert split_address("[::1]:9092") == ("::1", 9092)
    for wrong in ("a.example", "a.example:", ":9092", "a.example:0", "a.example:65536", "a.example:http"):
        with pytest.raises(EnrolmentError, match="write HOST:PORT"):
            split_address(wrong)
