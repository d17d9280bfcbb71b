"""SD1.5 in its true size with random weights: as fast and large as the real one, no download."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sandbox.stand_in_model import build_stand_in


def full_size_unet() -> UNet2DConditionModel:
    """SD1.5's UNet, by its published configuration: 859,520,964 parameters."""
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    )


def build_full_size(folder: Path) -> Path:
    """Write it as a diffusers folder, 2 GB; the tokenizer and the schedule are the stand-in's.

    Args:
        folder: Where; nothing may be there yet.
    """
    model = build_stand_in(folder)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {
            "unet": full_size_unet(),
            "vae": AutoencoderKL(
                sample_size=512,
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
                scaling_factor=0.18215,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(  # pylint: disable=unexpected-keyword-arg
                    vocab_size=49408,
                    hidden_size=768,
                    intermediate_size=3072,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                    max_position_embeddings=77,
                    hidden_act="quick_gelu",
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
        }
    for name, part in parts.items():
        shutil.rmtree(model / name)
        part.half().save_pretrained(model / name, safe_serialization=True)
    return model
