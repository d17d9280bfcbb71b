"""Headers of a signed request (Standard Webhooks), for every webhook that this product sends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

import standardwebhooks


def signed_headers(
    signers: Sequence[standardwebhooks.Webhook], webhook_id: str, text: str
) -> dict[str, str]:
    """The headers of one attempt, with the time of now.

    Args:
        signers: Each of them signs, because secrets rotate.
        webhook_id: The same for each attempt.
        text: The body, in ASCII.
    """
    now = datetime.now(UTC)
    return {
        "Content-Type": "application/json",
        "User-Agent": "training-server",
        # Nothing is decompressed, so the read bytes are those that were sent.
        "Accept-Encoding": "identity",
        "Connection": "close",
        "webhook-id": webhook_id,
        "webhook-timestamp": str(math.floor(now.timestamp())),
        "webhook-signature": " ".join(each.sign(webhook_id, now, text) for each in signers),
    }
