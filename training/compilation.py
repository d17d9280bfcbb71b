"""`torch.compile` by block, where a job is long enough to win back what compiling takes."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable

import torch
import torch._inductor.config
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

log = logging.getLogger(__name__)

TOLERANCE = 0.03
"""How far compiled gradients may be from those as written: fp16 rounds to a part in a thousand or
so, and torch 2.10 to 2.13 were seen to compile wrong ones without a word (pytorch issue 193061; on
a CPU, torch 2.13.0 was a fifth off for SD1.5's blocks with a LoRA)."""


class Miscompiled(Exception):
    """What was compiled computes something else than what is written."""


class Compilation:
    """Compiles the UNet's transformer blocks for one job at a time, or lets it be.

    The blocks alone: they are alike, so that one compiled for a shape serves all of that shape, and
    it is there that a LoRA adds its many small operations.

    Args:
        from_steps: Jobs of at least so many steps are compiled; 0: none.
        backend: torch's name of the compiler.
    """

    def __init__(self, from_steps: int, backend: str = "inductor") -> None:
        self._from_steps, self._backend = from_steps, backend
        self._failed = False

    def begin(self, unet: UNet2DConditionModel, steps: int) -> bool:
        """Have the blocks compiled when they are first called, if so many steps are worth it."""
        if self._failed or not 0 < self._from_steps <= steps:
            return False
        # LoRA's dropout must draw the same masks, or nothing could be held against eager training.
        torch._inductor.config.fallback_random = True  # pylint: disable=protected-access
        # Each width of the UNet, and each shape of image, is a version of its own.
        torch._dynamo.config.recompile_limit = 64  # pylint: disable=protected-access
        if unet.is_gradient_checkpointing:
            # By torch: the passes of `training.style.recomputation`, without a gradient and with
            # one, would each be compiled.
            unet.enable_gradient_checkpointing()
        unet.compile_repeated_blocks(backend=self._backend, dynamic=False)
        return True

    def end(self, unet: UNet2DConditionModel) -> None:
        """Have the blocks computed as they are written; compiled ones refer to a job's LoRA."""
        compiled = False
        for module in unet.modules():
            if module._compiled_call_impl is not None:  # pylint: disable=protected-access
                module._compiled_call_impl = None  # pylint: disable=protected-access
                compiled = True
        if compiled:
            torch.compiler.reset()

    def prove(self, gradient: Callable[[], Tensor]) -> None:
        """Hold what is compiled against what is written, before a job relies on it.

        Args:
            gradient: Computes the gradient of some images, the same at each call.

        Raises:
            Miscompiled: It is another one when it is compiled.
        """
        with self.aside():
            written = gradient()
        away = float((gradient() - written).norm() / written.norm())
        log.info("blocks_compiled", extra={"gradient_away": away})
        if not math.isfinite(away) or away > TOLERANCE:
            raise Miscompiled(f"their gradient is {away:.1%} away from the right one")

    @staticmethod
    def aside() -> contextlib.AbstractContextManager[None]:
        """What is computed inside is computed as it is written: a look at images of other shapes.

        It would cost a compilation for each of them.
        """
        stance: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
        return stance

    def failed_by(self, error: BaseException) -> str | None:
        """A sentence for the report if it is the compiler that failed, else None.

        Then nothing is compiled in this process again.

        Args:
            error: What training raised.
        """
        if not isinstance(error, (TorchDynamoException, Miscompiled)):
            return None
        self._failed = True
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2])[:200]  # the first names the compiler, the second its trouble
        sentence = (
            f"The UNet's blocks could not be compiled ({reason or type(error).__name__}); training "
            "ran without, at its usual speed. COMPILE_FROM_STEPS=0 leaves it out."
        )
        log.warning("compilation_failed", extra={"reason": sentence})
        return sentence
