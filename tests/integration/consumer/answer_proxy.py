"""A TCP proxy before RabbitMQ that swallows chosen answers of the broker, and nothing else."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import struct
import threading
from typing import Self

CONFIRM = (60, 80)  # basic.ack: class and method of AMQP 0-9-1
DECLARED = (50, 11)  # queue.declare-ok
CONSUMING = (60, 21)  # basic.consume-ok

_HEADER = struct.Struct(">BHI")  # a frame's type, its channel, its payload's size
_METHOD = 1


class AnswerProxy:
    """A context manager; forwards every frame except those to swallow.

    Heartbeats go on, so neither side notices that a frame is missing.

    Args:
        host, port: The broker.

    Attributes:
        port: The port that it listens on, on the loopback address.
        swallow: Class and method of the frames from the broker that are thrown away.
        swallowed: How many were.
    """

    def __init__(self, host: str, port: int) -> None:
        self.swallow: frozenset[tuple[int, int]] = frozenset()
        self.swallowed = 0
        proxy, target = self, (host, port)

        class Link(socketserver.BaseRequestHandler):
            """One connection through the proxy."""

            def handle(self) -> None:
                with socket.create_connection(target) as broker:
                    back = threading.Thread(
                        target=proxy.answers, args=(broker, self.request), daemon=True
                    )
                    back.start()
                    with contextlib.suppress(OSError):
                        while data := self.request.recv(1 << 16):
                            broker.sendall(data)
                    _end(broker)
                    back.join()

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Link)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answers(self, broker: socket.socket, client: socket.socket) -> None:
        """Forward the broker's frames, except those to swallow."""
        with contextlib.suppress(OSError), broker.makefile("rb") as frames:
            while len(header := frames.read(_HEADER.size)) == _HEADER.size:
                kind, _, size = _HEADER.unpack(header)
                rest = frames.read(size + 1)  # and the frame's end
                if kind == _METHOD and struct.unpack_from(">HH", rest) in self.swallow:
                    self.swallowed += 1
                    continue
                client.sendall(header + rest)
        _end(client)


def _end(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)
