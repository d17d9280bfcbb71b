"""Long jobs may be compiled by block; what is compiled is an aid and never a condition."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import register_backend
from torch.fx import GraphModule

from tests.unit.training.conftest import MakeRun
from tests.unit.training.runs import same, trained
from training.compilation import Compilation
from training.style.families.sd15 import BaseModel

COMPILED: list[GraphModule] = []
"""What the backends below were given."""


@register_backend
def counts(graph: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
    """Computes a graph as it stands: quick, and the same to the bit."""
    COMPILED.append(graph)
    return graph.forward


@register_backend
def has_no_compiler(graph: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
    """As on a machine without a C compiler."""
    COMPILED.append(graph)
    raise RuntimeError("no C compiler was found")


@register_backend
def computes_wrong(graph: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
    """Runs without a complaint, and is off by a tenth."""
    COMPILED.append(graph)
    return lambda *arguments: tuple(1.1 * part for part in graph.forward(*arguments))


@pytest.fixture
def compiling(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """Has the base compile from so many steps on, by one of the backends."""
    COMPILED.clear()
    torch.compiler.reset()

    def set_up(from_steps: int, backend: str) -> None:
        monkeypatch.setattr(base, "compilation", Compilation(from_steps, backend))
        monkeypatch.setattr(base, "warnings", ())

    return set_up


def test_a_long_job_is_compiled_and_a_short_one_never(
    base: BaseModel, make_run: MakeRun, compiling: Callable[[int, str], None]
) -> None:
    run = make_run(count=3, epochs=2)
    compiling(7, "counts")
    _, as_written, _ = trained(base, run)
    assert not COMPILED  # it has six steps
    compiling(6, "counts")
    _, compiled, _ = trained(base, run)
    assert COMPILED
    assert same(compiled, as_written)


def test_what_one_job_compiled_is_not_there_in_the_next(
    base: BaseModel, make_run: MakeRun, compiling: Callable[[int, str], None]
) -> None:
    compiling(6, "counts")
    trained(base, make_run(count=3, epochs=2))
    COMPILED.clear()
    _, _, _ = trained(base, make_run(count=3, epochs=1))
    assert not COMPILED
    assert not [
        name
        for name, part in base.unet.named_modules()
        if part._compiled_call_impl is not None  # pylint: disable=protected-access
    ]


def test_looks_at_samples_and_probes_compile_nothing(
    base: BaseModel, make_run: MakeRun, compiling: Callable[[int, str], None]
) -> None:
    compiling(1, "counts")
    trained(base, make_run(count=3, epochs=1))
    few = len(COMPILED)
    COMPILED.clear()
    torch.compiler.reset()
    looking = make_run(count=3, epochs=2)
    held_out = looking.images[:1]
    looking = dataclasses.replace(
        looking, images=looking.images[1:] + held_out, checkpoint_interval=1, preview_share=1.0
    )
    compiling(1, "counts")
    result, _, _ = trained(base, looking)
    assert result.probes
    assert len(COMPILED) == few


def test_where_compiling_fails_the_job_is_trained_without_and_says_so(
    base: BaseModel, make_run: MakeRun, compiling: Callable[[int, str], None]
) -> None:
    run = make_run(count=3, epochs=2)
    _, as_written, _ = trained(base, run)
    compiling(6, "has_no_compiler")
    result, weights, _ = trained(base, run)
    assert same(weights, as_written)
    assert result.epochs == 2
    (sentence,) = [each for each in result.warnings if "compiled" in each]
    assert "no C compiler was found" in sentence and "COMPILE_FROM_STEPS" in sentence
    assert len(COMPILED) == 1
    trained(base, run)  # another job of this process does not try again
    assert len(COMPILED) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own
def test_what_computes_another_gradient_is_not_trained_with(
    base: BaseModel, make_run: MakeRun, compiling: Callable[[int, str], None]
) -> None:
    run = make_run(count=3, epochs=2)
    _, as_written, _ = trained(base, run)
    compiling(1, "computes_wrong")
    result, weights, _ = trained(base, run)
    assert COMPILED
    assert same(weights, as_written)
    (sentence,) = [each for each in result.warnings if "compiled" in each]
    assert re.search(r"their gradient is [0-9.]+% away", sentence)


def test_what_fails_besides_is_no_fault_of_the_compiler(base: BaseModel) -> None:
    assert Compilation(1).failed_by(RuntimeError("no C compiler was found")) is None
    assert base.compilation.failed_by(ValueError("bad")) is None


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:The .grad attribute")  # torch's own
@pytest.mark.parametrize(
    "backend",
    # The one that is shipped takes half a minute of a CPU, and is for GPUs.
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)],
)
def test_what_is_compiled_trains_the_same_but_for_rounding(
    base: BaseModel, make_run: MakeRun, compiling: Callable[[int, str], None], backend: str
) -> None:
    run = make_run(count=3, epochs=2, dropout=0.0)
    result, as_written, _ = trained(base, run)
    compiling(1, backend)
    again, compiled, _ = trained(base, run)
    if backend == "aot_eager":  # the other may be found to be wrong, and left out for that
        assert not [each for each in again.warnings if "compiled" in each]
    assert again.losses == pytest.approx(result.losses, rel=1e-3)
    change = sum(float((compiled[name] - as_written[name]).norm() ** 2) for name in compiled)
    size = sum(float(weights.norm() ** 2) for name, weights in as_written.items() if "_B" in name)
    assert change < 0.01 * size  # AdamW's first updates have the gradients' signs alone
