"""Serves the application with uvicorn until a signal stops it."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI

GRACE_SECONDS = 5


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
