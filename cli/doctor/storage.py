"""S3: every bucket and prefix that the worker uses, by doing there what the worker does."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator

from cli.doctor import stores
from cli.doctor.findings import Finding, clock, fail, now, ok, warn
from cli.doctor.storage_rights import PROBE, Right, Use, uses
from config import Settings
from consumer.worker import open_s3, open_state_s3
from jobs.addresses import S3Location
from services.records.condition_probe import probe
from services.s3.s3_service import S3Service
from utils.errors import AccessDenied, ConfigurationError, ObjectNotFound, StorageError

_SECONDS = 10.0
_POLICY = "grant the worker the policy that the doctor prints"


def examine(settings: Settings) -> list[Finding]:
    """A finding a bucket, then conditional writes, the clock, and whether the state is public."""
    try:
        s3 = open_s3(settings, attempts=2, patience=_SECONDS)
        state_s3 = open_state_s3(settings, attempts=2, patience=_SECONDS)
    except ConfigurationError as error:
        return [fail("storage", str(error), "check AWS_ENDPOINT_URL_S3 and AWS_S3_REGION_NAME")]
    findings: list[Finding] = stores.examine(settings, s3)
    clocks: list[Finding] = []
    by_bucket: dict[tuple[bool, str], list[Use]] = {}
    for use in uses(settings):
        by_bucket.setdefault((use.of_state, use.bucket), []).append(use)
    usable = set()
    for (of_state, bucket), its_uses in by_bucket.items():
        visit = _BucketVisit(state_s3 if of_state else s3, bucket, clocks, of_state)
        findings.append(visit.examine(its_uses))
        if findings[-1].verdict != "fail":
            usable.add((of_state, bucket))
    return findings + _guarantees(settings, s3, state_s3, usable) + clocks[:1]


def _guarantees(
    settings: Settings, s3: S3Service, state_s3: S3Service, usable: set[tuple[bool, str]]
) -> list[Finding]:
    """Conditional writes and privacy, in the buckets that can be used at all."""
    findings = []
    state = (settings.state_store() != settings.main_store(), settings.state_bucket_name)
    models = (False, settings.model_bucket_name)
    if models in usable and models != state:
        findings.append(_model_conditions(s3, settings.model_bucket_name))
    if state in usable:
        findings.append(_state_conditions(settings, state_s3))
        findings.append(_public(settings, state_s3))
    return findings


@dataclasses.dataclass
class _BucketVisit:
    """Does in one bucket what the worker does there.

    Attributes:
        clocks: Receives what S3's answers say of the time.
        of_state: Whether this is the state bucket, in a store of its own.
    """

    s3: S3Service
    bucket: str
    clocks: list[Finding]
    of_state: bool = False

    def __post_init__(self) -> None:
        self._denied: list[str] = []
        self._done: dict[str, list[str]] = {}

    def examine(self, its_uses: list[Use]) -> Finding:
        """What may be done there, and what not."""
        check = f"bucket {self.bucket}{' (state store)' if self.of_state else ''}"
        try:
            for use in its_uses:
                self._try(use)
            missing = self._missing_looks_forbidden(its_uses)
        except StorageError as error:
            return fail(check, str(error), _remedy(error, self.of_state))
        if self._denied:
            return fail(check, f"S3 refuses to {', '.join(self._denied)}", _POLICY)
        if missing:
            return self._forbidden(check, its_uses)
        return ok(
            check,
            "; ".join(f"{prefix or '*'}: {', '.join(d)}" for prefix, d in self._done.items()),
        )

    def _try(self, use: Use) -> None:
        done = self._done.setdefault(use.prefix, [])
        if Right.WRITE not in use.rights:
            self._try_to_read(use, done)
            return
        with self._may("list", use, done):
            next(self.s3.list_objects(self.bucket, use.prefix), None)
        self._try_to_change(use, done)

    def _try_to_read(self, use: Use, done: list[str]) -> None:
        try:
            first = next(self.s3.list_objects(self.bucket, use.prefix), None)
        except AccessDenied:
            return  # the worker can do without; what follows is told at the end
        done.append("list")
        # Whether or not there is such an object, only who may read is told so.
        key = first.key if first else f"{use.prefix}{PROBE}{uuid.uuid4()}"
        with self._may("read", use, done):
            self.s3.exists(S3Location(self.bucket, key))

    def _try_to_change(self, use: Use, done: list[str]) -> None:
        location = S3Location(self.bucket, f"{use.prefix}{PROBE}{uuid.uuid4()}")
        written = False
        with self._may("write", use, done):
            self.s3.write(location, b"written by the doctor; can be deleted", "text/plain")
            written = True
        if not written:
            return
        try:
            if Right.READ in use.rights:
                with self._may("read", use, done):
                    asked = now()
                    stored = self.s3.read(location)
                    self.clocks.append(clock("S3", stored.server_date, asked, now()))
        finally:
            with self._may("delete", use, done):
                self.s3.delete(self.bucket, [location.key])

    def _missing_looks_forbidden(self, its_uses: list[Use]) -> bool:
        """S3 tells what is missing only to those who may list the whole bucket."""
        readable = [use for use in its_uses if Right.READ in use.rights]
        try:
            for use in readable:
                self.s3.exists(S3Location(self.bucket, f"{use.prefix}{PROBE}{uuid.uuid4()}"))
        except AccessDenied:
            return True
        return False

    @staticmethod
    def _forbidden(check: str, its_uses: list[Use]) -> Finding:
        remedy = "grant s3:ListBucket on the bucket, without a condition on prefixes"
        forbidden = "S3 answers 403 for what is not there"
        if any(Right.WRITE in use.rights for use in its_uses):
            return fail(
                check, f"{forbidden}, so a new job cannot be told from a forbidden one", remedy
            )
        return warn(
            check,
            f"{forbidden}: reading could not be tried, and an image that is missing will look "
            "like one that is forbidden",
            remedy,
        )

    @contextlib.contextmanager
    def _may(self, what: str, use: Use, done: list[str]) -> Iterator[None]:
        try:
            yield
            done.append(what)
        except AccessDenied:
            self._denied.append(f"{what} under {use.prefix or 'any prefix'}")


def _remedy(error: StorageError, of_state: bool) -> str:
    if isinstance(error, ObjectNotFound):
        return (
            "check AWS_STORAGE_BUCKET_NAME, MODEL_BUCKET_NAME, STATE_BUCKET_NAME and IMAGE_BUCKETS,"
            " or make the bucket"
        )
    own = "STATE_AWS_" if of_state else "AWS_"
    return (
        f"check {own}ACCESS_KEY_ID, {own}SECRET_ACCESS_KEY, {own}S3_REGION_NAME, "
        f"{own}ENDPOINT_URL_S3 and, if the credentials are temporary, {own}SESSION_TOKEN"
    )


def _model_conditions(s3: S3Service, bucket: str) -> Finding:
    check = f"conditional writes in {bucket}"
    try:
        support = probe(s3, bucket, "models/")
    except StorageError as error:
        return fail(check, str(error), _POLICY)
    if support.complete:
        return ok(check, "If-None-Match and If-Match are honoured")
    return warn(
        check,
        f"the store does not honour {support.missing}: publishing relies on the style's turn in "
        "the state bucket alone, and a worker that was stopped during an upload may still write "
        "one file over a newer model",
    )


def _state_conditions(settings: Settings, s3: S3Service) -> Finding:
    bucket = settings.state_bucket_name
    check = f"conditional writes in {bucket}"
    try:
        support = probe(s3, bucket)
    except StorageError as error:
        return fail(check, str(error), _POLICY)
    if support.complete:
        return ok(check, "If-None-Match and If-Match are honoured")
    if settings.allow_unguarded_state:
        return warn(
            check,
            f"{support.explain()} ALLOW_UNGUARDED_STATE=true allows it",
            "make sure that exactly one worker runs, also during an update",
        )
    return fail(
        check,
        f"{support.explain()} A worker refuses to start with it",
        "set STATE_BUCKET_NAME and STATE_AWS_ENDPOINT_URL_S3 to a store that honours them, or "
        "ALLOW_UNGUARDED_STATE=true to run exactly one worker alone",
    )


def _public(settings: Settings, s3: S3Service) -> Finding:
    """Whether somebody without a key can read a job record, which holds a customer's message."""
    check = f"privacy of {settings.state_bucket_name}"
    location = S3Location(settings.state_bucket_name, f"jobs/{PROBE}{uuid.uuid4()}")
    try:
        s3.write(location, b"written by the doctor; can be deleted", "text/plain")
        try:
            statuses = {
                "read": _without_a_key(settings, f"{location.bucket}/{location.key}"),
                "list": _without_a_key(
                    settings, f"{location.bucket}?list-type=2&prefix=jobs/&max-keys=1"
                ),
            }
        finally:
            s3.delete(location.bucket, [location.key])
    except StorageError as error:
        return warn(check, f"could not be tested: {error}")
    public = [word for word, status in statuses.items() if status == http.HTTPStatus.OK]
    if public:
        inherited = (
            f"STATE_BUCKET_NAME is not set, so the state is in the bucket of the models, "
            f"{location.bucket}: "
            if "state_bucket_name" not in settings.storage.model_fields_set
            else ""
        )
        return warn(
            check,
            f"{inherited}anybody can {' and '.join(public)} job records and checkpoints, which "
            "hold what customers sent",
            "set STATE_BUCKET_NAME to a private bucket, or block public access to this one",
        )
    if set(statuses.values()) <= {http.HTTPStatus.FORBIDDEN, http.HTTPStatus.UNAUTHORIZED}:
        return ok(check, "nobody reads it without a key")
    return ok(check, f"could not be told (the answers without a key were {statuses})")


def _without_a_key(settings: Settings, path: str) -> int | None:
    """The HTTP status of an unsigned GET; None where there was no answer."""
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
