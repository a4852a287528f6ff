"""An HTTP proxy as a hospital has one: it knows CONNECT alone, opens tunnels, and counts them."""

import asyncio
import base64
import contextlib
import threading
from collections.abc import Iterator

READ_BYTES = 1 << 16


class Proxy:
    """Serves on a free port of the loopback, in a thread. `asked` is what CONNECTs named, `refused` what was kept out.

    With `user` and `password` it asks for them (RFC 7617).
    """

    def __init__(self, user: str = "", password: str = "") -> None:
        words = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._wanted = f"Basic {words}" if user else ""
        self._login = f"{user}:{password}@" if user else ""
        self.asked: list[str] = []
        self.refused: list[str] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://{self._login}127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def up(self) -> Iterator["Proxy"]:
        """Serve until the end of the block; open tunnels are cut then."""
        opened = threading.Event()
        loops: list[asyncio.AbstractEventLoop] = []
        over = asyncio.Event()

        async def serve() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            loops.append(asyncio.get_running_loop())
            opened.set()
            await over.wait()
            server.close()

        thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        thread.start()
        assert opened.wait(10)
        try:
            yield self
        finally:
            loops[0].call_soon_threadsafe(over.set)
            thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with (
            contextlib.closing(writer),
            contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError),
        ):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, target, _ = head[0].split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            if method != "CONNECT":
                self.refused.append(f"{method} {target}")
                writer.write(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n")
                return
            if self._wanted and headers.get("proxy-authorization", "") != self._wanted:
                self.refused.append(f"{method} {target}")
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                return
            self.asked.append(target)
            host, _, port = target.rpartition(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            with contextlib.closing(far_writer):
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                ways = (_pipe(reader, far_writer), _pipe(far_reader, writer))
                tasks = [asyncio.create_task(way) for way in ways]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(READ_BYTES):
            writer.write(data)
            await writer.drain()
