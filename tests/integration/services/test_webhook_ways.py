"""Backends under a path, with a private authority's certificate, and behind a proxy."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sandbox.backend import PROGRESS, Backend
from services.webhooks.webhook_service import EndingOutcome, ProgressAnswer
from tests.integration.services.webhook_setup import ENDING, REPORT, service
from utils.errors import ConfigurationError


class Relay:
    """A listener that forwards its connections to the address that `begin` returns."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def begin(self, client: socket.socket) -> tuple[socket.socket, socket.socket]:
        raise NotImplementedError

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            ours, theirs = map(opened.enter_context, self.begin(client))
            while True:
                ready, _, _ = select.select([ours, theirs], [], [], 5.0)
                for one, other in ((ours, theirs), (theirs, ours)):
                    if one in ready:
                        data = one.recv(65536)
                        if not data:
                            return
                        other.sendall(data)


class TlsFront(Relay):
    """TLS in front of a backend, with a certificate of an unknown authority."""

    def __init__(self, backend_port: int, folder: Path) -> None:
        self.ca_file, certificate, key = _certificates(folder)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._backend_port = backend_port
        super().__init__()

    def begin(self, client: socket.socket) -> tuple[socket.socket, socket.socket]:
        there = socket.create_connection(("127.0.0.1", self._backend_port))
        try:
            return self._context.wrap_socket(client, server_side=True), there
        except OSError:
            there.close()
            raise


