"""How the relay reaches the vault: one call over a Unix socket, bytes in and bytes out. No torch, no records."""

import contextlib
from pathlib import Path

import grpc

from common.errors import ServiceError

__all__ = ["METHOD", "OVERSIZED", "REFUSED", "SERVICE", "call_vault", "tell_refused"]

SERVICE = "coadapt.Vault"
METHOD = "Answer"
REFUSED = "Refused"
OVERSIZED = "Oversized"

# The vault has a limit of its own, from its policy; Flower's pieces and the gate have theirs.
_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


def call_vault(socket: Path, data: bytes, *, timeout: float = 60.0) -> bytes:
    """The answer frame to an order frame; `timeout` in seconds.

    Raises:
        ServiceError: no vault answers there, the order is far larger than it takes, or too many come at once.
    """
    with grpc.insecure_channel(f"unix:{socket.absolute()}", options=_OPTIONS) as channel:
        call = channel.unary_unary(f"/{SERVICE}/{METHOD}")
        try:
            answer: bytes = call(data, timeout=timeout)
        except grpc.RpcError as error:
            code = error.code().name if isinstance(error, grpc.Call) else "UNKNOWN"
            if code == "RESOURCE_EXHAUSTED" and (said := _told_oversized(channel, len(data), timeout)):
                return said
            advice = (
                "the order is larger than limits.message_bytes of its site.toml, or too many come at once"
                if code == "RESOURCE_EXHAUSTED"
                else "start it with `coadapt site start`"
            )
            raise ServiceError(f"the vault at {socket} did not answer ({code}); {advice}") from error
    return answer


def _told_oversized(channel: grpc.Channel, size: int, timeout: float) -> bytes:
    """The vault's signed refusal of an order that it was never given, for its size; empty where that was not why."""
    try:
        answer: bytes = channel.unary_unary(f"/{SERVICE}/{OVERSIZED}")(str(size).encode(), timeout=timeout)
    except grpc.RpcError:
        return b""
    return answer


def tell_refused(socket: Path, digest: str, *, timeout: float = 10.0) -> None:
    """Have the vault note in its audit log that an app bundle with this SHA-256 (hex) was refused.

    Without a vault nothing is noted, and the bundle is refused all the same.
    """
    with grpc.insecure_channel(f"unix:{socket.absolute()}") as channel, contextlib.suppress(grpc.RpcError):
        channel.unary_unary(f"/{SERVICE}/{REFUSED}")(digest.encode(), timeout=timeout)
