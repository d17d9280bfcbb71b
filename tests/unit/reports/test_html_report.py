"""The artist's report: whole in one file, readable in a real browser, harmless for any message."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from images.decoder import Decoder
from images.decoding import Request
from jobs.style import HyperParameters, TrainingImage, TrainingRun
from reports.html_report import ReportImages, write_html
from reports.verdict import HELD_OUT
from tests.unit.training.browser import chromium, look
from training.style.results.preview import jpeg, with_row
from training.style.results.probe import Probed
from training.style.results.report import TrainingResult, sample_rows

EVIL = "<script>document.title='taken'</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"
LONG = "averyveryverylongwordwithoutanyplacetobreak" * 8
PROMPTS = ["a harbour at dawn", EVIL, LONG]
PROBES = tuple(
    Probed(10 * n, 100 * n, 0.2 - 0.02 * n, 0.2 - 0.03 * n + 0.006 * n * n) for n in range(6)
)


def image(number: int) -> Image.Image:
    """A coloured gradient."""
    across, down = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 64))
    pixels = np.stack([across, down, np.full_like(across, 40 * number % 256)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def make(folder: Path, **changed: Any) -> tuple[dict[str, Any], TrainingRun, TrainingResult]:
    """A run with every kind of image and of trouble."""
    entries, images = [], []
    for number in range(14):
        path = folder / f"image-{number}.png"
        image(number).save(path)
        status = ("used", "warned", "left_out")[number % 3]
        name = {1: f"{EVIL}.png", 2: f"{LONG}.png"}.get(number, f"image_{number}.png")
        entries.append(
            {
                "source": f"s3://media/training/{name}",
                "status": status,
                "reasons": [EVIL, "is smaller than 512 x 512 pixels"] if status != "used" else [],
                "width": 96,
                "height": 64,
                "trained_as": None if status == "left_out" else "640 x 384",
                "caption": EVIL if number == 3 else f"a red house, {number}",
            }
        )
        images.append(TrainingImage(f"s3://media/training/{name}", str(path)))
    broken = folder / "broken.png"
    broken.write_bytes(b"<svg onload=alert(1)>")
    images[5] = dataclasses.replace(images[5], path=str(broken))
    images[8] = dataclasses.replace(images[8], path=None)
    samples: dict[str, Any] = {}
    for row in ("base", "10", "20", "30", "50"):
        samples = with_row(samples, row, [image(n) for n in range(3)])
    parameters = HyperParameters(epochs=50, deliver="best")
    result = TrainingResult(
        epochs=50,
        steps=500,
        loss=0.1,
        losses=(0.2, math.nan, 0.1),
        seconds=4000.0,
        steps_per_second=1.0,
        peak_memory_bytes=1,
        skipped_steps=0,
        resumed_from=None,
        stopped=None,
        parameters=parameters,
        probes=PROBES,
        best_epoch=20,
        delivered_epoch=20,
        samples=samples,
    )
    run = TrainingRun(
        "task-1",
        10,
        1,
        tuple(images),
        parameters,
        str(folder),
        validation_images=(images[0],),
    )
    report = {
        "task_id": "task-1",
        "style_id": 10,
        "finished_at": "2026-11-26T12:00:00+00:00",
        "trigger_word": "inkstyle",
        "pictures_asked": 14,
        "pictures_used": 10,
        "pictures": entries,
        "validation_pictures": entries[:1],
        "hyperparameters": dataclasses.asdict(parameters),
        "hyperparameters_asked": dataclasses.asdict(parameters) | {"rank": 8},
        "epochs": 50,
        "steps": 500,
        "losses": [0.2, None, 0.1],
        "seconds": 4000.0,
        "probes": [dataclasses.asdict(each) for each in PROBES],
        "best_epoch": 20,
        "delivered_epoch": 20,
        "probe_seconds": 3.0,
        "sample_seconds": 20.0,
        "base_model": {"name": EVIL, "hash": "ab" * 32},
        "versions": {"torch": "2"},
        "files": {"lora_weights_kohya.safetensors": "ComfyUI"},
        "warnings": [EVIL, "After epoch 20 the LoRA began to copy its images."],
    }
    return report | changed, run, result


def thumbnails(run: TrainingRun) -> dict[str, bytes]:
    """The thumbnails of the run's images."""
    images = (*run.images, *run.validation_images)
    paths = [each.path for each in images if each.path]
    requests = [Request(path, run.max_image_pixels, 64) for path in paths]
    with Decoder() as decoder:
        answers = decoder.answers(requests)
        return {p: a.thumbnail for p, a in zip(paths, answers, strict=True) if a.thumbnail}


def written(
    report: dict[str, Any],
    run: TrainingRun,
    result: TrainingResult,
    prompts: list[str],
    folder: Path,
) -> Path:
    """The report's file."""
    known = thumbnails(run)
    images = ReportImages(
        training=[known.get(each.path or "") for each in run.images],
        held_out=[known.get(each.path or "") for each in run.validation_images],
        prompts=prompts,
        before=[jpeg(pattern(n), 256) for n, _ in enumerate(prompts)],
        after=[jpeg(pattern(n + 10), 256) for n, _ in enumerate(prompts)],
        checkpoints=sample_rows(result),
    )
    return write_html(report, images, folder)


def pattern(seed: int) -> Image.Image:
    """A random pattern, unlike every other."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run with everything in it, its report written."""
    path = tmp_path_factory.mktemp("report")
    report, run, result = make(path)
    written(report, run, result, PROMPTS, path)
    yield path


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """Its report."""
    return folder / "training_report.html"


