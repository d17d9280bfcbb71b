"""Inspection of LoRA files: the three formats agree, and no file is executed.

Files of other programs are recognised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from benchmarks.sd15 import unet
from jobs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, KOHYA_WEIGHTS, WEIGHTS
from jobs.style import TARGETS, HyperParameters
from training.style.families.sd15 import BaseModel
from training.style.results import export
from training.style.results.inspection import NotALora, inspect
from training.style.results.lora_formats import Layer, lora_layers
from training.style.results.readers import USES, in_words, layers_read

KNOWN = ("diffusers", "PEFT", "kohya")
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
        (WEIGHTS, "diffusers", (4.0,), "unet."),
        (ADAPTER_WEIGHTS, "PEFT", (9.0,), "base_model.model."),
        (KOHYA_WEIGHTS, "kohya", (9.0,), "lora_unet_"),
    ],
)
def test_every_format_is_recognised_with_its_rank_its_alpha_and_its_true_norms(
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


def test_the_metadata_is_shown_with_the_base(exported: Path) -> None:
    found = inspect(exported / KOHYA_WEIGHTS)
    assert found.metadata["modelspec.title"] == "Harbour"
    assert found.base and found.base.startswith("stable-diffusion-v1/lora, sd_v1")


def test_a_header_whose_length_looks_like_the_mark_of_a_pickle_is_read(tmp_path: Path) -> None:
    """The length of the header comes first: 128 bytes more or less begin with the byte 80."""
    path = tmp_path / "a.safetensors"
    tensors = {
        f"{LAYER}.lora_down.weight": torch.ones(2, 8),
        f"{LAYER}.lora_up.weight": torch.ones(3, 2),
    }
    for padding in range(0, 256, 8):
        save_file(tensors, path, metadata={"padding": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert len(inspect(path).layers) == 1


def test_a_peft_file_without_its_configuration_has_no_alpha(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / ADAPTER_WEIGHTS
    copy.write_bytes((exported / ADAPTER_WEIGHTS).read_bytes())
    found = inspect(copy)
    assert not found.alphas and ADAPTER_CONFIG in found.notes[0]


@pytest.mark.parametrize(
    ("width", "family"),
    [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (2048, "Stable Diffusion XL")],
)
def test_a_file_without_metadata_is_recognised_by_its_shapes(
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
    assert "1 layer with weights that are not finite" in said
    assert "1 of 3 layers have no effect" in said and "1 tensor of another kind (LoHa)" in said
    assert found.norms == (0.0, 4.0, 8.0)


@pytest.mark.parametrize(
    "name", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"]
)
def test_a_dora_is_recognised_in_every_spelling(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    factors = {
        f"{LAYER}.lora_down.weight": torch.ones(2, 4),
        f"{LAYER}.lora_up.weight": torch.ones(3, 2),
    }
    save_file(factors | {f"{LAYER}.{name}": torch.ones(3)}, path)
    _, note = inspect(path).notes
    assert note.startswith("1 layers are DoRA's") and "low-rank part" in note


# ---- files of other programs ---------------------------------------------------------------------


def factors(down: str, up: str, rank: int = 4) -> dict[str, torch.Tensor]:
    """A layer of 8 inputs and 8 outputs whose factors, unscaled, have the norm 8 · rank."""
    return {down: torch.ones(rank, 8), up: torch.ones(8, rank)}


@pytest.mark.parametrize(
    ("down", "up", "kind"),
    [
        ("unet.a.to_q.lora_A.weight", "unet.a.to_q.lora_B.weight", "diffusers"),
        ("transformer.a.to_q.lora_A.weight", "transformer.a.to_q.lora_B.weight", "diffusers"),
        ("unet.a.to_q.lora.down.weight", "unet.a.to_q.lora.up.weight", "diffusers"),
        (
            "mid_block.a.processor.to_q_lora.down.weight",
            "mid_block.a.processor.to_q_lora.up.weight",
            "diffusers",
        ),
        (
            "text_encoder.a.to_q.lora_linear_layer.down.weight",
            "text_encoder.a.to_q.lora_linear_layer.up.weight",
            "diffusers",
        ),
        (
            "base_model.model.a.to_q.lora_A.default.weight",
            "base_model.model.a.to_q.lora_B.default.weight",
            "PEFT",
        ),
        (
            "base_model.model.a.to_q.lora_embedding_A",
            "base_model.model.a.to_q.lora_embedding_B",
            "PEFT",
        ),
        ("lora_te1_a_to_q.lora_down.weight", "lora_te1_a_to_q.lora_up.weight", "kohya"),
        (
            "diffusion_model.a.to_q.lora_A.weight",
            "diffusion_model.a.to_q.lora_B.weight",
            "another program's",
        ),
    ],
)
def test_the_factors_are_found_in_every_spelling(
    tmp_path: Path, down: str, up: str, kind: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(factors(down, up), path)
    found = inspect(path)
    assert (found.format, found.ranks, len(found.layers)) == (kind, (4,), 1)
    assert next(iter(found.targets)).endswith("to_q") and found.layers[0].norm == pytest.approx(32)
    assert ("as another program names them" in " ".join(found.notes)) == (kind not in KNOWN)


@pytest.mark.parametrize(
    "prefix", ["base_model.model.", "unet."], ids=["PEFT's file", "a diffusers header"]
)
def test_each_layer_has_the_alpha_of_its_pattern_and_network(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "a.safetensors"
    config = {"lora_alpha": 8, "alpha_pattern": {"b.to_k": 2, "^c.to_v$": 1}}
    layers = ("a.to_q", "b.to_k", "c.to_v", "deep.b.to_k")
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        name = prefix + layer
        tensors |= factors(f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    header = {}
    if prefix == "unet.":
        tensors |= factors("text_encoder.a.lora_A.weight", "text_encoder.a.lora_B.weight")
        packed = {f"unet.{key}": value for key, value in config.items()}
        header["lora_adapter_metadata"] = json.dumps(packed | {"text_encoder.lora_alpha": 16})
    else:
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    save_file(tensors, path, metadata=header)
    found = inspect(path)
    alphas = {layer.name.removeprefix(prefix): layer.alpha for layer in found.layers}
    assert [alphas[layer] for layer in layers] == [8, 2, 1, 2]
    assert alphas.get("text_encoder.a", 16) == 16
    for each in found.layers:
        assert each.alpha and each.norm == pytest.approx(32 * each.alpha / 4)
    assert not found.notes


@pytest.mark.parametrize("prefix", ["base_model.model.", "unet."])
def test_an_rslora_is_scaled_by_the_root_of_its_rank_and_named(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "a.safetensors"
    config = {"lora_alpha": 8, "use_rslora": True}
    packed = json.dumps({f"unet.{key}": value for key, value in config.items()})
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    save_file(
        factors(f"{prefix}a.lora_A.weight", f"{prefix}a.lora_B.weight"),
        path,
        metadata={"lora_adapter_metadata": packed},
    )
    found = inspect(path)
    assert found.layers[0].norm == pytest.approx(32 * 8 / 2)
    assert any("rsLoRA" in note for note in found.notes)


class Small(torch.nn.Module):
    """A network with layers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(8, 8)
        self.b = torch.nn.ModuleDict({"to_k": torch.nn.Linear(8, 8)})
        self.c = torch.nn.Conv2d(8, 8, 3)
        self.words = torch.nn.Embedding(16, 8)


