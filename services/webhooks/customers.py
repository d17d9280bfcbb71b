"""Sends signed webhooks to addresses that organisations have named (Standard Webhooks).

The receiver verifies `webhook-signature` with any library of Standard Webhooks, or with OpenAI's
client (`client.webhooks.unwrap`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import standardwebhooks

from services.webhooks.answers import Reply
from services.webhooks.exchange import Exchange, Way, certificates
from services.webhooks.signing import signed_headers


class CustomerWebhooks:
    """Sends webhooks. Safe to share between threads.

    Args:
        only_public: Refuse addresses of private networks.
        timeout: Seconds that one attempt may take in all.
        ca_file: Certificates (PEM) of further authorities.
        proxy: Address of an HTTP proxy.

    Raises:
        ConfigurationError: The file of certificates is malformed.
    """

    def __init__(
        self,
        *,
        only_public: bool,
        timeout: float = 10.0,
        ca_file: Path | None = None,
        proxy: str | None = None,
    ) -> None:
        self.only_public = only_public
        self._way = Way(certificates(ca_file), proxy, only_public)
        self._timeout = timeout

    def send(self, url: str, webhook_id: str, body: bytes, secrets: Sequence[str]) -> Reply:
        """Make one attempt; no error of the network or the receiver is raised.

        Args:
            url: The receiver. Redirects are not followed.
            webhook_id: The same for each attempt.
            body: JSON in ASCII.
            secrets: `whsec_…`; each of them signs.
        """
        signers = [standardwebhooks.Webhook(secret) for secret in secrets]
        headers = signed_headers(signers, webhook_id, body.decode("ascii"))
        return Exchange("POST", url, headers, body, self._timeout, self._way).reply()
