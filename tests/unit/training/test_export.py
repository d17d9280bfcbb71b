"""The exported files do what the trained weights do, in every loader, or they are not exported."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jobs.kinds import TrainerOptions
from jobs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, KOHYA_WEIGHTS, MODEL_FILES, WEIGHTS
from jobs.style import ATTENTION, HyperParameters
from training.style.families.lora_config import peft_config
from training.style.families.sd15 import ADAPTER, BaseModel
from training.style.results import export
from training.style.results.lora_formats import lora_layers
from utils.errors import ExportFailed

Tensors = dict[str, torch.Tensor]


def attach(base: BaseModel, *, rank: int = 4, alpha: float = 9.0, **more: Any) -> HyperParameters:
    """Attach a LoRA and move its weights about as far as training does."""
    parameters = HyperParameters(rank=rank, alpha=alpha, resolution=64, **more)
    base.attach(parameters)
    stir(base.unet)
    return parameters


def stir(unet: Any, strength: float = 0.05) -> None:
    """Give every `lora_B` random values: an effect that is easily measured."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if ".lora_B." in name:
                weight.copy_(strength * torch.randn(weight.shape, generator=generator))


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a safetensors file, and keep its metadata."""
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(path)), path, metadata=metadata)


def paint(unet: Any) -> torch.Tensor:
    """The prediction of a UNet for fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn((2, 4, 8, 8), generator=generator)
    texts = torch.randn((2, 77, 32), generator=generator)
    unet.eval()
    with torch.no_grad():
        prediction: torch.Tensor = unet(latents, 500, encoder_hidden_states=texts).sample
    return prediction


def through_diffusers(stand_in: Path, folder: Path, file: str) -> Any:
    """The UNet of a user who calls `load_lora_weights`."""
    pipeline = StableDiffusionPipeline.from_pretrained(stand_in, safety_checker=None)
    pipeline.load_lora_weights(folder, weight_name=file)
    return pipeline.unet


def through_peft(stand_in: Path, folder: Path, _file: str) -> Any:
    """The UNet of the inference server, which calls `PeftModel.from_pretrained`."""
    unet = UNet2DConditionModel.from_pretrained(stand_in / "unet")
    return PeftModel.from_pretrained(unet, str(folder))


USERS = {
    WEIGHTS: through_diffusers,
    KOHYA_WEIGHTS: through_diffusers,
    ADAPTER_WEIGHTS: through_peft,
}


@pytest.fixture(name="exported", scope="module")
def fixture_exported(
    options: TrainerOptions, tmp_path_factory: pytest.TempPathFactory
) -> tuple[BaseModel, Path]:
    """A separate base with its LoRA still attached, and the folder of its good files."""
    attached = BaseModel.load(options)
    folder = tmp_path_factory.mktemp("exported")
    export.export(attached, attach(attached), folder, metadata={})
    return attached, folder


@pytest.mark.parametrize(
    "how",
    [
        {"rank": 4, "alpha": 4.0},
        {"rank": 4, "alpha": 9.0},
        {"rank": 3, "alpha": 0.5},
        {"rank": 4, "alpha": 9.0, "target": "attention+ff", "rslora": True},
    ],
)
def test_every_file_changes_the_prediction_as_the_live_lora_does(
    base: BaseModel, stand_in: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    plain = paint(base.unet)
    export.export(base, attach(base, **how), tmp_path, metadata={})
    effect = paint(base.unet) - plain
    assert effect.norm() > 0.002 * plain.norm()
    for file, load in USERS.items():
        difference = paint(load(stand_in, tmp_path, file)) - plain - effect
        assert difference.norm() < 2e-3 * effect.norm(), file


def test_rank_stabilised_scaling_comes_out_right_in_all_files(
    base: BaseModel, stand_in: Path, tmp_path: Path
) -> None:
    export.export(base, attach(base, alpha=6.0, rslora=True), tmp_path, metadata={})
    live = paint(base.unet)
    for file, load in USERS.items():
        painted = paint(load(stand_in, tmp_path, file))
        torch.testing.assert_close(painted, live, rtol=0, atol=2e-3)
    alphas = {
        value.item() for key, value in load_file(tmp_path / KOHYA_WEIGHTS).items() if "alpha" in key
    }
    assert alphas == {12.0}  # 6 · √4, for readers that divide by the rank


def test_exporting_changes_neither_the_unet_nor_the_random_state(
    base: BaseModel, tmp_path: Path
) -> None:
    parameters = attach(base)
    modules = {name: (type(module), module.training) for name, module in base.unet.named_modules()}
    weights = {name: value.clone() for name, value in base.unet.state_dict().items()}
    state = torch.get_rng_state()
    export.export(base, parameters, tmp_path, metadata={})
    assert torch.equal(torch.get_rng_state(), state)
    assert modules == {
        name: (type(module), module.training) for name, module in base.unet.named_modules()
    }
    assert list(base.unet.peft_config) == [ADAPTER]
    after = base.unet.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())