@pytest.mark.parametrize("rs_lora", [False, True])
def test_the_norms_are_those_that_peft_itself_computes(tmp_path: Path, rs_lora: bool) -> None:
    patterns = {} if rs_lora else {"alpha_pattern": {"to_k": 2}, "rank_pattern": {"c": 2}}
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=rs_lora,
        init_lora_weights=False,
        target_modules=["a", "b.to_k", "c", "words"],
        **patterns,
    )
    model = get_peft_model(Small(), config)
    model.save_pretrained(tmp_path)
    norms = {
        name: float(module.get_delta_weight("default").detach().norm())
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    found = {layer.name: layer.norm for layer in inspect(tmp_path / ADAPTER_WEIGHTS).layers}
    assert len(norms) == 4 and found == {k: pytest.approx(v, rel=1e-4) for k, v in norms.items()}


def test_an_alpha_next_to_the_factors_wins_over_any_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = factors("diffusion_model.a.lora_A.weight", "diffusion_model.a.lora_B.weight")
    save_file(tensors | {"diffusion_model.a.alpha": torch.tensor(2.0)}, path)
    found = inspect(path)
    assert found.alphas == (2.0,) and found.layers[0].norm == pytest.approx(16)


@pytest.mark.parametrize("pattern", ["(a+)+b", "a.*", "[", "a{9}"])
def test_a_pattern_that_could_match_for_hours_is_not_matched(tmp_path: Path, pattern: str) -> None:
    path = tmp_path / "a.safetensors"
    config = {"lora_alpha": 8, "alpha_pattern": {pattern: 2}}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    name = f"base_model.model.{'a' * 60}"
    save_file(factors(f"{name}.lora_A.weight", f"{name}.lora_B.weight"), path)
    found = inspect(path)
    assert not found.alphas and "alpha that can be read" in found.notes[0]


def test_norms_that_are_not_computed_are_not_claimed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = factors(f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight")
    third = {f"{LAYER}.lora_mid.weight": torch.ones(4, 4, 3, 3)}
    alpha = {f"{LAYER}.alpha": torch.tensor(4.0)}
    save_file(tensors | third | alpha, path)
    found = inspect(path)
    assert found.norms is None
    (note,) = found.notes
    assert note.startswith("1 layer with a third factor")


# ---- refusals ------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    """The description of a file that is no LoRA."""
    with pytest.raises(NotALora) as caught:
        inspect(path)
    return str(caught.value)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    for name, content in (("new.pt", b"PK\x03\x04rest"), ("old.ckpt", b"\x80\x02crest")):
        (tmp_path / name).write_bytes(content)
        assert "is a pickle" in refusal(tmp_path / name)


def test_a_damaged_file_is_reported(exported: Path, tmp_path: Path) -> None:
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
        "model.safetensors holds no LoRA factors that inspect knows; the first of its 1 tensors is "
        "named 'conv_in.weight'."
    )
    assert "is a folder" in refusal(tmp_path)
    assert "cannot be read" in refusal(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["lora_unet_a.hada_w1_a", "lora_unet_a.hada_w1_b"], "adapter of another kind (LoHa)"),
        (["lora_unet_a.lokr_w1", "lora_unet_a.lokr_w2"], "adapter of another kind (LoKr)"),
        (["lora_unet_a.oft_blocks"], "adapter of another kind (OFT)"),
        (["base_model.model.a.ia3_l"], "adapter of another kind (IA3)"),
        (["base_model.model.a.vera_lambda_b"], "adapter of another kind (VeRA)"),
        (["lora_unet_a.diff", "lora_unet_a.diff_b"], "another kind (weight difference)"),
        (["emb_params"], "is an embedding (textual inversion)"),
        (["clip_l", "clip_g"], "is an embedding (textual inversion)"),
        (["model.diffusion_model.out.weight"], "is a whole model (checkpoint)"),
        (["controlnet_cond_embedding.a"], "is a ControlNet"),
        (["down_blocks.0.a.weight"], "holds the weights of a whole network"),
        (["anything.weight"], "holds no LoRA factors that inspect knows"),
    ],
)
def test_a_file_without_lora_factors_is_named_for_what_it_is(
    tmp_path: Path, names: list[str], reason: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.ones(2) for name in names}, path)
    assert reason in refusal(path)


