"""Programs that read a LoRA file of Stable Diffusion, by the names of its layers.

A program lists names that it does not know in its log at most, and paints without those layers: a
file that only partly fits looks like a weak style. The rules for diffusers and PEFT are tested with
these libraries. Those for ComfyUI and A1111 follow from their sources (`comfy/lora.py` of October
2025, `extensions-builtin/Lora/networks.py`); neither program was run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from jobs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, KOHYA_WEIGHTS, WEIGHTS

DIFFUSERS, PEFT, COMFYUI, A1111 = PROGRAMS = ("diffusers", "PEFT", "ComfyUI", "A1111")

USES: Mapping[str, str] = {
    WEIGHTS: f"for diffusers; ComfyUI and A1111 need {KOHYA_WEIGHTS}",
    KOHYA_WEIGHTS: "for ComfyUI and A1111; diffusers reads it, too",
    ADAPTER_WEIGHTS: f"for PEFT, with {ADAPTER_CONFIG}; ComfyUI and A1111 need {KOHYA_WEIGHTS}",
    ADAPTER_CONFIG: f"for PEFT, with {ADAPTER_WEIGHTS}",
}
"""Which published file is for which program."""

USAGE_HINT = "modelspec.usage_hint"
_UNET = r"(?:down_blocks|mid_block|up_blocks)"
_KOHYA = re.compile(rf"lora_unet_{_UNET}_.+")
_DIFFUSERS = re.compile(rf"unet\.({_UNET}\..+)")
_PEFT = re.compile(rf"base_model\.model\.{_UNET}\..+")
_BARE = re.compile(rf"({_UNET}\..+)")


def layers_read(layers: Collection[str]) -> dict[str, int] | None:
    """How many layers of a file each program reads.

    Args:
        layers: Names of layers as the file spells them, without the part that names the factor.

    Returns:
        By program; None if a layer is not one of Stable Diffusion's UNet in a known spelling.
    """
    counts = dict.fromkeys(PROGRAMS, 0)
    for layer in layers:
        programs = _programs(layer)
        if programs is None:
            return None
        for program in programs:
            counts[program] += 1
    return counts


def hint(file: str) -> dict[str, str]:
    """The header entry of a published file that names the programs it is for."""
    use = USES[file]
    return {USAGE_HINT: f"{use[0].upper()}{use[1:]}."}


def _programs(layer: str) -> tuple[str, ...] | None:
    if _KOHYA.fullmatch(layer):
        return (DIFFUSERS, COMFYUI, A1111)
    if _PEFT.fullmatch(layer):
        return (PEFT,)
    if found := _DIFFUSERS.fullmatch(layer):
        return (DIFFUSERS, COMFYUI) if _comfyui_knows(found[1]) else (DIFFUSERS,)
    if found := _BARE.fullmatch(layer):
        return (COMFYUI,) if _comfyui_knows(found[1]) else ()
    return None


def _comfyui_knows(path: str) -> bool:
    """It knows attention layers only by the names that diffusers gave them until 2023."""
    return ".to_" not in path or ".processor.to_" in path


def in_words(counts: Mapping[str, int], layers: int) -> str:
    """`diffusers: all; ComfyUI: 32 of 160; PEFT, A1111: none`.

    Args:
        counts: From `layers_read`.
        layers: Number of layers of the file.
    """
    groups: dict[str, list[str]] = {}
    for program, count in sorted(counts.items(), key=lambda item: -item[1]):
        amount = "all" if count == layers else f"{count} of {layers}" if count else "none"
        groups.setdefault(amount, []).append(program)
    return "; ".join(f"{', '.join(names)}: {amount}" for amount, names in groups.items())
