"""A tiny language model and a file of conversations, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.kinds import TrainerOptions
from jobs.llm import LlmParameters, LlmRun
from sandbox import stand_in_language_model as stand_in
from training.language.work import LanguageWork

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

SMALL: dict[str, Any] = {
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "rank": 4,
    "target_modules": "all-linear",
    "max_steps": 8,
    "save_steps": 2,
    "eval_steps": 4,
}
OPTIONS = TrainerOptions("none", allow_cpu=True)

MakeRun = Callable[..., LlmRun]


@pytest.fixture(autouse=True)
def _no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled files can run code, so that nothing here may read or write one."""

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickled file")

    monkeypatch.setattr(torch, "save", refused)
    monkeypatch.setattr(torch, "load", refused)


@pytest.fixture(scope="session", name="tiny_llama")
def _tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in.build(tmp_path_factory.mktemp("llama"), hidden=32, layers=1, vocabulary=384)


@pytest.fixture(name="data")
def _data(tmp_path: Path) -> Path:
    return stand_in.write_conversations(tmp_path / "data.jsonl", 40)


@pytest.fixture(name="make_run")
def _make_run(tmp_path: Path, tiny_llama: Path, data: Path) -> MakeRun:
    """Makes runs of one job in separate folders."""

    def make(folder: str, resume_from: str | None = None, **parameters: Any) -> LlmRun:
        return LlmRun(
            task_id="job",
            subject="guide",
            claim=1,
            base_model="stand-in/tiny",
            base_source=str(tiny_llama),
            training_file=str(data),
            validation_file=None,
            parameters=LlmParameters(**SMALL | parameters),
            work_folder=str(tmp_path / folder),
            template_date="2026-01-31",
            resume_from=resume_from,
        )

    return make


@pytest.fixture(name="work")
def _work() -> LanguageWork:
    return LanguageWork(OPTIONS)
