"""A job's images and their captions, fetched side by side into the job's own folder."""

from __future__ import annotations

import contextvars
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

from jobs.addresses import S3Location
from services.s3.errors import VersionNotServed
from services.s3.types import FetchedImage, ImageRequest, ObjectInfo, StoredObject
from utils.captions import MAX_CAPTION_BYTES, TOO_LARGE, CaptionText, read_caption
from utils.errors import AccessDenied, ObjectNotFound, ObjectTooLarge
from utils.logger import get_logger
from utils.sizes import spoken

log = get_logger(__name__)

AT_ONCE = 8

NOT_FOUND = "could not be found in storage"
REFUSED = "could not be read: storage refuses access to it"
NO_VERSIONS = "names a version that this storage does not give"
STOPPED = "was not fetched, because the job was stopped"


class Store(Protocol):
    """What is needed of `S3Service`."""

    def download(
        self,
        location: S3Location,
        path: Path,
        *,
        max_bytes: int | None = None,
        watch: Callable[[], None] = ...,
        version_id: str | None = None,
    ) -> int:
        """Write an object into a local file; `watch` is called now and then and may raise."""

    def read(self, location: S3Location, *, max_bytes: int = ...) -> StoredObject:
        """A small object, whole."""

    def head(self, location: S3Location, *, version_id: str | None = None) -> ObjectInfo:
        """Facts about an object, without its body."""


class _GivenUp(Exception):
    """Raised inside a download that nobody waits for any more."""


def fetch_images(
    store: Store,
    requests: Sequence[ImageRequest],
    folder: Path,
    *,
    max_bytes: int,
    stop: Callable[[], bool],
) -> tuple[FetchedImage, ...]:
    """Fetch images; see `S3Service.fetch_images`."""
    nobody_waits = threading.Event()

    def watch() -> None:
        if nobody_waits.is_set() or stop():
            raise _GivenUp

    def fetch(index: int, request: ImageRequest) -> FetchedImage:
        # The name is the worker's own: nothing that a message or a bucket says becomes a path.
        path = folder / f"{index:04d}.img"
        try:
            watch()
            return _fetch(store, request, path, max_bytes, watch)
        except _GivenUp:
            return FetchedImage(request.source, None, problem=STOPPED)

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="image") as pool:
        futures = [
            # Each with a copy of this thread's context, so that its log lines carry the job, too.
            pool.submit(contextvars.copy_context().run, fetch, index, request)
            for index, request in enumerate(requests)
        ]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # Either all are done, or S3 or the disk failed and the rest would fail the same way.
            nobody_waits.set()
    fetched = tuple(future.result() for future in futures)
    _report(requests, fetched)
    return fetched


def object_sizes(
    store: Store, objects: Sequence[tuple[S3Location, str | None]], *, stop: Callable[[], bool]
) -> tuple[int, ...]:
    """Ask for the sizes of objects, several at a time; nothing is downloaded.

    Args:
        store: The storage.
        objects: Where each is, and which version of it is meant; None for the present one.
        stop: Asked before each request; once true, the rest count as 0.

    Returns:
        Bytes of each, in order; 0 for an object that is missing or forbidden.

    Raises:
        StorageError: S3 as a whole is in trouble.
    """
    over = threading.Event()

    def size(wanted: tuple[S3Location, str | None]) -> int:
        if over.is_set() or stop():
            return 0
        try:
            location, version_id = wanted
            return store.head(location, version_id=version_id).size
        except (ObjectNotFound, AccessDenied):
            return 0

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="image-size") as pool:
        futures = [pool.submit(contextvars.copy_context().run, size, each) for each in objects]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            over.set()
    return tuple(future.result() for future in futures)


def _report(requests: Sequence[ImageRequest], fetched: Sequence[FetchedImage]) -> None:
    for index, (request, image) in enumerate(zip(requests, fetched, strict=True)):
        if image.problem:
            # Not the message's own spelling: it may be a signed address.
            address = request.location.uri()
            log.warning("picture_left_out", index=index, image=address, problem=image.problem)
    if fetched and all(image.problem == REFUSED for image in fetched):
        # One refused image is the artist's affair. All of them are a policy's, which ops can
        # mend while the job waits.
        buckets = ", ".join(sorted({request.location.bucket for request in requests}))
        raise AccessDenied(f"S3 refuses access to every image of the job (bucket {buckets})")


def _fetch(
    store: Store,
    request: ImageRequest,
    path: Path,
    max_bytes: int,
    watch: Callable[[], None],
) -> FetchedImage:
    try:
        store.download(
            request.location, path, max_bytes=max_bytes, watch=watch, version_id=request.version_id
        )
    except VersionNotServed:
        return FetchedImage(request.source, None, problem=NO_VERSIONS)
    except ObjectNotFound:
        return FetchedImage(request.source, None, problem=NOT_FOUND)
    except AccessDenied:
        return FetchedImage(request.source, None, problem=REFUSED)
    except ObjectTooLarge:
        problem = f"is too large: an image may have at most {spoken(max_bytes)}"
        return FetchedImage(request.source, None, problem=problem)
    if request.caption is not None:
        return FetchedImage(request.source, path, request.caption)
    beside = _caption_beside(store, request.location, watch)
    return FetchedImage(request.source, path, beside.text or None, caption_problem=beside.problem)


def _caption_beside(store: Store, image: S3Location, watch: Callable[[], None]) -> CaptionText:
    """The first caption that is there, or why it is ignored; an empty one if there is none."""
    for location in _captions_of(image):
        watch()
        if found := _caption_at(store, location):
            return found
    return CaptionText("")


def _captions_of(image: S3Location) -> Iterator[S3Location]:
    """Where an image's caption may be, the usual place first."""
    folder, slash, name = image.key.rpartition("/")
    stem = name.rpartition(".")[0] or name
    names = dict.fromkeys((f"{stem}.txt", f"{name}.txt", f"{stem}.TXT", f"{stem}.caption"))
    for form in ("NFC", "NFD"):  # a Mac decomposes the letters of names, other systems do not
        names |= dict.fromkeys(unicodedata.normalize(form, each) for each in list(names)[:2])
    for each in names:
        if each != name:
            yield S3Location(image.bucket, f"{folder}{slash}{each}")


def _caption_at(store: Store, location: S3Location) -> CaptionText | None:
    """A caption, or why it is ignored; None where there is none."""
    try:
        found = read_caption(store.read(location, max_bytes=MAX_CAPTION_BYTES).body)
    except (ObjectNotFound, AccessDenied):
        # Where the worker may not list the bucket, S3 answers "forbidden" for what is not there.
        return None
    except ObjectTooLarge:
        found = CaptionText("", TOO_LARGE)
    if found.problem:
        log.warning("caption_ignored", caption=location.uri(), reason=found.problem)
    return found
