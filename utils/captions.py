"""A caption that lies beside a picture: the same text, whether on S3 or in a folder."""

from __future__ import annotations

MAX_CAPTION_BYTES = 16 * 1024
"""A larger file is no caption, and is not read."""


def caption_text(content: bytes) -> str:
    """A caption file's text on one line, without a byte-order mark; "" where it says nothing."""
    text = content.decode("utf-8-sig", errors="replace").replace("\0", " ")
    return " ".join(text.split())
