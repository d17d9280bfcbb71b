"""The verdict puts the numbers of a report into words."""

from __future__ import annotations

from typing import Any

import pytest

from reports.likeness import Copy
from reports.verdict import Level, Point, TrainingVerdict, of_style


def report(*probes: tuple[int, float, float | None], **changed: Any) -> dict[str, Any]:
    """A report whose probes are epoch, loss on training images, and loss on held-out images."""
    return {
        "probes": [
            {"epoch": epoch, "step": epoch, "training": training, "held_out": held_out}
            for epoch, training, held_out in probes
        ],
        "delivered_epoch": probes[-1][0] if probes else None,
        "pictures_used": 10,
        "pictures_asked": 10,
        "pictures": [],
        "warnings": [],
    } | changed


def texts(content: dict[str, Any], *copies: Copy | None) -> str:
    """The sentences of a verdict."""
    return "\n".join(point.text for point in of_style(content, copies).points)


def test_a_loss_that_falls_on_held_out_images_is_a_style_that_was_learnt() -> None:
    found = of_style(report((0, 0.2, 0.2), (10, 0.1, 0.15)), [None])
    assert found.level is Level.GOOD
    assert found.headline == "The model has learnt your style."
    assert found.points[0].text == (
        "It has learnt: its error on images that were held out fell by 25%."
    )
    assert "0.2000 before, 0.1500 after" in found.points[0].numbers


def test_the_training_images_are_the_measure_where_none_were_held_out() -> None:
    found = of_style(report((0, 0.2, None), (10, 0.1, None)), [])
    assert "its error on your images fell by 50%" in found.points[0].text
    assert found.points[1].level is Level.NOTE
    assert "No images were held out" in found.points[1].text
    assert found.headline == "The model is ready."


@pytest.mark.parametrize(
    ("after", "level", "said"),
    [
        (0.1999, Level.WARNING, "has learnt little"),
        (0.2, Level.BAD, "no better than the base model"),
        (0.3, Level.BAD, "no better than the base model"),
    ],
)
def test_a_loss_that_hardly_falls_is_no_success(after: float, level: Level, said: str) -> None:
    found = of_style(report((0, 0.2, None), (10, after, None)), [])
    assert found.points[0].level is level and found.level is level
    assert said in found.points[0].text


@pytest.mark.parametrize(
    ("after", "level"), [(0.1981, Level.WARNING), (0.1979, Level.GOOD)], ids=["0.95%", "1.05%"]
)
def test_a_fall_of_less_than_a_hundredth_is_a_slight_one(after: float, level: Level) -> None:
    found = of_style(report((0, 0.2, 0.2), (10, 0.1, after)), [])
    assert found.points[0].level is level and found.level is level


def test_each_level_has_its_own_headline() -> None:
    headlines = {
        Level.GOOD: "has learnt your style",
        Level.NOTE: "is ready.",
        Level.WARNING: "is ready. Read the notes",
        Level.BAD: "may not do what you expect",
    }
    for level, said in headlines.items():
        found = TrainingVerdict(
            (Point(Level.GOOD, "fine"), Point(level, "news"), Point(Level.GOOD, "fine"))
        )
        assert found.level is level and said in found.headline


def test_without_a_measurement_nothing_is_claimed() -> None:
    unmeasured = report((0, 0.2, None), (10, 0.1, None))
    unmeasured["probes"][1]["training"] = None
    for content in (report(), unmeasured, report((10, 0.1, None))):
        found = of_style(content, [])
        assert found.points[0].level is Level.NOTE
        assert "no measurement" in found.points[0].text


def test_a_held_out_loss_that_rises_again_is_copying_and_names_the_better_epoch() -> None:
    copied = report((0, 0.2, 0.2), (10, 0.15, 0.15), (20, 0.1, 0.17))
    assert "began to copy your images after epoch 10" in texts(copied)
    assert of_style(copied, []).level is Level.WARNING
    slightly = report((0, 0.2, 0.2), (10, 0.15, 0.15), (20, 0.1, 0.1509))
    assert "began to copy your images after epoch 10" in texts(slightly)
    stood_still = report((0, 0.2, 0.2), (10, 0.15, 0.15), (20, 0.1, 0.1506))
    assert "has not begun to copy" in texts(stood_still)


def test_a_checkpoint_from_before_the_copying_is_no_copy() -> None:
    early = report((0, 0.2, 0.2), (10, 0.15, 0.15), (20, 0.1, 0.17), delivered_epoch=10)
    assert "has not begun to copy" in texts(early)


def test_a_sample_that_repeats_an_image_is_named_with_its_numbers() -> None:
    content = report((0, 0.2, 0.2), (10, 0.1, 0.15))
    found = of_style(content, [None, Copy("harbour.jpg", 0.97, 0.12)])
    assert found.level is Level.BAD
    assert "1 of 2 samples repeats one of your images almost unchanged: harbour.jpg" in (
        found.points[2].text
    )
    assert found.points[2].numbers == "likeness to harbour.jpg: 0.97 with the LoRA, 0.12 without"


def test_an_image_that_several_samples_repeat_is_named_once() -> None:
    copy = Copy("harbour.jpg", 0.97, 0.12)
    said = texts(report((0, 0.2, 0.2), (10, 0.1, 0.15)), copy, copy)
    assert "2 of 2 samples" in said and said.count("harbour.jpg") == 1


def test_images_that_were_left_out_are_counted_by_reason() -> None:
    reasons = ["is damaged", "is small", "is small", "is a film", "is missing", "is damaged"]
    left_out = [{"status": "left_out", "reasons": [each, "and more"]} for each in reasons]
    others = [
        {"status": "used", "reasons": []},
        {"status": "warned", "reasons": ["is a film"]},
    ]
    content = report((0, 0.2, 0.2), (10, 0.1, 0.15), pictures_used=4, pictures=[*left_out, *others])
    point = of_style(content, []).points[-1]
    assert point.level is Level.WARNING
    assert point.text == "6 of 10 images were left out. Replace or remove them."
    assert point.numbers == "is damaged (2); is small (2); is a film (1)", "the most common three"


def test_warnings_of_the_run_lower_the_verdict_and_those_of_the_machine_do_not() -> None:
    content = report((0, 0.2, 0.2), (10, 0.1, 0.15), warnings=["no GPU", "diverged"])
    assert of_style(content, []).notes == ("no GPU", "diverged")
    found = of_style(content | {"machine_warnings": ["no GPU"]}, [])
    assert found.notes == ("diverged",) and found.level is Level.WARNING
    both = {"machine_warnings": ["no GPU", "diverged"]}
    assert of_style(content | both, []).level is Level.GOOD
