"""What a LoRA file is, read without running anything of it: safetensors only."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
"""As PEFT names it. (`training.lora_formats`, which writes it, takes seconds to import.)"""
KOHYA, DIFFUSERS, PEFT = "kohya", "diffusers", "PEFT"
MOST_CONFIG_BYTES = 1 << 20
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")

_DOWN = re.compile(r"(.+)\.(?:lora_A|lora_down|lora\.down)\.weight")
_DORA = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_UP = ("lora_B", "lora_up", "lora.up")
# Width of the text that cross-attention reads -> the family of models that has it.
_FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}


class NotALora(Exception):
    """A file that cannot be inspected; the message is a sentence for a person."""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer.

    Attributes:
        name: As the file spells it.
        rank: Rows of its down matrix.
        alpha: As the file or its configuration says; None where neither does, and then readers take
            the rank.
        norm: ‖ΔW‖ (Frobenius), its scaling included; None where a weight is not finite.
        down_norm, up_norm: Of the two factors.
    """

    name: str
    rank: int
    alpha: float | None
    norm: float | None
    down_norm: float | None
    up_norm: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Inspection:
    """What a LoRA file is.

    Attributes:
        file: Its name.
        format: `diffusers`, `PEFT` or `kohya`.
        base: What it was made for, as the file says or as its shapes show; None where neither does.
        ranks, alphas: The different ones, ascending.
        targets: How many layers of each kind there are.
        parameters: Numbers in its tensors.
        dtypes: Of its tensors.
        layers: In the file's order.
        metadata: The file's header, as it is.
        notes: What somebody who uses the file should know.
    """

    file: str
    format: str
    base: str | None
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    targets: dict[str, int]
    parameters: int
    dtypes: tuple[str, ...]
    layers: tuple[LayerFacts, ...]
    metadata: dict[str, str]
    notes: tuple[str, ...]

    @property
    def about_alpha(self) -> str:
        """Why files of one model may differ in alpha; empty where this file has none."""
        if not self.alphas:
            return ""
        if self.format == DIFFUSERS and self.alphas == tuple(map(float, self.ranks)):
            return (
                "Here alpha equals rank, which is a scaling of 1. Diffusers files of this server "
                "have the scaling folded into the weights, because some readers of this format "
                "ignore alpha. The PEFT and kohya files of the same model keep the alpha of the "
                "training; "
                "all three change the base model by the same ‖ΔW‖."
            )
        if self.format in (PEFT, KOHYA) and self.alphas != tuple(map(float, self.ranks)):
            return (
                "This format keeps alpha, and its readers scale by it. The diffusers file of the "
                "same model says alpha = rank, because there the scaling is folded into the "
                "weights; both change the base model by the same ‖ΔW‖."
            )
        return ""

    @property
    def norms(self) -> tuple[float, float, float] | None:
        """The smallest, the mean and the largest ‖ΔW‖; None where none is finite."""
        known = [layer.norm for layer in self.layers if layer.norm is not None]
        return (min(known), sum(known) / len(known), max(known)) if known else None


