"""The LoRA of a style run as PEFT configures it."""

from __future__ import annotations

from peft import LoraConfig

from jobs.style import TARGETS, HyperParameters
from training.runtime.quantisers import look_for_quantised_layers_only_if_loaded

look_for_quantised_layers_only_if_loaded()


def peft_config(parameters: HyperParameters) -> LoraConfig:
    """The PEFT configuration of the LoRA on the UNet."""
    return LoraConfig(
        r=parameters.rank,
        lora_alpha=parameters.alpha,
        lora_dropout=parameters.dropout,
        target_modules=list(TARGETS[parameters.target]),
        use_rslora=parameters.rslora,
        init_lora_weights=True,
        bias="none",
    )
