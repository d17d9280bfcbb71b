"""One HTTP request that ends by its deadline in every case, with an answer or a sentence.

The only module that imports requests. No error of the network is raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import socket
import ssl
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from services.webhooks.answers import Reply
from utils.errors import ConfigurationError

_MAX_ANSWER_BYTES = 64 * 1024

# Requests that cannot be made at all.
_HOPELESS = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
    requests.exceptions.InvalidHeader,
    requests.exceptions.URLRequired,
    requests.exceptions.InvalidJSONError,
)
# Errors of requests, of the layers below it, and of a socket.
_FOREIGN = (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """The certificates and the proxy of requests.

    Attributes:
        only_public: Refuse to send to private addresses, such as those of this machine's network.
            With a proxy, the proxy decides.
    """

    context: ssl.SSLContext
    proxy: str | None
    only_public: bool = False

    def proxies_for(self, url: str) -> dict[str, str]:
        """The proxy of a request in the form of `requests`; none for this machine."""
        if self.proxy is None or urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1"):
            return {}
        return {"http": self.proxy, "https": self.proxy}


def certificates(ca_file: Path | None) -> ssl.SSLContext:
    """The usual certificate authorities, and those of a file."""
    context = ssl.create_default_context(cafile=DEFAULT_CA_BUNDLE_PATH)
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"WEBHOOK_CA_FILE: {ca_file} has no readable PEM certificates ({error}). "
                "Set it to a PEM file, or unset it."
            ) from None
    return context


class Exchange:
    """One request in a separate thread, which ends by its deadline in every case.

    The time-outs of `requests` are for the next byte, so a backend that sends one now and then
    would hold its caller forever. Here the caller waits until the deadline, takes the part of the
    answer that has arrived, and shuts the socket down, which ends the thread as well.
    """

    def __init__(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        timeout: float,
        way: Way,
    ) -> None:
        self._way = way
        self._method = method
        self._url = url
        self._headers = dict(headers)
        self._body = body
        self._timeout = timeout
        self._lock = threading.Lock()
        self._reply = Reply(problem=f"no answer within {timeout:g} seconds")
        self._socket: socket.socket | None = None
        self._over = False

    def reply(self) -> Reply:
        """Make the request, and return the part of the answer that arrived in time."""
        thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        thread.start()
        thread.join(self._timeout)
        with self._lock:
            self._over = True
            if self._socket and thread.is_alive():
                _shut_down(self._socket)
            return self._reply

    def connected(self, opened: socket.socket) -> None:
        """Called in the thread when its connection is open, before anything is sent.

        The address of the open connection is checked: a name may have another one each time.
        """
        if self._way.only_public and not self._way.proxies_for(self._url):
            _require_public(opened)
        with self._lock:
            self._socket = opened
            if self._over:
                _shut_down(opened)

    def _run(self) -> None:
        adapter = _ReportingAdapter(self, self._way.context)
        try:
            # An adapter without a session: a session prepares redirects, keeps cookies, and reads
            # proxies and .netrc from the environment.
            request = requests.Request(
                self._method, self._url, headers=self._headers, data=self._body
            ).prepare()
            response = adapter.send(
                request,
                stream=True,
                timeout=self._timeout,
                proxies=self._way.proxies_for(self._url),
            )
            head = {name.lower(): value for name, value in response.headers.items()}
            self._set(Reply(response.status_code, head))
            body = response.raw.read(_MAX_ANSWER_BYTES, decode_content=False)
            self._set(Reply(response.status_code, head, body))
        except _FOREIGN as error:
            problem = _innermost(error)
            hopeless = isinstance(error, _HOPELESS)
            self._set(dataclasses.replace(self._reply, problem=problem, hopeless=hopeless))
        finally:
            adapter.close()

    def _set(self, reply: Reply) -> None:
        with self._lock:
            if not self._over:
                self._reply = reply


def _innermost(error: BaseException) -> str:
    """The first cause: "connection refused" and not the three errors wrapped around it."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {error}"


class _ReportingAdapter(HTTPAdapter):
    """The adapter of `requests`, which also reports its connection's socket when it is open."""

    def __init__(self, exchange: Exchange, context: ssl.SSLContext) -> None:
        self._exchange = exchange
        self._context = context
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """The pool of `requests`, with our certificate authorities."""
        super().init_poolmanager(*args, **kwargs, ssl_context=self._context)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """The pool of `requests` for a proxy, with our certificate authorities."""
        return super().proxy_manager_for(proxy, **kwargs, ssl_context=self._context)

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        """The pool for a request; each of its connections reports."""
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = _reporting(pool.ConnectionCls, self._exchange)
        return pool


def _reporting(connection_class: Any, exchange: Exchange) -> type[Any]:
    """A class of urllib3's connections that report their socket when it is open."""

    class Reporting(connection_class):  # type: ignore[misc]  # a class of the library's choice
        """The connection."""

        def connect(self) -> None:
            """urllib3's hook."""
            super().connect()
            exchange.connected(self.sock)

    return Reporting


def _shut_down(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side may have closed it
        opened.shutdown(socket.SHUT_RDWR)


def _require_public(opened: socket.socket) -> None:
    address = ipaddress.ip_address(str(opened.getpeername()[0]).partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if not address.is_global or address.is_multicast:
        raise PermissionError("the host has a private address, which is not allowed")
