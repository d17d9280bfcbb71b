"""The base model: loaded whole or not at all, and bit for bit itself again after each LoRA."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.kinds import TrainerOptions
from jobs.style import HyperParameters
from tests.unit.training.conftest import MakeRun
from tests.unit.training.runs import same, trained
from training.runtime.device import gpu_error
from training.style.families.sd15 import ADAPTER, BaseModel
from training.style.stand_in_model import build_stand_in
from utils.errors import (
    BaseModelUnavailable,
    GpuBroken,
    GpuOutOfMemory,
    TrainingFailed,
    WrongBaseModel,
)

SMALL = HyperParameters(rank=2, alpha=4.0, resolution=64)


def copied(stand_in: Path, folder: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(stand_in, folder / "copied-model"))


def load(folder: Path | str) -> BaseModel:
    """Load a model onto the CPU."""
    return BaseModel.load(TrainerOptions(str(folder), allow_cpu=True))


def test_a_stand_in_of_one_seed_is_always_the_same(stand_in: Path, tmp_path: Path) -> None:
    again = build_stand_in(tmp_path / "again")
    names = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert len(names) > 8
    assert all((again / name).read_bytes() == (stand_in / name).read_bytes() for name in names)


def test_a_complete_stand_in_is_left_alone_and_a_half_one_replaced(tmp_path: Path) -> None:
    folder = build_stand_in(tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    build_stand_in(folder)
    assert weights.stat().st_mtime_ns == before
    (folder / "stand-in.json").unlink()
    weights.unlink()
    build_stand_in(folder)
    assert weights.is_file()


def test_building_a_stand_in_leaves_the_global_random_state_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    build_stand_in(tmp_path / "model")
    assert torch.equal(torch.rand(3), expected)


def test_the_base_has_a_name_a_hash_and_a_warning_that_the_cpu_is_slow(
    base: BaseModel, stand_in: Path
) -> None:
    assert base.name == stand_in.name
    assert len(base.hash) == 64
    assert (base.device.type, base.dtype) == ("cpu", torch.float32)
    slow, stand_in_warning = base.warnings
    assert "CPU" in slow and "stand-in" in stand_in_warning
    assert base.scheduler.config.prediction_type == "epsilon"
    assert not any(weight.requires_grad for weight in base.unet.parameters())


def test_prompts_become_77_states_each_however_long_they_are(base: BaseModel) -> None:
    states = base.encode_prompts(["", "a harbour at dawn", "word " * 200])
    assert states.shape[:2] == (3, 77)
    assert torch.isfinite(states).all() and not torch.equal(states[0], states[1])


def test_the_vaes_scaling_factor_is_applied_exactly_once(base: BaseModel) -> None:
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    mean, std = base.encode_images(pixels)
    with torch.no_grad():
        bare = base.vae.encode(pixels).latent_dist
    factor = base.vae.config.scaling_factor
    assert mean.shape == (1, 4, 8, 8)
    assert torch.equal(mean, bare.mean * factor) and torch.equal(std, bare.std * factor)


def test_without_cuda_and_without_leave_to_use_the_cpu_the_error_of_loading_names_the_remedy(
    stand_in: Path,
) -> None:
    with pytest.raises(GpuBroken, match="ALLOW_CPU"):
        BaseModel.load(TrainerOptions(str(stand_in)))


@pytest.mark.parametrize("name", ["/nowhere/at/all/model", "./nowhere", "nowhere"])
def test_a_model_that_does_not_exist_is_named_with_the_folder_that_was_looked_for(
    name: str,
) -> None:
    with pytest.raises(BaseModelUnavailable, match="BASE_MODEL") as caught:
        load(name)
    assert f"the folder {Path(name).absolute()} does not exist" in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelUnavailable, match="somebody/some-model.*HF_TOKEN"):
        load("somebody/some-model")


def test_a_missing_part_is_named(stand_in: Path, tmp_path: Path) -> None:
    folder = copied(stand_in, tmp_path)
    shutil.rmtree(folder / "vae")
    with pytest.raises(BaseModelUnavailable, match="copied-model lacks vae"):
        load(folder)


def test_a_base_of_another_family_is_refused_before_its_parts_are_looked_for(
    stand_in: Path, tmp_path: Path
) -> None:
    folder = copied(stand_in, tmp_path)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    shutil.rmtree(folder / "unet")
    with pytest.raises(WrongBaseModel, match="copied-model is FLUX.1 .*Set BASE_MODEL") as caught:
        load(folder)
    assert str(tmp_path) not in str(caught.value)


def test_a_model_of_another_family_on_the_hub_is_refused_before_it_is_downloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = "training.style.families.base_files.DiffusionPipeline"
    index = {"_class_name": "StableDiffusionXLPipeline"}
    monkeypatch.setattr(f"{pipeline}.load_config", lambda *_, **__: index)
    monkeypatch.setattr(f"{pipeline}.download", lambda *_, **__: pytest.fail("was downloaded"))
    with pytest.raises(WrongBaseModel, match="owner/model is Stable Diffusion XL"):
        load("owner/model")


def test_weights_that_are_missing_from_a_file_are_not_made_up(
    stand_in: Path, tmp_path: Path
) -> None:
    folder = copied(stand_in, tmp_path)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("final_layer_norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BaseModelUnavailable, match="text_encoder lacks 1 weights"):
        load(folder)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_truncated_weight_file_is_a_damaged_model(
    stand_in: Path, tmp_path: Path, part: str
) -> None:
    folder = copied(stand_in, tmp_path)
    path = folder / part / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BaseModelUnavailable, match="incomplete or damaged") as caught:
        load(folder)
    assert str(tmp_path) not in str(caught.value)


def test_a_text_encoder_with_the_names_of_the_published_weights_loads_the_same(
    base: BaseModel, stand_in: Path, tmp_path: Path
) -> None:
    """SD1.5's files spell every weight `text_model.…`, and carry the position ids."""
    folder = copied(stand_in, tmp_path)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(path).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path, metadata={"format": "pt"})
    published = load(folder)
    assert torch.equal(published.encode_prompts(["a"]), base.encode_prompts(["a"]))


