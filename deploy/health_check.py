"""Asks a worker how it is: `python deploy/health_check.py [ADDRESS] [PAGE]`.

Exit code 0 where the page answers 200, else 1. The page is `health` unless another is named; the
address that of a worker on this machine, at `HTTP_PORT`. Standard library alone: it is the image's
HEALTHCHECK.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

SECONDS = 4.0


def main(arguments: list[str]) -> int:
    """Print what the page says; the exit code."""
    here = f"http://127.0.0.1:{os.environ.get('HTTP_PORT') or 8080}"
    address = (arguments[0] if arguments else here).rstrip("/")
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
