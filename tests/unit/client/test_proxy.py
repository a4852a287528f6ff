"""Which way a site takes to the coordinator: as httpx takes it, which is what Flower's transport is made of."""

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import httpcore
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxying import Proxy

from client.proxy import Proxy as Way
from client.proxy import proxy_for, proxy_settings
from client.reach import reach
from common.errors import EnrolmentError
from common.tls import new_authority, new_server

HOSTS = ("gate.example.org", "example.org", "wwwexample.org", "10.0.0.7", "127.0.0.1", "localhost", "::1")
EXEMPT = (*HOSTS, ".example.org", ".org", "*", "10.0.0.0/8", "", " ")
NAMES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


def httpx_uses_a_proxy(host: str) -> bool:
    """Asked of httpx itself, which reads the environment when a client is made."""
    with httpx.Client(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)) as client:
        shown = f"[{host}]" if ":" in host else host
        transport = client._transport_for_url(httpx.URL(f"https://{shown}:9092"))
        assert isinstance(transport, httpx.HTTPTransport)
        return isinstance(transport._pool, httpcore.HTTPProxy)


@given(
    st.sampled_from(HOSTS), st.lists(st.sampled_from(EXEMPT), max_size=3), st.sampled_from(["HTTPS_PROXY", "ALL_PROXY"])
)
def test_check_and_node_take_the_way_of_httpx(host: str, exempt: list[str], variable: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.delenv(name, raising=False)
        given_ = {variable: "http://proxy.example:8080", "NO_PROXY": ",".join(exempt)}
        for name, value in given_.items():
            patch.setenv(name, value)
        found = proxy_for(host, given_)
        assert (found is not None) == httpx_uses_a_proxy(host)
        # And so with what a node is given of it.
        patch.delenv("ALL_PROXY", raising=False)
        for name, value in proxy_settings(given_).items():
            patch.setenv(name, value)
        assert (found is not None) == httpx_uses_a_proxy(host)


def test_an_address_may_hold_a_login_and_is_never_shown() -> None:
    assert proxy_for("a", {"https_proxy": "http://jo:p%40ss@proxy:8080"}) == Way("proxy", 8080, "jo", "p@ss")
    assert proxy_for("a", {"HTTPS_PROXY": "proxy"}) == Way("proxy", 80)
    for wrong in ("https://jo:secret@proxy:1", "http://:secret@", "http://jo:secret@proxy:99999", "socks5://proxy:1"):
        with pytest.raises(EnrolmentError, match="HTTPS_PROXY must be") as caught:
            proxy_for("a", {"HTTPS_PROXY": wrong})
        assert "secret" not in str(caught.value)


def test_loopback_calls_of_a_node_are_never_given_a_proxy() -> None:
    given_ = {"HTTP_PROXY": "http://a", "ALL_PROXY": "http://b", "no_proxy": "c", "PATH": "/"}
    assert proxy_settings(given_) == {"HTTPS_PROXY": "http://b", "NO_PROXY": "c"}
    assert proxy_settings({**given_, "https_proxy": "http://d"})["HTTPS_PROXY"] == "http://d"


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Something that speaks TLS with a certificate of a private authority; its address and the authority."""
    authority = new_authority("Clinic")
    pair = new_server(authority, ["127.0.0.1"])
    for name, data in (("ca.pem", authority.certificate), ("pem", pair.certificate), ("key", pair.key)):
        (tmp_path / name).write_bytes(data)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem", tmp_path / "key")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    plain, _ = server.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(plain, server_side=True) as one:
                        one.recv(1000)
                        one.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                except OSError:
                    plain.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", tmp_path / "ca.pem"
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_check_says_that_it_went_through_the_proxy(
    gate: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, authority = gate
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    with Proxy("jo", "p@ss").up() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://jo:p%40ss@127.0.0.1:{proxy.port}")
        (found,) = (each for each in reach(address, authority) if each.what == "network")
        assert found.level == "ok"
        assert f"answers through the proxy 127.0.0.1:{proxy.port}" in found.text
        assert proxy.asked == [address]
        # Another authority than the agreed one is refused, whoever stands between.
        (tmp_path / "other.pem").write_bytes(new_authority("Other").certificate)
        assert "was not agreed on" in [each.text for each in reach(address, tmp_path / "other.pem")][-1]
        monkeypatch.setenv("HTTPS_PROXY", f"http://jo:wrong@127.0.0.1:{proxy.port}")
        refused = list(reach(address, authority))[-1]
        assert (refused.level, "407" in refused.text) == ("problem", True)
        count = len(proxy.asked)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        direct = next(each for each in reach(address, authority) if each.what == "network")
        assert (direct.level, "proxy" in direct.text) == ("ok", False)
        assert len(proxy.asked) == count
