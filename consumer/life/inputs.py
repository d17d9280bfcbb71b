"""The inputs of a job: downloaded several at a time into the job's folder, with their texts.

An input that cannot be fetched has the reason why not, and the kind of the job decides whether the
job continues without it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from consumer.life.stop_signal import StopSignal
from jobs.addresses import S3Location
from jobs.kinds import Fetched, Input, TextBeside
from services.s3.errors import VersionNotServed
from services.s3.s3_service import S3Service
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


class _GivenUp(Exception):
    """Raised inside a download whose result is no longer needed."""


def fetch_inputs(
    s3: S3Service, inputs: Sequence[Input], folder: Path, *, max_bytes: int, stop: StopSignal
) -> tuple[Fetched, ...]:
    """Download a job's inputs, one role after the other, into a separate folder per role.

    Args:
        s3: The storage.
        inputs: The inputs, in the order of their roles.
        folder: The job's folder.
        max_bytes: Larger objects are not fetched.
        stop: Ends the download.

    Returns:
        One entry per input, in order.

    Raises:
        StorageError: S3 as a whole cannot be used.
        Stopped, Cancelled: A stop was requested.
    """
    fetched: list[Fetched] = []
    for role in dict.fromkeys(each.role for each in inputs):
        began = time.monotonic()
        (folder / role).mkdir()
        of_role = download(
            s3,
            [each for each in inputs if each.role == role],
            folder / role,
            max_bytes=max_bytes,
            stop=lambda: stop.reason is not None,
        )
        stop.check()
        log.info(
            "pictures_fetched",
            images=sum(each.path is not None for each in of_role),
            missing=sum(each.path is None for each in of_role),
            seconds=round(time.monotonic() - began, 3),
        )
        fetched += of_role
    return tuple(fetched)


def download(
    s3: S3Service,
    inputs: Sequence[Input],
    folder: Path,
    *,
    max_bytes: int,
    stop: Callable[[], bool],
) -> tuple[Fetched, ...]:
    """Download several inputs at a time into `folder`, under this server's own names.

    The names are `0000.img`, `0001.img` and so on, by the inputs that have a location.

    An input that is missing, forbidden or too large is reported and not raised.

    Args:
        s3: The storage.
        inputs: The inputs.
        folder: Receives the files.
        max_bytes: The largest size of one input.
        stop: Called often, from several threads. Once it returns true, the inputs that are not
            there yet are reported as stopped; the caller checks for a stop before it judges the
            result.

    Returns:
        One entry per input, in order.

    Raises:
        AccessDenied: Every input was refused, so a policy is wrong and not the inputs.
        StorageError: S3 as a whole cannot be used.
        DiskFull: The worker's disk is full.
    """
    failed = threading.Event()

    def watch() -> None:
        if failed.is_set() or stop():
            raise _GivenUp

    def fetch(numbered: tuple[int, Input]) -> Fetched:
        index, wanted = numbered
        # The file's name comes from the worker: no text from a message or a bucket becomes a path.
        path = folder / f"{index:04d}.img"
        try:
            watch()
            return _fetch(s3, wanted, path, max_bytes, watch)
        except _GivenUp:
            return Fetched(wanted, None, problem=STOPPED)
        except BaseException:
            failed.set()  # S3 or the disk failed, and the other downloads would fail the same way
            raise

    there = [each for each in inputs if each.location]
    downloads = tuple(in_parallel(fetch, enumerate(there), at_once=AT_ONCE, name="input"))
    _report(downloads)
    found = iter(downloads)
    return tuple(
        next(found) if each.location else Fetched(each, None, problem=each.problem)
        for each in inputs
    )


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

    return tuple(in_parallel(size, objects, at_once=AT_ONCE, name="input-size"))


def _place(wanted: Input) -> S3Location:
    assert wanted.location is not None  # the others are not downloaded
    return wanted.location


def _report(fetched: Sequence[Fetched]) -> None:
    places = [_place(each.input) for each in fetched]
    for index, (each, place) in enumerate(zip(fetched, places, strict=True)):
        if each.problem:
            # Not the message's own spelling: it may be a signed address.
            log.warning("picture_left_out", index=index, image=place.uri(), problem=each.problem)
    if fetched and all(each.problem == REFUSED for each in fetched):
        # One refused input is the customer's problem. If all are refused, a policy is wrong, which
        # an operator can correct while the job waits.
        buckets = ", ".join(sorted({place.bucket for place in places}))
        raise AccessDenied(
            f"S3 refuses access to every input file of the job. Allow reading the bucket {buckets}."
        )


def _fetch(
    s3: S3Service, wanted: Input, path: Path, max_bytes: int, watch: Callable[[], None]
) -> Fetched:
    place = _place(wanted)
    try:
        s3.download(place, path, max_bytes=max_bytes, watch=watch, version_id=wanted.version_id)
    except VersionNotServed:
        return Fetched(wanted, None, problem=NO_VERSIONS)
    except ObjectNotFound:
        return Fetched(wanted, None, problem=NOT_FOUND)
    except AccessDenied:
        return Fetched(wanted, None, problem=REFUSED)
    except ObjectTooLarge:
        problem = f"is too large: send a file of at most {spoken(max_bytes)}"
        return Fetched(wanted, None, problem=problem)
    if wanted.text_source is None:
        return Fetched(wanted, path, wanted.text)
    text, problem_of_text = _text_beside(s3, wanted.text_source, watch)
    return Fetched(wanted, path, text or None, text_problem=problem_of_text)


def _text_beside(
    s3: S3Service, beside: TextBeside, watch: Callable[[], None]
) -> tuple[str, str | None]:
    """The first text that exists, or why it is ignored; an empty one if there is none."""
    for location in beside.places:
        watch()
        try:
            text, problem = beside.read(s3.read(location, max_bytes=beside.max_bytes).body)
        except (ObjectNotFound, AccessDenied):
            # If the worker may not list the bucket, S3 answers "forbidden" for a missing object.
            continue
        except ObjectTooLarge:
            text, problem = "", beside.too_large
        if problem:
            log.warning("caption_ignored", caption=location.uri(), reason=problem)
        return text, problem
    return "", None