class Proxy(Relay):
    """An HTTP proxy with CONNECT, which resolves every name itself."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self.asked: list[str] = []
        super().__init__()

    def begin(self, client: socket.socket) -> tuple[socket.socket, socket.socket]:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(1024)
        self.asked.append(head.split(b"\r\n")[0].decode())
        there = socket.create_connection(("127.0.0.1", self._target_port))
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        return client, there


def _certificates(folder: Path) -> tuple[Path, Path, Path]:
    """An authority's certificate, and one for 127.0.0.1 and backend.internal with its key."""
    now = datetime.datetime.now(datetime.UTC)
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def build(name: str, issuer: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )

    authority = (
        build("private authority", "private authority", authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(True, False, False, False, False, True, True, False, False), critical=True
        )
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    names: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.DNSName("backend.internal"),
    ]
    certificate = (
        build("backend", "private authority", key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    files = folder / "ca.pem", folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[2].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


@pytest.fixture(name="front")
def _front(backend: Backend, tmp_path: Path) -> Iterator[TlsFront]:
    front = TlsFront(int(backend.url.rsplit(":", 1)[1]), tmp_path)
    yield front
    front.close()


@pytest.fixture(name="proxy")
def _proxy(front: TlsFront) -> Iterator[Proxy]:
    proxy = Proxy(front.port)
    yield proxy
    proxy.close()


def test_a_backend_with_a_private_authoritys_certificate_is_reached_by_its_ca_file(
    backend: Backend, front: TlsFront
) -> None:
    url = f"https://127.0.0.1:{front.port}"
    without = service(url)
    answer = without.send_ending(url, ENDING)
    assert answer.outcome is EndingOutcome.RETRY
    assert "certificate" in answer.detail.lower()
    assert not backend.requests
    known = service(url, ca_file=front.ca_file)
    assert known.send_ending(url, ENDING).outcome is EndingOutcome.DELIVERED
    assert known.send_progress(url, REPORT) is ProgressAnswer.DONE


def test_the_ca_file_and_the_proxy_of_the_environment_change_nothing(
    backend: Backend, front: TlsFront, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(front.ca_file))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    url = f"https://127.0.0.1:{front.port}"
    assert service(url).send_ending(url, ENDING).outcome is EndingOutcome.RETRY
    assert not backend.requests
    assert not proxy.connections


def test_a_backend_behind_a_proxy_is_reached_by_its_address(
    backend: Backend, front: TlsFront, proxy: Proxy
) -> None:
    url = "https://backend.internal:8443"
    webhooks = service(
        url, ca_file=front.ca_file, proxy=f"http://user:secret@127.0.0.1:{proxy.port}"
    )
    assert webhooks.send_ending(url, ENDING).outcome is EndingOutcome.DELIVERED
    assert [asked.rpartition(" ")[0] for asked in proxy.asked] == ["CONNECT backend.internal:8443"]
    assert len(backend.endings("t")) == 1


def test_a_backend_on_this_machine_is_reached_without_the_proxy(
    backend: Backend, proxy: Proxy
) -> None:
    webhooks = service(backend.url, proxy=f"http://127.0.0.1:{proxy.port}")
    assert webhooks.send_progress(backend.url, REPORT) is ProgressAnswer.DONE
    assert not proxy.connections


def test_a_certificate_for_another_name_is_refused_also_with_the_ca_file(
    backend: Backend, front: TlsFront, proxy: Proxy
) -> None:
    url = "https://other.internal:8443"
    webhooks = service(url, ca_file=front.ca_file, proxy=f"http://127.0.0.1:{proxy.port}")
    assert webhooks.send_ending(url, ENDING).outcome is EndingOutcome.RETRY
    assert not backend.requests


def test_a_file_without_certificates_is_refused_by_the_settings_name(tmp_path: Path) -> None:
    empty = tmp_path / "ca.pem"
    empty.write_text("no certificate")
    for file in (empty, tmp_path / "missing.pem"):
        with pytest.raises(ConfigurationError, match="WEBHOOK_CA_FILE"):
            service("https://a.com", ca_file=file)


# ---- a path in the address ----------------------------------------------------------------------


def test_the_path_of_the_backends_address_is_in_front_of_every_route(backend: Backend) -> None:
    webhooks = service(f"{backend.url}/prod/")
    webhooks.send_progress(backend.url, REPORT)
    webhooks.send_ending(backend.url, ENDING)
    paths = [request.path for request in (*backend.requests, *backend.rejected)]
    assert paths and all(path.startswith("/prod/api/webhooks/training/") for path in paths)


def test_a_message_that_names_a_configured_origin_gets_that_entrys_path() -> None:
    webhooks = service(
        "https://api.default.com/prod",
        allowed_origins=("https://staging.default.com/v2/", "https://plain.default.com"),
    )
    assert {
        requested: webhooks.origin_for(requested)
        for requested in (
            "https://api.default.com/other/path?x=1",
            "https://staging.default.com",
            "https://plain.default.com/v2/api",
            "https://elsewhere.com",
        )
    } == {
        "https://api.default.com/other/path?x=1": "https://api.default.com/prod",
        "https://staging.default.com": "https://staging.default.com/v2",
        "https://plain.default.com/v2/api": "https://plain.default.com",
        "https://elsewhere.com": "https://api.default.com/prod",
    }


def test_an_empty_report_can_be_sent_without_the_path(backend: Backend) -> None:
    webhooks = service(f"{backend.url}/prod")
    reply, _ = webhooks.knock(backend.url, with_path=False)
    assert reply.status == 400  # the backend's own refusal: the route is there
    reply, _ = webhooks.knock(backend.url)
    assert reply.status == 404
    assert PROGRESS in {request.path for request in (*backend.requests, *backend.rejected)}


@pytest.mark.parametrize(
    "address",
    [
        "https://a.com/?x=1",
        "https://a.com/p?",
        "https://a.com/p#f",
        "https://a.com/../p",
        "https://a.com/./p",
        "https://a.com//p",
        "https://a.com/p q",
        "https://a.com/p\\q",
    ],
)
def test_an_address_with_an_ending_that_would_be_dropped_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="must"):
        service(address)


def test_one_origin_with_two_paths_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="one origin with two paths"):
        service("https://a.com/one", allowed_origins=("https://a.com/two",))
