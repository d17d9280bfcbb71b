"""The training of a LoRA on a frozen language model.

A step reads `batch_size * gradient_accumulation_steps` rows, for any size of its forward
passes. Its loss is the sum over all learned tokens of these rows divided by their number, so that
neither padding nor the size of a forward pass changes it. Every random number follows from the
seed, the step and the first row of a forward pass: a resumed run needs no generator's state, and a
stop between two forward passes of a step loses only that step.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.checkpoint_name import folder_name
from jobs.llm import LlmParameters, LlmRun
from training.language import checkpoint
from training.language.base import LanguageBase
from training.language.checkpoint import LanguageCheckpoint, LanguageState
from training.language.evaluation import learned_logits, measure
from training.language.masks import TokenRow
from training.runtime import optimizer as optimizers
from training.runtime.checkpoint import CheckpointWriter
from training.runtime.clock import Clock
from training.runtime.device import allocated_bytes, free_memory, out_of_memory, reserved_bytes
from training.runtime.team import ALONE, Team
from utils.errors import StopReason, TrainingDiverged, TrainingFailed
from utils.events import CheckpointSaved, Event, Progress, Stage

log = logging.getLogger(__name__)

SKIPS = 10
"""Steps in a row without a finite gradient that mean divergence."""
PROBED_STEPS = 3
"""After so many updates every lora_B must have moved."""

Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class LanguagePlan:
    """The steps of a job.

    Attributes:
        rows: Rows of the training part.
        per_step: Rows of one step.
        total: Steps of the job.
        warmup: Steps that warm up.
        save_every, evaluate_every: Steps between checkpoints and evaluations.
    """

    rows: int
    per_step: int
    total: int
    warmup: int
    save_every: int
    evaluate_every: int

    @classmethod
    def of(cls, parameters: LlmParameters, rows: int) -> LanguagePlan:
        """The plan for so many rows."""
        per_step = parameters.batch_size * parameters.gradient_accumulation_steps
        per_epoch = math.ceil(rows / per_step)
        total = parameters.max_steps or max(1, math.ceil(parameters.epochs * per_epoch))
        quarter = max(1, total // 4)
        return cls(
            rows,
            per_step,
            total,
            min(parameters.warmup_steps, total // 10),
            min(parameters.save_steps, quarter),
            min(parameters.eval_steps, quarter),
        )

    @property
    def per_epoch(self) -> int:
        """Steps of one epoch. Its last step may have fewer rows."""
        return math.ceil(self.rows / self.per_step)

    def rows_of(self, step: int, seed: int) -> list[int]:
        """Indices of the rows of a step, from 0."""
        epoch, place = divmod(step, self.per_epoch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(self.rows, generator=generator)
        return [int(i) for i in order[place * self.per_step : (place + 1) * self.per_step]]

    def rate(self, step: int, schedule: str) -> float:
        """Factor of the peak learning rate in a step, from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if schedule == "linear" else 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """A training that ended: its state, the delivered adapter, and why it stopped early."""

    state: LanguageState
    lora: Tensors
    delivered_step: int
    stopped: StopReason | None
    steps_per_second: float | None


def passes_of(rows: int, size: int, processes: int = 1) -> list[range]:
    """The rows of each forward pass of a step.

    Several processes do a pass each in a round, and the rounds are full if there are rows enough.
    If one process would do as many passes, they have the same rows and the same random numbers.

    Args:
        rows: Rows of the step.
        size: Most rows of a pass.
        processes: Processes that share the step.
    """
    if processes > 1:
        passes = math.ceil(math.ceil(rows / size) / processes) * processes
        size = math.ceil(rows / passes)
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


class _StopInside(Exception):
    """A stop between two forward passes of a step."""


