"""Inspects a LoRA file without running any of it: safetensors only.

It is meant for this server's files first. Files of other programs are read as far as their names
and their headers are certain; the notes name the rest.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from jobs.layout import ADAPTER_CONFIG
from training.style.results.readers import layers_read
from utils.wording import counted

KOHYA, DIFFUSERS, PEFT, OTHER = "kohya", "diffusers", "PEFT", "another program's"
MOST_CONFIG_BYTES = 1 << 20
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")

_DORA = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_PEFT_PREFIX = "base_model.model."
_DIFFUSERS_NAMES = re.compile(
    r"(?:unet|prior|transformer(?:_\d)?|text_encoder(?:_\d)?|down_blocks|mid_block|up_blocks)\."
)
# Patterns of layers without repetition: a stranger's pattern could take hours to match.
_PLAIN_PATTERN = re.compile(r"[\w.\\^$-]+")
# Width of the text that cross-attention reads -> the family of models that has it.
_FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
# Layer, and how the file spells the first factor of it. In order: PEFT and diffusers (also saved
# with the adapter's name), kohya, diffusers before 0.22 (three spellings), PEFT's embeddings.
_DOWN = re.compile(
    r"(.+?)("
    r"\.lora_A(?:\.default)?\.weight"
    r"|\.lora_down\.weight"
    r"|\.lora\.down\.weight"
    r"|\.lora_linear_layer\.down\.weight"
    r"|_lora\.down\.weight"
    r"|\.lora_embedding_A"
    r")"
)
_OTHER_ADAPTERS = (
    ("LoHa", re.compile(r"\.hada_[wt]\d")),
    ("LoKr", re.compile(r"\.lokr_[wt]\d")),
    ("OFT", re.compile(r"\.(?:oft_blocks|oft_diag|oft_R|boft_R)\b")),
    ("IA3", re.compile(r"\.(?:ia3_l\b|on_input$)")),
    ("VeRA", re.compile(r"\.vera_lambda_")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
    ("weight difference", re.compile(r"\.(?:diff|diff_b)$")),
)
_MODELS = (
    ("is a ControlNet", re.compile(r"(?:control_model\.|controlnet_)")),
    ("is a whole model (checkpoint)", re.compile(r"model\.diffusion_model\.")),
    ("is a VAE", re.compile(r"(?:first_stage_model\.|decoder\.(?:up_blocks|up|mid)\b)")),
    (
        "holds the weights of a whole network",
        re.compile(r"(?:(?:down|up|mid)_blocks?|double_blocks|transformer_blocks|text_model)\."),
    ),
)
_EMBEDDINGS = frozenset({"emb_params", "clip_l", "clip_g", "t5xxl"})
_LONGEST_NAME = 80


class NotALora(Exception):
    """A file that cannot be inspected; the message is a sentence for a person."""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer.

    Attributes:
        name: As the file spells it.
        rank: Rows of its down matrix.
        alpha: From the file or its configuration. None if neither has one; then readers take the
            rank.
        norm: ‖ΔW‖ (Frobenius), its scaling included; None where a weight is not finite, or where
            the layer has a third factor.
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
    """Facts about a LoRA file.

    Attributes:
        file: Its name.
        format: `diffusers`, `PEFT`, `kohya` or `another program's`.
        base: The model that it was made for, as the file states or as its shapes show, or None.
        ranks, alphas: The different ones, ascending.
        targets: How many layers of each kind there are.
        parameters: Numbers in its tensors.
        dtypes: Of its tensors.
        layers: In the file's order.
        metadata: The file's header, as it is.
        notes: Notes for users of the file.
        readers: How many layers each program reads; None if that is not known.
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
    readers: dict[str, int] | None = None

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
                "This format keeps alpha, and its readers scale by it. If this server made the "
                "file, the diffusers file of the same model has alpha = rank, because there the "
                "scaling is folded into the weights; both change the base model by the same ‖ΔW‖."
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
        path: A safetensors file; next to one of PEFT's, `adapter_config.json` is read too.

    Raises:
        NotALora: It is missing, damaged, a pickle, or something else than a LoRA.
    """
    tensors, metadata = _read(path)
    pairs = _pairs(tensors, path)
    kind = _kind(tensors)
    scalings = _scalings(kind, pairs, tensors, metadata, path)
    thirds = {name for name in pairs if f"{name}.lora_mid.weight" in tensors}
    layers = tuple(
        _facts(name, down, up, scalings[name], has_third=name in thirds)
        for name, (down, up) in pairs.items()
    )
    notes = _about_scaling(kind, scalings, path) + _warnings(tensors, layers, thirds)
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
        readers=layers_read(pairs),
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.is_dir():
        raise NotALora(f"{path} is a folder; name one of the safetensors files in it.")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise NotALora(f"{path} cannot be read ({error.strerror}).") from error
    # torch.save writes a zip file; the other is a bare pickle. A safetensors file begins with the
    # length of its header (8 bytes), the first of which may be 80, too.
    is_header = start[4:] == b"\0\0\0\0{"
    if not is_header and start.startswith((b"PK\x03\x04", b"\x80")):
        raise NotALora(
            f"{path.name} is a pickle, as .pt, .ckpt and .bin files are: opening it could run "
            "code in it, so it is not opened. Convert it to safetensors where that is safe."
        )
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            if not any(map(factor_names, names)):  # before gigabytes of a model are read
                raise NotALora(f"{path.name} {file_kind(names)}.")
            tensors = {name: opened.get_tensor(name) for name in names}
            return tensors, dict(opened.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise NotALora(
            f"{path.name} is not a valid safetensors file; it may be truncated. Download it again."
        ) from error


def _pairs(tensors: Mapping[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Down and up matrix of each layer, convolutions flattened."""
    pairs = {}
    for name, down in tensors.items():
        if not (names := factor_names(name)):
            continue
        layer, second = names
        up = tensors.get(second)
        if up is None:
            raise NotALora(f"{path.name} is damaged: {layer} has no second factor.")
        if down.dim() < 2 or up.dim() < 2 or down.shape[0] != up.shape[1]:
            raise NotALora(f"{path.name} is damaged: the factors of {layer} do not fit.")
        pairs[layer] = (down.flatten(1), up.flatten(1))
    return pairs


