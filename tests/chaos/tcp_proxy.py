"""A TCP proxy that breaks connections in the ways in which networks do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Self

_LINGER_NOT = struct.pack("ii", 1, 0)
_METHOD = 1
_BASIC_ACK = struct.pack(">HH", 60, 80)
Struck = Callable[[int], None]


def _nothing(_times: int) -> None:
    """Count nothing."""


class Frames:
    """The frames that an AMQP 0-9-1 server sends on one connection."""

    def __init__(self) -> None:
        self._rest = b""

    def passed(self, data: bytes, *, without_confirms: bool) -> tuple[bytes, int]:
        """The bytes to forward of those that arrived, in whole frames.

        A `basic.ack` from a server is always a publisher confirm.

        Returns:
            The bytes, and how many confirms were left out.
        """
        self._rest += data
        forwarded, lost = [], 0
        while len(self._rest) >= 7:
            kind, _, size = struct.unpack(">BHI", self._rest[:7])
            if len(self._rest) < size + 8:
                break
            frame, self._rest = self._rest[: size + 8], self._rest[size + 8 :]
            if without_confirms and kind == _METHOD and frame[7:11] == _BASIC_ACK:
                lost += 1
                continue
            forwarded.append(frame)
        return b"".join(forwarded), lost


class _Link:
    """One client's connection and its connection to the server.

    Attributes:
        swallows: Arriving bytes are dropped: the other side is gone without a notice.
        frames: Reads what an AMQP server sends.
    """

    def __init__(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.client, self.server = client, server
        self.frames = Frames()
        self.swallows = False
        self.answered = 0

    def reset(self) -> None:
        """A reset to both sides."""
        _reset(self.client[1])
        _reset(self.server[1])


class TcpProxy:
    """A context manager; forwards until a fault is set. Any thread may call its methods.

    Args:
        host, port: The address to forward to; it need not listen all the time.
        amqp: The server speaks AMQP, so that its confirms can be withheld.

    Attributes:
        port: The port that it listens on, on the loopback address.

    Each fault takes `struck`, which is called with the number of connections, answers or frames
    that it hit, each time it hits some.
    """

    def __init__(self, host: str, port: int, *, amqp: bool = False) -> None:
        self.port = 0
        self._amqp = amqp
        self._strikes: Callable[[int], None] = lambda times: None
        self._losing_until = 0.0
        self._target = (host, port)
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._silent_until = 0.0
        self._refusing_until = 0.0
        self._slow_until = 0.0
        self._delay = 0.0
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

    @property
    def links(self) -> int:
        """How many connections there are."""
        return len(self._links)

    def reset(self, struck: Struck = _nothing) -> None:
        """Reset every connection."""
        struck(len(self._links))
        self._call(self._each(_Link.reset))

    def go_silent(self, seconds: float, struck: Struck = _nothing) -> None:
        """A black hole: nothing gets through for this time, and no side gets a notice."""
        self._strikes = struck
        self._silent_until = time.monotonic() + seconds

    def slow(self, delay: float, seconds: float, struck: Struck = _nothing) -> None:
        """For so long, each answer of the server is late."""
        self._strikes = struck
        self._delay = delay
        self._slow_until = time.monotonic() + seconds

    def refuse(self, seconds: float, struck: Struck = _nothing) -> None:
        """Reset what there is, and every new connection for so long."""
        self._strikes = struck
        self._refusing_until = time.monotonic() + seconds
        self.reset(struck)

    def half_open(self, *, server_knows: bool, struck: Struck = _nothing) -> None:
        """Every connection ends for only one side; the other goes on sending."""

        def halve(link: _Link) -> None:
            link.swallows = True
            _reset(link.server[1] if server_knows else link.client[1])

        struck(len(self._links))
        self._call(self._each(halve))

    def cut_answers(self, after: int, seconds: float, struck: Struck = _nothing) -> None:
        """For so long, reset a connection once `after` bytes of the server's answer are through."""
        self._strikes = struck
        self._cut_after = after
        self._cutting_until = time.monotonic() + seconds

    def lose_confirms(self, seconds: float, struck: Struck = _nothing) -> None:
        """For this time, the broker's confirms do not arrive."""
        self._strikes = struck
        self._losing_until = time.monotonic() + seconds

    def calm(self) -> None:
        """Forward everything again."""
        self._silent_until = self._refusing_until = self._cutting_until = 0.0
        self._losing_until = self._slow_until = 0.0

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
            self._strikes(1)
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
                if time.monotonic() < self._silent_until:
                    self._strikes(1)
                while time.monotonic() < self._silent_until:
                    await asyncio.sleep(0.05)
                if is_answer and time.monotonic() < self._slow_until:
                    self._strikes(1)
                    await asyncio.sleep(self._delay)
                if link.swallows:
                    continue
                if is_answer and self._amqp:
                    loses = time.monotonic() < self._losing_until
                    data, lost = link.frames.passed(data, without_confirms=loses)
                    if lost:
                        self._strikes(lost)
                if is_answer and time.monotonic() < self._cutting_until:
                    data = data[: max(0, self._cut_after - link.answered)]
                    link.answered += len(data)
                    sink.write(data)
                    if link.answered >= self._cut_after:
                        self._strikes(1)
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
            # A linger time of zero turns the close into a reset.
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    writer.transport.abort()
