"""Reads an uploaded form from the network into S3, piece by piece.

Nothing is written to this machine's disk. Bytes are counted and hashed while they come; a file of
more than one piece becomes a multipart upload of S3, which is dropped if the client vanishes.
"""

from __future__ import annotations

import dataclasses
import email.message
import email.utils
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import unquote

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser
from starlette.concurrency import run_in_threadpool

from api.gate.problems import Problem
from jobs.addresses import S3Location
from services.s3.s3_service import S3Service
from services.s3.uploads import Uploads

PIECE_BYTES = 8 * 1024**2
MAX_FIELD_BYTES = 64 * 1024
MAX_PARTS = 1000
MAX_HEADER_BYTES = 16 * 1024
MAX_NAME = 255
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,60}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,120}")


@dataclasses.dataclass(slots=True)
class Received:
    """A file that has arrived on S3.

    Attributes:
        file_id: Its new id.
        filename: The client's name of it: one name without folders.
        content_type: As the client states it.
        size: Bytes.
        sha256: Hash of the bytes, in hexadecimal.
    """

    file_id: str
    filename: str
    content_type: str
    size: int
    sha256: str


class ToS3:
    """Writes one file to S3 while it arrives.

    Args:
        s3: The storage.
        uploads: Its uploads in parts.
        location: The target.
        content_type: The object's type.
        most: The most bytes.
    """

    def __init__(
        self, s3: S3Service, uploads: Uploads, location: S3Location, content_type: str, most: int
    ) -> None:
        self.size = 0
        self._s3 = s3
        self._uploads = uploads
        self._location = location
        self._content_type = content_type
        self._most = most
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._upload_id: str | None = None
        self._parts: list[tuple[int, str]] = []
        self._is_written = False

    @property
    def sha256(self) -> str:
        """Hash of the bytes so far."""
        return self._hash.hexdigest()

    async def write(self, data: bytes) -> None:
        """Take bytes.

        Raises:
            Problem: The file is larger than allowed.
            StorageError: S3 cannot be used.
        """
        self.size += len(data)
        if self.size > self._most:
            raise too_large(self._most)
        self._hash.update(data)
        self._buffer += data
        while len(self._buffer) >= PIECE_BYTES:
            piece = bytes(self._buffer[:PIECE_BYTES])
            del self._buffer[:PIECE_BYTES]
            await run_in_threadpool(self._put, piece)

    async def finish(self) -> None:
        """Have everything on S3. Raises `StorageError`."""
        await run_in_threadpool(self._finish)
        self._is_written = True

    async def drop(self) -> None:
        """Leave nothing on S3."""
        await run_in_threadpool(self._drop)

    def _put(self, piece: bytes) -> None:
        if self._upload_id is None:
            self._upload_id = self._uploads.begin(self._location, self._content_type)
        number = len(self._parts) + 1
        etag = self._uploads.put_part(self._location, self._upload_id, number, piece)
        self._parts.append((number, etag))

    def _finish(self) -> None:
        if self._upload_id is None:
            self._s3.write(self._location, bytes(self._buffer), self._content_type)
            return
        if self._buffer:
            self._put(bytes(self._buffer))
        self._uploads.complete(self._location, self._upload_id, self._parts)

    def _drop(self) -> None:
        if self._is_written:
            self._s3.delete(self._location.bucket, [self._location.key])
        elif self._upload_id is not None:
            self._uploads.abort(self._location, self._upload_id)


def too_large(most: int) -> Problem:
    """The problem of a form with more bytes than allowed."""
    return Problem(
        "too_large",
        f"file: a form may have {most:,} bytes. Upload a larger file in parts, with POST "
        "/v1/uploads.",
        param="file",
    )