class Trainer:
    """Trains the adapter of one run.

    Args:
        run: The run.
        base: The base, for its device and identity.
        model: The base with the adapter (PEFT).
        rows, held_out: Token rows.
        emit: Receives events.
        should_stop: Returns the reason to stop, the same in all processes, or None.
        team: The processes that train together. Each computes a part of the passes of a step.
    """

    def __init__(
        self,
        run: LlmRun,
        base: LanguageBase,
        model: Any,
        rows: Sequence[TokenRow],
        held_out: Sequence[TokenRow],
        *,
        emit: Callable[[Event], None],
        should_stop: Callable[[], StopReason | None],
        team: Team = ALONE,
    ) -> None:
        self._run, self._base, self._model, self._team = run, base, model, team
        self._rows, self._held_out = rows, held_out
        self._emit, self._should_stop = emit, should_stop
        self._parameters = run.parameters
        self.plan = LanguagePlan.of(run.parameters, len(rows))
        self.weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
        self._refuse_other_dtypes()
        self._optimizer = optimizers.create(
            run.parameters.optimizer,
            list(self.weights.values()),
            learning_rate=run.parameters.learning_rate,
            weight_decay=run.parameters.weight_decay,
        )
        self._best: Tensors = {}
        self._sound: LanguageCheckpoint | None = None
        self._clock = Clock()
        self.state = self._first_state()
        self._refuse_differences()

    def _refuse_differences(self) -> None:
        """Compare what the processes train on, and the adapters that they have."""
        state = self.state
        read = f"{state.data} {state.base_model} {self.plan} {state.parameters}"
        self._team.refuse_difference("conversations or base models", [read.encode()])
        weights = (w.detach().cpu().numpy().tobytes() for w in self.weights.values())
        self._team.refuse_difference("adapters", weights)

    def _refuse_other_dtypes(self) -> None:
        other = {str(w.dtype) for w in self.weights.values()} - {"torch.float32"}
        if other or not self.weights:
            raise TrainingFailed(
                f"The adapter has weights of {', '.join(sorted(other)) or 'no layer'}; it must be "
                "float32. Check target_modules."
            )

    def _first_state(self) -> LanguageState:
        run = self._run
        return LanguageState(
            task_id=run.task_id,
            subject=run.subject,
            claim=run.claim,
            base_model=self._base.sha256,
            quantization=self._base.identity.quantization,
            data=identity_of(self._rows, self._held_out),
            parameters=run.parameters,
            step=0,
            total_steps=self.plan.total,
            micro_batch=run.parameters.batch_size,
            rate=1.0,
            losses=(),
            skipped_in_a_row=0,
            evaluations=(),
            best_step=0,
        )

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointUnusable: It is damaged, or of another run.
        """
        saved = checkpoint.load(folder)
        checkpoint.refuse_another_run(saved.state, self.state)
        self._restore(saved)
        self.state = dataclasses.replace(saved.state, claim=self._run.claim)
        self._refuse_differences()

    def _restore(self, saved: LanguageCheckpoint) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(saved.lora[name])
        optimizers.restore(self._optimizer, saved.optimizer, self.weights)
        self._best = dict(saved.best)
        self._sound = saved

    def train(self) -> Trained:
        """Train until the plan is done, the loss no longer falls, or a stop is asked for."""
        with CheckpointWriter(self._emit) as writer:
            stopped = self._loop(writer)
            if self.state.step and (stopped is not StopReason.CANCELLED):
                self._save(writer)
            writer.settle()
        lora = {name: weight.detach().cpu().clone() for name, weight in self.weights.items()}
        delivered = self.state.step
        if self._parameters.deliver == "best" and self._best and not stopped:
            lora, delivered = self._best, self.state.best_step
        return Trained(self.state, lora, delivered, stopped, self._clock.steps_per_second)

    def _loop(self, writer: CheckpointWriter) -> StopReason | None:
        while self.state.step < self.plan.total:
            if reason := self._should_stop():
                return reason
            try:
                self.step()
            except _StopInside:
                return self._should_stop() or StopReason.SHUTDOWN
            self._clock.tick()
            step = self.state.step
            if self.state.skipped_in_a_row >= SKIPS:
                self._go_back()
                continue
            last = step == self.plan.total
            if self._held_out and (step % self.plan.evaluate_every == 0 or last):
                self._evaluate()
            if step % self.plan.save_every == 0 and not last:
                self._save(writer)
            if self._clock.due() or last:
                self._report()
            if self._patience_is_over():
                break
        return None

    def step(self) -> None:
        """One optimizer step, with smaller forward passes if memory does not suffice."""
        state = self.state
        chosen = [self._rows[i] for i in self.plan.rows_of(state.step, self._parameters.seed)]
        while True:
            try:
                loss = self._gradients(chosen)
                break
            except Exception as error:  # pylint: disable=broad-exception-caught  # raised again
                self._optimizer.zero_grad(set_to_none=True)
                if not out_of_memory(error) or self.state.micro_batch == 1:
                    raise
                self._smaller_batches()
        rate = self.plan.rate(state.step, self._parameters.lr_schedule) * self.state.rate
        for group in self._optimizer.param_groups:
            peak = 1.0 if self._parameters.optimizer == "prodigy" else None
            group["lr"] = (peak or self._parameters.learning_rate) * rate
        norm = torch.nn.utils.clip_grad_norm_(
            list(self.weights.values()), self._parameters.max_grad_norm
        )
        finite = math.isfinite(loss) and bool(norm.isfinite())
        if finite:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.state = dataclasses.replace(
            self.state,
            step=state.step + 1,
            losses=(*state.losses, loss if math.isfinite(loss) else 0.0),
            skipped_in_a_row=0 if finite else state.skipped_in_a_row + 1,
        )
        if self.state.step == PROBED_STEPS and finite:
            self._refuse_still_weights()

    def _gradients(self, chosen: Sequence[TokenRow]) -> float:
        """Accumulate the gradient of a step; returns its loss."""
        self._model.train()
        tokens = sum(row.learned for row in chosen)
        total = torch.zeros((), device=self._base.device)
        passes = passes_of(len(chosen), self.state.micro_batch, self._team.size)
        for first in range(0, len(passes), self._team.size):
            if first and self._should_stop():
                self._optimizer.zero_grad(set_to_none=True)
                raise _StopInside
            own = passes[first : first + self._team.size][self._team.rank :][:1]
            total += self._team.all_or_none(functools.partial(self._passes, own, chosen, tokens))
        return self._summed(total)

    def _passes(self, own: Sequence[range], chosen: Sequence[TokenRow], tokens: int) -> Tensor:
        """Do this process's passes of a round: one, or none if a step has too few rows."""
        loss = torch.zeros((), device=self._base.device)
        for each in own:
            loss += self._pass(each.start, [chosen[i] for i in each], tokens)
        if not own and self._team.shards:  # the others need this process's share of the base
            self._pass(0, chosen[:1], tokens, weight=0.0)
        return loss

    def _pass(
        self, start: int, rows: Sequence[TokenRow], tokens: int, weight: float = 1.0
    ) -> Tensor:
        """Add the gradient of some rows of a step; returns their part of its loss."""
        torch.manual_seed(self._seed(start))
        logits, wanted, _ = learned_logits(self._model, rows, self._base.device)
        loss = F.cross_entropy(logits, wanted, reduction="sum") / tokens * weight
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _summed(self, loss: Tensor) -> float:
        """Sum the gradients and the loss of a step over the processes; returns the loss."""
        if self._team.size == 1:
            return float(loss)
        for weight in self.weights.values():
            if weight.grad is None:  # no row of this process's passes
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        flat = torch.cat([loss.view(1), *(gradient.view(-1) for gradient in gradients)])
        summed = self._team.add(flat)
        place = 1
        for gradient in gradients:
            gradient.copy_(summed[place : place + gradient.numel()].view_as(gradient))
            place += gradient.numel()
        return float(summed[0])

    def _seed(self, start: int) -> int:
        text = f"{self._parameters.seed} {self.state.step} {start}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])

    def _smaller_batches(self) -> None:
        free_memory(self._base.device)
        half = max(1, self.state.micro_batch // 2)
        sentence = f"Memory did not suffice; forward passes have {half} conversations since then."
        log.warning("batch_halved", extra={"micro_batch": half, "step": self.state.step})
        changes = (*self.state.changes, sentence)
        self.state = dataclasses.replace(self.state, micro_batch=half, changes=changes)

    def _refuse_still_weights(self) -> None:
        still = [n for n, w in self.weights.items() if "lora_B" in n and not bool(w.any())]
        if still:
            raise TrainingFailed(
                f"{len(still)} of the adapter's layers get no gradient, such as {still[0]}. Set "
                "quantization to none, or choose other target_modules."
            )

    def _go_back(self) -> None:
        """After a divergence: half the rate from the newest sound checkpoint, once.

        Raises:
            TrainingDiverged: It happened before.
        """
        if self.state.rate < 1.0:
            raise TrainingDiverged(
                "The loss was not a finite number, also at half the learning rate. Lower "
                "learning_rate."
            )
        sentence = f"Training diverged at step {self.state.step}; the learning rate was halved."
        log.warning("training_diverged", extra={"step": self.state.step})
        if self._sound is None:
            raise TrainingDiverged(
                "The loss was not a finite number before the first checkpoint. Lower learning_rate."
            )
        changes = (*self._sound.state.changes, sentence)
        self._restore(self._sound)
        self.state = dataclasses.replace(
            self._sound.state, rate=0.5, changes=changes, claim=self._run.claim, skipped_in_a_row=0
        )

    def _evaluate(self) -> None:
        measured = measure(self._model, self._held_out, self._base.device, self._team)
        state = self.state
        before = min((loss for _, loss in state.evaluations), default=math.inf)
        best = measured.loss < before
        if best and self._parameters.deliver == "best":
            self._best = {name: w.detach().cpu().clone() for name, w in self.weights.items()}
        self.state = dataclasses.replace(
            state,
            evaluations=(*state.evaluations, (float(state.step), measured.loss)),
            best_step=state.step if best else state.best_step,
        )

    def _patience_is_over(self) -> bool:
        patience = self._parameters.early_stopping_patience
        since = [step for step, _ in self.state.evaluations if step > self.state.best_step]
        return bool(patience) and len(since) >= patience

    def _save(self, writer: CheckpointWriter) -> None:
        state = self.state
        saved = LanguageCheckpoint(
            state,
            {name: w.detach().cpu().clone() for name, w in self.weights.items()},
            {
                name: tensor.detach().cpu().clone()
                for name, tensor in optimizers.state_tensors(self._optimizer, self.weights).items()
            },
            self._best,
        )
        if all(bool(w.isfinite().all()) for w in saved.lora.values()):
            self._sound = saved if not state.skipped_in_a_row else self._sound
        epoch = state.step // self.plan.per_epoch
        retakes = 1 if state.rate < 1.0 else 0
        name = folder_name(epoch, state.step, inside_epoch=True, changes=retakes)
        folder = Path(self._run.work_folder) / "checkpoints" / name
        event = CheckpointSaved(self._run.task_id, name, epoch, state.step, str(folder), 0.0)
        self._refuse_differences()
        if self._team.leads:
            writer.write(event, lambda: checkpoint.save(folder, saved))

    def _report(self) -> None:
        state, device = self.state, self._base.device
        facts: dict[str, Any] = {
            "epoch": round(state.step / self.plan.per_epoch, 3),
            "loss": state.losses[-1],
        }
        if state.evaluations:
            facts["held_out_loss"] = state.evaluations[-1][1]
        self._emit(
            Progress(
                self._run.task_id,
                Stage.TRAINING,
                state.step,
                self.plan.total,
                per_second=self._clock.warm_steps_per_second,
                gpu_memory_allocated=allocated_bytes(device),
                gpu_memory_reserved=reserved_bytes(device),
                facts=facts,
            )
        )


def identity_of(rows: Sequence[TokenRow], held_out: Sequence[TokenRow]) -> str:
    """SHA-256 (hex) of token rows: what is learned, in which order."""
    digest = hashlib.sha256()
    for part in (rows, held_out):
        digest.update(f"{len(part)};".encode())
        for row in part:
            digest.update(repr((row.ids, row.labels)).encode())
    return digest.hexdigest()


def load_weights(weights: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy an adapter's weights into a model's."""
    with torch.no_grad():
        for name, weight in weights.items():
            into[name].copy_(weight)
