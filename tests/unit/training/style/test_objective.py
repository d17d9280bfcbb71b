"""The objective: the right target, the right weights, the right share of captions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.training.conftest import MakeRun
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from training.style.objective import Chance, denoising_losses, min_snr_weights
from training.style.trainer import LoRATrainer
from utils.errors import TrainingFailed


def scheduler_like(predicts: str, kept: list[float]) -> Any:
    """The part that `min_snr_weights` reads of a scheduler."""
    config = type("Config", (), {"prediction_type": predicts})()
    return type("Scheduler", (), {"config": config, "alphas_cumprod": torch.tensor(kept)})()


def chance(images: int, *, seed: int, caption_dropout: float = 0.0, **more: float) -> Chance:
    """Everything random about some images of 64 pixels."""
    return Chance.draw(
        (images, 4, 8, 8),
        timesteps=1000,
        caption_dropout=caption_dropout,
        **more,
        generator=torch.Generator().manual_seed(seed),
    )


def test_min_snr_divides_by_snr_for_noise_and_by_snr_plus_one_for_velocity() -> None:
    kept = [0.9, 0.5, 0.1]  # SNR 9, 1 and 1/9
    noise = min_snr_weights(scheduler_like("epsilon", kept), 5.0)
    velocity = min_snr_weights(scheduler_like("v_prediction", kept), 5.0)
    assert noise.tolist() == pytest.approx([5 / 9, 1.0, 1.0], rel=1e-5)
    assert velocity.tolist() == pytest.approx([5 / 10, 1 / 2, (1 / 9) / (10 / 9)], rel=1e-5)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_min_snr_is_finite_where_a_schedule_ends_in_pure_noise(predicts: str) -> None:
    weights = min_snr_weights(scheduler_like(predicts, [0.5, 0.0]), 5.0)
    assert weights.tolist() == [1.0 if predicts == "epsilon" else 0.5, float(predicts == "epsilon")]


def test_gamma_zero_turns_min_snr_off() -> None:
    assert min_snr_weights(scheduler_like("epsilon", [0.99, 0.0]), 0.0).tolist() == [1.0, 1.0]


def test_offset_noise_is_one_value_a_channel_and_of_the_size_that_is_asked_for() -> None:
    plain, offset = chance(500, seed=3), chance(500, seed=3, noise_offset=0.3)
    assert torch.equal(offset.sample, plain.sample)
    added = offset.noise - plain.noise
    torch.testing.assert_close(added, added.mean(dim=(2, 3), keepdim=True).expand_as(added))
    assert float(added[..., 0, 0].std()) == pytest.approx(0.3, rel=0.1)
    assert torch.equal(chance(500, seed=3, noise_offset=0.0).timesteps, plain.timesteps)


def test_a_base_that_predicts_samples_is_refused(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.scheduler.config, "prediction_type", "sample", raising=False)
    monkeypatch.setitem(base.scheduler.config, "prediction_type", "sample")
    with pytest.raises(TrainingFailed, match="sample"):
        LoRATrainer(make_run(), base, prepare(make_run(), base))


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_the_target_is_the_prediction_type_of_the_scheduler(
    base: BaseModel, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, predicts: str
) -> None:
    data = prepare(make_run(), base)
    config = type("Config", (), {"prediction_type": predicts, "num_train_timesteps": 1000})()
    monkeypatch.setattr(type(base.scheduler), "config", config)
    latents, text = data.batch([0, 1])
    seen: dict[str, Tensor] = {}

    def perfect(noisy: Tensor, steps: Tensor, **_: Any) -> Any:
        generator = torch.Generator().manual_seed(11)
        clean = latents.mean + latents.std * torch.randn(noisy.shape, generator=generator)
        noise = torch.randn(noisy.shape, generator=generator)
        kept = base.scheduler.alphas_cumprod[steps][:, None, None, None]
        seen["noisy"] = noisy - (kept.sqrt() * clean + (1 - kept).sqrt() * noise)
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        return type("Out", (), {"sample": noise if predicts == "epsilon" else velocity})()

    with monkeypatch.context() as patch:  # the base is wanted whole when the test is over
        patch.setattr(base, "unet", perfect)
        losses, _ = denoising_losses(
            base,
            (latents, text),
            chance(2, seed=11),
            empty_text=data.embeddings[""],
            weights=torch.ones(1000),
            autocast=torch.autocast("cpu", enabled=False),
        )
    assert seen["noisy"].abs().max() < 1e-6
    assert losses.max() < 1e-9


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_captions_are_dropped_as_often_as_asked(
    base: BaseModel, make_run: MakeRun, dropout: float, expected: float
) -> None:
    data = prepare(make_run(), base)
    latents, text = data.batch([0] * 200)
    empty = torch.zeros_like(data.embeddings[""])
    seen: list[Tensor] = []

    class Watching:
        """Stands where the UNet stands."""

        def __call__(self, noisy: Tensor, _steps: Tensor, encoder_hidden_states: Tensor) -> Any:
            seen.append(encoder_hidden_states.flatten(1).any(dim=1))
            return type("Out", (), {"sample": noisy})()

    unet, base.unet = base.unet, Watching()
    try:
        denoising_losses(
            base,
            (latents, text),
            chance(200, seed=1, caption_dropout=dropout),
            empty_text=empty,
            weights=torch.ones(1000),
            autocast=torch.autocast("cpu", enabled=False),
        )
    finally:
        base.unet = unet
    dropped = 1.0 - float(seen[0].float().mean())
    assert dropped == pytest.approx(expected, abs=0.12)
