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
INDIFFERENT_TO_SHAPE = ("adamw", "prodigy")
"""Optimizers that train one flat parameter as they train its parts. AdamW does the same to every
number. Prodigy sums over all weights: by parts that is 16 kernels and two reads by the host for
each weight, and a flat parameter needs that once. 8-bit AdamW scales its state in blocks, which
would reach from one weight into the next."""
_FLATTENED = ("p0", "s")
"""Entries that Prodigy keeps as vectors for weights of any shape."""


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


def state_tensors(optimizer: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state by `{weight's name}/{entry}`.

    Its numbers that belong to no weight, such as the rate that Prodigy has found, are at
    `group/{entry}`.

    The table is the same whether the optimizer has the weights one by one or as one flat parameter.

    Args:
        optimizer: One that `create` made, also when Accelerate has wrapped it.
        weights: Its weights by name, in order.
    """
    saved = optimizer.state_dict()
    (group,) = saved["param_groups"]
    # The plan sets the rate before every step.
    numbers = {k: v for k, v in group.items() if type(v) in (int, float) and k != "lr"}
    found = _flattened(numbers, _GROUP)
    names = list(weights)
    for index, entries in saved["state"].items():
        flat = _is_flat(group, weights)
        parts = _by_weight(entries, weights) if flat else {names[index]: entries}
        for name, own in parts.items():
            found |= _flattened(own, name)
    return found


def restore(optimizer: Any, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Set the optimizer to what `state_tensors` found; `tensors` are only read."""
    index = {name: i for i, name in enumerate(weights)}
    group = dict(optimizer.state_dict()["param_groups"][0])
    entries: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, *path, entry = key.split("/")
        place = group if name == _GROUP else entries.setdefault(index[name], {})
        for part in path:
            place = place.setdefault(part, {})
        # A copy: the optimizer would go on in the saved tensors where they need not be moved.
        place[entry] = tensor.item() if _is_number(tensor) else tensor.clone()
    if entries and _is_flat(group, weights):
        entries = {0: _joined([entries[i] for i in range(len(weights))], weights)}
    optimizer.load_state_dict({"state": entries, "param_groups": [group]})


def _is_flat(group: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether the optimizer has all weights as one parameter, [n], in their order."""
    return len(group["params"]) == 1 < len(weights)


def _by_weight(
    entries: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """The state of a flat parameter as that of each weight."""
    total = sum(weight.numel() for weight in weights.values())
    place = 0
    found = {}
    for name, weight in weights.items():
        own = dict(entries)
        for entry, value in entries.items():
            if isinstance(value, Tensor) and value.numel() == total:
                part = value[place : place + weight.numel()]
                own[entry] = part if entry in _FLATTENED else part.view(weight.shape)
        place += weight.numel()
        found[name] = own
    return found


def _joined(parts: Sequence[Mapping[str, Any]], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of each weight as that of a flat parameter."""
    joined: dict[str, Any] = dict(parts[0])  # numbers, such as the steps, are the same in all
    sizes = [weight.numel() for weight in weights.values()]
    for entry in joined:
        values = [part[entry] for part in parts]
        if isinstance(values[0], Tensor) and any(value.dim() for value in values):
            # Prodigy keeps one zero for a weight that began as zeros.
            joined[entry] = torch.cat(
                [v.reshape(-1).expand(size) for v, size in zip(values, sizes, strict=True)]
            )
    return joined


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
