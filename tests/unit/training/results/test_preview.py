"""Samples and loss curve: they show the right images, and do not change training."""

from __future__ import annotations

import logging
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.style import HyperParameters
from reports.charts import smoothed
from tests.unit.training.conftest import MakeRun
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from training.style.results import preview
from training.style.results.examiner import Examiner
from training.style.results.preview import write_loss_curve, write_samples
from training.style.trainer import LoRATrainer

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(name="trained")
def fixture_trained(base: BaseModel) -> BaseModel:
    """A base with a LoRA whose effect can be seen."""
    weights = base.attach(HyperParameters(rank=4, alpha=16.0, resolution=64))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return base


def sample(base: BaseModel, folder: Path, *prompts: str, seed: int = 3) -> Path:
    """Samples of the tiny model's size."""
    write_samples(base, prompts, seed, folder, resolution=64, steps=2)
    return folder / "samples.png"


def cells(path: Path, rows: int) -> list[tuple[Pixels, Pixels]]:
    """The images without and with the LoRA, cut out of the sheet."""
    sheet = np.asarray(Image.open(path))
    left = (preview.MARGIN + preview.LEAST_CELL + preview.MARGIN) // 2 - 32
    right = left + preview.LEAST_CELL + preview.MARGIN
    pitch = 64 + preview.LINE + preview.MARGIN
    tops = [preview.MARGIN + preview.LINE + row * pitch for row in range(rows)]
    return [
        (sheet[top : top + 64, left : left + 64], sheet[top : top + 64, right : right + 64])
        for top in tops
    ]


def test_the_columns_differ_by_the_lora_and_the_rows_by_prompt_and_noise(
    trained: BaseModel, tmp_path: Path
) -> None:
    path = sample(trained, tmp_path, "a harbour", "a cat")
    assert [file.name for file in tmp_path.iterdir()] == ["samples.png"]
    (without, with_lora), (other, _) = cells(path, 2)
    assert without.std() > 5 and with_lora.std() > 5  # images, not paper
    assert (without != with_lora).any()
    assert (without != other).any()


def test_without_an_effect_of_the_lora_the_columns_are_the_same(
    base: BaseModel, tmp_path: Path
) -> None:
    base.attach(HyperParameters(rank=4, alpha=16.0, resolution=64))
    [(without, with_lora)] = cells(sample(base, tmp_path, "a harbour"), 1)
    np.testing.assert_array_equal(without, with_lora)


def test_the_same_seed_paints_the_same_image_and_another_seed_another(
    trained: BaseModel, tmp_path: Path
) -> None:
    first = sample(trained, tmp_path, "a harbour").read_bytes()
    assert sample(trained, tmp_path, "a harbour").read_bytes() == first
    assert sample(trained, tmp_path, "a harbour", seed=4).read_bytes() != first


def test_at_most_four_different_prompts_are_painted(trained: BaseModel, tmp_path: Path) -> None:
    many = sample(trained, tmp_path, *"aabbccddee").read_bytes()
    assert sample(trained, tmp_path, *"abcd").read_bytes() == many


@pytest.mark.parametrize("prompts", [(), ("",), ("wörter " * 100,), ("바다의 새벽\n" * 3,)])
def test_no_prompt_and_long_and_foreign_prompts_are_drawn(
    trained: BaseModel, tmp_path: Path, prompts: tuple[str, ...]
) -> None:
    sheet = np.asarray(Image.open(sample(trained, tmp_path, *prompts)))
    assert sheet.shape == (152, 2 * preview.LEAST_CELL + 3 * preview.MARGIN, 3)
    label = sheet[preview.MARGIN + preview.LINE + 64 :]
    assert label.min() < 128  # something is written
    edges = label[:, : preview.MARGIN - 2], label[:, 2 - preview.MARGIN :]
    assert all((edge == 255).all() for edge in edges)  # and ends before the paper does