@pytest.fixture(scope="module")
def wide(page: Path) -> dict[str, Any]:
    """The contents that a browser finds on a wide screen."""
    return look(page, width=1280)


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_every_image_and_nothing_beyond_the_edge(page: Path, width: int) -> None:
    found = look(page, width=width)
    assert found["width"] == width
    assert found["needed"] <= width and not found["wide"]
    # 12 thumbnails and one of a held-out image; two cannot be shown; eight above the samples;
    # three pairs of samples; those of five checkpoints.
    assert found["images"] == 13 + 8 + 2 * 3 + 5 * 3
    assert not found["broken"] and not found["unnamed"]


@pytest.mark.browser
def test_the_content_of_a_message_is_text_and_nothing_else(wide: dict[str, Any]) -> None:
    found = wide
    assert (found["scripts"], found["handlers"], found["foreign"]) == (0, 0, [])
    assert found["text"].count("alert(1)") >= 10 and "{{ 7*7 }}" in found["text"]
    assert "&amp;" not in found["text"]


@pytest.mark.browser
def test_it_answers_the_questions_of_an_artist(wide: dict[str, Any]) -> None:
    found = wide
    headings = [text for level, text in found["headings"] if level == "H2"]
    assert headings == [
        *("Your images, and the model’s", "How to use the model", "Each image"),
        *("Held-out images", "The training", "Technical details"),
    ]
    titles = [text for level, text in found["headings"] if level == "H1"]
    assert titles == ["Style 10"]
    text = found["text"]
    for said in (
        "26 November 2026",
        "10 of 14 images were trained on",
        "A prompt to copy: inkstyle, a harbour at dawn",
        "lora_weights_kohya.safetensors",
        "1 h 6 min",
        "Epoch 20 is the model: its loss on the held-out images was the lowest.",
        "is smaller than 512 x 512 pixels",
        "96 × 64, trained as 640 × 384",
        "The same prompt and seed, without and with the LoRA",
    ):
        assert said in text, said


def test_the_first_screen_has_everything_that_went_wrong(tmp_path: Path) -> None:
    diverged = "Training diverged in epoch 3 and went on from epoch 2 with half the learning_rate."
    machine = "There is no CUDA GPU."
    report, run, result = make(
        tmp_path,
        warnings=[machine, diverged],
        machine_warnings=[machine],
        pictures_used=9,
    )
    source = Path(run.images[0].path or "")
    pattern(10).save(source)  # which the sample of the first prompt repeats
    text = written(report, run, result, PROMPTS, tmp_path).read_text(encoding="utf-8")
    first = text[text.index("<body>") : text.index('id="samples"')]
    assert diverged in first and machine not in first
    assert "5 of 14 images were left out" in first
    assert "1 of 3 samples repeats one of your images almost unchanged: image_0.png" in first
    assert "The model may not do what you expect" in first
    assert machine in text


def test_it_is_whole_in_itself_and_forbids_what_it_does_not_need(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.findall(r"https?://", text)
    assert str(page.parent) not in text
    assert len(text) < 1_500_000


def test_an_image_that_is_held_out_is_not_shown_as_trained_on(tmp_path: Path) -> None:
    report, run, result = make(tmp_path)
    text = written(report, run, result, PROMPTS, tmp_path).read_text(encoding="utf-8")
    report["pictures"][0] |= {"reasons": [HELD_OUT]}
    report["pictures_held_out"] = 1
    held = written(report, run, result, PROMPTS, tmp_path).read_text(encoding="utf-8")
    assert "10 of 14 images were trained on" in text and "9 of 14 images were trained on" in held
    strips = [each.split('class="strip">')[1].split("</div>")[0] for each in (text, held)]
    assert "a red house, 0" in strips[0] and "a red house, 0" not in strips[1]


def test_a_report_that_does_not_fit_the_template_is_refused(tmp_path: Path) -> None:
    for name in ("trigger_word", "steps"):
        report, run, result = make(tmp_path)
        del report[name]
        with pytest.raises(ValueError, match=f"cannot be rendered: .{name}."):
            written(report, run, result, PROMPTS, tmp_path)


def test_thumbnails_carry_nothing_but_the_image(tmp_path: Path) -> None:
    report, run, result = make(tmp_path)
    secret = Image.Exif()
    secret[0x010E] = "the artist's address"
    with Image.open(run.images[0].path or "") as plain:
        buffer = io.BytesIO()
        plain.convert("RGB").save(buffer, "JPEG", exif=secret, comment=b"the artist's address")
    Path(run.images[0].path or "").write_bytes(buffer.getvalue())
    text = written(report, run, result, PROMPTS, tmp_path).read_text(encoding="utf-8")
    inside = [base64.b64decode(each) for each in re.findall(r'base64,([^"]+)"', text)]
    assert inside and not any(b"address" in each for each in inside)


@pytest.mark.browser
def test_a_run_without_samples_probe_or_images_to_show_has_a_report_too(tmp_path: Path) -> None:
    report, run, result = make(
        tmp_path, warnings=[], probes=[], best_epoch=None, validation_pictures=[], losses=[]
    )
    result = dataclasses.replace(result, samples={}, probes=())
    run = dataclasses.replace(
        run,
        validation_images=(),
        max_image_pixels=1,
        images=tuple(dataclasses.replace(each, caption="") for each in run.images),
    )
    found = look(written(report, run, result, [], tmp_path), width=360)
    assert found["images"] == 0 and not found["wide"]
    assert "could not compare" in found["text"]


@pytest.mark.browser
def test_it_can_be_photographed(page: Path, folder: Path) -> None:
    """And is no blank sheet."""
    for width in (500, 1280):  # narrower windows the browser does not open
        target = folder / f"page-{width}.png"
        chromium(page, f"--screenshot={target}", width=width, height=1600)
        with Image.open(target) as shot:
            assert shot.width == width
            assert len(shot.convert("RGB").getcolors(1 << 24) or ()) > 1000
