"""Verifies webhooks that come in: the bearer token and the signature (docs/protocol.md, section 3).

The other side of `webhook_service`: the API server receives what workers send.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence

from standardwebhooks import Webhook, WebhookVerificationError

SOURCE = "training-server"


class Unverified(Exception):
    """A request that is not from one of our workers.

    Attributes:
        status: HTTP status of the answer: 401 for the token, 400 for the signature.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class WebhookVerifier:
    """Verifies requests of workers.

    Args:
        token: The bearer token.
        secrets: Signing secrets, `whsec_…`; a signature by any of them is accepted, because keys
            rotate.
    """

    def __init__(self, token: str, secrets: Sequence[str]) -> None:
        self._token = token.encode()
        self._webhooks = [Webhook(secret) for secret in secrets]

    def verify(self, headers: Mapping[str, str], body: bytes) -> None:
        """Check one request.

        Args:
            headers: Its headers, names in lower case.
            body: Its body, as it came.

        Raises:
            Unverified: The token, the source or the signature is wrong, or the time-stamp differs
                from this machine's clock by more than five minutes.
        """
        given = headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, b"Bearer " + self._token):
            raise Unverified(401, "The bearer token is not INTERNAL_API_TOKEN.")
        if headers.get("x-request-source") != SOURCE:
            raise Unverified(400, f"The header X-Request-Source must be {SOURCE}.")
        problem = ""
        for webhook in self._webhooks:
            try:
                webhook.verify(body, dict(headers), json_parse=False)
                return
            except (WebhookVerificationError, ValueError) as error:
                problem = str(error)
        raise Unverified(400, f"The signature does not verify: {problem}")