def test_only_the_model_files_are_left_in_the_folder(base: BaseModel, tmp_path: Path) -> None:
    export.export(base, attach(base), tmp_path / "model", metadata={})
    assert {path.name for path in (tmp_path / "model").iterdir()} == set(MODEL_FILES)


def test_a_lora_that_learnt_nothing_can_be_exported(base: BaseModel, tmp_path: Path) -> None:
    parameters = HyperParameters(rank=4, alpha=8.0, resolution=64)
    base.attach(parameters)
    export.export(base, parameters, tmp_path, metadata={})


@pytest.mark.parametrize(
    ("strength", "dtype"), [(0.05, torch.float16), (1e-5, torch.float16), (1e-12, torch.float32)]
)
def test_half_precision_is_used_where_it_keeps_the_effect(
    base: BaseModel, tmp_path: Path, strength: float, dtype: torch.dtype
) -> None:
    parameters = attach(base)
    stir(base.unet, strength)
    export.export(base, parameters, tmp_path, metadata={})
    for file in (WEIGHTS, KOHYA_WEIGHTS, ADAPTER_WEIGHTS):
        weights = {k: v for k, v in load_file(tmp_path / file).items() if not k.endswith(".alpha")}
        assert {weight.dtype for weight in weights.values()} == {dtype}


def _unfolded(tensors: Tensors) -> Tensors:
    return {k: v / 2.25 if ".lora_B." in k else v for k, v in tensors.items()}


def _alpha_as_rank(tensors: Tensors) -> Tensors:
    return {k: torch.tensor(4.0) if k.endswith(".alpha") else v for k, v in tensors.items()}


def _without_prefix(tensors: Tensors) -> Tensors:
    return {key.partition("unet.")[2]: value for key, value in tensors.items()}


def _kohya_text_encoder_prefix(tensors: Tensors) -> Tensors:
    return {key.replace("lora_unet_", "lora_te_"): value for key, value in tensors.items()}


def _without_peft_prefix(tensors: Tensors) -> Tensors:
    return {key.removeprefix("base_model.model."): value for key, value in tensors.items()}


def _without_one_layer(tensors: Tensors) -> Tensors:
    gone = sorted(tensors)[0].partition(".lora_")[0]
    return {key: value for key, value in tensors.items() if not key.startswith(gone)}


def _with_a_stranger(tensors: Tensors) -> Tensors:
    key = sorted(tensors)[0]
    return tensors | {key.replace("down_blocks.0", "down_blocks.9"): tensors[key].clone()}


def _two_layers_swapped(tensors: Tensors) -> Tensors:
    one, other = [key for key in sorted(tensors) if key.endswith("attn1.to_q.lora_B.weight")][:2]
    return tensors | {one: tensors[other].clone(), other: tensors[one].clone()}


def _not_finite(tensors: Tensors) -> Tensors:
    key = sorted(key for key in tensors if ".alpha" not in key)[0]
    return tensors | {key: torch.full_like(tensors[key], float("nan"))}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (WEIGHTS, _unfolded),
        (WEIGHTS, _without_prefix),
        (WEIGHTS, _without_one_layer),
        (WEIGHTS, _with_a_stranger),
        (WEIGHTS, _two_layers_swapped),
        (WEIGHTS, _not_finite),
        (KOHYA_WEIGHTS, _alpha_as_rank),
        (KOHYA_WEIGHTS, _kohya_text_encoder_prefix),
        (KOHYA_WEIGHTS, _without_one_layer),
        (KOHYA_WEIGHTS, _not_finite),
        (ADAPTER_WEIGHTS, _unfolded),
        (ADAPTER_WEIGHTS, _without_peft_prefix),
        (ADAPTER_WEIGHTS, _without_one_layer),
        (ADAPTER_WEIGHTS, _with_a_stranger),
        (ADAPTER_WEIGHTS, _not_finite),
    ],
)
def test_a_file_that_differs_from_the_live_lora_is_refused_by_name(
    exported: tuple[BaseModel, Path],
    tmp_path: Path,
    file: str,
    change: Callable[[Tensors], Tensors],
) -> None:
    base, folder = exported
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path / file, change)
    with pytest.raises(ExportFailed, match=file):
        export.verify(base.unet, tmp_path)


