"""Downloads a job's images and their captions, several at a time, into the job's folder."""

from __future__ import annotations

import dataclasses
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jobs.addresses import S3Location
from services.s3.errors import VersionNotServed
from services.s3.s3_service import S3Service
from utils.captions import MAX_CAPTION_BYTES, TOO_LARGE, CaptionText, read_caption
from utils.errors import AccessDenied, ObjectNotFound, ObjectTooLarge
from utils.logger import get_logger
from utils.threads import in_parallel
from utils.wording import spoken

log = get_logger(__name__)

AT_ONCE = 8

NOT_FOUND = "could not be found in storage"
REFUSED = "could not be read: storage refuses access to it"
NO_VERSIONS = "names a version that this storage does not return"
STOPPED = "was not fetched, because the job was stopped"


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRequest:
    """An image that a job asks for.

    Attributes:
        source: The image's address as the message spells it, for the report.
        location: The object.
        caption: Its caption; with None, a caption file next to the image is looked for.
        version_id: The object's version; None for the current one.
    """

    source: str
    location: S3Location
    caption: str | None = None
    version_id: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class FetchedImage:
    """The result of an `ImageRequest`.

    Attributes:
        source: As in the request.
        path: The local file; None if the image could not be fetched.
        caption: The request's caption, or the text found next to the image, or None.
        problem: Why the image could not be fetched, for an artist to read ("could not be found in
            storage"); otherwise None.
        caption_problem: Why the caption found next to the image is ignored; None if it is used.
    """

    source: str
    path: Path | None
    caption: str | None = None
    problem: str | None = None
    caption_problem: str | None = None


class _GivenUp(Exception):
    """Raised inside a download whose result is no longer needed."""


def download_images(
    s3: S3Service,
    requests: Sequence[ImageRequest],
    folder: Path,
    *,
    max_bytes: int,
    stop: Callable[[], bool],
) -> tuple[FetchedImage, ...]:
    """Download several images at a time into `folder`, under this server's own names.

    The names are `0000.img`, `0001.img` and so on.

    An image that is missing, forbidden or too large is reported and not raised: the job may
    continue without it.

    Args:
        s3: The storage.
        requests: The images.
        folder: Receives the files.
        max_bytes: The largest size of one image.
        stop: Called often, from several threads. Once it returns true, the images that are not
            there yet are reported as stopped; the caller checks for a stop before it judges the
            result.

    Returns:
        One entry per request, in order.

    Raises:
        AccessDenied: Every image was refused, so a policy is wrong and not the images.
        StorageError: S3 as a whole cannot be used.
        DiskFull: The worker's disk is full.
    """
    failed = threading.Event()

    def watch() -> None:
        if failed.is_set() or stop():
            raise _GivenUp

    def fetch(numbered: tuple[int, ImageRequest]) -> FetchedImage:
        index, request = numbered
        # The file's name comes from the worker: no text from a message or a bucket becomes a path.
        path = folder / f"{index:04d}.img"
        try:
            watch()
            return _fetch(s3, request, path, max_bytes, watch)
        except _GivenUp:
            return FetchedImage(request.source, None, problem=STOPPED)
        except BaseException:
            failed.set()  # S3 or the disk failed, and the other downloads would fail the same way
            raise

    fetched = tuple(in_parallel(fetch, enumerate(requests), at_once=AT_ONCE, name="image"))
    _report(requests, fetched)
    return fetched


def object_sizes(
    s3: S3Service, objects: Sequence[tuple[S3Location, str | None]], *, stop: Callable[[], bool]
) -> tuple[int, ...]:
    """Ask for the sizes of objects, several at a time; nothing is downloaded.

    Args:
        s3: The storage.
        objects: The place of each object, and its version; None for the current one.
        stop: Called before each request; once it returns true, the other objects count as 0.

    Returns:
        Bytes of each, in order; 0 for an object that is missing or forbidden.

    Raises:
        StorageError: S3 as a whole cannot be used.
    """

    def size(wanted: tuple[S3Location, str | None]) -> int:
        if stop():
            return 0
        try:
            location, version_id = wanted
            return s3.head(location, version_id=version_id).size
        except (ObjectNotFound, AccessDenied):
            return 0

    return tuple(in_parallel(size, objects, at_once=AT_ONCE, name="image-size"))


def _report(requests: Sequence[ImageRequest], fetched: Sequence[FetchedImage]) -> None:
    for index, (request, image) in enumerate(zip(requests, fetched, strict=True)):
        if image.problem:
            # Not the message's own spelling: it may be a signed address.
            address = request.location.uri()
            log.warning("picture_left_out", index=index, image=address, problem=image.problem)
    if fetched and all(image.problem == REFUSED for image in fetched):
        # One refused image is the artist's problem. If all are refused, a policy is wrong, which
        # an operator can correct while the job waits.
        buckets = ", ".join(sorted({request.location.bucket for request in requests}))
        raise AccessDenied(
            f"S3 refuses access to every input file of the job. Allow reading the bucket {buckets}."
        )


def _fetch(
    s3: S3Service,
    request: ImageRequest,
    path: Path,
    max_bytes: int,
    watch: Callable[[], None],
) -> FetchedImage:
    try:
        s3.download(
            request.location, path, max_bytes=max_bytes, watch=watch, version_id=request.version_id
        )
    except VersionNotServed:
        return FetchedImage(request.source, None, problem=NO_VERSIONS)
    except ObjectNotFound:
        return FetchedImage(request.source, None, problem=NOT_FOUND)
    except AccessDenied:
        return FetchedImage(request.source, None, problem=REFUSED)
    except ObjectTooLarge:
        problem = f"is too large: send a file of at most {spoken(max_bytes)}"
        return FetchedImage(request.source, None, problem=problem)
    if request.caption is not None:
        return FetchedImage(request.source, path, request.caption)
    beside = _caption_beside(s3, request.location, watch)
    return FetchedImage(request.source, path, beside.text or None, caption_problem=beside.problem)


def _caption_beside(s3: S3Service, image: S3Location, watch: Callable[[], None]) -> CaptionText:
    """The first caption that exists, or why it is ignored; an empty one if there is none."""
    for location in _captions_of(image):
        watch()
        if found := _caption_at(s3, location):
            return found
    return CaptionText("")


def _captions_of(image: S3Location) -> Iterator[S3Location]:
    """The places of an image's caption, the usual one first."""
    folder, slash, name = image.key.rpartition("/")
    stem = name.rpartition(".")[0] or name
    names = dict.fromkeys((f"{stem}.txt", f"{name}.txt", f"{stem}.TXT", f"{stem}.caption"))
    for form in ("NFC", "NFD"):  # a Mac decomposes the letters of names, other systems do not
        names |= dict.fromkeys(unicodedata.normalize(form, each) for each in list(names)[:2])
    for each in names:
        if each != name:
            yield S3Location(image.bucket, f"{folder}{slash}{each}")


def _caption_at(s3: S3Service, location: S3Location) -> CaptionText | None:
    """A caption, or why it is ignored; None if there is none."""
    try:
        found = read_caption(s3.read(location, max_bytes=MAX_CAPTION_BYTES).body)
    except (ObjectNotFound, AccessDenied):
        # If the worker may not list the bucket, S3 answers "forbidden" for a missing object.
        return None
    except ObjectTooLarge:
        found = CaptionText("", TOO_LARGE)
    if found.problem:
        log.warning("caption_ignored", caption=location.uri(), reason=found.problem)
    return found
