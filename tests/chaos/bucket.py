"""A bucket on this machine, moto's S3 server, behind a proxy that delays, answers 500, or hangs up."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

BUCKET = "chaos"
# Any do: moto asks for no right ones.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "chaos", "AWS_SECRET_ACCESS_KEY": "chaos", "AWS_EC2_METADATA_DISABLED": "true"}
_ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")
_SLOW_REQUEST, _SLOW_CHUNK, _CHUNK = 1.0, 0.005, 1 << 16


class Trouble(StrEnum):
    """What the proxy does to requests."""

    NONE = "none"
    SLOW = "slow"
    ERRORS = "errors"
    DROPS = "drops"


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Bucket:
    """An S3 server in a process of its own, and the proxy in a thread of this one.

    Attributes:
        port: of the server itself.
        proxy_port: of the way through the proxy.
        trouble: what the proxy does now.
    """

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.port, self.proxy_port, self.trouble = free_port(), free_port(), Trouble.NONE
        with open(log, "ab") as output:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.bucket", str(self.port)],
                env=environment,
                stdin=subprocess.PIPE,  # it ends with this process, however that ends
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._make_bucket()
        threading.Thread(target=lambda: asyncio.run(self._listen()), daemon=True).start()

    def _make_bucket(self) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{BUCKET}", method="PUT")
        for _ in range(300):
            with suppress(OSError):
                urllib.request.urlopen(request, timeout=10).close()
                return
            time.sleep(0.2)
        raise RuntimeError("moto's server does not answer")

    def close(self) -> None:
        """End the server; what it holds is gone."""
        self._server.kill()
        self._server.wait()

    async def _listen(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.proxy_port)
        async with server:
            await server.serve_forever()

    async def _serve(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        """Pass one connection on."""
        with suppress(OSError):
            server, request = await asyncio.open_connection("127.0.0.1", self.port)
            back = asyncio.create_task(self._answers(server, answer))
            with suppress(OSError):
                await self._requests(client, request, answer)
            request.close()
            with suppress(OSError):
                await back
        answer.transport.abort()

    async def _requests(
        self, client: asyncio.StreamReader, request: asyncio.StreamWriter, answer: asyncio.StreamWriter
    ) -> None:
        while chunk := await client.read(_CHUNK):
            if self.trouble is Trouble.DROPS:
                answer.transport.abort()
                return
            if self.trouble is Trouble.ERRORS:
                answer.write(_ERROR)
                await answer.drain()
                answer.close()
                return
            if self.trouble is Trouble.SLOW:
                await asyncio.sleep(_SLOW_REQUEST if chunk.startswith(_METHODS) else _SLOW_CHUNK)
            request.write(chunk)
            await request.drain()

    async def _answers(self, server: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        while chunk := await server.read(_CHUNK):
            if self.trouble is Trouble.DROPS:
                answer.transport.abort()
                return
            answer.write(chunk)
            await answer.drain()


def _keep(port: int) -> None:
    """Serve until standard input ends."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    _keep(int(sys.argv[1]))
