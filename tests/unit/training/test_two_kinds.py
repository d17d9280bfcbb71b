"""A style, a language model, and the same style in one trainer process: nothing is left behind."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest

from jobs.kinds import Run, TrainerOptions
from jobs.llm import LlmKind, LlmParameters, LlmRun
from jobs.style import StyleKind
from sandbox import stand_in_language_model
from tests.unit.training.conftest import MakeRun
from training.runtime.child import Child
from training.runtime.inbox import Inbox
from utils.events import Finished

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def test_a_style_after_a_language_model_equals_the_style_before_it(
    options: TrainerOptions, make_run: MakeRun, tmp_path: Path
) -> None:
    child = Child(options, Inbox(io.BytesIO()), io.BytesIO())

    def done(run: Run) -> Path:
        ending = child._do(run)  # pylint: disable=protected-access
        assert isinstance(ending, Finished), ending
        return Path(ending.folder)

    style = make_run(count=3, epochs=1)
    style_run = Run.of(style, StyleKind.runner, {})
    before = (done(style_run) / "lora_weights.safetensors").read_bytes()
    llm = LlmRun(
        task_id="llm",
        subject="guide",
        claim=1,
        base_model="stand-in",
        base_source=str(
            stand_in_language_model.build(tmp_path / "base", hidden=32, layers=1, vocabulary=384)
        ),
        training_file=str(stand_in_language_model.write_conversations(tmp_path / "data", 12)),
        validation_file=None,
        parameters=LlmParameters(max_steps=2, rank=4),
        work_folder=str(tmp_path / "llm"),
        template_date="2026-01-31",
    )
    weights = "adapter_model.safetensors"
    first = (done(Run.of(llm, LlmKind.runner, {})) / weights).read_bytes()
    again = dataclasses.replace(style, work_folder=str(tmp_path / "again"))
    after = done(Run.of(again, StyleKind.runner, {})) / "lora_weights.safetensors"
    assert after.read_bytes() == before
    second = dataclasses.replace(llm, work_folder=str(tmp_path / "llm-again"))
    assert (done(Run.of(second, LlmKind.runner, {})) / weights).read_bytes() == first
