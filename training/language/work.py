"""The work of the language-model kind: runs on a base that stays loaded between them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from conversations.intake import Intake, take_in
from conversations.reading import UnreadableFile
from jobs.kinds import TrainerOptions
from jobs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, HTML_REPORT, REPORT
from jobs.llm import LlmRun
from training.language import base as bases
from training.language import evaluation, export, report
from training.language.base import LanguageBase
from training.language.evaluation import Measured
from training.language.masks import TokenData, Tokens, tokenise
from training.language.trainer import Trained, Trainer, load_weights
from training.runtime import team as teams
from training.runtime.device import device_errors_as_ours, free_memory
from training.runtime.team import Team
from utils.errors import LowQualityData, Stopped, StopReason
from utils.events import BaseModelReady, Event, Finished, Progress, Stage, Started

log = logging.getLogger(__name__)

Emit = Callable[[Event | BaseModelReady], None]
FILES = (
    *(REPORT, HTML_REPORT, export.CARD, export.TEMPLATE, export.FINGERPRINT),
    *(ADAPTER_CONFIG, ADAPTER_WEIGHTS),
)
"""The files of a model, in the order of their publication."""


class LanguageWork:
    """Does the runs of the language-model kind, one after the other.

    Attributes:
        is_usable: False when the process must be replaced before the next run.

    Args:
        options: The options of the trainer process.
    """

    run_type = LlmRun
    has_base = True
    shares_runs = True

    def __init__(self, options: TrainerOptions) -> None:
        self.is_usable = True
        self._team: Team | None = None
        self._options = options
        self._base: LanguageBase | None = None
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each 8-bit layer

    @property
    def on_gpu(self) -> bool:
        """Whether a base is loaded and on a GPU."""
        return self._base is not None and self._base.device.type == "cuda"

    def load(self, tell: Emit) -> None:
        """A run names its base, so that none is loaded ahead."""
        tell(BaseModelReady(True))

    def release(self, tell: Emit) -> None:
        """Give the memory of the base back."""
        if self._base is not None:
            device, self._base = self._base.device, None
            free_memory(device)
            tell(BaseModelReady(False))

    @device_errors_as_ours()
    def run(
        self, run: LlmRun, tell: Emit, should_stop: Callable[[], StopReason | None]
    ) -> Finished:
        """Do one run. The base is as it was afterwards, or is given up."""
        began = time.monotonic()
        tell(Progress(run.task_id, Stage.PREPARING, 0, 0))
        team = self._joined()
        with team.failing_together():
            intake = intake_of(run)
            base = self._loaded(run, team, tell)
            devices = [base.device] if base.device.type == "cuda" else []
            stop = functools.partial(team.stop_reason, should_stop)
            try:
                with torch.random.fork_rng(devices):
                    finished = _Job(run, base, intake, tell, stop, team).done()
            except Stopped as stopped:
                finished = Finished(run.task_id, "", (), 0, 0.0, stopped=stopped.reason)
            finally:
                self._leave_unchanged(tell)
        return dataclasses.replace(finished, seconds=time.monotonic() - began)

    def _joined(self) -> Team:
        if self._team is None:
            self._team = teams.join(self._options)
        return self._team

    def _loaded(self, run: LlmRun, team: Team, tell: Emit) -> LanguageBase:
        cuda = torch.cuda.is_available()
        wanted = bases.identity_of(run, cuda=cuda, shards=team.shards)
        if self._base is not None and self._base.identity != wanted:
            self.release(tell)
        if self._base is None:
            began = time.monotonic()
            self._base = bases.load(run, allow_cpu=self._options.allow_cpu, team=team)
            tell(BaseModelReady(True, time.monotonic() - began))
        return self._base

    def _leave_unchanged(self, tell: Emit) -> None:
        """Give the base up if a run has changed anything of it."""
        if self._base is not None and not self._base.unchanged:
            log.warning("base_model_changed", extra={"model": self._base.identity.source})
            self.release(tell)


def intake_of(run: LlmRun) -> Intake:
    """Read and clean a run's files.

    Raises:
        LowQualityData: Too few conversations can be used.
    """
    parameters = run.parameters
    try:
        intake = take_in(
            Path(run.training_file),
            validation=Path(run.validation_file) if run.validation_file else None,
            train_on=parameters.train_on,
            system_prompt=run.system_prompt,
            redact=parameters.redact,
            validation_split=parameters.validation_split,
            seed=parameters.seed,
        )
    except UnreadableFile as error:
        raise LowQualityData(f"The training data cannot be read: {error}") from error
    if intake.used < run.min_training_samples or not intake.training:
        reasons = "; ".join(
            f"{each['count']} rows: {each['reason']} (first: row {each['rows'][0]})"
            for each in intake.left_out.listed()[:5]
        )
        raise LowQualityData(
            f"Only {intake.used} of {intake.rows} rows can be used, and "
            f"{run.min_training_samples} are needed (LLM_MIN_TRAINING_SAMPLES). {reasons}"
        )
    return intake


def tokens_of(run: LlmRun, tokenizer: Any, intake: Intake) -> tuple[Tokens, TokenData]:
    """Tokenise a run's conversations.

    Raises:
        LowQualityData: No row can be trained, or the held-out part has no answer.
    """
    tokens = Tokens(
        tokenizer,
        template_date=run.template_date,
        max_length=run.parameters.max_length,
        train_on=run.parameters.train_on,
    )
    data = tokenise(intake.training, intake.held_out, tokens, tokenizer)
    reasons = "; ".join(
        f"{each['count']} rows: {each['reason']}" for each in data.left_out.listed()[:5]
    )
    if not data.training:
        raise LowQualityData(f"No conversation can be trained. {reasons}")
    if intake.held_out and not data.held_out:
        raise LowQualityData(f"No held-out conversation has an answer to measure. {reasons}")
    return tokens, data


class _Job:
    """One run from its conversations to its files."""

    def __init__(
        self,
        run: LlmRun,
        base: LanguageBase,
        intake: Intake,
        tell: Emit,
        should_stop: Callable[[], StopReason | None],
        team: Team,
    ) -> None:
        self._run, self._base, self._intake = run, base, intake
        self._tell, self._should_stop, self._team = tell, should_stop, team
        self._tokens, self._data = tokens_of(run, base.tokenizer, intake)
        self._proved = self._data.held_out or self._data.training

    def done(self) -> Finished:  # pylint: disable=too-many-locals  # one for each result
        """Measure, train, measure, export and prove."""
        run, base, data = self._run, self._base, self._data
        before = self._measure(base.model)
        self._check_stop()
        prompts = evaluation.prompts_of(run.prompts, run.system_prompt, self._intake.held_out)
        answers = [self._answer(base.model, turns) for turns in prompts]
        without = export.prove(base.model, self._proved, base.device)
        torch.manual_seed(run.parameters.seed)
        model = peft.get_peft_model(base.model, export.config_of(run))
        try:
            with _checkpointing(model, self._wants_checkpointing()):
                trained = self._trained(model)
            facts = self._facts(trained)
            if trained.stopped:
                steps = trained.state.step
                return Finished(
                    run.task_id, "", (), steps, 0.0, stopped=trained.stopped, facts=facts
                )
            load_weights(trained.lora, dict(model.named_parameters()))
            self._tell(
                Progress(
                    run.task_id, Stage.EXPORTING, trained.state.step, trained.state.total_steps
                )
            )
            after = self._measure(model)
            told = self._told(model, prompts, answers)
            proof = export.prove(model, self._proved, base.device)
            folder = self._new_folder()
            measured = self._evaluation(before, after, told, trained)
            content = report.build(run, base, self._intake, data, trained, measured)
            export.write(model, run, base, folder, export.card_of(run, report.summary(content)))
        finally:
            export.unload(model, base)
        measured["proof"] = export.check(base, folder, proof, without, learned=True)
        print_of = export.fingerprint(run, base, folder, proof)
        (folder / export.FINGERPRINT).write_text(json.dumps(print_of, indent=1), encoding="utf-8")
        report.write(content, folder)
        summary = report.summary(content)
        steps = trained.state.step
        return Finished(run.task_id, str(folder), FILES, steps, 0.0, facts=facts, summary=summary)

    def _trained(self, model: Any) -> Trained:
        run, data = self._run, self._data
        trainer = Trainer(
            run,
            self._base,
            model,
            data.training,
            data.held_out,
            emit=self._tell,
            should_stop=self._should_stop,
            team=self._team,
        )
        if run.resume_from:
            trainer.resume(Path(run.resume_from))
        warnings = (*self._base.warnings, *self._intake.warnings, *data.warnings)
        self._tell(
            Started(run.task_id, trainer.state.step, trainer.plan.total, "step", warnings=warnings)
        )
        return trainer.train()

    def _wants_checkpointing(self) -> bool:
        wanted = self._run.parameters.checkpointing
        return self._base.device.type == "cuda" if wanted == "auto" else wanted == "true"

    def _measure(self, model: Any) -> Measured | None:
        if not self._data.held_out:
            return None
        return evaluation.measure(model, self._data.held_out, self._base.device, self._team)

    def _answer(self, model: Any, turns: Any, *, sampled: bool = False) -> str:
        self._check_stop()
        return evaluation.answer(
            model,
            self._tokens,
            self._base.tokenizer,
            turns,
            sampled=sampled,
            seed=self._run.parameters.seed,
        )

    def _told(self, model: Any, prompts: Any, answers: list[str]) -> list[dict[str, str]]:
        return [
            {
                "question": turns[-1].text,
                "base": base,
                "tuned": self._answer(model, turns),
                "sampled": self._answer(model, turns, sampled=True),
            }
            for turns, base in zip(prompts, answers)
        ]

    def _evaluation(
        self,
        before: Measured | None,
        after: Measured | None,
        told: list[dict[str, str]],
        trained: Trained,
    ) -> dict[str, Any]:
        texts = [
            turn.text
            for each in self._intake.training
            for turn in each.turns
            if turn.role == "assistant"
        ]
        copies = [evaluation.longest_copy(each["tuned"], texts) for each in told]
        copied = (
            sum(c > evaluation.COPY_CHARACTERS for c in copies) / len(copies) if copies else 0.0
        )
        recent = trained.state.losses[-10:]
        training_loss = sum(recent) / len(recent) if recent else None
        return {
            "before": before.report() if before else None,
            "after": after.report() if after else None,
            "answers": told,
            "longest_copies": copies,
            "copied": copied,
            "training_loss": training_loss,
            "verdict": evaluation.verdict(before, after, copied, training_loss),
        }

    def _facts(self, trained: Trained) -> dict[str, Any]:
        state, parameters = trained.state, self._run.parameters
        per_step = parameters.batch_size * parameters.gradient_accumulation_steps
        epoch = round(state.step * per_step / max(1, len(self._data.training)), 3)
        return {"epoch": epoch, "loss": state.losses[-1] if state.losses else None}

    def _new_folder(self) -> Path:
        # Process 0 publishes; the others prove their own files in step with it.
        name = "output" if self._team.leads else f"output-{self._team.rank}"
        folder = Path(self._run.work_folder) / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _check_stop(self) -> None:
        if reason := self._should_stop():
            raise Stopped(reason)


@contextlib.contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Recompute activations inside the block. No hook stays behind."""
    if not wanted:
        yield
        return
    inner = model.get_base_model()
    inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        inner.activation_checkpointing_disable()
        inner.disable_input_require_grads()
