"""Two spellings of one origin are equal, and different origins are not."""

from __future__ import annotations

import pytest

from utils.urls import origin_of, shown


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://api.example.com", "https://api.example.com"),
        ("HTTPS://API.Example.com:443/a?b#c", "https://api.example.com"),
        (" https://api.example.com\n", "https://api.example.com"),
        ("http://localhost:80/", "http://localhost"),
        ("http://localhost:443/", "http://localhost:443"),
        ("http://backend_api:8000", "http://backend_api:8000"),
        ("http://[::0001]:8000/x", "http://[::1]:8000"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("https://BÜCHER.example", "https://xn--bcher-kva.example"),
        ("https://api.example.com/a@b", "https://api.example.com"),
    ],
)
def test_an_origin_is_scheme_host_and_port(url: str, origin: str) -> None:
    assert origin_of(url) == origin
    assert origin_of(origin) == origin


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.example.com",
        "//api.example.com",
        "ftp://api.example.com",
        "https://",
        "https:///path",
        "https:api.example.com",
        "https://:443",
        "https://user:secret@api.example.com",
        "https://@api.example.com",
        "https://good.example\\@evil.example",
        "https://good.example\t.evil.example",
        "https://good.example%2eevil.example",
        "https://a..b",
        "https://good.example.",
        "https://api.example.com:99999",
        "https://api.example.com:secret",
        "https://[::1",
        "https://[fe80::1%25eth0]",
        "https://" + "a" * 64 + ".example",
    ],
)
def test_an_address_that_is_not_clearly_one_web_origin_is_refused(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        origin_of(url)
    assert "secret" not in str(caught.value)


def test_a_log_line_shows_only_scheme_host_and_port() -> None:
    assert (
        shown("https://user:secret@api.example.com/path?token=secret") == "https://api.example.com"
    )
    assert shown("https://[::1") == "an address that cannot be read"
    assert shown("http://10.0.0.5:8443/api?token=secret") == "http://10.0.0.5:8443"
    assert shown("http://[::1]:8000/x") == "http://[::1]:8000"
    assert len(shown("https://" + "a" * 1000)) == 108
