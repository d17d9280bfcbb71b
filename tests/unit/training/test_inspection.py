"""What a LoRA file is: the three formats say the same, strangers' files are told, none is run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from training import export
from training.base_model import BaseModel
from training.inspection import NotALora, inspect
from training.lora_config import HyperParameters
from training.lora_formats import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DIFFUSERS_WEIGHTS,
    KOHYA_WEIGHTS,
    lora_layers,
)

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture(scope="module")
def exported(warm_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA of rank 4 and alpha 9 in all formats."""
    folder = tmp_path_factory.mktemp("exported")
    parameters = HyperParameters(rank=4, alpha=9.0, resolution=64)
    warm_base.detach()
    generator = torch.Generator().manual_seed(1)
    for weight in warm_base.attach(parameters):
        weight.data.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    export.export(warm_base, parameters, folder, metadata={"modelspec.title": "Harbour"})
    norms = {
        name: float((layer.scaling * layer.up @ layer.down).norm())
        for name, layer in lora_layers(warm_base.unet).items()
    }
    (folder / "norms.json").write_text(json.dumps(norms))
    warm_base.detach()
    return folder


@pytest.mark.parametrize(
    ("file", "kind", "alphas", "prefix"),
    [
        (DIFFUSERS_WEIGHTS, "diffusers", (4.0,), "unet."),
        (ADAPTER_WEIGHTS, "PEFT", (9.0,), "base_model.model."),
        (KOHYA_WEIGHTS, "kohya", (9.0,), "lora_unet_"),
    ],
)
def test_every_format_is_told_with_its_rank_its_alpha_and_its_true_norms(
    exported: Path, file: str, kind: str, alphas: tuple[float, ...], prefix: str
) -> None:
    found = inspect(exported / file)
    assert (found.format, found.ranks, found.alphas) == (kind, (4,), alphas)
    norms = json.loads((exported / "norms.json").read_text())
    assert len(found.layers) == len(norms)
    assert set(found.targets) == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(set(found.targets.values())) == 1
    by_name = {layer.name: layer.norm for layer in found.layers}
    for name, norm in norms.items():
        spelt = prefix + (name.replace(".", "_") if kind == "kohya" else name)
        assert by_name[spelt] == pytest.approx(norm, rel=2e-3)
    assert not found.notes and found.dtypes == (
        ("float16", "float32") if kind == "kohya" else ("float16",)
    )


def test_the_metadata_is_told_and_the_base_with_it(exported: Path) -> None:
    found = inspect(exported / KOHYA_WEIGHTS)
    assert found.metadata["modelspec.title"] == "Harbour"
    assert found.base and found.base.startswith("stable-diffusion-v1/lora, sd_v1")


def test_a_peft_file_alone_does_not_know_its_alpha(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / ADAPTER_WEIGHTS
    copy.write_bytes((exported / ADAPTER_WEIGHTS).read_bytes())
    found = inspect(copy)
    assert not found.alphas and ADAPTER_CONFIG in found.notes[0]


@pytest.mark.parametrize(
    ("width", "family"),
    [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (2048, "Stable Diffusion XL")],
)
def test_a_file_that_says_nothing_is_recognised_by_its_shapes(
    tmp_path: Path, width: int, family: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(
        {
            f"{LAYER}.lora_down.weight": torch.ones(2, width),
            f"{LAYER}.lora_up.weight": torch.ones(3, 2),
        },
        path,
    )
    found = inspect(path)
    assert found.base == f"{family}, by its shapes" and found.targets == {"to_k": 1}
    assert found.layers[0].norm == pytest.approx(math.sqrt(3 * width) * 2)


def test_layers_without_effect_broken_ones_and_other_kinds_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"other.hada_w1_a": torch.ones(1)}
    for name, value in (("still", 0.0), ("broken", math.nan), ("good", 1.0)):
        tensors[f"unet.{name}.lora_A.weight"] = torch.ones(2, 4)
        tensors[f"unet.{name}.lora_B.weight"] = torch.full((4, 2), value)
    save_file(tensors, path)
    found = inspect(path)
    said = " ".join(found.notes)
    assert "1 layers have weights that are not finite" in said
    assert "1 of 3 layers have no effect" in said and "1 tensors are of another kind" in said
    assert found.norms == (0.0, 4.0, 8.0)


@pytest.mark.parametrize(
    "name", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"]
)
def test_a_dora_is_told_in_every_spelling(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    factors = {
        f"{LAYER}.lora_down.weight": torch.ones(2, 4),
        f"{LAYER}.lora_up.weight": torch.ones(3, 2),
    }
    save_file(factors | {f"{LAYER}.{name}": torch.ones(3)}, path)
    (note,) = inspect(path).notes
    assert note.startswith("1 layers are DoRA's") and "low-rank part" in note


# ---- refusals ------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    """What is said of a file that is no LoRA."""
    with pytest.raises(NotALora) as caught:
        inspect(path)
    return str(caught.value)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    for name, content in (("new.pt", b"PK\x03\x04rest"), ("old.ckpt", b"\x80\x02crest")):
        (tmp_path / name).write_bytes(content)
        assert "is a pickle" in refusal(tmp_path / name)


def test_a_damaged_file_is_told(exported: Path, tmp_path: Path) -> None:
    content = (exported / KOHYA_WEIGHTS).read_bytes()
    huge = (1 << 62).to_bytes(8, "little") + b"{}"
    path = tmp_path / "a.safetensors"
    for broken in (content[:-100], content[:50], b"", b"abc", huge, b"<html></html>"):
        path.write_bytes(broken)
        assert "not a valid safetensors file" in refusal(path)


def test_factors_that_do_not_belong_together_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    down = {f"{LAYER}.lora_down.weight": torch.ones(2, 4)}
    save_file(down, path)
    assert "no second factor" in refusal(path)
    save_file(down | {f"{LAYER}.lora_up.weight": torch.ones(4, 3)}, path)
    assert "do not fit" in refusal(path)


def test_other_things_are_no_lora(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"conv_in.weight": torch.ones(2)}, path)
    assert refusal(path) == (
        "model.safetensors is not a LoRA: none of its 1 tensors is a LoRA's factor."
    )
    assert "is a folder" in refusal(tmp_path)
    assert "cannot be read" in refusal(tmp_path / "nowhere.safetensors")
