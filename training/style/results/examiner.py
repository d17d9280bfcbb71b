"""Looks at the LoRA before its first step and at checkpoints: the probe, and sample images.

The probe depends only on the weights and decides which checkpoint is best, so it is always
measured, in a fixed number of passes. Samples are for people: they are painted as long as
they take no more than their share of the time.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from jobs.layout import PREVIEW_FOLDER
from training.runtime.clock import Clock
from training.runtime.device import free_memory, gpu_error, out_of_memory
from training.style.dataset import with_trigger
from training.style.loop_state import LoopState, weights_are_finite
from training.style.results import preview
from training.style.results.probe import Interrupted, Probe, Probed, best_of
from utils.errors import GpuBroken, StopReason

if TYPE_CHECKING:
    from jobs.style import TrainingRun
    from training.style.examples import Dataset
    from training.style.families.sd15 import BaseModel

log = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 60.0
"""Samples that would take longer wait for the end: a worker that makes no step looks dead."""
CPU_SAMPLE_STEPS = 8
"""On a CPU the samples are a sketch: each step of the sampler takes as long as a training step."""


class Examiner:
    """Examines a run's LoRA.

    Attributes:
        probe_seconds, sample_seconds: Seconds of this run that both have used.

    Args:
        run: The run.
        base: The base model with the LoRA.
        dataset: The run's images.
        should_stop: Asked while it works: a stop need not wait for it.
        clock: The run's; the time taken here is left out of its rate.
    """

    def __init__(
        self,
        run: TrainingRun,
        base: BaseModel,
        dataset: Dataset,
        should_stop: Callable[[], StopReason | None],
        clock: Clock,
    ) -> None:
        self._run, self._base, self._clock = run, base, clock
        self._should_stop = lambda: should_stop() is not None
        self._probe = Probe(base, dataset, self._should_stop)
        self._embeddings = dataset.embeddings
        self._prompts = preview.chosen_prompts(prompts_of(run, dataset))
        self._steps = sample_steps(run, base)
        self.probe_seconds = self.sample_seconds = 0.0

    def examine(self, state: LoopState) -> bool:
        """Examine what is due at the end of an epoch, or before the first.

        Whether it is due follows only from the state, so that a resumed run examines what the
        uninterrupted one does.

        Args:
            state: Receives the measurement and the samples.

        Returns:
            False where a stop was asked for before the probe was through: then nothing is found,
            and the examination is due still.
        """
        if not self._is_due(state):
            return True
        with self._timed() as taken:
            found = self._measured(state)
        self.probe_seconds += taken[0]
        if found is None:
            return False
        state.probes.append(found)
        if self._run.parameters.deliver == "best" and best_of(state.probes) is found:
            state.keep_as_best()
        log.info(
            "probed",
            extra={"epoch": found.epoch, "loss": found.training, "held_out": found.held_out},
        )
        if found.epoch and weights_are_finite(state):
            with self._timed() as taken:
                self._paint(state)
            self.sample_seconds += taken[0]
        return True

    def _is_due(self, state: LoopState) -> bool:
        if not state.probes:
            return True
        epoch, before = state.epoch, state.probes[-1].epoch
        ends, interval = epoch == self._run.parameters.epochs, self._run.checkpoint_interval
        # Between two skipped steps there may be a divergence: no checkpoint is made there either.
        at_checkpoint = epoch // interval > before // interval and not state.skipped_in_a_row
        return epoch > before and (ends or at_checkpoint)

    def _measured(self, state: LoopState) -> Probed | None:
        try:
            return self._probe.measure(state.epoch, state.step)
        except Interrupted:
            return None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Training itself may need less than the machine's other users leave for this.
        log.warning("probe_ran_out_of_memory", extra={"epoch": state.epoch})
        free_memory(self._base.device)
        return Probed(state.epoch, state.step, None)

    def _paint(self, state: LoopState) -> None:
        """Paint a row of samples if there is time for it; no harm is done where it fails."""
        first = not any(key.startswith(preview.WITHOUT_LORA) for key in state.samples)
        if not self._has_time_for(2 if first else 1):
            return
        try:
            if first:
                self._keep(state, preview.WITHOUT_LORA, 0, self._images(with_lora=False))
            self._keep(state, str(state.epoch), state.step, self._images(with_lora=True))
        except Interrupted:
            pass
        except Exception as error:  # pylint: disable=broad-exception-caught  # logged
            if isinstance(gpu_error(error), GpuBroken):
                raise
            log.warning("samples_not_painted", extra={"epoch": state.epoch}, exc_info=error)
            free_memory(self._base.device)
        finally:
            self._base.offload_encoders()

    def _keep(self, state: LoopState, row: str, step: int, images: list[Image.Image]) -> None:
        state.keep_samples(row, images)
        preview.write_small(images, Path(self._run.work_folder) / PREVIEW_FOLDER / str(step))

    def _images(self, *, with_lora: bool) -> list[Image.Image]:
        return preview.paint(
            self._base,
            self._prompts,
            self._run.parameters.seed,
            with_lora=with_lora,
            resolution=self._run.parameters.resolution,
            steps=self._steps,
            embeddings=self._embeddings,
            should_stop=self._should_stop,
        )

    def _has_time_for(self, rows: int) -> bool:
        # Two passes a step, for guidance; decoding costs about as much as two steps.
        each = 2 * (self._steps + 2) * self._probe.pass_seconds
        need = rows * len(self._prompts) * each
        allowed = self._run.preview_share * self._clock.seconds
        return need <= LONGEST_PAUSE_SECONDS and self.sample_seconds + need <= allowed

    @contextlib.contextmanager
    def _timed(self) -> Iterator[list[float]]:
        began, taken = time.monotonic(), [0.0]
        try:
            yield taken
        finally:
            taken[0] = time.monotonic() - began
            self._clock.leave_out(taken[0])


def prompts_of(run: TrainingRun, dataset: Dataset) -> list[str]:
    """Prompts of the samples: those of the message, else the captions."""
    captions = [example.caption for example in dataset.usable if example.caption]
    asked = [with_trigger(run.trigger_word, prompt) for prompt in run.sample_prompts]
    return asked or captions


def sample_steps(run: TrainingRun, base: BaseModel) -> int:
    """Steps of the sampler on this machine."""
    on_gpu = base.device.type == "cuda"
    return run.sample_steps if on_gpu else min(run.sample_steps, CPU_SAMPLE_STEPS)
