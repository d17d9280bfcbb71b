"""The trained LoRA becomes files, and each is loaded back and compared before it counts.

A LoRA file that is slightly wrong loads without an error and paints at half strength, or not at
all. Therefore nothing is believed: each file goes through its own loader into a skeleton of the
UNet, and every layer's ΔW is compared with the trained one. Only then do the files get their names.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import PeftModel

from jobs.layout import ADAPTER_WEIGHTS, KOHYA_WEIGHTS, MODEL_FILES, WEIGHTS
from training.style.families.sd15 import ADAPTER
from training.style.results.lora_formats import (
    Layer,
    kohya_metadata,
    lora_layers,
    write_diffusers,
    write_kohya,
    write_peft,
)
from utils.errors import ExportFailed

if TYPE_CHECKING:
    from jobs.style import HyperParameters
    from training.style.families.sd15 import BaseModel

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest ‖ΔW of the file − ΔW trained‖ / ‖ΔW trained‖ (Frobenius) of any layer. Rounding both
factors to half precision costs about 3e-4; a wrong alpha, a swapped or a lost layer costs far more
than 1e-2."""


def export(
    base: BaseModel, parameters: HyperParameters, folder: Path, *, metadata: dict[str, str]
) -> None:
    """Write the attached LoRA in the three formats of docs/protocol.md, section 4.

    The files get their names in `folder` only after all of them have passed `verify`. The UNet is
    only read, and the global random state stays as it is.

    Args:
        base: The base model with the trained LoRA attached to its UNet.
        parameters: The hyper-parameters in force at the end, for the kohya file's metadata.
        folder: Receives the files; created if it is missing.
        metadata: More header entries, such as `modelspec.title`; they win over the ones made here.

    Raises:
        ExportFailed: A weight is not finite, or a file does not reproduce the trained weights;
            names file and layer.
        OSError: The disk is full or read-only.
    """
    live = lora_layers(base.unet)
    _require_finite(live)
    config, plain = base.unet.peft_config[ADAPTER], _for_disk(live)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
        staging = Path(scratch)
        header = kohya_metadata(base, parameters, next(iter(plain.values()))) | metadata
        folded = _for_disk({name: layer.folded() for name, layer in live.items()})
        write_diffusers(folded, config, header, staging)
        write_peft(plain, config, base.name, staging)
        write_kohya(plain, header, staging)
        verify(base.unet, staging)
        for name in MODEL_FILES:
            os.replace(staging / name, folder / name)
    log.info("model_exported", extra={"layers": len(live)})


def verify(unet: torch.nn.Module, folder: Path) -> None:
    """Load every file of `folder` through its own loader, and compare each layer's ΔW.

    The reference is the live adapter.

    The files go into skeletons of the UNet whose frozen weights take no memory. SD1.5 takes a few
    seconds on two cores.

    Args:
        unet: The UNet with the trained adapter.
        folder: The folder that `export` wrote.

    Raises:
        ExportFailed: A file cannot be loaded, lacks a layer, has one too many, or differs by more
            than `TOLERANCE`.
    """
    live = lora_layers(unet)
    # Loaders initialise the layers that they are about to overwrite, from the global generator.
    with torch.random.fork_rng(devices=[]):
        for file, load in LOADERS:
            _compare(file, _reload(file, load, _skeleton(unet), folder), live)


def _reload(
    file: str, load: Callable[[Any, Path, str], Any], skeleton: Any, folder: Path
) -> dict[str, Layer]:
    try:
        with safetensors.safe_open(folder / file, framework="pt") as opened:
            tensors = len(opened.keys())
        # Loaders warn of missing and of surplus keys; what matters of that is an error below.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = lora_layers(load(skeleton, folder, file))
    except Exception as error:
        raise ExportFailed(f"{file} cannot be loaded again ({type(error).__name__}).") from error
    expected = len(loaded) * (3 if file == KOHYA_WEIGHTS else 2)  # down, up, and kohya's alpha
    if tensors != expected:
        raise ExportFailed(f"{file} has {tensors} tensors, of which its loader uses {expected}.")
    return loaded


