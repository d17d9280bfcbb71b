"""A TCP proxy that breaks connections in the ways in which networks do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Coroutine
from typing import Any, Self

_LINGER_NOT = struct.pack("ii", 1, 0)


class _Link:
    """One client's connection and its way on.

    Attributes:
        swallows: What arrives is thrown away: the other side is gone, and nobody was told.
    """

    def __init__(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.client, self.server = client, server
        self.swallows = False
        self.answered = 0

    def reset(self) -> None:
        """A reset to both sides."""
        _reset(self.client[1])
        _reset(self.server[1])


class TcpProxy:
    """A context manager; forwards until told otherwise. Its methods may be called by any thread.

    Args:
        host, port: Where to forward to; need not listen all the time.

    Attributes:
        port: Where it listens, on the loopback address.
    """

    def __init__(self, host: str, port: int) -> None:
        self.port = 0
        self._target = (host, port)
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._silent_until = 0.0
        self._refusing_until = 0.0
        self._cutting_until = 0.0
        self._cut_after = 0
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def reset(self) -> None:
        """Reset every connection."""
        self._call(self._each(_Link.reset))

    def go_silent(self, seconds: float) -> None:
        """A black hole: nothing gets through for so long, and nobody is told."""
        self._silent_until = time.monotonic() + seconds

    def refuse(self, seconds: float) -> None:
        """Reset what there is, and every new connection for so long."""
        self._refusing_until = time.monotonic() + seconds
        self.reset()

    def half_open(self, *, server_knows: bool) -> None:
        """Every connection ends for one side only; the other goes on talking to nobody."""

        def halve(link: _Link) -> None:
            link.swallows = True
            _reset(link.server[1] if server_knows else link.client[1])

        self._call(self._each(halve))

    def cut_answers(self, after: int, seconds: float) -> None:
        """For so long, reset a connection once `after` bytes of the server's answer are through."""
        self._cut_after = after
        self._cutting_until = time.monotonic() + seconds

    def calm(self) -> None:
        """Forward everything again."""
        self._silent_until = self._refusing_until = self._cutting_until = 0.0

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _each(self, act: Any) -> None:
        for link in tuple(self._links):
            act(link)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server:
            self._server.close()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._forward(reader, writer)
        except (OSError, asyncio.CancelledError):
            _reset(writer)
        finally:
            self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if time.monotonic() < self._refusing_until:
            _reset(writer)
            return
        link = _Link((reader, writer), await asyncio.open_connection(*self._target))
        self._links.add(link)
        try:
            await asyncio.gather(
                self._pump(link, link.client[0], link.server[1]),
                self._pump(link, link.server[0], link.client[1], is_answer=True),
            )
        finally:
            self._links.discard(link)
            link.reset()

    async def _pump(
        self,
        link: _Link,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        *,
        is_answer: bool = False,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                while time.monotonic() < self._silent_until:
                    await asyncio.sleep(0.05)
                if link.swallows:
                    continue
                if is_answer and time.monotonic() < self._cutting_until:
                    data = data[: max(0, self._cut_after - link.answered)]
                    link.answered += len(data)
                    sink.write(data)
                    if link.answered >= self._cut_after:
                        await asyncio.sleep(0.02)  # so that what was written arrives before that
                        link.reset()
                        return
                    continue
                sink.write(data)
                await sink.drain()
        if not link.swallows:
            sink.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    opened = writer.get_extra_info("socket")
    if opened is not None and not writer.transport.is_closing():
        with contextlib.suppress(OSError):
            # A linger time of nought turns the close into a reset.
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    writer.transport.abort()
