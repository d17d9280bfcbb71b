"""Stable Diffusion 1.5, loaded once and kept; its UNet is lent to one LoRA at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from jobs.kinds import TrainerOptions
from jobs.style import HyperParameters
from training.runtime.device import (
    available_bytes,
    choose_device,
    free_memory,
    gpu_error,
    out_of_memory,
    prefer_speed,
    tf32,
    use_deterministic_algorithms,
)
from training.runtime.recomputation import Recomputation
from training.style.families import memory
from training.style.families.base_files import (
    first_line,
    hash_of_weights,
    load_part,
    locate,
)
from training.style.families.lora_config import peft_config
from training.style.stand_in_model import COMPLETE as STAND_IN
from utils.errors import BaseModelUnavailable, GpuBroken, TrainingFailed

log = logging.getLogger(__name__)

STAND_IN_WARNING = (
    "The base model is a stand-in with random weights: images of this model are noise, with or "
    "without the LoRA."
)
ADAPTER = "default"
"""Name of the adapter on the UNet while a run is in hand."""

DRIFT_BYTES = 64 * 1024**2
"""A detached base that holds this much more GPU memory than a fresh one has leaked."""

Fingerprint = dict[str, list[int]]
T = TypeVar("T")


class BaseModel:
    """The frozen base model of this process.

    Attributes:
        name: Hub name, or the folder's own name where the model is local (never a path).
        hash: SHA-256 of the UNet's weight files, in hexadecimal.
        encoders_hash: The same of the VAE's and the text encoder's.
        device: Device of all parts.
        dtype: Of the frozen UNet and text encoder; the VAE is always float32, in half precision it
            gives NaN.
        unet, vae, text_encoder, tokenizer: The parts, in evaluation mode, without gradients.
        scheduler: The base's own noise schedule and prediction type, as a DDPM scheduler.
        warnings: Sentences for the report, about the machine rather than a run.
        fast: Train on the fast paths (see `TrainerOptions`).
        drifted: True once GPU memory did not come back after a run: the process should be replaced.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        checkpointing: str,
        fast: bool = True,
        warnings: tuple[str, ...] = (),
    ) -> None:
        """Load from a complete local diffusers folder; `load` is the way in."""
        self.name, self.device, self.dtype, self.fast = name, device, dtype, fast
        self.warnings = warnings
        self.drifted = False
        self._checkpointing = checkpointing
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.scheduler: Any = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.text_encoder = load_part(CLIPTextModel, folder, "text_encoder", dtype).to(device)
        self.vae = load_part(AutoencoderKL, folder, "vae", torch.float32).to(device)
        self.unet = load_part(UNet2DConditionModel, folder, "unet", dtype).to(device)
        if fast and device.type == "cuda":
            prefer_speed(device)
            # The layout that tensor cores compute in: cuDNN need not rearrange the weights.
            self.unet.to(memory_format=torch.channels_last)
            self.vae.to(memory_format=torch.channels_last)
        self.hash = hash_of_weights(folder / "unet")
        self.encoders_hash = hash_of_weights(folder / "vae", folder / "text_encoder")
        self._fresh = self._fingerprint()
        self._fresh_bytes = self._allocated_bytes()

    @classmethod
    def load(cls, options: TrainerOptions) -> BaseModel:
        """Load the base model onto the GPU, or onto the CPU where that is allowed.

        Raises:
            GpuBroken: There is no usable CUDA device, and training on the CPU is not allowed.
            BaseModelUnavailable: The model is missing, incomplete or cannot be reached.
        """
        if options.deterministic:
            use_deterministic_algorithms()
        device, dtype, warnings = choose_device(
            options.mixed_precision, allow_cpu=options.allow_cpu
        )
        folder, name = locate(options)
        if (folder / STAND_IN).is_file():
            warnings = (*warnings, STAND_IN_WARNING)
        try:
            base = cls(
                folder,
                name=name,
                device=device,
                dtype=dtype,
                checkpointing=options.gradient_checkpointing,
                fast=options.fast_training,
                warnings=warnings,
            )
        except Exception as error:
            if out_of_memory(error):
                raise GpuBroken(
                    f"The GPU has too little free memory to load {name}. End the other programs "
                    "that use it."
                ) from error
            if known := gpu_error(error):
                raise known from error
            raise BaseModelUnavailable(
                f"The base model {name} is incomplete or damaged ({first_line(error, folder)}). "
                "It must be a whole diffusers folder of Stable Diffusion 1.5 with safetensors "
                "weights; download it again."
            ) from error
        log.info(
            "base_model_loaded",
            extra={"model": name, "device": str(device), "dtype": str(dtype), "hash": base.hash},
        )
        return base

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The latent distribution of images, so that each step can draw a fresh sample.

        Args:
            pixels: [n, 3, h, w], from -1 to 1.

        Returns:
            Mean and standard deviation of the VAE's posterior, each [n, 4, h/8, w/8] in float32 on
            the device; the VAE's scaling factor is already applied to both, and must not be applied
            again.
        """
        self.restore_encoders()
        factor = float(self.vae.config.scaling_factor)

        def encode() -> tuple[Tensor, Tensor]:
            with tf32(self.device, enabled=self.fast):
                posterior = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
            return posterior.mean * factor, posterior.std * factor

        return self._with_room(encode)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """The text encoder's last hidden states, as SD1.5's cross-attention reads them.

        Args:
            prompts: n prompts; tokens after the 77th are cut off.

        Returns:
            [n, 77, d] in the base's dtype on the device.
        """
        self.restore_encoders()
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # SD1.5 was trained without an attention mask: padding is part of the prompt.

        def encode() -> Tensor:
            states: Tensor = self.text_encoder(tokens.input_ids.to(self.device))[0]
            return states

        return self._with_room(encode)

    def fit_prompt(self, prompt: str) -> str:
        """As much of a prompt as the text encoder reads (77 tokens), cut between two tags.

        A prompt without commas is cut between two words.
        """
        if self._is_read_whole(prompt):
            return prompt
        for separator in (",", " "):
            parts = prompt.split(separator)
            while len(parts) > 1:
                parts.pop()
                if self._is_read_whole(separator.join(parts)):
                    return separator.join(parts).rstrip()
        return ""  # a word of hundreds of letters

    def _is_read_whole(self, prompt: str) -> bool:
        longest: int = self.tokenizer.model_max_length
        return len(self.tokenizer(prompt, verbose=False).input_ids) <= longest

    def attach(
        self, parameters: HyperParameters, *, checkpointing: bool = False
    ) -> list[torch.nn.Parameter]:
        """Put a fresh LoRA on the UNet and make it ready to train.

        The initial weights depend only on the seed: they are drawn on the CPU, from a random state
        that is put back afterwards.

        Args:
            parameters: The LoRA's rank, alpha and dropout, and the seed.
            checkpointing: Turn gradient checkpointing on regardless of the options.

        Returns:
            The LoRA's trainable weights, float32, in the order of the UNet's modules.

        Raises:
            TrainingFailed: Another LoRA is attached still.
        """
        if getattr(self.unet, "peft_config", None):
            raise TrainingFailed("The base model still carries the LoRA of another run.")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(parameters.seed)
            self.unet.add_adapter(peft_config(parameters), adapter_name=ADAPTER)
        trainable = [weight for weight in self.unet.parameters() if weight.requires_grad]
        # PEFT makes them in the base's dtype; fp16 gradients cannot be unscaled.
        for weight in trainable:
            weight.data = weight.data.to(torch.float32)
        self.unet.train()  # the LoRA's dropout and gradient checkpointing act in this mode only
        if checkpointing or self._wants_checkpointing(parameters):
            self.unet.enable_gradient_checkpointing(Recomputation())
        return trainable

    @property
    def checkpointing(self) -> bool:
        """Whether gradient checkpointing is on at present."""
        return bool(self.unet.is_gradient_checkpointing)

    def take_off(self) -> None:
        """Take the LoRA off, if one is on, with everything that belongs to its training."""
        if getattr(self.unet, "peft_config", None):
            self.unet.unload_lora()
        self.unet.disable_gradient_checkpointing()
        self.unet.requires_grad_(False)
        self.unet.zero_grad(set_to_none=True)
        self.unet.eval()

    def detach(self) -> None:
        """Take the LoRA off, if one is on, and prove that the base is what it was.

        Raises:
            TrainingFailed: The base's weights or their names are no longer those that were loaded.
        """
        self.take_off()
        self.restore_encoders()
        if self._fingerprint() != self._fresh:
            self.drifted = True
            raise TrainingFailed(
                "The base model's frozen weights changed during training; the trainer process must "
                "be replaced."
            )
        self._look_for_leaks()

    def offload_encoders(self) -> None:
        """Make room on the GPU: VAE and text encoder wait on the CPU while the UNet trains."""
        if self.device.type == "cuda":
            self.vae.to("cpu")
            self.text_encoder.to("cpu")
            torch.cuda.empty_cache()

    def restore_encoders(self) -> None:
        """Bring VAE and text encoder back to the device; nothing to do where they are there."""
        if self.device.type == "cuda":
            self.vae.to(self.device)
            self.text_encoder.to(self.device)

    def _with_room(self, compute: Callable[[], T]) -> T:
        """Compute; where memory does not suffice, once more with the UNet out of the way."""
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        log.warning("unet_made_room_for_encoders")
        self.unet.to("cpu")
        free_memory(self.device)
        try:
            return compute()
        finally:
            self.unet.to(self.device)

    def _wants_checkpointing(self, parameters: HyperParameters) -> bool:
        """`auto` means: on a GPU without room for all that a batch leaves behind."""
        if self._checkpointing == "auto":
            needed = memory.bytes_without_checkpointing(memory.SD15, parameters, self.dtype)
            return self.device.type == "cuda" and available_bytes(self.device) < needed
        return self._checkpointing == "true"

    def _fingerprint(self) -> Fingerprint:
        """Checksums of the bits of every tensor, computed on its device in some milliseconds."""
        return {
            f"{part}.{name}": sums
            for part in ("unet", "vae", "text_encoder")
            for name, sums in _checksums(getattr(self, part)).items()
        }

    def _allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _look_for_leaks(self) -> None:
        if self.device.type != "cuda":
            return
        free_memory(self.device)
        extra = self._allocated_bytes() - self._fresh_bytes
        if extra > DRIFT_BYTES:
            self.drifted = True
            log.warning("gpu_memory_drifted", extra={"bytes_above_baseline": extra})


def _checksums(model: torch.nn.Module) -> dict[str, list[int]]:
    names, sums = [], []
    for name, tensor in model.state_dict().items():
        bits = (
            tensor.contiguous().view(torch.uint8).flatten() if tensor.dim() else tensor.reshape(1)
        )
        if bits.dtype == torch.uint8 and bits.numel() % 4 == 0:
            bits = bits.view(torch.int32)
        # The second sum skips every other word: two swapped neighbours change it.
        sums += [bits.sum(dtype=torch.int64), bits[::2].sum(dtype=torch.int64)]
        names.append(name)
    values = torch.stack(sums).tolist()  # one transfer for all
    return {name: values[2 * i : 2 * i + 2] for i, name in enumerate(names)}
