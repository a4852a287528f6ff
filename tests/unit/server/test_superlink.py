"""What is known of the SuperLink without starting one: its certificate, environment, keys, and what it refuses."""

import os
import stat
from pathlib import Path

import httpcore
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from common.errors import EnrolmentError, ServiceError
from common.tls import require_issued
from server import superlink
from server.home import CoordinatorHome


@pytest.fixture
def home(tmp_path: Path) -> CoordinatorHome:
    made = CoordinatorHome(tmp_path)
    made.database.parent.mkdir()
    return made


def line(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def test_a_nodes_key_is_registered_as_it_stands_in_the_enrolment() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    wanted = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert superlink._key_bytes(line(key)) == wanted
    assert superlink._key_bytes(line(key) + " north") == wanted
    with pytest.raises(EnrolmentError, match="elliptic curve"):
        superlink._key_bytes(line(ed25519.Ed25519PrivateKey.generate()))
    with pytest.raises(EnrolmentError, match="no OpenSSH line"):
        superlink._key_bytes("ecdsa-sha2-nistp384 AAAA")


def test_the_loopback_certificate_is_made_once_and_anew_near_its_end(
    home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = superlink._certificate(home)
    require_issued(certificate.read_bytes(), superlink.loopback_certificate(home).read_bytes())
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    first = certificate.read_bytes(), key.read_bytes()
    superlink._certificate(home)
    assert (certificate.read_bytes(), key.read_bytes()) == first
    monkeypatch.setattr("server.superlink.expiry", lambda _: ("warning", "expires soon"))
    superlink._certificate(home)
    assert certificate.read_bytes() != first[0]
    assert key.read_bytes() != first[1]
    require_issued(certificate.read_bytes(), superlink.loopback_certificate(home).read_bytes())
    monkeypatch.undo()
    second = certificate.read_bytes()
    superlink.loopback_certificate(home).unlink()
    superlink._certificate(home)
    assert certificate.read_bytes() != second


def test_flower_neither_reports_nor_finds_other_commands_first(home: CoordinatorHome) -> None:
    found = superlink._environment(home)
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert found[superlink.HOME] == str(home.folder)
    assert Path(found["FLWR_HOME"]).is_relative_to(home.folder)
    assert found["PATH"].split(os.pathsep)[0] == str(Path(superlink.sys.executable).parent)


def test_what_it_refuses_is_one_line() -> None:
    request = httpx.Request("POST", "https://127.0.0.1")
    answer = httpx.Response(403, text="no\n" * 500, request=request)
    with pytest.raises(ServiceError, match=r"refuses \(403\): no no") as raised, superlink._told():
        raise httpx.HTTPStatusError("", request=request, response=answer)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
    with pytest.raises(ServiceError, match=r"does not answer \(ConnectError\)"), superlink._told():
        raise httpx.ConnectError("refused")


def test_a_run_is_over_when_flower_says_finished() -> None:
    assert superlink.FlowerRun(1, "finished:completed", "").over
    assert not superlink.FlowerRun(1, "running", "").over


def test_control_needs_a_superlink_that_was_once_started(home: CoordinatorHome, tmp_path: Path) -> None:
    (tmp_path / "coordinator.toml").write_text('version = 1\naddress = "a.example:9092"\n')
    with pytest.raises(ServiceError, match="never started"):
        superlink.Control(home)


def test_nothing_here_asks_a_proxy_for_the_loopback(home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "intranet.example")
    monkeypatch.delenv("no_proxy", raising=False)

    def proxied(host: str) -> bool:
        with httpx.Client(verify=False) as client:  # nothing is sent
            transport = client._transport_for_url(httpx.URL(f"https://{host}:9093"))
            assert isinstance(transport, httpx.HTTPTransport)
            return isinstance(transport._pool, httpcore.HTTPProxy)

    hosts = ("127.0.0.1", "localhost", "intranet.example", "hub.example")
    assert [proxied(host) for host in hosts] == [True, True, False, True]
    with superlink._without_proxy():
        assert [proxied(host) for host in hosts] == [False, False, False, True]
    assert [proxied(host) for host in hosts] == [True, True, False, True]
    assert "no_proxy" not in os.environ
    for name, value in superlink._environment(home).items():
        monkeypatch.setenv(name, value)
    assert [proxied(host) for host in hosts] == [False, False, False, True]