def inspect(path: Path) -> Inspection:
    """Read a LoRA file.

    Args:
        path: A safetensors file; beside one of PEFT's, `adapter_config.json` is read, too.

    Raises:
        NotALora: It is missing, damaged, a pickle, or something else than a LoRA.
    """
    tensors, metadata = _read(path)
    pairs = _pairs(tensors, path)
    kind = _kind(tensors)
    alphas, notes = _alphas(kind, pairs, tensors, metadata, path)
    rs_lora = kind == PEFT and bool(_config(path).get("use_rslora"))
    layers = tuple(
        _facts(name, down, up, alphas[name], rs_lora=rs_lora) for name, (down, up) in pairs.items()
    )
    notes += _warnings(tensors, layers)
    return Inspection(
        file=path.name,
        format=kind,
        base=_base(metadata, pairs, _config(path) if kind == PEFT else {}),
        ranks=tuple(sorted({layer.rank for layer in layers})),
        alphas=tuple(sorted({layer.alpha for layer in layers if layer.alpha is not None})),
        targets=dict(Counter(_target(name) for name in pairs)),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
        layers=layers,
        metadata=metadata,
        notes=notes,
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.is_dir():
        raise NotALora(f"{path} is a folder; name one of the safetensors files in it.")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise NotALora(f"{path} cannot be read ({error.strerror}).") from error
    # A zip file is what torch.save writes today; the other is a bare pickle.
    if start == b"PK\x03\x04" or start[:1] == b"\x80":
        raise NotALora(
            f"{path.name} is a pickle, as .pt, .ckpt and .bin files are: opening it could run "
            "whatever it holds, so it is not opened. Convert it to safetensors where that is safe."
        )
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(
                opened.metadata() or {}
            )
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise NotALora(
            f"{path.name} is not a valid safetensors file; it may be truncated. Download it again."
        ) from error


def _pairs(tensors: Mapping[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Down and up matrix of each layer, convolutions flattened."""
    pairs = {}
    for name, down in tensors.items():
        if not (match := _DOWN.fullmatch(name)):
            continue
        up = next(
            (tensors[key] for part in _UP if (key := f"{match[1]}.{part}.weight") in tensors), None
        )
        if up is None:
            raise NotALora(f"{path.name} is damaged: {match[1]} has no second factor.")
        if down.dim() < 2 or up.dim() < 2 or down.shape[0] != up.shape[1]:
            raise NotALora(f"{path.name} is damaged: the factors of {match[1]} do not fit.")
        pairs[match[1]] = (down.flatten(1), up.flatten(1))
    if not pairs:
        raise NotALora(
            f"{path.name} is not a LoRA: none of its {len(tensors)} tensors is a LoRA's factor."
        )
    return pairs


def _kind(tensors: Mapping[str, Tensor]) -> str:
    first = next(name for name in tensors if _DOWN.fullmatch(name))
    if ".lora_down." in first:
        return KOHYA
    return PEFT if first.startswith("base_model.model.") else DIFFUSERS


def _alphas(
    kind: str,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
) -> tuple[dict[str, float | None], tuple[str, ...]]:
    """Each layer's alpha, from where its format keeps it."""
    if kind == KOHYA:
        known = {
            name: (
                float(tensors[key].float().mean()) if (key := f"{name}.alpha") in tensors else None
            )
            for name in pairs
        }
        return known, ()
    if kind == PEFT:
        config, prefix = _config(path), ""
        note = f"{ADAPTER_CONFIG} is not beside it: its alpha, and so its strength, is not known."
    else:
        config, prefix = _header_config(metadata), "unet."
        note = "It does not say its alpha: readers take the rank, which is a scaling of 1."
    alpha = config.get(f"{prefix}lora_alpha")
    value = float(alpha) if isinstance(alpha, (int, float)) else None
    return dict.fromkeys(pairs, value), () if value is not None else (note,)


def _config(path: Path) -> dict[str, Any]:
    beside = path.with_name(ADAPTER_CONFIG)
    if not beside.is_file() or beside.stat().st_size > MOST_CONFIG_BYTES:
        return {}
    return _object(beside.read_text(encoding="utf-8", errors="replace"))


def _header_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    return _object(metadata.get("lora_adapter_metadata", "{}"))


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _facts(
    name: str, down: Tensor, up: Tensor, alpha: float | None, *, rs_lora: bool
) -> LayerFacts:
    rank = down.shape[0]
    divisor = math.sqrt(rank) if rs_lora else rank
    scaling = 1.0 if alpha is None or not rank else alpha / divisor
    first, second = down.double(), up.double()
    # ‖up · down‖² = Σ (upᵀ·up ∘ down·downᵀ): the matrix itself need not be formed.
    square = float(((second.T @ second) * (first @ first.T)).sum())
    norm = abs(scaling) * math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.nan
    return LayerFacts(
        name=name,
        rank=rank,
        alpha=_finite(alpha),
        norm=_finite(norm),
        down_norm=_finite(float(first.norm())),
        up_norm=_finite(float(second.norm())),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _base(
    metadata: Mapping[str, str],
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    config: Mapping[str, Any],
) -> str | None:
    said = [
        metadata.get("modelspec.architecture"),
        metadata.get("ss_base_model_version"),
        metadata.get("ss_sd_model_name"),
        config.get("base_model_name_or_path"),
    ]
    if known := [str(each) for each in said if each]:
        return ", ".join(known)
    widths = {d.shape[1] for name, (d, _) in pairs.items() if re.search(r"attn2.to_[kv]$", name)}
    families = {_FAMILIES[width] for width in widths if width in _FAMILIES}
    return f"{families.pop()}, by its shapes" if len(widths) == len(families) == 1 else None


def _target(name: str) -> str:
    """The kind of layer: the end of its path, as diffusers spells it."""
    where = (
        "text encoder " if re.match(r"(lora_te|text_encoder|base_model\.model\.text)", name) else ""
    )
    for target in TARGETS:
        if name.endswith((target, target.replace(".", "_"))):
            return where + target
    return where + name.rpartition(".")[2]


def _warnings(tensors: Mapping[str, Tensor], layers: tuple[LayerFacts, ...]) -> tuple[str, ...]:
    notes = []
    if broken := sum(layer.norm is None for layer in layers):
        notes.append(f"{broken} layers have weights that are not finite: it paints nothing.")
    if still := sum(layer.norm == 0 for layer in layers):
        notes.append(f"{still} of {len(layers)} layers have no effect.")
    scales = sum(name.endswith(_DORA) for name in tensors)
    if scales:
        notes.append(
            f"{scales} layers are DoRA's, which also sets the length of each row of the base's "
            "weight: the norms are those of its low-rank part, and readers differ in what they "
            "make of the rest (diffusers drops a dora_scale of SD1.5)."
        )
    used = 2 * len(layers) + scales + sum(name.endswith(".alpha") for name in tensors)
    if others := len(tensors) - used:
        notes.append(f"{others} tensors are of another kind (such as LoCon) and not in the norms.")
    return tuple(notes)
