"""The stand-in backend as a program: `python -m sandbox.backend_server [HOST] [PORT]`.

It checks token and signature by the contract, and prints a line for each request. The token and the
secret are those of the environment, or else the sandbox's.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from sandbox.backend import SIGNING_SECRET, TOKEN, Backend, ReceivedRequest


def main(arguments: list[str]) -> None:
    """Serve until the process is ended."""
    host = arguments[0] if arguments else "127.0.0.1"
    port = int(arguments[1]) if len(arguments) > 1 else 8000
    backend = Backend(
        token=os.environ.get("INTERNAL_API_TOKEN") or TOKEN,
        secrets=(os.environ.get("WEBHOOK_SIGNING_SECRET") or SIGNING_SECRET).split(","),
        on_request=show,
        host=host,
        port=port,
    )
    with backend:
        print(f"the stand-in backend listens on {host}:{port}", flush=True)
        threading.Event().wait()


def show(request: ReceivedRequest) -> None:
    """Print a line for a request, at once."""
    print(request.method, request.path, request.status, json.dumps(request.body), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