def _compare(file: str, loaded: dict[str, Layer], live: dict[str, Layer]) -> None:
    for name in loaded:
        if name not in live:
            raise ExportFailed(f"{file} has the layer {name}, which was not trained.")
    for name, layer in live.items():
        if name not in loaded:
            raise ExportFailed(f"{file} has no effect on the layer {name}.")
        distance = _distance(loaded[name], layer)
        if math.isnan(distance) or distance > TOLERANCE:
            raise ExportFailed(
                f"{file} does not reproduce the layer {name}: it is {distance:.2%} off, and "
                f"{TOLERANCE:.2%} is allowed."
            )


def _distance(layer: Layer, reference: Layer) -> float:
    """‖ΔW − ΔW of the reference‖ / ‖ΔW of the reference‖ (Frobenius); 0 where both are zero.

    The matrices themselves are never formed: their difference is the product of the stacked
    factors, [s·up, −s'·up'] · [down; down'].
    """
    factors = [(part.up.double() * part.scaling, part.down.double()) for part in (layer, reference)]
    (up, down), (up_reference, down_reference) = factors
    error = _norm(torch.cat([up, -up_reference], dim=1), torch.cat([down, down_reference]))
    norm = _norm(up_reference, down_reference)
    return error / norm if norm > 0 else float(error > 0)


def _norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """‖up · down‖ by ‖up · down‖² = Σ (upᵀ·up ∘ down·downᵀ), in double precision."""
    square = ((up.T @ up) * (down @ down.T)).sum().item()
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.nan


def _require_finite(layers: dict[str, Layer]) -> None:
    if not layers:
        raise ExportFailed("There is no trained adapter on the UNet to export.")
    for name, layer in layers.items():
        if not (layer.down.isfinite().all() and layer.up.isfinite().all()):
            raise ExportFailed(f"The trained weights of the layer {name} are not finite numbers.")


def _for_disk(layers: dict[str, Layer]) -> dict[str, Layer]:
    """The layers in half precision, the usual and half as long.

    They are in single precision if half precision would cost too much.

    It does for updates of hardly any size (below about 1e-9), as after a step or two at the start
    of a warm-up.
    """
    halves = {name: layer.halved() for name, layer in layers.items()}
    if all(_distance(halves[name], layer) <= TOLERANCE / 2 for name, layer in layers.items()):
        return halves
    log.info("export_in_single_precision")
    return layers


def _skeleton(unet: Any) -> Any:
    """A UNet of the same shape on the CPU.

    Every frozen weight is one zero, seen through strides of zero.
    """
    with torch.device("meta"):
        skeleton = type(unet).from_config(unet.config)
    for module in skeleton.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros(()).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    return skeleton


def _through_peft(skeleton: Any, folder: Path, _file: str) -> Any:
    return PeftModel.from_pretrained(skeleton, str(folder), adapter_name=ADAPTER).base_model.model


def _through_diffusers(
    skeleton: Any, folder: Path, file: str, *, reads_metadata: bool = True
) -> Any:
    loader = StableDiffusionLoraLoaderMixin
    weights, alphas, metadata = loader.lora_state_dict(
        str(folder), weight_name=file, local_files_only=True, return_lora_metadata=True
    )
    loader.load_lora_into_unet(
        weights,
        alphas,
        skeleton,
        adapter_name=ADAPTER,
        metadata=metadata if reads_metadata else None,
        low_cpu_mem_usage=True,
    )
    return skeleton


def _through_older_diffusers(skeleton: Any, folder: Path, file: str) -> Any:
    return _through_diffusers(skeleton, folder, file, reads_metadata=False)


# The kohya file takes diffusers' own conversion, which heeds alpha.
LOADERS: tuple[tuple[str, Callable[[Any, Path, str], Any]], ...] = (
    (ADAPTER_WEIGHTS, _through_peft),
    (KOHYA_WEIGHTS, _through_diffusers),
    (WEIGHTS, _through_diffusers),
    (WEIGHTS, _through_older_diffusers),
)
