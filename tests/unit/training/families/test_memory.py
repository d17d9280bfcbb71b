"""Memory without gradient checkpointing: the estimates against a count at full size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.sd15 import unet
from jobs.style import HyperParameters
from training.style.families.lora_config import peft_config
from training.style.families.memory import SD15, kept_bytes

GIB = 1024**3
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def counted_bytes(
    parameters: HyperParameters, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Bytes that autograd keeps of one forward pass of SD1.5's UNet, the weights left out.

    The tensors have shapes and no content. A CPU's autocast leaves the norms in half precision;
    CUDA's does not, so they are computed in single precision here.
    """
    for name in ("group_norm", "layer_norm"):
        monkeypatch.setattr(F, name, _in_single_precision(getattr(F, name)))
    with torch.device("meta"):
        network = unet().requires_grad_(False)
    network.add_adapter(peft_config(parameters))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in network.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                trained = weight.requires_grad
                empty = torch.empty(weight.shape, dtype=torch.float32 if trained else dtype)
                setattr(module, name, torch.nn.Parameter(empty, requires_grad=trained))
        return _kept(network.train(), parameters, dtype)


def _in_single_precision(norm: Any) -> Any:
    def computed(values: Tensor, groups: Any, *parts: Any, **how: Any) -> Tensor:
        whole = [part.float() if isinstance(part, Tensor) else part for part in parts]
        result: Tensor = norm(values.float(), groups, *whole, **how)
        return result

    return computed


def _place(tensor: Tensor) -> int:
    """The storage of a tensor without content, which has no address."""
    place: int = tensor.untyped_storage()._cdata  # pylint: disable=protected-access
    return place


def _kept(network: Any, parameters: HyperParameters, dtype: torch.dtype) -> int:
    frozen = {_place(weight) for weight in network.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors too, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if (place := _place(tensor)) not in frozen:
            kept.setdefault(place, tensor)
        return tensor

    side = parameters.resolution // 8
    noisy = torch.empty(parameters.batch_size, 4, side, side, dtype=dtype)
    text = torch.empty(parameters.batch_size, 77, 768, dtype=dtype)
    timesteps = torch.empty(parameters.batch_size, dtype=torch.int64)
    half = dtype != torch.float32
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.float16, enabled=half),
    ):
        network(noisy, timesteps, encoder_hidden_states=text).sample.float().pow(2).mean()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_sd15_keeps_1_3_gib_of_one_image_and_not_four(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = counted_bytes(HyperParameters(), torch.float16, monkeypatch)
    assert counted / GIB == pytest.approx(1.31, abs=0.01)


@pytest.mark.parametrize(
    ("precision", "wanted"),
    [
        ("fp16", {}),
        ("fp16", {"batch_size": 4}),
        ("fp16", {"resolution": 1024}),
        ("fp16", {"dropout": 0.0}),
        ("fp16", {"target": "attention+ff", "rank": 128}),
        ("fp32", {"target": "attention+ff"}),
    ],
)
def test_the_estimate_is_enough_and_not_much_more(
    monkeypatch: pytest.MonkeyPatch, precision: str, wanted: dict[str, Any]
) -> None:
    parameters, dtype = HyperParameters(**wanted), DTYPES[precision]
    counted = counted_bytes(parameters, dtype, monkeypatch)
    assert counted <= kept_bytes(SD15, parameters, dtype) <= 1.3 * counted