def test_a_vae_with_the_names_of_the_published_weights_loads_the_same(
    base: BaseModel, stand_in: Path, tmp_path: Path
) -> None:
    """SD1.5's VAE spells its attention's weights as older diffusers did."""
    folder = copied(stand_in, tmp_path)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for name in list(tensors):
        for new, former in old.items():
            if f".attentions.0.{new}." in name:
                tensors[name.replace(new, former)] = tensors.pop(name)
    assert any(".query." in name for name in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.equal(load(folder).encode_images(pixels)[0], base.encode_images(pixels)[0])


def test_a_lora_starts_in_float32_with_every_b_at_zero_and_the_base_frozen(base: BaseModel) -> None:
    weights = base.attach(SMALL)
    trainable = {name: w for name, w in base.unet.named_parameters() if w.requires_grad}
    assert [id(weight) for weight in weights] == [id(weight) for weight in trainable.values()]
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert all((".lora_A." in name) or (".lora_B." in name) for name in trainable)
    assert all(f".{ADAPTER}." in name for name in trainable)
    assert all(not w.any() for name, w in trainable.items() if ".lora_B." in name)


def test_a_seed_gives_the_same_lora_on_a_fresh_and_on_a_warm_base(
    base: BaseModel, options: TrainerOptions
) -> None:
    torch.manual_seed(99)
    fresh = [w.detach().clone() for w in BaseModel.load(options).attach(SMALL)]
    state = torch.get_rng_state()
    warm = base.attach(SMALL)
    assert all(torch.equal(a, b) for a, b in zip(fresh, warm, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_gives_another_lora(base: BaseModel) -> None:
    first = base.attach(SMALL)[0].detach().clone()
    base.detach()
    assert not torch.equal(base.attach(HyperParameters(rank=2, seed=1, resolution=64))[0], first)


def test_after_detach_the_base_has_the_same_names_modules_and_bits(base: BaseModel) -> None:
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    modules = [(name, type(module)) for name, module in base.unet.named_modules()]
    for weight in base.attach(SMALL):
        weight.data.fill_(1.0)
    base.detach()
    after = base.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [(name, type(module)) for name, module in base.unet.named_modules()] == modules
    assert not hasattr(base.unet, "peft_config") and not base.unet.training
    assert not base.drifted


def test_two_loras_at_once_are_refused(base: BaseModel) -> None:
    base.attach(SMALL)
    with pytest.raises(TrainingFailed, match="another run"):
        base.attach(SMALL)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_single_changed_bit_of_the_frozen_weights_is_noticed(
    options: TrainerOptions, part: str
) -> None:
    own = BaseModel.load(options)
    own.attach(SMALL)
    weights = list(getattr(own, part).state_dict().values())[-1]
    weights.view(-1).view(torch.int32)[1] ^= 1
    with pytest.raises(TrainingFailed, match="frozen weights changed"):
        own.detach()
    assert own.drifted


def test_two_swapped_weights_are_noticed(options: TrainerOptions) -> None:
    own = BaseModel.load(options)
    bias = own.unet.state_dict()["conv_in.bias"]
    bias[[0, 1]] = bias[[1, 0]]
    with pytest.raises(TrainingFailed, match="frozen weights changed"):
        own.detach()


def test_gradient_checkpointing_is_as_in_the_options(stand_in: Path) -> None:
    wishes = {"true": True, "false": False, "auto": False}  # auto: only where a GPU is small
    for wish, expected in wishes.items():
        own = BaseModel.load(
            TrainerOptions(str(stand_in), allow_cpu=True, gradient_checkpointing=wish)
        )
        own.attach(SMALL)
        assert own.unet.is_gradient_checkpointing is expected
        own.detach()
        assert not own.unet.is_gradient_checkpointing


def test_a_run_may_turn_gradient_checkpointing_on_for_itself(base: BaseModel) -> None:
    base.attach(SMALL, checkpointing=True)
    assert base.checkpointing
    base.detach()
    base.attach(SMALL)
    assert not base.checkpointing


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_the_unet_makes_room_if_encoding_runs_out_of_memory(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def encode() -> Tensor:
        if part == "vae":
            return base.encode_images(torch.zeros(1, 3, 64, 64))[0]
        return base.encode_prompts(["a harbour"])

    expected, encoder = encode(), getattr(base, part)
    name = "encode" if part == "vae" else "forward"
    real, fails = getattr(encoder, name), iter([True, False, True, True])
    moves: list[Any] = []

    def short_of_memory(*arguments: Any, **named: Any) -> Any:
        if next(fails):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*arguments, **named)

    monkeypatch.setattr(encoder, name, short_of_memory)
    monkeypatch.setattr(base.unet, "to", moves.append)
    assert torch.equal(encode(), expected)
    with pytest.raises(torch.OutOfMemoryError):
        encode()
    assert moves == ["cpu", base.device] * 2


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), GpuOutOfMemory),
        (MemoryError(), GpuOutOfMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), GpuOutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), GpuOutOfMemory),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), GpuOutOfMemory),
        (torch.AcceleratorError("CUDA error: out of memory"), GpuOutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), GpuBroken),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), GpuBroken),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), GpuBroken),
    ],
)
def test_an_error_of_the_device_is_distinguished_from_any_other(
    error: Exception, kind: type[Any]
) -> None:
    mapped = gpu_error(error)
    assert mapped is not None and mapped.__class__ is kind


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("CUDA error")])
def test_an_error_of_the_program_is_not_blamed_on_the_gpu(error: Exception) -> None:
    assert gpu_error(error) is None


