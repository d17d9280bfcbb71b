"""The optimizers, and their state as plain tensors.

Libraries that torch does not need are imported only for jobs that ask for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.errors import TrainingFailed

_GROUP = "group"


def create(
    name: str,
    weights: Sequence[torch.nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Create an optimizer whose library is installed.

    Args:
        name: `adamw`, `adamw8bit` or `prodigy`.
        weights: Trainable weights, float32, on the device.
        learning_rate: The first rate. Prodigy finds its own.
        weight_decay: Decoupled weight decay.

    Raises:
        TrainingFailed: The optimizer cannot compute on this device.
    """
    match name:
        case "adamw8bit":
            if weights[0].device.type != "cuda":
                raise TrainingFailed(
                    "The optimizer adamw8bit needs a GPU. Set the optimizer to adamw or prodigy."
                )
            # pylint: disable-next=import-outside-toplevel,import-error
            from bitsandbytes.optim import AdamW8bit

            made: torch.optim.Optimizer = AdamW8bit(
                weights, lr=learning_rate, weight_decay=weight_decay
            )
        case "prodigy":
            from prodigyopt import Prodigy  # pylint: disable=import-outside-toplevel

            # As its authors advise for fine-tuning with a warm-up.
            made = Prodigy(weights, lr=1.0, use_bias_correction=True, safeguard_warmup=True)
            # The constructor would print it.
            made.param_groups[0]["weight_decay"] = weight_decay
        case _:
            made = torch.optim.AdamW(
                weights, lr=learning_rate, weight_decay=weight_decay, fused=True
            )
    return made


def heeds_found_inf(optimizer: Any) -> bool:
    """Whether its step leaves the weights alone if its attribute `found_inf`, [] float32, is 1.

    torch's fused kernels do, and no host has to look.
    """
    return bool(optimizer.defaults.get("fused"))


def state_tensors(optimizer: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimizer's state by `{weight's name}/{entry}`.

    Its numbers that belong to no weight, such as the rate that Prodigy has found, are at
    `group/{entry}`.

    Args:
        optimizer: One that `create` made, also when Accelerate has wrapped it.
        names: Of its weights, in order.
    """
    saved = optimizer.state_dict()
    (group,) = saved["param_groups"]
    # The plan sets the rate before every step.
    numbers = {k: v for k, v in group.items() if type(v) in (int, float) and k != "lr"}
    found = _flattened(numbers, _GROUP)
    for index, entries in saved["state"].items():
        found |= _flattened(entries, names[index])
    return found


def restore(optimizer: Any, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Set the optimizer to what `state_tensors` found; `tensors` are only read."""
    index = {name: i for i, name in enumerate(names)}
    group = dict(optimizer.state_dict()["param_groups"][0])
    entries: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, *path, entry = key.split("/")
        place = group if name == _GROUP else entries.setdefault(index[name], {})
        for part in path:
            place = place.setdefault(part, {})
        # A copy: the optimizer would go on in the saved tensors where they need not be moved.
        place[entry] = tensor.item() if _is_number(tensor) else tensor.clone()
    optimizer.load_state_dict({"state": entries, "param_groups": [group]})


def _flattened(entries: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Nested entries (those of 8-bit AdamW are) as one table; numbers keep all their digits."""
    found: dict[str, Tensor] = {}
    for entry, value in entries.items():
        key = f"{prefix}/{entry}"
        if isinstance(value, Mapping):
            found |= _flattened(value, key)
        elif isinstance(value, torch.Tensor):
            found[key] = value
        else:
            kind = torch.int64 if isinstance(value, int) else torch.float64
            found[key] = torch.tensor(value, dtype=kind)
    return found


def _is_number(tensor: Tensor) -> bool:
    """Whether it was a number of Python: the optimizers' own tensors are 32 bits wide, or 8."""
    return tensor.dim() == 0 and tensor.element_size() == 8