def test_sampling_leaves_training_as_it_was(trained: BaseModel, tmp_path: Path) -> None:
    unet = trained.unet
    unet.enable_gradient_checkpointing()
    unet.mid_block.eval()  # modes and flags are restored one by one
    unet.mid_block.requires_grad_(False)

    def condition() -> list[object]:
        return [
            [(name, module.training) for name, module in unet.named_modules()],
            [(name, w.requires_grad, w.dtype) for name, w in unet.named_parameters()],
            unet.is_gradient_checkpointing,
            unet.active_adapters(),
            torch.get_rng_state().tolist(),
            random.getstate(),
            torch.is_grad_enabled(),
        ]

    weights = {name: weight.clone() for name, weight in unet.state_dict().items()}
    before = condition()
    sample(trained, tmp_path, "a harbour")
    assert condition() == before
    assert all(torch.equal(weight, weights[name]) for name, weight in unet.state_dict().items())


def test_the_lora_is_on_again_when_sampling_fails(
    trained: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object, **_named: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(trained.vae, "decode", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        sample(trained, tmp_path, "a harbour")
    lora = [weight for name, weight in trained.unet.named_parameters() if ".lora_" in name]
    assert all(weight.requires_grad for weight in lora)
    monkeypatch.undo()
    [(without, with_lora)] = cells(sample(trained, tmp_path, "a harbour"), 1)
    assert (without != with_lora).any()


def test_a_half_precision_base_with_a_single_precision_lora_paints(
    trained: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = cells(sample(trained, tmp_path, "a harbour"), 1)[0][1]
    frozen = [weight for weight in trained.unet.parameters() if not weight.requires_grad]
    kept = [weight.data for weight in frozen]
    monkeypatch.setattr(trained, "dtype", torch.bfloat16)
    try:
        for weight in frozen:
            weight.data = weight.data.to(torch.bfloat16)
        half = cells(sample(trained, tmp_path, "a harbour"), 1)[0][1]
    finally:
        for weight, data in zip(frozen, kept, strict=True):
            weight.data = data
    assert np.abs(full.astype(float) - half).mean() < 8


def test_an_image_that_is_not_finite_is_logged_and_drawn_black(
    trained: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        trained.unet.get_parameter(
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.default.weight"
        ).fill_(math.nan)
    with caplog.at_level(logging.WARNING, logger="training.style.results.preview"):
        [(without, with_lora)] = cells(sample(trained, tmp_path, "a harbour"), 1)
    assert without.any() and not with_lora.any()
    assert "sample_not_finite" in caplog.text


@pytest.mark.parametrize(
    "losses", [[0.3], [0.5, 0.4], [0.5, math.nan, 0.4], [math.nan], [1 / n for n in range(1, 1001)]]
)
def test_a_loss_curve_is_drawn_for_any_number_of_epochs(
    losses: list[float], tmp_path: Path
) -> None:
    path = write_loss_curve(losses, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["loss_curve.png"]
    with Image.open(path) as image:
        assert image.size == (960, 540)
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 2


def test_plotting_uses_no_global_state() -> None:
    assert "matplotlib.pyplot" not in sys.modules


def test_smoothing_calms_the_loss_and_passes_over_gaps() -> None:
    noisy = [1.0 + (-1) ** n * 0.5 for n in range(40)]
    calm = smoothed(noisy)
    assert np.std(calm[10:]) < 0.5 * np.std(noisy)
    assert smoothed([math.nan, 2.0, math.nan]) == pytest.approx([math.nan, 2.0, 2.0], nan_ok=True)
    assert not smoothed([])


def test_the_prompts_of_the_samples_are_encoded_once_and_not_again_at_each_checkpoint(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(
        epochs=2,
        checkpoint_interval=1,
        sample_prompts=("a harbour",),
        trigger_word="mystyle",
        preview_share=1.0,
        sample_steps=1,
    )
    data = prepare(run, base)
    assert "mystyle, a harbour" in data.embeddings

    def refuse(_: object) -> torch.Tensor:
        raise AssertionError("The text encoder was used during training.")

    monkeypatch.setattr(base, "encode_prompts", refuse)
    monkeypatch.setattr(Examiner, "_has_time_for", lambda *_: True)
    result = LoRATrainer(run, base, data).train()
    assert preview.sampled_epochs(result.samples) == [1, 2]
