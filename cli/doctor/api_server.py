"""The API's database and keys, where `API_DATABASE_URL` is set."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from cli.doctor.findings import Finding, fail, ok, warn
from utils.settings.groups import ApiSettings


def examine(settings: ApiSettings, backend_url: str) -> Iterator[Finding]:
    """Connect to the database, compare the version of its tables, and look at the keys' pepper.

    Nothing is written. Without `API_DATABASE_URL` this machine serves no API, or one for trials.
    """
    if settings.api_database_url is None:
        return
    yield _database(settings.api_database_url.get_secret_value())
    if settings.api_key_pepper is None:
        detail = "API_KEY_PEPPER is not set: a new INTERNAL_API_TOKEN makes all API keys invalid."
        yield warn("API keys", detail, "Set it before the first key is made, and never change it.")
    else:
        yield ok("API keys", "API_KEY_PEPPER is set.")
    public = settings.api_public_url
    if public and urlsplit(public).netloc != urlsplit(backend_url).netloc:
        detail = f"API_PUBLIC_URL is {public}, and messages name {backend_url} for webhooks."
        remedy = "This is right only if workers reach the API there. Else unset one of them."
        yield warn("API address", detail, remedy)


def _database(url: str) -> Finding:
    check = "API database"
    try:
        # pylint: disable=import-outside-toplevel  # a worker's image lacks these packages
        from api.store.database import Database, DatabaseAway
        from api.store.migrating import state_of
    except ImportError as error:
        return warn(
            check,
            f"The packages of the API are not installed here ({error.name}).",
            "Run the doctor where the API runs, or unset API_DATABASE_URL on workers.",
        )
    database = Database(url)
    try:
        version, newest = state_of(database)
    except DatabaseAway as error:
        return fail(
            check,
            f"It cannot be used: {error.__cause__ or error}",
            "Check that it runs, and the address, user, password and name in API_DATABASE_URL.",
        )
    finally:
        database.close()
    if version == newest:
        return ok(check, f"It answers, and its tables have the version {newest}.")
    return warn(
        check,
        f"Its tables have the version {version or 'none'}, and this program needs {newest}.",
        "A starting API server migrates them, and so does `main.py api migrate`. A newer version "
        "belongs to a newer server.",
    )
