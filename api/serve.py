"""Serves the application with uvicorn until a signal stops it."""

from __future__ import annotations

import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from api.services import Services

GRACE_SECONDS = 5


class ApiServer(uvicorn.Server):
    """A server that ends the open streams before it waits for the last answers.

    Args:
        app: The application.
        host, port: Its address.
        grace_seconds: The longest wait for answers at the end.
    """

    def __init__(
        self, app: FastAPI, host: str, port: int, *, grace_seconds: int = GRACE_SECONDS
    ) -> None:
        self._services: Services = app.state.services
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=grace_seconds,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams: their clients come back with the id of their last event. Then stop."""
        self._services.hub.stop()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at a signal, and at once at a second Ctrl-C.

        uvicorn's method would raise the signal again in the end: a regular end has exit code 0.
        """
        del frame
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    ApiServer(app, host, port).run()