@pytest.mark.parametrize(
    ("free_gib", "resolution", "batch_size", "on"),
    [
        # A card of 12 GB has about 9 GiB free after the base is loaded, one of 24 GB about 20.
        (9, 512, 1, False),
        (9, 512, 4, False),
        (9, 512, 8, True),
        (9, 768, 1, False),
        (9, 1024, 2, True),
        (20, 512, 12, False),
        (2, 512, 1, True),
    ],
)
def test_checkpointing_is_automatic_by_the_room_that_the_batch_needs(
    stand_in: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_gib: int,
    resolution: int,
    batch_size: int,
    on: bool,
) -> None:
    options = TrainerOptions(str(stand_in), allow_cpu=True, gradient_checkpointing="auto")
    base = BaseModel.load(options)
    base.attach(HyperParameters(resolution=resolution, batch_size=batch_size))
    assert not base.checkpointing, "there is no GPU whose memory could be short"
    base.take_off()
    monkeypatch.setattr(base, "device", torch.device("cuda"))
    monkeypatch.setattr(base, "dtype", torch.float16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gib * 1024**3, None))
    base.attach(HyperParameters(resolution=resolution, batch_size=batch_size))
    assert base.checkpointing is on


@pytest.fixture(name="any_algorithm")
def _any_algorithm() -> Iterator[None]:
    """Deterministic algorithms are off again after the test."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("any_algorithm")
def test_deterministic_algorithms_are_used_where_the_setting_asks_for_them(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    load(stand_in)
    assert not torch.are_deterministic_algorithms_enabled()
    BaseModel.load(TrainerOptions(str(stand_in), allow_cpu=True, deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.benchmark is False


def test_the_base_names_its_vae_and_its_text_encoder_by_their_weights(
    base: BaseModel, stand_in: Path, tmp_path: Path
) -> None:
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        folder = Path(shutil.copytree(stand_in, tmp_path / part))
        path = folder / part / f"{name}.safetensors"
        tensors = load_file(path)
        next(iter(tensors.values())).flatten()[0] += 1
        save_file(tensors, path, metadata={"format": "pt"})
        other = load(folder)
        assert other.hash == base.hash
        assert other.encoders_hash != base.encoders_hash


@pytest.mark.gpu
@pytest.mark.usefixtures("any_algorithm")
def test_on_a_gpu_deterministic_algorithms_give_the_same_bits_twice(
    stand_in: Path, make_run: MakeRun
) -> None:
    base = BaseModel.load(TrainerOptions(str(stand_in), deterministic=True))
    run = make_run(count=4, epochs=3, batch_size=2, dropout=0.1)
    assert same(trained(base, run)[1], trained(base, run)[1])
