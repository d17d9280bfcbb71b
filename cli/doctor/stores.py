"""Which stores are meant, and what follows from that: Google's, the models' addresses, credentials.

Judged by the settings alone: no request is made.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from cli.doctor.findings import Finding, fail, ok, warn
from config import Settings
from services.s3.s3_service import S3Service
from utils.settings.storage import is_google

_TEMPORARY = "ASIA"  # how AWS's temporary access keys begin
_PAGE = "docs/operations.md, Google Cloud Storage"


def examine(settings: Settings, s3: S3Service) -> list[Finding]:
    """Findings about the stores.

    Args:
        settings: Which stores.
        s3: The store of images and models; it knows an endpoint of boto3's own configuration.
    """
    found = [_model_address(settings), *_credentials(settings), _endpoint(settings, s3)]
    found += [_google(settings)]
    return [finding for finding in found if finding is not None]


def _model_address(settings: Settings) -> Finding:
    check = "model address"
    google = is_google(settings.s3_endpoint)
    if settings.model_url_scheme == "s3":
        return warn(
            check,
            "MODEL_URL_SCHEME=s3: an inference server that reads gs:// addresses only, as the "
            "platform's does, paints without the style and reports success",
            "set MODEL_URL_SCHEME=gs where that server reads the models"
            + ("" if google else ", and store them where it reads gs:// from"),
        )
    if not google:
        return warn(
            check,
            f"MODEL_URL_SCHEME=gs, and models are written to {settings.s3_endpoint or 'AWS S3'}, "
            "which is not Google Cloud Storage",
            "make sure that the inference server finds gs:// addresses in that store",
        )
    return ok(check, "gs://, in Google Cloud Storage")


def _credentials(settings: Settings) -> list[Finding]:
    found = []
    for prefix, store in (("", settings.main_store()), ("STATE_", settings.state_store())):
        if prefix and store.access_key_id == settings.aws_access_key_id:
            continue
        key = store.access_key_id or ""
        if key.startswith(_TEMPORARY) and not store.session_token:
            found.append(
                fail(
                    f"{prefix}AWS_SESSION_TOKEN",
                    f"{prefix}AWS_ACCESS_KEY_ID is a temporary key (it begins with {_TEMPORARY}), "
                    "and its session token is not set: AWS refuses every request",
                    f"set {prefix}AWS_SESSION_TOKEN",
                )
            )
        elif store.session_token:
            found.append(
                warn(
                    f"{prefix}AWS_SESSION_TOKEN",
                    "the credentials are temporary: when they expire, the worker cannot use S3 "
                    "until it is restarted with new ones",
                    "use a role of the instance, or a lasting key",
                )
            )
    return found


def _endpoint(settings: Settings, s3: S3Service) -> Finding | None:
    host = urlsplit(s3.endpoint).hostname or ""
    is_amazon = host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
    if settings.s3_endpoint or is_amazon:
        return None
    return warn(
        "endpoint",
        f"requests go to {s3.endpoint}, which an AWS configuration file names and no setting: "
        "https addresses of images in that store are refused",
        "set AWS_ENDPOINT_URL_S3",
    )


def _google(settings: Settings) -> Finding | None:
    check = "Google Cloud Storage"
    state = is_google(settings.state_store().endpoint)
    if state:
        return warn(
            check,
            "the state bucket is in Google Cloud Storage, whose S3-compatible interface is "
            "documented to apply If-Match and If-None-Match to reads only",
            "set STATE_BUCKET_NAME, STATE_AWS_ENDPOINT_URL_S3, STATE_AWS_ACCESS_KEY_ID and "
            f"STATE_AWS_SECRET_ACCESS_KEY to another store ({_PAGE})",
        )
    if is_google(settings.s3_endpoint):
        return ok(
            check,
            f"images and models; uploads carry {settings.main_store().checksums.upper()}, objects "
            "are deleted singly, and publishing relies on the style's turn in the state bucket",
            f"this release was not tried against the real service: see {_PAGE}",
        )
    return None
