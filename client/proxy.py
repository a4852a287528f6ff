"""Which proxy the way to the coordinator takes, by the environment, as Flower's transport (httpx) reads it."""

import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import EnrolmentError

__all__ = ["Proxy", "proxy_for", "proxy_settings"]

_DEFAULT_PORT = 80  # of http, which is what httpx takes too


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy; `user` and `password` where its address holds them."""

    host: str
    port: int
    user: str = ""
    password: str = ""


def proxy_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a process gets which speaks to the coordinator: HTTPS_PROXY and NO_PROXY alone.

    ALL_PROXY counts as HTTPS_PROXY where that is missing. HTTP_PROXY and ALL_PROXY are not passed on: Flower's
    processes of one site speak plain HTTP to each other over the loopback, and a proxy must not get into that.
    """

    def value(*names: str) -> str:
        spelled = [spelling for name in names for spelling in (name.lower(), name)]
        return next((environment[name] for name in spelled if environment.get(name)), "")

    found = {"HTTPS_PROXY": value("HTTPS_PROXY", "ALL_PROXY"), "NO_PROXY": value("NO_PROXY")}
    return {name: text for name, text in found.items() if text}


def proxy_for(host: str, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy between here and the host; None where the way is direct.

    Raises:
        EnrolmentError: HTTPS_PROXY is no address of an HTTP proxy.
    """
    settings = proxy_settings(environment)
    address = settings.get("HTTPS_PROXY")
    if not address or _exempt(host, settings.get("NO_PROXY", "")):
        return None
    parts = urllib.parse.urlsplit(address if "//" in address else f"http://{address}")
    try:
        port = parts.port or _DEFAULT_PORT
    except ValueError:
        port = 0
    if not parts.hostname or not port or parts.scheme != "http":
        # The address is not shown: it may hold a password.
        raise EnrolmentError("HTTPS_PROXY must be http://HOST:PORT or http://USER:PASSWORD@HOST:PORT; it is not")
    user, password = (urllib.parse.unquote(text or "") for text in (parts.username, parts.password))
    return Proxy(parts.hostname, port, user, password)


def _exempt(host: str, exempt: str) -> bool:
    """Whether NO_PROXY names the host: `*`, itself, a domain that it lies in, or with a dot before it only those in it.

    As httpx reads it (`httpx._utils.get_environment_proxies`); networks such as 10.0.0.0/8 it does not know.
    """
    host = host.strip("[]").lower()
    names = [name.strip().strip("[]").lower() for name in exempt.split(",") if name.strip()]
    return "*" in names or any(host == name or host.endswith(f".{name.removeprefix('.')}") for name in names)
