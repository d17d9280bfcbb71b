"""Checks of S3: the settings of the stores, then every bucket and prefix that the worker uses."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from cli.doctor.findings import Finding, clock, fail, now, ok, warn
from cli.doctor.storage_rights import PROBE, Right, Use, uses
from jobs.addresses import S3Location
from jobs.layout import MODELS, RECORDS
from services.records.condition_probe import probe
from services.s3.s3_service import S3Service, open_store
from utils.errors import AccessDenied, ConfigurationError, ObjectNotFound, StorageError
from utils.settings.storage import StorageSettings, is_google

_SECONDS = 10.0
_BODY = b"written by the doctor; can be deleted"
_TEMPORARY = "ASIA"  # prefix of AWS's temporary access keys
_POLICY = "Grant the worker the policy that `main.py doctor --policy` prints."
_LIST = "Grant s3:ListBucket on the bucket, without a condition on prefixes."
_PAGE = "docs/operations.md, Google Cloud Storage"


def examine(settings: StorageSettings) -> Iterator[Finding]:
    """Test the settings, each bucket, conditional writes, privacy of the state, and the clock."""
    try:
        s3 = open_store(settings.main_store(), attempts=2, patience=_SECONDS)
        state_s3 = open_store(settings.state_store(), attempts=2, patience=_SECONDS)
    except ConfigurationError as error:
        yield fail("storage", str(error), "Correct AWS_ENDPOINT_URL_S3 and AWS_S3_REGION_NAME.")
        return
    yield from examine_settings(settings, s3)
    by_bucket: dict[tuple[bool, str], list[Use]] = {}
    for use in uses(settings):
        by_bucket.setdefault((use.of_state, use.bucket), []).append(use)
    visits = {
        place: _Visit(state_s3 if place[0] else s3, place[1], its_uses)
        for place, its_uses in by_bucket.items()
    }
    usable = set()
    for place, visit in visits.items():
        yield (finding := visit.finding())
        if finding.verdict != "fail":
            usable.add(place)
    state = (settings.state_store() != settings.main_store(), settings.state_bucket_name)
    models = (False, settings.model_bucket_name)
    if models in usable and models != state:
        yield _conditions(settings, s3, models[1], MODELS)
    if state in usable:
        yield _conditions(settings, state_s3, state[1], RECORDS)
        yield _privacy(settings, state_s3)
    yield from [visit.clock for visit in visits.values() if visit.clock][:1]


def examine_settings(settings: StorageSettings, s3: S3Service) -> Iterator[Finding]:
    """Judge the stores by the settings, without a request.

    Args:
        settings: The settings.
        s3: The store of images and models; its endpoint may be from an AWS configuration file.
    """
    yield _model_address(settings)
    yield from _credentials(settings)
    host = urlsplit(s3.endpoint).hostname or ""
    if not settings.s3_endpoint and not host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        yield warn(
            "endpoint",
            f"Requests go to {s3.endpoint}, set in an AWS configuration file and not in the "
            "worker's settings. The worker refuses https addresses of images in that store.",
            "Set AWS_ENDPOINT_URL_S3.",
        )
    check = "Google Cloud Storage"
    if is_google(settings.state_store().endpoint):
        yield warn(
            check,
            "The state bucket is in Google Cloud Storage, whose S3-compatible interface applies "
            "If-Match and If-None-Match to reads only, according to its documentation.",
            "Set STATE_BUCKET_NAME, STATE_AWS_ENDPOINT_URL_S3, STATE_AWS_ACCESS_KEY_ID and "
            f"STATE_AWS_SECRET_ACCESS_KEY to another store ({_PAGE}).",
        )
    elif is_google(settings.s3_endpoint):
        yield ok(
            check,
            f"Holds images and models. Uploads carry {settings.main_store().checksums.upper()}, "
            "objects are deleted one by one, and only the turn of a style in the state bucket "
            "protects a publication.",
            f"This release was not tried against the real service: see {_PAGE}.",
        )


def _model_address(settings: StorageSettings) -> Finding:
    check = "model address"
    google = is_google(settings.s3_endpoint)
    if settings.model_url_scheme == "s3":
        return warn(
            check,
            "MODEL_URL_SCHEME=s3: an inference server that reads only gs:// addresses, as the "
            "platform's does, paints without the style and reports success.",
            "Set MODEL_URL_SCHEME=gs if that server reads the models"
            + ("." if google else ", and store them in Google Cloud Storage."),
        )
    if google:
        return ok(check, "gs://, in Google Cloud Storage.")
    return warn(
        check,
        f"MODEL_URL_SCHEME=gs, but models are written to {settings.s3_endpoint or 'AWS S3'}, "
        "which is not Google Cloud Storage.",
        "Make sure that the inference server finds gs:// addresses in that store.",
    )


def _credentials(settings: StorageSettings) -> Iterator[Finding]:
    for prefix, store in (("", settings.main_store()), ("STATE_", settings.state_store())):
        name = f"{prefix}AWS_SESSION_TOKEN"
        if prefix and store.access_key_id == settings.aws_access_key_id:
            continue
        if (store.access_key_id or "").startswith(_TEMPORARY) and not store.session_token:
            yield fail(
                name,
                f"{prefix}AWS_ACCESS_KEY_ID is a temporary key (it begins with {_TEMPORARY}), but "
                "its session token is not set. AWS refuses every request.",
                f"Set {name}.",
            )
        elif store.session_token:
            yield warn(
                name,
                "The credentials are temporary. Once they expire, the worker cannot use S3 until "
                "it is restarted with new ones.",
                "Use an instance role or a permanent key.",
            )


class _Visit:
    """Uses one bucket as the worker does.

    Attributes:
        clock: The comparison with the store's clock; None until an object was read.
    """

    def __init__(self, s3: S3Service, bucket: str, its_uses: list[Use]) -> None:
        self.clock: Finding | None = None
        self._s3 = s3
        self._bucket = bucket
        self._uses = its_uses
        self._denied: list[str] = []
        self._allowed: dict[str, list[str]] = {}

    def finding(self) -> Finding:
        """Try every right and report those that are missing."""
        of_state = self._uses[0].of_state
        check = f"bucket {self._bucket}{' (state store)' if of_state else ''}"
        try:
            for use in self._uses:
                self._try(use)
            missing_looks_forbidden = self._missing_looks_forbidden()
        except StorageError as error:
            return fail(check, str(error), _remedy(error, of_state))
        if self._denied:
            return fail(check, f"S3 refuses to {', '.join(self._denied)}.", _POLICY)
        if not missing_looks_forbidden:
            found = (f"{prefix or '*'}: {', '.join(w)}" for prefix, w in self._allowed.items())
            return ok(check, "; ".join(found))
        forbidden = "S3 answers 403 for a missing object"
        if any(Right.WRITE in use.rights for use in self._uses):
            return fail(check, f"{forbidden}, so a new job looks like a forbidden one.", _LIST)
        detail = f"{forbidden}, so reading could not be tested, and a missing image looks forbidden"
        return warn(check, f"{detail}.", _LIST)

    def _try(self, use: Use) -> None:
        probe_at = S3Location(self._bucket, f"{use.prefix}{PROBE}{uuid.uuid4()}")
        if Right.WRITE not in use.rights:
            self._try_to_read(use, probe_at)
            return
        self._may("list", use, lambda: self._first(use))
        if not self._may("write", use, lambda: self._s3.write(probe_at, _BODY, "text/plain")):
            return
        try:
            if Right.READ in use.rights:
                self._may("read", use, lambda: self._read(probe_at))
        finally:
            self._may("delete", use, lambda: self._s3.delete(self._bucket, [probe_at.key]))

    def _try_to_read(self, use: Use, probe_at: S3Location) -> None:
        try:
            key = self._first(use) or probe_at.key
        except AccessDenied:
            return  # the worker does not need to list images
        self._allowed.setdefault(use.prefix, []).append("list")
        # S3 answers 403 if reading is not allowed, whether or not the object exists.
        self._may("read", use, lambda: self._s3.exists(S3Location(self._bucket, key)))

    def _missing_looks_forbidden(self) -> bool:
        """S3 answers 404 for a missing object only to readers who may list the whole bucket."""
        try:
            for use in self._uses:
                if Right.READ in use.rights:
                    missing = f"{use.prefix}{PROBE}{uuid.uuid4()}"
                    self._s3.exists(S3Location(self._bucket, missing))
        except AccessDenied:
            return True
        return False

    def _first(self, use: Use) -> str:
        found = next(self._s3.list_objects(self._bucket, use.prefix), None)
        return found.key if found else ""

    def _read(self, location: S3Location) -> None:
        asked = now()
        self.clock = clock("S3", self._s3.read(location).server_date, asked, now())

    def _may(self, word: str, use: Use, act: Callable[[], object]) -> bool:
        try:
            act()
        except AccessDenied:
            self._denied.append(f"{word} under {use.prefix or 'any prefix'}")
            return False
        self._allowed.setdefault(use.prefix, []).append(word)
        return True


def _remedy(error: StorageError, of_state: bool) -> str:
    if isinstance(error, ObjectNotFound):
        names = "AWS_STORAGE_BUCKET_NAME, MODEL_BUCKET_NAME, STATE_BUCKET_NAME and IMAGE_BUCKETS"
        return f"Check {names}, or create the bucket."
    own = "STATE_AWS_" if of_state else "AWS_"
    return (
        f"Check {own}ACCESS_KEY_ID, {own}SECRET_ACCESS_KEY, {own}S3_REGION_NAME, "
        f"{own}ENDPOINT_URL_S3 and, for temporary credentials, {own}SESSION_TOKEN."
    )


def _conditions(settings: StorageSettings, s3: S3Service, bucket: str, prefix: str) -> Finding:
    check = f"conditional writes in {bucket}"
    try:
        support = probe(s3, bucket, prefix)
    except StorageError as error:
        return fail(check, str(error), _POLICY)
    if support.complete:
        return ok(check, "If-None-Match and If-Match are honoured.")
    if prefix == MODELS:
        return warn(
            check,
            f"The store does not honour {support.missing}. Publishing relies on the style's turn "
            "in the state bucket, and a worker that was stopped during an upload may still "
            "overwrite one file of a newer model.",
            "To rule this out, store the models where conditional writes are honoured.",
        )
    if settings.allow_unguarded_state:
        return warn(
            check,
            f"{support.explain()} ALLOW_UNGUARDED_STATE=true allows it.",
            "Make sure that exactly one worker runs, also during an update.",
        )
    return fail(
        check,
        f"{support.explain()} A worker refuses to start with it.",
        "Set STATE_BUCKET_NAME and STATE_AWS_ENDPOINT_URL_S3 to a store that honours them, or "
        "set ALLOW_UNGUARDED_STATE=true and run exactly one worker.",
    )


def _privacy(settings: StorageSettings, s3: S3Service) -> Finding:
    """Test whether the public can read a job record, which holds a customer's message."""
    bucket = settings.state_bucket_name
    check = f"privacy of {bucket}"
    location = S3Location(bucket, f"{RECORDS}{PROBE}{uuid.uuid4()}")
    listing = f"{bucket}?list-type=2&prefix={RECORDS}&max-keys=1"
    try:
        s3.write(location, _BODY, "text/plain")
        try:
            statuses = {
                "read": _unsigned_get(settings, f"{bucket}/{location.key}"),
                "list": _unsigned_get(settings, listing),
            }
        finally:
            s3.delete(bucket, [location.key])
    except StorageError as error:
        return warn(check, f"The test failed: {error}", "Correct this and run the doctor again.")
    if public := [word for word, status in statuses.items() if status == http.HTTPStatus.OK]:
        inherited = (
            f"STATE_BUCKET_NAME is not set, so the state is in the bucket of the models, {bucket}. "
            if "state_bucket_name" not in settings.model_fields_set
            else ""
        )
        return warn(
            check,
            f"{inherited}The public can {' and '.join(public)} job records and checkpoints, which "
            "hold what customers sent.",
            "Set STATE_BUCKET_NAME to a private bucket, or block public access to this one.",
        )
    if set(statuses.values()) <= {http.HTTPStatus.FORBIDDEN, http.HTTPStatus.UNAUTHORIZED}:
        return ok(check, "S3 refuses to read and to list it without a key.")
    return ok(check, f"Unknown: the answers to requests without a key were {statuses}.")


def _unsigned_get(settings: StorageSettings, path: str) -> int | None:
    """The HTTP status of a GET without a key; None without an answer."""
    store = settings.state_store()
    suffix = ".cn" if store.region.startswith("cn-") else ""
    endpoint = store.endpoint or f"https://s3.{store.region}.amazonaws.com{suffix}"
    url = f"{endpoint.rstrip('/')}/{urllib.parse.quote(path, safe='/?&=')}"
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except (OSError, http.client.HTTPException):
        return None