def _kind(tensors: Mapping[str, Tensor]) -> str:
    first = next(name for name in tensors if factor_names(name))
    if ".lora_down." in first:
        return KOHYA
    if first.startswith(_PEFT_PREFIX):
        return PEFT
    return DIFFUSERS if _DIFFUSERS_NAMES.match(first) else OTHER


@dataclasses.dataclass(frozen=True, slots=True)
class _Scaling:
    """How a layer's factors are scaled.

    Attributes:
        alpha: None if it is unknown.
        by_root: It is divided by the root of the rank (rsLoRA), not by the rank.
    """

    alpha: float | None
    by_root: bool = False


def _scalings(
    kind: str,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
) -> dict[str, _Scaling]:
    """Each layer's scaling: from its own tensor, else from the configuration of its network."""
    header = _object(metadata.get("lora_adapter_metadata", "{}"))
    beside = _config(path) if kind == PEFT else {}
    found = {}
    for name in pairs:
        own = tensors.get(f"{name}.alpha")
        if own is not None:
            found[name] = _Scaling(float(own.float().mean()))
        elif kind == PEFT:
            found[name] = _configured(beside, name.removeprefix(_PEFT_PREFIX))
        else:
            network, _, module = name.partition(".")
            start = f"{network}."
            config = {
                key.removeprefix(start): value
                for key, value in header.items()
                if key.startswith(start)
            }
            found[name] = _configured(config, module)
    return found


def _configured(config: Mapping[str, Any], module: str) -> _Scaling:
    """The scaling of a module as a configuration of PEFT states it."""
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern")
    if isinstance(patterns, dict) and patterns:
        if not all(_PLAIN_PATTERN.fullmatch(pattern) for pattern in patterns):
            return _Scaling(None)
        # Imported late: it takes seconds, and few files need it.
        from peft.utils.other import (  # pylint: disable=import-outside-toplevel
            get_pattern_key,
        )

        try:
            alpha = patterns.get(get_pattern_key(list(patterns), module), alpha)
        except re.error:
            return _Scaling(None)
    value = float(alpha) if isinstance(alpha, (int, float)) else None
    return _Scaling(value, bool(config.get("use_rslora")))


def _about_scaling(kind: str, scalings: Mapping[str, _Scaling], path: Path) -> tuple[str, ...]:
    notes = []
    if unknown := sum(scaling.alpha is None for scaling in scalings.values()):
        if kind == PEFT and not _config(path):
            notes.append(
                f"{ADAPTER_CONFIG} is not next to it, so its alpha and its strength are unknown. "
                "The norms assume a scaling of 1."
            )
        else:
            which = "No layer has an" if unknown == len(scalings) else f"{unknown} layers have no"
            notes.append(
                f"{which} alpha that can be read: the norms assume a scaling of 1, as most "
                "readers do."
            )
    if any(scaling.by_root for scaling in scalings.values()):
        notes.append(
            "It is an rsLoRA: alpha is divided by the root of the rank. The norms include that; "
            "readers that do not know rsLoRA paint it more weakly."
        )
    if kind == OTHER:
        notes.append(
            "Its layers are named as another program names them; whether a reader finds them in "
            "its base model is not known."
        )
    return tuple(notes)


