"""SD1.5's own layout with random weights: as fast and large as the real one, no download."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.style.stand_in_model import build_stand_in

NARROW = 8
"""For machines without a GPU: every part an eighth as wide, and as deep as it is."""


def unet(divisor: int = 1) -> UNet2DConditionModel:
    """SD1.5's UNet, by its published configuration: 859,520,964 parameters.

    Args:
        divisor: Of all widths; 1 or `NARROW`.
    """
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=tuple(width // divisor for width in (320, 640, 1280, 1280)),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=768 // divisor,
        attention_head_dim=8,
        norm_num_groups=32 if divisor == 1 else 8,
    )


def build(folder: Path, divisor: int = 1) -> Path:
    """Write the model as a diffusers folder; the tokenizer and the schedule are the stand-in's.

    Args:
        folder: Receives the model; must not exist yet.
        divisor: Of all widths: 1 for 2 GB in fp16, `NARROW` for 60 MB in fp32.
    """
    model = build_stand_in(folder)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {
            "unet": unet(divisor),
            "vae": AutoencoderKL(
                sample_size=512,
                block_out_channels=tuple(width // divisor for width in (128, 256, 512, 512)),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
                norm_num_groups=32 if divisor == 1 else 8,
                scaling_factor=0.18215,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(  # pylint: disable=unexpected-keyword-arg
                    vocab_size=49408,
                    hidden_size=768 // divisor,
                    intermediate_size=3072 // divisor,
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
        (part.half() if divisor == 1 else part).save_pretrained(
            model / name, safe_serialization=True
        )
    return model
