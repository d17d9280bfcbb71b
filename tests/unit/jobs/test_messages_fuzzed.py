"""Any message and any address gives a valid job, or a sentence that names the field."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote

from hypothesis import assume, given
from hypothesis import strategies as st

from jobs.addresses import AddressRules, BrokenAddress, S3Location, read_address, version_of
from jobs.captions import clean_caption
from jobs.message import Job, from_understood
from tests.unit.jobs.message_samples import BUCKET, ENDPOINT, envelope, flat, read, style_kind
from utils.errors import InvalidMessage

RULES = AddressRules(BUCKET, (BUCKET, "second-bucket"), ENDPOINT)
UNCLEAN = re.compile("[\x00-\x08\x0a-\x1f\x7f\ufffd\ud800-\udfff]")
TEXTS = st.text(max_size=60)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [
        *("style_id", "images", "image_urls", "captions", "tags", "validation_images"),
        *("sample_prompts", "trigger_word", "parameters", "task_id", "type", "webhook_url"),
    ]
)
KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=80).filter(
    lambda key: len(key.encode()) <= 1024
    and not key.endswith("/")
    and key == key.strip()
    and not any(part in (".", "..") for part in key.split("/"))
)


def trained_texts(job: Job) -> list[str]:
    """The texts of a job that are trained, as the text encoder gets them."""
    spec = job.spec
    captions = [clean_caption(caption) for caption in (*spec.captions, *spec.tags) if caption]
    return [*(found.text for found in captions if not found.problem), spec.trigger_word]


def outcome(body: bytes) -> Job | None:
    """The job of a body, or None if it is refused with a sentence that names a field."""
    try:
        return read(body)
    except InvalidMessage as error:
        assert error.field and str(error).startswith(error.field)
        assert "\n" not in str(error) and not UNCLEAN.search(str(error).replace("\ufffd", ""))
        return None


@given(st.binary(max_size=400))
def test_any_bytes_are_a_job_or_a_refusal(body: bytes) -> None:
    outcome(body)


@given(st.dictionaries(FIELDS, JSON, max_size=6), st.booleans())
def test_any_values_of_the_fields_are_a_job_or_a_refusal(
    values: dict[str, Any], in_an_envelope: bool
) -> None:
    message = envelope(**values) if in_an_envelope else flat(**values)
    job = outcome(json.dumps(message).encode())
    if job is not None:
        assert job.spec.style_id > 0 and len(job.spec.captions) == len(job.spec.images)


@given(TEXTS, TEXTS, st.lists(TEXTS, max_size=3), TEXTS)
def test_no_control_character_of_a_message_is_trained(
    caption: str, tag: str, prompts: list[str], word: str
) -> None:
    values = {"captions": [caption], "tags": [tag], "sample_prompts": prompts}
    message = envelope(**values, trigger_word=word)
    job = outcome(json.dumps(message).encode())
    if job is not None:
        for text in trained_texts(job):
            assert not UNCLEAN.search(text)
        for prompt in job.spec.sample_prompts:
            assert not UNCLEAN.search(prompt.replace("\ufffd", ""))


@given(st.dictionaries(FIELDS, JSON, max_size=4))
def test_a_job_is_restored_completely_from_its_record_and_from_its_message(
    values: dict[str, Any],
) -> None:
    job = outcome(json.dumps(envelope(**values)).encode())
    assume(job is not None)
    assert job is not None
    stored = json.loads(json.dumps(job.understood()))
    again = from_understood(style_kind(), stored)
    assert again == job and read(again.body).identity == job.identity


@given(KEYS)
def test_every_spelling_of_a_keys_address_gives_this_key(key: str) -> None:
    place = S3Location(BUCKET, key)
    assert read_address(f"s3://{BUCKET}/{key}", RULES)[1] == place
    assert read_address(f"gs://{BUCKET}/{key}", RULES)[1] == place
    assert read_address(f"{ENDPOINT}/{BUCKET}/{quote(key)}", RULES)[1] == place
    assert read_address(f"https://{BUCKET}.s3.amazonaws.com/{quote(key)}", RULES)[1] == place


@given(KEYS, st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40))
def test_the_version_of_an_address_survives_its_shown_form(key: str, version: str) -> None:
    address = f"{ENDPOINT}/{BUCKET}/{quote(key)}?versionId={quote(version, safe='')}"
    shown, place = read_address(address, RULES)
    assert (place, version_of(shown)) == (S3Location(BUCKET, key), version)
    assert read_address(shown, RULES) == (shown, place)


@given(TEXTS)
def test_any_text_is_an_address_in_an_allowed_bucket_or_a_reason(text: str) -> None:
    try:
        shown, place = read_address(text, RULES)
    except BrokenAddress:
        return
    except ValueError as error:
        assert str(error)
        return
    assert place.bucket in RULES.allowed and place.key and read_address(shown, RULES)[1] == place
