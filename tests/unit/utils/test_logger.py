"""The log: one line of JSON per event, with its job, and without secrets of any logger."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from utils.logger import MASK, Redactor, bound, configure, get_logger

SECRET = "correct-horse-battery-staple"


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The log so far; every line must be one JSON object."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_an_event_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    get_logger("services.s3.s3_service").info("picture_downloaded", image="ä.jpg", seconds=0.5)
    (line,) = lines(capsys)
    assert line["event"] == "picture_downloaded"
    assert line["image"] == "ä.jpg"
    assert line["seconds"] == 0.5
    assert line["level"] == "info"
    assert line["logger"] == "services.s3.s3_service"
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize(
    "spell",
    [
        str,
        quote,
        lambda secret: quote(secret, safe=""),
        lambda secret: re.sub("%..", lambda code: code[0].lower(), quote(secret, safe="")),
        quote_plus,
        repr,
        json.dumps,
        lambda secret: json.dumps({"in": json.dumps(secret)}),
        lambda secret: str(secret.encode()),
    ],
)
def test_a_secret_is_masked_however_it_is_spelt(spell: Callable[[str], str]) -> None:
    for secret in ("p@ss/w+rd=12 x", 'quoted"back\\slash', "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEX"):
        said = Redactor([secret]).clean(f"url: /?key={spell(secret)}&page=7 refused")
        assert MASK in said and said.endswith("refused")
        assert not re.search(r"p@ss|rd=12|p%40ss|quoted|slash|K7MDENG|FEMI", said, re.IGNORECASE)


def test_a_line_break_in_a_value_makes_no_second_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    get_logger("x").info("caption_read", caption='two\nlines", "event": "forged')
    (line,) = lines(capsys)
    assert line["event"] == "caption_read"


def test_the_standard_library_s_loggers_write_the_same_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure()
    logging.getLogger("training.style.dataset").info("image_vetted", extra={"image": 3})
    logging.getLogger("third.party").warning("%s of %d", "one", 2)
    vetted, foreign = lines(capsys)
    assert (vetted["event"], vetted["image"]) == ("image_vetted", 3)
    assert (foreign["event"], foreign["level"]) == ("one of 2", "warning")


def test_the_job_is_bound_to_every_line_until_the_block_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure()
    with bound(task_id="job", style_id=7):
        get_logger("x").info("one")
        logging.getLogger("training.style.trainer").info("two")
    get_logger("x").info("three")
    one, two, three = lines(capsys)
    assert (one["task_id"], one["style_id"]) == (two["task_id"], two["style_id"]) == ("job", 7)
    assert "task_id" not in three


def test_the_level_holds(capsys: pytest.CaptureFixture[str]) -> None:
    configure(level="WARNING")
    get_logger("x").info("quiet")
    get_logger("x").warning("loud")
    assert [line["event"] for line in lines(capsys)] == ["loud"]


def test_libraries_that_log_every_request_are_kept_quiet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure(level="DEBUG")
    logging.getLogger("botocore.auth").debug("CanonicalRequest: x-amz-security-token")
    logging.getLogger("pika.connection").info("a long story")
    get_logger("x").debug("ours")
    assert [line["event"] for line in lines(capsys)] == ["ours"]


def test_python_s_warnings_reach_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure()
        warnings.warn("old habits", FutureWarning, stacklevel=1)
    assert "old habits" in lines(capsys)[0]["event"]


def test_the_text_format_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format="text", secrets=[SECRET])
    get_logger("x").info("model_published", style=7, token=SECRET)
    text = capsys.readouterr().err
    assert "model_published" in text and "style=7" in text
    assert "\x1b" not in text, "colours are for terminals"
    assert SECRET not in text


DIES = """
import sys, threading
from utils.logger import configure
configure(secrets=["correct-horse-battery-staple"])
def die(): raise ValueError("with correct-horse-battery-staple")
thread = threading.Thread(target=die, name="watch")
thread.start()
thread.join()
die()
"""


def test_an_uncaught_exception_is_a_line_of_the_log_too() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", DIES], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert SECRET not in ended.stderr
    thread, main = (json.loads(line) for line in ended.stderr.splitlines())
    assert (thread["event"], thread["level"], thread["thread"]) == (
        *("thread_died", "error"),
        "watch",
    )
    assert (main["event"], main["level"]) == ("uncaught_exception", "critical")
    assert all(f"ValueError: with {MASK}" in line["exception"] for line in (thread, main))


# ---- secrets -------------------------------------------------------------------------------------


def test_a_secret_is_masked_at_any_place(capsys: pytest.CaptureFixture[str]) -> None:
    configure(secrets=[SECRET])
    get_logger("x").info(
        f"said_{SECRET}",
        text=f"before {SECRET} after",
        nested={"list": [SECRET, {SECRET: 1}], "pair": (SECRET,)},
        error=ValueError(SECRET),
        raw=SECRET.encode(),
    )
    with bound(task_id=SECRET):
        get_logger("x").info("bound")
    text = capsys.readouterr().err
    assert SECRET not in text
    assert text.count(MASK) == 8


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_secret_is_masked_in_a_traceback(
    capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    configure(log_format=log_format, secrets=[SECRET])
    try:
        raise ValueError(f"connecting with {SECRET}")
    except ValueError:
        get_logger("x").exception("broke")
        logging.getLogger("third.party").exception("broke too")
    text = capsys.readouterr().err
    assert SECRET not in text
    assert text.count(f"ValueError: connecting with {MASK}") == 2


def test_a_secret_is_masked_in_what_third_parties_log(capsys: pytest.CaptureFixture[str]) -> None:
    configure(secrets=[SECRET])
    logging.getLogger("third.party").error("sent %s", SECRET, extra={"header": SECRET})
    text = capsys.readouterr().err
    assert SECRET not in text
    assert MASK in text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer "),
        ("authorization: basic YWJjOmRlZg==", "authorization: basic "),
        ("signs with whsec_c2VjcmV0c2VjcmV0", "signs with "),
        ("hub token hf_abcdefghijklmnopqrstuvwx", "hub token "),
        ("key AKIAIOSFODNN7EXAMPLE is wrong", "key "),
        ("amqp://trainer:hunter2@broker:5672/", "amqp://trainer:"),
        ("https://b.s3/k?a=1&X-Amz-Signature=0a1b2c3d&x=2", "https://b.s3/k?a=1&X-Amz-Signature="),
        ("https://b.s3/k?X-Amz-Credential=AKIA%2F2025&x=2", "https://b.s3/k?X-Amz-Credential="),
    ],
)
def test_text_in_the_shape_of_a_secret_is_masked_without_a_setting(text: str, kept: str) -> None:
    cleaned = Redactor().clean(text)
    assert cleaned.startswith(kept + MASK)


@pytest.mark.parametrize("name", ["token", "aws_secret_access_key", "Authorization", "PASSWORD"])
def test_a_value_under_a_secret_s_name_is_masked(name: str) -> None:
    assert Redactor().clean({name: "anything"}) == {name: MASK}


@pytest.mark.parametrize(
    "harmless",
    [
        "s3://stylelicense-media/training/123/image_0.jpg",
        "https://api.stylelicense.com/api/webhooks/training/complete",
        {"tokens": 77, "seconds": 0.5, "image": None, "ok": True},
        "550e8400-e29b-41d4-a716-446655440000",
        "a bearer of news",
    ],
)
def test_text_that_is_no_secret_stays_readable(harmless: Any) -> None:
    assert Redactor([SECRET]).clean(harmless) == harmless


def test_a_secret_inside_a_longer_one_leaves_nothing_of_it() -> None:
    assert Redactor([SECRET[:10], SECRET]).clean(SECRET) == MASK


def test_a_very_short_secret_does_not_mask_half_of_every_line() -> None:
    assert Redactor(["a"]).clean("a harbour at dawn") == "a harbour at dawn"