class Form:
    """A form with files, read once.

    Args:
        content_type: The request's header.
        open_file: Makes the target of a file: from its name and type.
        most: The most bytes of the whole form.

    Attributes:
        fields: The text fields.
        files: The files that have arrived.
    """

    def __init__(
        self, content_type: str, open_file: Callable[[str, str], tuple[str, ToS3]], most: int
    ) -> None:
        self.fields: dict[str, str] = {}
        self.files: list[Received] = []
        self._open_file = open_file
        self._most = most
        self._size = 0
        self._events: list[tuple[str, bytes]] = []
        self._opened: list[ToS3] = []
        parsed = email.message.Message()
        parsed["content-type"] = content_type
        boundary = parsed.get_param("boundary")
        if parsed.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
            raise Problem(
                "unsupported_media_type",
                "The body must be multipart/form-data with a part named `file`.",
            )
        names = ("part_begin", "header_field", "header_value", "headers_finished", "part_data")
        callbacks: Any = {
            f"on_{name}": self._noter(name) for name in (*names, "part_end", "end", "header_end")
        }
        self._parser = MultipartParser(boundary.encode("utf-8", "replace"), callbacks)
        self._is_complete = False

    def _noter(self, name: str) -> Callable[..., None]:
        def note(data: bytes = b"", start: int = 0, end: int = 0) -> None:
            self._events.append((name, bytes(data[start:end])))

        return note

    async def read(self, chunks: AsyncIterator[bytes]) -> None:
        """Read the whole form.

        Raises:
            Problem: It is not a form, or has a file that is too large; nothing is left on S3.
            StorageError: S3 cannot be used.
        """
        try:
            part = _Part()
            async for chunk in chunks:
                self._size += len(chunk)
                if self._size > self._most:
                    raise too_large(self._most)
                try:
                    self._parser.write(chunk)
                except FormParserError as error:
                    raise Problem(
                        "invalid_parameter", f"The body is not a valid form: {error}."
                    ) from None
                for name, data in self._events:
                    part = await self._handle(part, name, data)
                self._events.clear()
            if not self._is_complete:
                raise Problem("invalid_parameter", "The body ends in the middle of the form.")
        except BaseException:
            await self.drop()
            raise

    async def drop(self) -> None:
        """Leave nothing on S3."""
        for target in self._opened:
            await target.drop()

    async def _handle(self, part: _Part, name: str, data: bytes) -> _Part:
        match name:
            case "part_begin":
                return _Part()
            case "header_field":
                part.field += data
            case "header_value":
                part.value += data
            case "header_end":
                part.end_header()
            case "headers_finished":
                self._begin(part)
            case "part_data":
                await self._data(part, data)
            case "part_end":
                await self._end(part)
            case "end":
                self._is_complete = True
        if len(part.field) + len(part.value) > MAX_HEADER_BYTES:
            raise Problem("invalid_parameter", "A part of the form has too long a header.")
        return part

    def _begin(self, part: _Part) -> None:
        part.read_headers()
        if part.filename is None:
            return
        if len(self._opened) >= MAX_PARTS:
            raise Problem("too_large", f"A form may have {MAX_PARTS} files. Send several forms.")
        part.file_id, part.target = self._open_file(part.filename, part.content_type)
        self._opened.append(part.target)

    async def _data(self, part: _Part, data: bytes) -> None:
        if part.target is not None:
            await part.target.write(data)
            return
        part.text += data
        if len(part.text) > MAX_FIELD_BYTES:
            raise Problem("too_large", f"{part.name}: a field may have {MAX_FIELD_BYTES:,} bytes.")

    async def _end(self, part: _Part) -> None:
        if part.target is None:
            self.fields[part.name] = part.text.decode("utf-8", "replace")
            return
        await part.target.finish()
        self.files.append(
            Received(
                part.file_id,
                part.filename or "file",
                part.content_type,
                part.target.size,
                part.target.sha256,
            )
        )


class _Part:
    """One part of a form while it arrives."""

    def __init__(self) -> None:
        self.field = b""
        self.value = b""
        self.headers: dict[str, str] = {}
        self.name = ""
        self.filename: str | None = None
        self.content_type = "application/octet-stream"
        self.text = b""
        self.file_id = ""
        self.target: ToS3 | None = None

    def end_header(self) -> None:
        """A header is complete."""
        name = self.field.decode("latin-1").lower()
        self.headers[name] = self.value.decode("utf-8", "surrogateescape")
        self.field = self.value = b""

    def read_headers(self) -> None:
        """All headers are complete."""
        parameters = _parameters(self.headers.get("content-disposition", ""))
        self.name = parameters.get("name", "")
        given = parameters.get("filename*")
        name = _extended(given) if given is not None else None
        if name is None and "filename" in parameters:
            # Browsers and httpx escape a quote and line breaks, and nothing else.
            name = parameters["filename"]
            for escaped, letter in (("%22", '"'), ("%0D", " "), ("%0A", " ")):
                name = name.replace(escaped, letter)
        if name is not None:
            self.filename = plain_name(name)
        kind = self.headers.get("content-type", "").partition(";")[0].strip()
        if _TYPE.fullmatch(kind):
            self.content_type = kind


_PARAMETER = re.compile(r';\s*([A-Za-z0-9_*-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;]*)')


def _parameters(header: str) -> dict[str, str]:
    """The parameters of a Content-Disposition header."""
    found: dict[str, str] = {}
    for name, value in _PARAMETER.findall(header):
        text = value.strip()
        if text.startswith('"'):
            # Only a quote is escaped: old browsers send Windows paths with plain backslashes.
            text = text[1:-1].replace('\\"', '"')
        found[name.lower()] = text
    return found


def _extended(value: str) -> str | None:
    """The text of an RFC 8187 value, such as `utf-8''%ED%8C%8C`; None if it is not one."""
    charset, quote, rest = value.partition("'")
    if not quote or charset.lower() not in ("utf-8", "iso-8859-1"):
        return None
    return unquote(rest.partition("'")[2], encoding=charset, errors="replace")


def plain_name(name: str) -> str:
    """A client's file name as one name: without folders, control characters and half letters."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    text = re.split(r"[/\\]", text)[-1]
    text = _CONTROL.sub(" ", text).strip()[:MAX_NAME]
    return text if text not in ("", ".", "..") else "file"
