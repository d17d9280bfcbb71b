"""A private S3 server: moto in a separate process, on a free port of this machine.

moto checks an `If-Match` and then writes, without a lock. So two writers can both win, and a
listing fails if an object is deleted meanwhile. Here requests that change or list something run one
at a time, so that a race has one winner, as on S3.

moto also ignores `x-amz-copy-source-if-match`; here a copy of another version is refused, as on S3.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote

import boto3
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

REGION = "us-east-1"
ACCESS_KEY_ID = "sandbox"
SECRET_ACCESS_KEY = "sandbox-secret-key"

_Environ = dict[str, Any]
_Application = Callable[[_Environ, Callable[..., Any]], Iterable[bytes]]


class S3Server:
    """A context manager: the server runs during the block, and its data are lost afterwards.

    Attributes:
        endpoint: Its address, `http://127.0.0.1:port`.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self._process: subprocess.Popen[str] | None = None
        self._client: S3Client | None = None

    def __enter__(self) -> Self:
        # The child ends when its standard input closes, so it cannot outlive this process.
        self._process = subprocess.Popen(  # pylint: disable=consider-using-with
            [sys.executable, "-m", "sandbox.s3_server"],
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C goes to the parent, which ends the server
        )
        assert self._process.stdout
        self.endpoint = self._process.stdout.readline().strip()
        if not self.endpoint:
            self.__exit__()
            raise RuntimeError("the S3 server did not start; its output is above")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def client(self) -> S3Client:
        """The boto3 client of this server, which threads may share."""
        self._client = self._client or boto3.session.Session().client(
            "s3",
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY_ID,
            aws_secret_access_key=SECRET_ACCESS_KEY,
            config=Config(s3={"addressing_style": "path"}),
        )
        return self._client

    def create_bucket(self, name: str) -> None:
        """Make an empty bucket."""
        self.client().create_bucket(Bucket=name)


class OneWriterAtATime:
    """WSGI middleware: changes and listings run one at a time; a body must match its SHA-256."""

    def __init__(self, application: _Application) -> None:
        self._application = application
        self._turn = threading.Lock()

    def __call__(self, environ: _Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        lists = "list-type=" in environ.get("QUERY_STRING", "")
        if environ["REQUEST_METHOD"] in ("GET", "HEAD") and not lists:
            return self._application(environ, start_response)
        # The body is read before the turn begins, so that a slow sender blocks no other request.
        body = _read_body(environ)
        environ["wsgi.input"] = io.BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        declared = environ.get("HTTP_X_AMZ_CHECKSUM_SHA256")
        if declared and declared != base64.b64encode(hashlib.sha256(body).digest()).decode():
            start_response("400 Bad Request", [("Content-Type", "application/xml")])
            return [b"<Error><Code>BadDigest</Code><Message>SHA-256 mismatch</Message></Error>"]
        with self._turn:
            if self._is_copy_of_another_version(environ):
                start_response("412 Precondition Failed", [("Content-Type", "application/xml")])
                return [b"<Error><Code>PreconditionFailed</Code><Message>ETag</Message></Error>"]
            return list(self._application(environ, start_response))

    def _is_copy_of_another_version(self, environ: _Environ) -> bool:
        wanted = environ.get("HTTP_X_AMZ_COPY_SOURCE_IF_MATCH")
        if not wanted:
            return False
        source = "/" + unquote(environ["HTTP_X_AMZ_COPY_SOURCE"]).lstrip("/")
        head = {name: value for name, value in environ.items() if "AMZ_COPY" not in name}
        head |= {"REQUEST_METHOD": "HEAD", "PATH_INFO": source, "RAW_URI": source}
        head |= {"REQUEST_URI": source, "CONTENT_LENGTH": "0", "wsgi.input": io.BytesIO()}
        found: dict[str, str] = {}

        def keep(_status: str, headers: list[tuple[str, str]], *_: Any) -> None:
            found.update({name.lower(): value for name, value in headers})

        for _ in self._application(head, keep):
            pass
        # A source that does not exist is refused by moto itself.
        return "etag" in found and found["etag"].strip('"') != wanted.strip('"')


def _read_body(environ: _Environ) -> bytes:
    stream = environ["wsgi.input"]
    if environ.get("wsgi.input_terminated"):
        return bytes(stream.read())
    return bytes(stream.read(int(environ.get("CONTENT_LENGTH") or 0)))


def _end_with_standard_input() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Serve until standard input closes; the first line on standard output is the address."""
    # Imported here: the process that starts the server does not need moto.
    from moto.moto_server.werkzeug_app import (  # pylint: disable=import-outside-toplevel
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server  # pylint: disable=import-outside-toplevel

    class QuietHandler(MotoRequestHandler):  # type: ignore[misc]
        """Serves without a line for each request."""

        def log(self, *_: object) -> None:
            """Print nothing."""

    application = OneWriterAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=QuietHandler)
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
