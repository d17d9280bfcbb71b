"""The output for operators on a terminal of 80 columns: one line per job, details, a bar."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from cli.jobs.follow import JobBar
from cli.jobs.job_view import JobView
from cli.jobs.screen import WIDE, print_details, print_jobs, progress
from cli.jobs.task_ids import SHOWN, short_ids
from jobs.kinds import Standing

LONG_ERROR = "the images could not be used because " * 8
NONE = Standing(0, None, "epoch", {"loss": None})
HELD = JobView(
    "550e8400-e29b-41d4-a716-446655440000",
    Standing(1000, 1000, "epoch", {"loss": 0.12344}),
    style_id=1_000_000_123,
    kind="style",
    subject="1000000123",
    state="held",
    owner="worker-with-a-long-name-8906-dca941ad",
    claim=3,
    seconds_left=3725,
    delivery="none",
    seconds_since_written=3540,
)
FAILED = JobView(
    "0f8fad5b-d9cb-469f-a165-70867728950e",
    Standing(100, 1000, "epoch"),
    style_id=1_000_000_124,
    kind="style",
    subject="1000000124",
    state="ended",
    attempts=3,
    ending="failed BASE_MODEL_UNAVAILABLE",
    delivery="set_aside",
    detail=LONG_ERROR,
    seconds_since_written=86_400 * 300,
)
REFUSED = JobView(
    "invalid/" + "f38c7d05" * 8,
    NONE,
    style_id=77,
    kind="style",
    subject="77",
    state="ended",
    ending="failed INVALID_MESSAGE",
    delivery="delivered",
    message_task_id="refused-one",
)
UNKNOWN = JobView("nobody-knows-it", NONE, detail="there is no such record")


def at_epoch(epoch: int, loss: float | None = 0.12344) -> JobView:
    """The held job, at an epoch."""
    return dataclasses.replace(HELD, standing=Standing(epoch, 1000, "epoch", {"loss": loss}))


def _lines(*jobs: JobView, width: int = 80, known: tuple[str, ...] = ()) -> list[str]:
    written = io.StringIO()
    print_jobs(jobs, known, Console(file=written, width=width))
    return [line.rstrip() for line in written.getvalue().splitlines()]


def _details(*jobs: JobView) -> str:
    written = io.StringIO()
    print_details(jobs, Console(file=written, width=80, highlight=False))
    return written.getvalue()


def test_each_job_is_one_line_of_80_columns() -> None:
    lines = _lines(HELD, FAILED, REFUSED, UNKNOWN)
    assert len(lines) == 5 and max(map(len, lines)) <= 80
    assert lines[1].split() == ["550e8400", "1000000123", "held", "1000/1000", "59", "min"]
    assert "failed BASE_MODEL_UNAVAILA" in lines[2] and "refused" in lines[2]
    assert lines[2].endswith("300 d") and "could not be used" not in lines[2]
    assert lines[3].startswith("refused-one ") and "unknown" in lines[4]


def test_a_short_line_is_shown_in_full() -> None:
    line = _lines(dataclasses.replace(FAILED, style_id=7, subject="7"))[1]
    assert "failed BASE_MODEL_UNAVAILABLE" in line and "…" not in line


def test_a_wide_terminal_shows_the_start_of_the_error() -> None:
    lines = _lines(FAILED, width=WIDE)
    assert len(lines) == 2 and "the images" in lines[1] and len(lines[1]) <= WIDE


def test_details_have_everything_and_fold_what_is_long() -> None:
    text = _details(HELD, FAILED)
    assert HELD.task_id in text and FAILED.task_id in text and HELD.owner in text
    assert "epoch 1000/1000, loss 0.1234, 1:02:05 left" in text
    assert "refused the ending" in text and "3 attempts in a row" in text
    assert " ".join(text.split()).count("could not be used because") == 8
    assert max(map(len, text.splitlines())) <= 80


def test_text_from_a_message_cannot_move_the_cursor() -> None:
    text = _details(dataclasses.replace(FAILED, detail="\x1b[2Jgone\r"))
    assert "\x1b[2J" not in text and "�[2Jgone�" in text


def test_short_ids_name_one_job_only() -> None:
    uuids = ("550e8400-e29b-41d4-a716-446655440000", "550e8400-e29b-99d4-a716-446655440000")
    short = short_ids(uuids, ("550e8", "something-else"))
    assert short[uuids[0]] == "550e8400-e29b-4" and short[uuids[1]] == "550e8400-e29b-9"
    assert short_ids(uuids[:1], ())[uuids[0]] == uuids[0][:SHOWN]


def test_an_id_that_is_short_already_is_shown_in_full() -> None:
    assert short_ids(["order-123"], ["order-124"]) == {"order-123": "order-123"}


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (HELD, "epoch 1000/1000, loss 0.1234, 1:02:05 left"),
        (dataclasses.replace(at_epoch(1000, None), seconds_left=None), "epoch 1000/1000"),
        (UNKNOWN, ""),
    ],
)
def test_the_progress_of_a_job_takes_a_few_words(job: JobView, words: str) -> None:
    assert progress(job) == words


def test_without_a_terminal_each_epoch_gets_a_line_instead_of_the_bar() -> None:
    written = io.StringIO()
    with JobBar(Console(file=written, width=80)) as shown:
        shown.uploaded(1, 3)
        shown.saw(UNKNOWN)
        for epoch in (4, 4, 5):
            shown.saw(at_epoch(epoch))
    lines = written.getvalue().splitlines()
    assert lines[0] == "waiting for a worker"
    assert [line.split(",")[0] for line in lines[1:]] == [
        "training: epoch 4/1000",
        "training: epoch 5/1000",
    ]


def test_on_a_terminal_of_80_columns_the_bar_shows_epoch_loss_and_time_left() -> None:
    written = io.StringIO()
    console = Console(file=written, width=80, force_terminal=True, color_system=None)
    with JobBar(console) as shown:
        shown.saw(at_epoch(24))
        shown._progress.refresh()  # pylint: disable=protected-access
    assert "epoch 24/1000, loss 0.1234, 1:02:05 left" in written.getvalue()
