"""The three file formats of a LoRA: diffusers, PEFT and kohya.

They differ in who knows the scaling of a layer's update, ΔW = scaling · up · down:

- **diffusers** files have no alpha key. A loader that reads the metadata of newer diffusers takes
  alpha from there; all others take alpha = rank, which is a scaling of 1. So the real scaling is
  folded into `up`, and the metadata has alpha = rank: both kinds of loader arrive at the same ΔW.
- **PEFT** folders keep the true alpha in `adapter_config.json`.
- **kohya** files carry one alpha a layer, and readers scale by alpha / rank. It is written as
  scaling · rank: the true alpha of a plain LoRA, the equivalent one of a rank-stabilised LoRA
  (arXiv:2312.03732).
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from jobs import base_models
from jobs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, KOHYA_WEIGHTS, WEIGHTS
from training.style.families.sd15 import ADAPTER
from training.style.results import readers

if TYPE_CHECKING:
    from jobs.style import HyperParameters, TrainingRun
    from training.style.examples import Dataset
    from training.style.families.sd15 import BaseModel
    from training.style.results.report import TrainingResult

_OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "prodigy": "prodigyopt.Prodigy",
}
_OF_ANY_FORMAT = (
    *("modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation"),
    *("modelspec.title", "modelspec.description", "modelspec.resolution", "modelspec.tags"),
    *("modelspec.prediction_type", "modelspec.trigger_phrase", "ss_v_parameterization"),
    *("ss_zero_terminal_snr", "ss_base_model_version", "ss_new_sd_model_hash", "ss_tag_frequency"),
)
"""Header entries for every file; not the date: the same weights would change their hash daily."""
MOST_TAGS = 200
LONGEST_TAG = 200
SHOWN_TAGS = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One layer's update of the frozen weight, ΔW = scaling · up · down.

    Attributes:
        down: PEFT's `lora_A`, [rank, inputs].
        up: PEFT's `lora_B`, [outputs, rank].
        scaling: Factor of the product: alpha / rank, or alpha / √rank with rsLoRA.
    """

    down: torch.Tensor
    up: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Number of rows of `down`."""
        return self.down.shape[0]

    def folded(self) -> Layer:
        """The same ΔW with a scaling of 1."""
        return Layer(self.down, self.up * self.scaling, 1.0)

    def halved(self) -> Layer:
        """The same ΔW in half precision.

        Early in training `up` is a thousand times smaller than `down`, and half precision grows
        coarse below 6e-5. So both are first brought to one magnitude by a power of two, which
        changes no digit of the product.
        """
        peaks = [float(factor.abs().max()) for factor in (self.down, self.up)]
        balance = 1.0
        if min(peaks) > 0:
            balance = 2.0 ** round(math.log2(peaks[1] / peaks[0]) / 2)
        return Layer((self.down * balance).half(), (self.up / balance).half(), self.scaling)


def lora_layers(model: torch.nn.Module) -> dict[str, Layer]:
    """Copies of the adapter's layers by module path, in single precision on the CPU."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            down, up = (
                factor[ADAPTER].weight.detach().to("cpu", torch.float32, copy=True)
                for factor in (module.lora_A, module.lora_B)
            )
            layers[name] = Layer(down, up, float(module.scaling[ADAPTER]))
    return layers


def write_diffusers(
    layers: dict[str, Layer], config: LoraConfig, metadata: dict[str, str], folder: Path
) -> None:
    """Write `lora_weights.safetensors`.

    The layers' scaling must be folded; no place in the file could hold it. Of the kohya file's
    `metadata` it has what is true of any format.
    """
    # Only what every PEFT knows: diffusers hands these to `LoraConfig`, and an older one refuses a
    # newer one's names.
    header = {
        "r": config.r,
        "lora_alpha": config.r,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.rank_pattern,
        "target_modules": sorted(config.target_modules),
        "bias": "none",
    }
    packed = json.dumps({f"unet.{key}": value for key, value in header.items()}, sort_keys=True)
    _write(
        folder / WEIGHTS,
        _peft_keys(layers, "unet."),
        {"format": "pt", "lora_adapter_metadata": packed}
        | readers.hint(WEIGHTS)
        | {key: metadata[key] for key in _OF_ANY_FORMAT if key in metadata},
    )