def _config(path: Path) -> dict[str, Any]:
    beside = path.with_name(ADAPTER_CONFIG)
    if not beside.is_file() or beside.stat().st_size > MOST_CONFIG_BYTES:
        return {}
    return _object(beside.read_text(encoding="utf-8", errors="replace"))


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _facts(
    name: str, down: Tensor, up: Tensor, scaling: _Scaling, *, has_third: bool
) -> LayerFacts:
    rank, alpha = down.shape[0], scaling.alpha
    divisor = math.sqrt(rank) if scaling.by_root else rank
    factor = 1.0 if alpha is None or not rank else alpha / divisor
    first, second = down.double(), up.double()
    # ‖up · down‖² = Σ (upᵀ·up ∘ down·downᵀ): the matrix itself need not be formed.
    square = float(((second.T @ second) * (first @ first.T)).sum())
    computable = math.isfinite(square) and not has_third
    norm = abs(factor) * math.sqrt(max(square, 0.0)) if computable else math.nan
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
    widths = {
        d.shape[1]
        for name, (d, _) in pairs.items()
        if re.search(r"attn2.(?:processor.)?to_[kv]$", name)
    }
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


def _warnings(
    tensors: Mapping[str, Tensor], layers: tuple[LayerFacts, ...], thirds: Collection[str]
) -> tuple[str, ...]:
    notes = []
    if broken := sum(layer.norm is None and layer.name not in thirds for layer in layers):
        notes.append(
            f"{counted(broken, 'layer')} with weights that are not finite: it paints nothing."
        )
    if still := sum(layer.norm == 0 for layer in layers):
        notes.append(f"{still} of {len(layers)} layers have no effect.")
    if thirds:
        notes.append(
            f"{counted(len(thirds), 'layer')} with a third factor (lora_mid, as LoCon has); their "
            "norms are not computed."
        )
    scales = sum(name.endswith(_DORA) for name in tensors)
    if scales:
        notes.append(
            f"{scales} layers are DoRA's, which also sets the length of each row of the base's "
            "weight: the norms are those of its low-rank part, and readers differ in what they "
            "make of the rest (diffusers drops a dora_scale of SD1.5)."
        )
    used = 2 * len(layers) + scales + sum(name.endswith(".alpha") for name in tensors)
    if others := len(tensors) - used - len(thirds):
        kinds = ", ".join(adapters_in(tensors)) or "such as biases"
        notes.append(
            f"{counted(others, 'tensor')} of another kind ({kinds}), not included in the norms."
        )
    return tuple(notes)


def factor_names(name: str) -> tuple[str, str] | None:
    """The layer of a first factor and the name of the second one.

    Returns:
        None if the tensor is not the first factor of a layer.
    """
    if not (match := _DOWN.fullmatch(name)):
        return None
    layer, spelling = match.groups()
    second = spelling.replace("lora_A", "lora_B").replace("down", "up")
    return layer, layer + second.replace("embedding_A", "embedding_B")


def adapters_in(names: Iterable[str]) -> dict[str, int]:
    """The kinds of adapters other than LoRA, with the number of tensors of each."""
    counts: dict[str, int] = {}
    for name in names:
        for kind, pattern in _OTHER_ADAPTERS:
            if pattern.search(name):
                counts[kind] = counts.get(kind, 0) + 1
                break
    return counts


def file_kind(names: Iterable[str]) -> str:
    """The kind of a file without LoRA factors, to follow the file's name in a sentence."""
    names = sorted(names)
    if not names:
        return "holds no tensors"
    if adapters := adapters_in(names):
        return (
            f"is an adapter of another kind ({', '.join(adapters)}); inspect reads LoRA factors "
            "only"
        )
    if _EMBEDDINGS.issuperset(names) or (len(names) == 1 and "." not in names[0]):
        return "is an embedding (textual inversion), not a LoRA"
    for kind, pattern in _MODELS:
        if any(pattern.match(name) for name in names):
            return f"{kind}, not a LoRA"
    return (
        f"holds no LoRA factors that inspect knows; the first of its {len(names)} tensors is named "
        f"{names[0][:_LONGEST_NAME]!r}"
    )