def test_a_file_with_the_plain_weights_is_refused_even_if_its_metadata_would_correct_it(
    exported: tuple[BaseModel, Path], tmp_path: Path
) -> None:
    base, folder = exported
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / WEIGHTS
    metadata = {"unet.r": 4, "unet.lora_alpha": 9, "unet.target_modules": list(ATTENTION)}
    save_file(
        _unfolded(load_file(file)), file, metadata={"lora_adapter_metadata": json.dumps(metadata)}
    )
    with pytest.raises(ExportFailed, match=WEIGHTS):
        export.verify(base.unet, tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", None])
@pytest.mark.parametrize("file", [ADAPTER_CONFIG, WEIGHTS])
def test_a_damaged_or_missing_file_is_refused_and_the_error_names_no_path(
    exported: tuple[BaseModel, Path], tmp_path: Path, file: str, content: bytes | None
) -> None:
    base, folder = exported
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ExportFailed, match="cannot be loaded again") as caught:
        export.verify(base.unet, tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_weights_that_are_not_finite_are_refused_and_earlier_files_stay(
    base: BaseModel, tmp_path: Path
) -> None:
    parameters = attach(base)
    export.export(base, parameters, tmp_path, metadata={})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    name = next(iter(lora_layers(base.unet)))
    with torch.no_grad():
        base.unet.get_submodule(name).lora_B[ADAPTER].weight[0, 0] = float("inf")
    with pytest.raises(ExportFailed, match=name):
        export.export(base, parameters, tmp_path, metadata={})
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_failed_check_leaves_nothing_in_the_folder(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TOLERANCE", 1e-9)  # not even single precision passes
    with pytest.raises(ExportFailed, match="does not reproduce the layer"):
        export.export(base, attach(base), tmp_path, metadata={})
    assert not list(tmp_path.iterdir())


def test_a_base_without_a_lora_has_nothing_to_export(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(ExportFailed, match="no trained adapter"):
        export.export(base, HyperParameters(), tmp_path, metadata={})


def test_the_peft_configuration_names_the_base_and_the_true_alpha(
    base: BaseModel, stand_in: Path, tmp_path: Path
) -> None:
    export.export(base, attach(base, rank=4, alpha=9.0), tmp_path, metadata={})
    text = (tmp_path / ADAPTER_CONFIG).read_text(encoding="utf-8")
    config = json.loads(text)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 9.0, "LORA")
    assert config["base_model_name_or_path"] == base.name
    assert config["target_modules"] == sorted(ATTENTION)
    assert str(stand_in.parent) not in text


def test_the_kohya_header_has_the_fields_that_webuis_sort_by(
    base: BaseModel, tmp_path: Path
) -> None:
    export.export(base, attach(base), tmp_path, metadata={"modelspec.title": "Harbour"})
    with safe_open(tmp_path / KOHYA_WEIGHTS, framework="pt") as opened:
        header = opened.metadata()
    expected = {
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "9.0",
        "ss_resolution": "(64, 64)",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "64x64",
        "modelspec.title": "Harbour",
    }
    assert expected.items() <= header.items()
    content = (tmp_path / KOHYA_WEIGHTS).read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert header["sshs_model_hash"] == digest


def test_a_base_that_predicts_velocity_is_named_in_the_headers(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "scheduler", DDPMScheduler(prediction_type="v_prediction"))
    export.export(base, attach(base), tmp_path, metadata={})
    for name in (KOHYA_WEIGHTS, WEIGHTS):
        with safe_open(tmp_path / name, framework="pt") as opened:
            header = opened.metadata()
        assert header["ss_base_model_version"] == "sd_v1_v"
        assert header["ss_v_parameterization"] == "True"
        assert header["modelspec.prediction_type"] == "v"


def test_the_same_weights_are_the_same_bytes_in_every_file(base: BaseModel, tmp_path: Path) -> None:
    parameters = attach(base)
    metadata = {"modelspec.date": "2026-01-20T10:00:00+00:00", "modelspec.title": "항구"}
    once, again = tmp_path / "once", tmp_path / "again"
    for folder in (once, again):
        export.export(base, parameters, folder, metadata=metadata)
    for name in MODEL_FILES:
        assert (once / name).read_bytes() == (again / name).read_bytes()
    content = (once / KOHYA_WEIGHTS).read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0, "the tensors are not aligned"
    with safe_open(once / KOHYA_WEIGHTS, framework="pt") as opened:
        assert metadata.items() <= opened.metadata().items()
        assert list(opened.keys())


def sd15_attention_paths() -> list[str]:
    """SD1.5's attention projections, by its architecture: three blocks down, middle, three up."""
    blocks = [f"down_blocks.{block}.attentions.{n}" for block in (0, 1, 2) for n in (0, 1)]
    blocks += ["mid_block.attentions.0"]
    blocks += [f"up_blocks.{block}.attentions.{n}" for block in (1, 2, 3) for n in (0, 1, 2)]
    return [
        f"{block}.transformer_blocks.0.{attention}.{projection}"
        for block in blocks
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out.0")
    ]


def kohya_modules() -> dict[str, tuple[int, int]]:
    """Names of SD1.5's attention modules in the spelling of kohya's trainer, with their widths.

    The widths, in and out, are those of SD1.5's published shape: 320, 640 and 1280 channels,
    768 of text.
    """
    blocks = {f"down_blocks_{n}_attentions_{m}": 320 << n for n in range(3) for m in range(2)}
    blocks["mid_block_attentions_0"] = 1280
    blocks |= {f"up_blocks_{n}_attentions_{m}": 2560 >> n for n in range(1, 4) for m in range(3)}
    modules = {}
    for block, width in blocks.items():
        for attention, source in (("attn1", width), ("attn2", 768)):
            name = f"lora_unet_{block}_transformer_blocks_0_{attention}"
            modules[f"{name}_to_q"] = (width, width)
            modules[f"{name}_to_k"] = modules[f"{name}_to_v"] = (source, width)
            modules[f"{name}_to_out_0"] = (width, width)
    return modules


def test_sd15_itself_is_exported_with_the_names_that_kohya_uses(
    base: BaseModel, tmp_path: Path
) -> None:
    with torch.device("meta"):
        shape = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    unet: Any = export._skeleton(shape)  # pylint: disable=protected-access  # no 3.4 GB for a name
    parameters = HyperParameters(rank=4, alpha=8.0)
    unet.add_adapter(peft_config(parameters), adapter_name=ADAPTER)
    stir(unet)
    full: Any = SimpleNamespace(unet=unet, name="sd15", scheduler=base.scheduler)
    export.export(full, parameters, tmp_path, metadata={})
    modules = kohya_modules()
    assert len(modules) == 128
    tensors = load_file(tmp_path / KOHYA_WEIGHTS)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{module}.{part}": shape
        for module, (inputs, outputs) in modules.items()
        for part, shape in {
            "lora_down.weight": (4, inputs),
            "lora_up.weight": (outputs, 4),
            "alpha": (),
        }.items()
    }
    assert all(tensors[f"{module}.alpha"] == 8.0 for module in modules)
    paths = sd15_attention_paths()
    diffusers = {f"unet.{path}.lora_{part}.weight" for path in paths for part in "AB"}
    assert load_file(tmp_path / WEIGHTS).keys() == diffusers


def test_the_diffusers_file_names_its_origin_too_and_is_the_same_each_time(
    base: BaseModel, tmp_path: Path
) -> None:
    parameters = attach(base)
    metadata = {"modelspec.title": "Harbour", "modelspec.trigger_phrase": "inkstyle"}
    for number in (1, 2):
        dated = metadata | {"modelspec.date": f"2026-01-0{number}", "ss_network_alpha": "9.0"}
        export.export(base, parameters, tmp_path / str(number), metadata=dated)
    one, other = (tmp_path / number / WEIGHTS for number in "12")
    with safe_open(one, framework="pt") as opened:
        header = opened.metadata()
    assert metadata.items() <= header.items()
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert "ss_network_alpha" not in header  # it is another one here
    assert one.read_bytes() == other.read_bytes()
