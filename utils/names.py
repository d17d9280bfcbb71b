"""Names of files and images for people: always valid Unicode, on one line."""

from __future__ import annotations

import re

# Parts of a query that may carry a signature or a key.
_SIGNED = re.compile(r"\?(?=.*(?:signature|credential|token|x-amz-|x-goog-|awsaccesskeyid))", re.I)


def printable(text: str) -> str:
    """The text with an escape sequence in place of each byte or character that is not text.

    Names from the operating system may hold bytes that are not UTF-8, which Python keeps as
    surrogates; JSON may spell surrogates, too. Neither can be written to a file or a socket.
    """
    if text.isprintable():
        return text
    try:
        whole = text.encode("utf-8", "surrogateescape")  # the bytes of a file's name
    except UnicodeEncodeError:
        whole = text.encode("utf-8", "backslashreplace")
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in whole.decode("utf-8", "backslashreplace")
    )


def shown_name(source: str) -> str:
    """The last part of an image's address, printable and without a query that may be signed."""
    is_url = source.lower().startswith(("http://", "https://"))
    bare = source.partition("?")[0] if is_url else _SIGNED.split(source, maxsplit=1)[0]
    return printable(bare.rstrip("/").rpartition("/")[2])


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