# ---- programs ------------------------------------------------------------------------------------


def _spelt(layers: dict[str, Layer], form: str) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA as a form of file spells them."""
    prefix = {"diffusers": "unet.", "PEFT": "base_model.model.", "bare": ""}[form]
    downs = {f"{prefix}{name}.lora_A.weight": layer.down for name, layer in layers.items()}
    return downs | {f"{prefix}{name}.lora_B.weight": layer.up for name, layer in layers.items()}


def _layers(base: BaseModel, names: Iterable[str]) -> dict[str, Layer]:
    """A LoRA of rank 2 on these layers of the UNet."""
    shapes = {name: base.unet.get_submodule(name).weight.shape for name in names}
    return {name: Layer(torch.ones(2, i), torch.ones(o, 2), 1.0) for name, (o, i) in shapes.items()}


@pytest.mark.parametrize("form", ["kohya", "diffusers", "PEFT", "bare"])
def test_the_layers_that_diffusers_reads_are_those_that_inspect_counts(
    warm_base: BaseModel, exported: Path, tmp_path: Path, form: str
) -> None:
    names = json.loads((exported / "norms.json").read_text())
    path = exported / KOHYA_WEIGHTS
    if form != "kohya":
        path = tmp_path / WEIGHTS
        save_file(_spelt(_layers(warm_base, names), form), path)
    counted = inspect(path).readers
    assert counted is not None and set(counted.values()) <= {0, len(names)}
    read = dict(export.LOADERS)[KOHYA_WEIGHTS]
    loaded = read(UNet2DConditionModel.from_config(warm_base.unet.config), path.parent, path.name)
    assert len(lora_layers(loaded)) == counted["diffusers"]


def test_peft_reads_its_own_file_in_full_and_no_other_program_does(exported: Path) -> None:
    layers = len(inspect(exported / ADAPTER_WEIGHTS).layers)
    counted = inspect(exported / ADAPTER_WEIGHTS).readers
    assert counted == {"diffusers": 0, "PEFT": layers, "ComfyUI": 0, "A1111": 0}


def test_comfyui_reads_only_the_feed_forward_layers_of_the_diffusers_file() -> None:
    """With `attention+ff` a LoRA of SD1.5 has 160 layers, 32 of them feed-forward ones."""
    with torch.device("meta"):
        names = [
            name
            for name, _ in unet().named_modules()
            if name.endswith(TARGETS["attention+ff"]) and ".transformer_blocks." in name
        ]
    assert len(names) == 160
    counted = layers_read([f"unet.{name}" for name in names])
    assert counted == {"diffusers": 160, "PEFT": 0, "ComfyUI": 32, "A1111": 0}
    assert in_words(counted, 160) == "diffusers: all; ComfyUI: 32 of 160; PEFT, A1111: none"
    kohya = layers_read([f"lora_unet_{name.replace('.', '_')}" for name in names])
    assert kohya == {"diffusers": 160, "PEFT": 0, "ComfyUI": 160, "A1111": 160}
    old = [f"unet.{name}".replace(".to_", ".processor.to_") for name in names]
    assert (layers_read(old) or {})["ComfyUI"] == 160


def test_readers_of_other_families_are_not_known() -> None:
    assert layers_read(["transformer.layers.0.attention.to_q"]) is None
    assert layers_read(["lora_unet_input_blocks_1_1_proj_in"]) is None


@pytest.mark.parametrize("file", [WEIGHTS, KOHYA_WEIGHTS, ADAPTER_WEIGHTS])
def test_every_file_names_the_programs_that_it_is_for_in_its_header(
    exported: Path, file: str
) -> None:
    hint = inspect(exported / file).metadata["modelspec.usage_hint"]
    assert hint.lower() == f"{USES[file]}.".lower()
    assert file == KOHYA_WEIGHTS or KOHYA_WEIGHTS in hint