def write_peft(layers: dict[str, Layer], config: LoraConfig, base_name: str, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    `PeftModel.from_pretrained(unet, folder)` reads them.
    """
    # Entries that equal PEFT's defaults are left out: an older PEFT refuses unknown names.
    default = LoraConfig().to_dict()
    entries = {key: value for key, value in config.to_dict().items() if value != default[key]}
    entries |= {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "bias": "none",
    }
    text = json.dumps(entries, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    header = {"format": "pt"} | readers.hint(ADAPTER_WEIGHTS)
    _write(folder / ADAPTER_WEIGHTS, _peft_keys(layers, "base_model.model."), header)


def write_kohya(layers: dict[str, Layer], metadata: dict[str, str], folder: Path) -> None:
    """Write `lora_weights_kohya.safetensors`.

    It has the weights with each layer's alpha, their hash, and `metadata`.
    """
    tensors = {}
    for name, layer in layers.items():
        key = kohya_name(name)
        tensors[f"{key}.lora_down.weight"] = layer.down
        tensors[f"{key}.lora_up.weight"] = layer.up
        tensors[f"{key}.alpha"] = torch.tensor(layer.scaling * layer.rank)
    plain = safetensors.torch.save(tensors)
    # Readers distinguish models by the hash of the bytes after the header (8 bytes of length, then
    # JSON).
    digest = hashlib.sha256(plain[8 + int.from_bytes(plain[:8], "little") :]).hexdigest()
    hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    header = {"format": "pt"} | readers.hint(KOHYA_WEIGHTS) | metadata | hashes
    _write(folder / KOHYA_WEIGHTS, tensors, header)


def kohya_name(path: str) -> str:
    """A UNet module's name in kohya's files: `lora_unet_` and its path with underscores."""
    return "lora_unet_" + path.replace(".", "_")


def kohya_metadata(base: BaseModel, parameters: HyperParameters, layer: Layer) -> dict[str, str]:
    """The kohya file's header: what A1111 and ComfyUI show and sort by.

    Without `ss_base_model_version` and `modelspec.architecture` they may hide the file from users
    of its base model.

    Args:
        base: The base model that was trained on.
        parameters: The hyper-parameters in force at the end.
        layer: Any of the layers; all have the same rank and alpha.
    """
    size = parameters.resolution
    entries = {
        "ss_sd_model_name": base.name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": layer.rank,
        "ss_network_alpha": layer.scaling * layer.rank,
        "ss_network_dropout": parameters.dropout,
        "ss_resolution": f"({size}, {size})",
        "ss_num_epochs": parameters.epochs,
        "ss_learning_rate": parameters.learning_rate,
        "ss_unet_lr": parameters.learning_rate,
        "ss_lr_scheduler": parameters.lr_schedule,
        "ss_optimizer": _OPTIMIZERS[parameters.optimizer],
        "ss_batch_size_per_device": parameters.batch_size,
        "ss_gradient_accumulation_steps": parameters.gradient_accumulation_steps,
        "ss_max_grad_norm": parameters.max_grad_norm,
        "ss_noise_offset": parameters.noise_offset,
        "ss_min_snr_gamma": parameters.snr_gamma,
        "ss_caption_dropout_rate": parameters.caption_dropout,
        "ss_seed": parameters.seed,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "Style LoRA",
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    named = base_models.labels(base.unet.config, base.scheduler.config)
    return {key: str(value) for key, value in entries.items()} | named


def _peft_keys(layers: dict[str, Layer], prefix: str) -> dict[str, torch.Tensor]:
    factors = {f"{prefix}{name}.lora_A.weight": layer.down for name, layer in layers.items()}
    return factors | {f"{prefix}{name}.lora_B.weight": layer.up for name, layer in layers.items()}


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    # Not `save_file`: its errors hide those of the operating system, such as a full disk.
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    path.write_bytes(_with_sorted_metadata(safetensors.torch.save(contiguous, metadata)))


def _with_sorted_metadata(content: bytes) -> bytes:
    """The same file with its metadata in the order of their names.

    safetensors writes them in a random order, and the same weights would have another hash each
    time. A file is the header's length (8 bytes, little-endian), the header (JSON, filled up with
    spaces so that the tensors begin at a multiple of 8), and the tensors.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + memoryview(content)[start:]


def model_card(
    run: TrainingRun,
    base: BaseModel,
    dataset: Dataset,
    result: TrainingResult,
) -> dict[str, str]:
    """Header entries for the kohya file, besides those that `kohya_metadata` makes.

    Args:
        run: Whose model it is.
        base: The base model that it was trained on.
        dataset: The images and their captions.
        result: How the training went.
    """
    tags = tag_counts(example.caption for example in dataset.usable)
    entries = {
        "task_id": run.task_id,
        "style_id": run.style_id,
        "claim": run.claim,
        "ss_output_name": f"style_{run.style_id}",
        "ss_steps": result.steps,
        "ss_epoch": result.delivered_epoch or result.epochs,
        "ss_num_train_images": len(dataset.usable),
        "ss_enable_bucket": True,
        "ss_bucket_info": json.dumps({"buckets": _frames(dataset)}),
        "ss_tag_frequency": json.dumps({"training": tags}, ensure_ascii=False),
        # Of the base's UNet as diffusers keeps it, which is what the LoRA was made for.
        "ss_new_sd_model_hash": base.hash,
        "modelspec.title": f"Style {run.style_id or run.trigger_word}".strip(),
        "modelspec.description": f"A style learnt from {len(dataset.usable)} images.",
        "modelspec.tags": ", ".join(list(tags)[:SHOWN_TAGS]),
        "ss_shuffle_caption": run.parameters.shuffle_tags,
        "modelspec.trigger_phrase": run.trigger_word,
    }
    return {name: str(value) for name, value in entries.items() if value != ""}


def _frames(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """How many images were trained on in each size, by a number, as kohya's readers expect."""
    frames = Counter(tuple(8 * side for side in reversed(shape[1:])) for shape in dataset.shapes)
    return {
        str(number): {"resolution": list(size), "count": count}
        for number, (size, count) in enumerate(sorted(frames.items()))
    }


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """How often each part of the captions between commas occurs; the most frequent first."""
    parts = (" ".join(part.split()) for caption in captions for part in caption.split(","))
    counts = Counter(part[:LONGEST_TAG] for part in parts if part)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_TAGS])
