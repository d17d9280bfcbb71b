"""`inspect` on a terminal of 80 columns: a summary, and every detail when asked."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from cli import inspect as inspect_command

LAYERS = 48


def _file(folder: Path, alpha: float = 32.0) -> Path:
    """A kohya file of many layers."""
    tensors: dict[str, torch.Tensor] = {}
    for number in range(LAYERS):
        name = f"lora_unet_down_blocks_{number}_attentions_0_transformer_blocks_0_attn1_to_k"
        tensors |= {
            f"{name}.lora_down.weight": torch.ones(16, 4),
            f"{name}.lora_up.weight": torch.ones(4, 16),
            f"{name}.alpha": torch.tensor(alpha),
        }
    path = folder / "style.safetensors"
    save_file(tensors, path, metadata={"modelspec.title": "Style 123", "ss_seed": "42"})
    return path


def _diffusers(folder: Path, alpha: int = 16) -> Path:
    path = folder / "lora_weights.safetensors"
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
    config = json.dumps({"unet.lora_alpha": alpha, "unet.r": 16})
    tensors = {
        f"{layer}.lora_A.weight": torch.ones(16, 4),
        f"{layer}.lora_B.weight": torch.ones(4, 16),
    }
    save_file(tensors, path, metadata={"lora_adapter_metadata": config})
    return path


def _shown(path: Path, *, show_all: bool = False, as_json: bool = False) -> str:
    written = io.StringIO()
    console = Console(file=written, width=80)
    assert inspect_command.run(path, as_json=as_json, show_all=show_all, console=console) == 0
    return written.getvalue()


def test_the_summary_is_short_and_names_the_option_for_the_rest(tmp_path: Path) -> None:
    lines = _shown(_file(tmp_path)).splitlines()
    assert len(lines) < 20 and max(map(len, lines)) <= 80
    assert lines[0].split() == ["file", "style.safetensors"]
    assert lines[-1] == "--all also prints 48 layers and 2 metadata entries."
    assert any(
        line.startswith("title") and line.endswith("Style 123") for line in map(str.rstrip, lines)
    )


def test_all_lists_every_layer_and_the_metadata_after_the_summary(tmp_path: Path) -> None:
    text = _shown(_file(tmp_path), show_all=True)
    assert text.startswith("file") and "ss_seed" in text
    assert text.index("format") < text.index("Layers") < text.index("Metadata")
    assert text.count("lora_unet_down_blocks") == LAYERS


@pytest.mark.parametrize("alpha", [16, 32])
def test_the_summary_of_a_diffusers_file_explains_why_its_alpha_is_the_rank(
    tmp_path: Path, alpha: int
) -> None:
    explained = "folded into the weights" in " ".join(_shown(_diffusers(tmp_path, alpha)).split())
    assert explained is (alpha == 16)


@pytest.mark.parametrize("alpha", [16.0, 32.0])
def test_the_summary_of_a_file_that_keeps_alpha_explains_the_difference_from_the_diffusers_file(
    tmp_path: Path, alpha: float
) -> None:
    explained = "diffusers file of the same model" in " ".join(
        _shown(_file(tmp_path, alpha)).split()
    )
    assert explained is (alpha != 16)


def test_json_has_everything_without_being_asked(tmp_path: Path) -> None:
    found = json.loads(_shown(_file(tmp_path), as_json=True))
    assert len(found["layers"]) == LAYERS and found["metadata"]["ss_seed"] == "42"
    assert "folded" in found["about_alpha"]
