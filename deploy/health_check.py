"""Asks a worker for one of its pages: `python deploy/health_check.py [ADDRESS] [PAGE]`.

Exit code 0 if the page answers 200, else 1. The page is `health` unless another is named. Without
an address, or with an empty one, it is that of a worker on this machine: `HTTP_HOST` and
`HTTP_PORT` from the environment, else from `.env` in the current folder, as the worker reads them.
It is the image's HEALTHCHECK, where there is no `.env`, so it needs the standard library only.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

SECONDS = 4.0


def main(arguments: list[str]) -> int:
    """Print the page and return the exit code."""
    address = (arguments[0] if arguments and arguments[0] else _here()).rstrip("/")
    page = arguments[1] if len(arguments) > 1 else "health"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}/{page}", timeout=SECONDS) as answer:
            print(answer.read().decode(errors="replace"))
            return 0
    except urllib.error.HTTPError as refusal:
        print(refusal.read().decode(errors="replace"))
    except (OSError, ValueError) as error:
        print(f"{address}/{page}: {error}", file=sys.stderr)
    return 1


def _here() -> str:
    """The address of the worker on this machine."""
    settings = _from_env_file() | {name.upper(): text for name, text in os.environ.items() if text}
    host = settings.get("HTTP_HOST") or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # all interfaces
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.get('HTTP_PORT') or 8080}"


def _from_env_file() -> dict[str, str]:
    try:
        from dotenv import dotenv_values  # pylint: disable=import-outside-toplevel
    except ImportError:
        return {}
    try:
        return {name.upper(): text for name, text in dotenv_values(".env").items() if text}
    except (OSError, ValueError):  # the worker reports the problem
        return {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
