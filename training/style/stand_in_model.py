"""A tiny stand-in for Stable Diffusion 1.5, for machines without the model hub or without CUDA.

It has SD1.5's parts and manners (the same kinds of blocks and attention layers, eight pixels to a
latent, the tokenizer's rules, the noise schedule) with few channels and random weights. It paints
noise: it proves the way through a whole training, not the taste of the result.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 32
MAX_TOKENS = 77
COMPLETE = "stand-in.json"
"""Written last: a folder with this file is whole."""
LAYOUT = 1
"""To be raised with every change of what is written below."""

# By hand, as SD1.5's is spelt: a pipeline object would load all of diffusers' pipelines.
_MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def build_stand_in(folder: Path, *, seed: int = 0) -> Path:
    """Write the stand-in as a folder for `StableDiffusionPipeline.from_pretrained`.

    Does nothing where a stand-in of the same seed is complete already. The global random state is
    left alone.

    Args:
        folder: The folder of the model; a half-written one is replaced.
        seed: Seed of the weights: the same seed gives the same files.

    Returns:
        `folder`, absolute.
    """
    folder = Path(folder).absolute()
    mark = folder / COMPLETE
    what = {"seed": seed, "layout": LAYOUT}
    if mark.is_file() and json.loads(mark.read_text("utf-8")) == what:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _write_parts(half)
        (half / "model_index.json").write_text(json.dumps(_MODEL_INDEX, indent=2), "utf-8")
        (half / COMPLETE).write_text(json.dumps(what), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(half, folder)
        except OSError:
            if not mark.is_file():  # else another process was faster, and wrote the same
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return folder


def _write_parts(folder: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    _text_encoder(tokenizer).save_pretrained(folder / "text_encoder", safe_serialization=True)
    _vae().save_pretrained(folder / "vae", safe_serialization=True)
    _unet().save_pretrained(folder / "unet", safe_serialization=True)
    PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")


def _tokenizer() -> Any:
    """CLIP's rules over single characters: every byte, also at a word's end, and no merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    # Byte-level BPE (Radford et al., 2019) spells unprintable bytes with characters from 256 on.
    characters = [chr(b) for b in printable] + [chr(256 + n) for n, _ in enumerate(others)]
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        model_max_length=MAX_TOKENS,
    )


def _text_encoder(tokenizer: Any) -> Any:
    # pylint: disable=unexpected-keyword-arg  # it does not see through the decorator
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _vae() -> Any:
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(16, 16, 32, 32),  # four blocks: eight pixels become one latent
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.18215,
    )


def _unet() -> Any:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),  # SD1.5 has three blocks with attention, and one without
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )


if __name__ == "__main__":
    build_stand_in(Path(sys.argv[1]))
