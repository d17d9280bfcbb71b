"""Local training: which files of a folder are its images, and what is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.training.local import MADE, folder_run, images_in, train_folder
from config import load_local
from consumer.life.stop_signal import StopSignal
from jobs.style import HyperParameters
from utils.errors import ConfigurationError


def fill(folder: Path, *names: str) -> Path:
    """A folder with a file of each name."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"content")
    return folder


def train(folder: Path, output: Path, *, trigger_word: str = "", **settings: str) -> None:
    """Begin to train; what is refused is refused before anything is written or started."""
    train_folder(
        folder,
        output,
        settings=load_local(_env_file=None, **settings),  # type: ignore[arg-type]
        parameters=HyperParameters(),
        trigger_word=trigger_word,
        resume=False,
        on_event=lambda event: None,
        stop=StopSignal(),
    )


def test_a_result_of_an_earlier_training_in_the_folder_is_no_image(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures", "one.jpg", "two.png", *MADE)
    assert [image.source for image in images_in(folder)] == ["one.jpg", "two.png"]


def test_auto_epochs_follow_the_number_of_images_in_the_folder(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures", *(f"{each}.jpg" for each in range(20)))
    settings = load_local(_env_file=None, epochs="auto")
    run = folder_run(folder, settings, settings.parameters["style"], "")
    assert (run.parameters.epochs, run.epochs_auto) == (150, True)


def test_a_trigger_word_that_would_be_several_tags_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the trigger word must have no comma"):
        train(fill(tmp_path / "pictures", "one.jpg"), tmp_path / "model", trigger_word="a, b")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("word", ["half \udcb0", "esc \x1b", "lost \N{REPLACEMENT CHARACTER}"])
def test_a_trigger_word_that_is_no_text_is_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigurationError, match="the trigger word must be valid Unicode text"):
        train(fill(tmp_path / "pictures", "one.jpg"), tmp_path / "model", trigger_word=word)


@pytest.mark.parametrize("setting", ["--output", "BASE_MODEL"])
def test_a_path_that_the_end_of_a_training_could_not_write_is_refused_at_its_start(
    tmp_path: Path, setting: str
) -> None:
    folder, bad = fill(tmp_path / "pictures", "one.jpg"), tmp_path / "\udcb0\udca1"
    with pytest.raises(ConfigurationError, match=rf"{setting}: .*\\xb0\\xa1 is not UTF-8"):
        if setting == "--output":
            train(folder, bad)
        else:
            train(folder, tmp_path / "model", base_model=str(bad))
    assert not bad.exists()


def test_without_a_report_next_to_it_a_file_of_such_a_name_is_an_image(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures", "one.jpg", "samples.png")
    assert [image.source for image in images_in(folder)] == ["one.jpg", "samples.png"]


def test_an_image_that_the_training_would_overwrite_is_reported_before_it_starts(
    tmp_path: Path,
) -> None:
    folder = fill(tmp_path / "pictures", "one.jpg", "samples.png")
    with pytest.raises(ConfigurationError, match="samples.png, which the training would overwrite"):
        train(folder, tmp_path / "elsewhere" / ".." / "pictures")
    assert sorted(path.name for path in folder.iterdir()) == ["one.jpg", "samples.png"]


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"\xef\xbb\xbfa harbour\r\nat dawn \n", "a harbour at dawn"),
        (b" \n", ""),
        (b"x" * (16 * 1024 + 1), ""),
    ],
)
def test_a_caption_is_the_text_that_it_would_be_on_s3(
    tmp_path: Path, content: bytes, caption: str
) -> None:
    folder = fill(tmp_path / "pictures", "one.jpg")
    (folder / "one.txt").write_bytes(content)
    assert [image.caption for image in images_in(folder)] == [caption]


def test_a_base_model_that_is_not_there_is_named_with_its_place(tmp_path: Path) -> None:
    folder, nowhere = fill(tmp_path / "pictures", "one.jpg"), tmp_path / "nowhere"
    with pytest.raises(ConfigurationError, match=f"the folder {nowhere} does not exist"):
        train(folder, tmp_path / "output", base_model=str(nowhere))
    assert not (tmp_path / "output").exists()


def test_a_base_model_of_another_family_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder, other = fill(tmp_path / "pictures", "one.jpg"), tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ConfigurationError, match=f"{other} is Stable Diffusion XL"):
        train(folder, tmp_path / "output", base_model=str(other))
    assert not (tmp_path / "output").exists()
