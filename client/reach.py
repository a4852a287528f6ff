"""Whether the coordinator's gate can be reached, with the certificate that was agreed on and a clock that agrees."""

import base64
import contextlib
import email.utils
import http.client
import os
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from client.proxy import proxy_for
from common.findings import Finding, Level
from common.tls import expiry, split_address

__all__ = ["agreed_context", "connection_to", "reach"]

TIMEOUT_SECONDS = 10.0

# Flower refuses a node whose signed time is further away than about five minutes.
WARN_SECONDS = 60.0
MOST_SECONDS = 300.0


def reach(address: str, authority: Path) -> Iterator[Finding]:
    """Shake hands with the gate, through HTTPS_PROXY where it is set, and look at certificates and clock."""
    host, port = split_address(address)
    pem = authority.read_bytes() if authority.exists() else b""
    if pem:
        level, text = expiry(pem)
        yield Finding(level, "certificate", f"the coordinator's authority {text}")
    try:
        connection, way = connection_to(host, port, agreed_context(pem))
        with contextlib.closing(connection):
            before = time.time()
            connection.connect()
            leaf: bytes = connection.sock.getpeercert(binary_form=True) or b""
            yield Finding("ok", "network", f"{address} answers{way}, and its certificate is the agreed authority's")
            level, text = expiry(ssl.DER_cert_to_PEM_cert(leaf).encode())
            yield Finding(level, "certificate", f"the gate's {text}")
            connection.request("HEAD", "/")
            yield from _clock(connection.getresponse().headers.get("Date"), before)
    except ssl.SSLCertVerificationError as error:
        yield Finding(
            "problem", "network", f"{address} shows a certificate that was not agreed on: {error.verify_message}"
        )
    except (OSError, http.client.HTTPException) as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        yield Finding("problem", "network", f"{address} cannot be reached: {said}; ask for an open way to this port")


def agreed_context(pem: bytes) -> ssl.SSLContext:
    """TLS that trusts the agreed authority alone, so that another that the system trusts does not vouch for the gate;
    without one (empty) what the system trusts."""
    if not pem:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=pem.decode("ascii"))
    return context


def connection_to(host: str, port: int, context: ssl.SSLContext) -> tuple[http.client.HTTPSConnection, str]:
    """A connection to the gate that is not open yet, through HTTPS_PROXY where it is set and NO_PROXY does not exempt
    the host; and which way it goes, in words.

    Raises:
        EnrolmentError: HTTPS_PROXY cannot be read.
    """
    proxy = proxy_for(host, os.environ)
    if proxy is None:
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=context), ""
    connection = http.client.HTTPSConnection(proxy.host, proxy.port, timeout=TIMEOUT_SECONDS, context=context)
    headers = {}
    if proxy.user:
        words = base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode("ascii")
        headers["Proxy-Authorization"] = f"Basic {words}"
    connection.set_tunnel(host, port, headers)
    return connection, f" through the proxy {proxy.host}:{proxy.port}"


def _clock(said: str | None, own: float) -> Iterator[Finding]:
    if not said:
        yield Finding("warning", "clock", "the gate does not tell the time, so the clocks cannot be compared")
        return
    try:
        apart = own - email.utils.parsedate_to_datetime(said).timestamp()
    except ValueError:
        yield Finding("warning", "clock", "the gate's time cannot be read")
        return
    level: Level = "ok" if abs(apart) < WARN_SECONDS else "warning" if abs(apart) < MOST_SECONDS else "problem"
    yield Finding(level, "clock", f"{apart:+.0f} s from the gate's; set it by NTP" if level != "ok" else "agrees")
