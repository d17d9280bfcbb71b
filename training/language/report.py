"""The report of a language model's training, as JSON and as a page."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from conversations.intake import Intake
from jobs.layout import HTML_REPORT, REPORT
from jobs.llm import LlmRun
from reports.language_report import write_language_report
from training.language.base import LanguageBase
from training.language.masks import TokenData
from training.language.trainer import Trained

LIBRARIES = ("torch", "transformers", "peft", "safetensors")


def build(
    run: LlmRun,
    base: LanguageBase,
    intake: Intake,
    data: TokenData,
    trained: Trained,
    evaluation: dict[str, Any],
) -> dict[str, Any]:
    """All facts of a run, as JSON values."""
    state = trained.state
    return {
        "kind": "llm",
        "task_id": run.task_id,
        "subject": run.subject,
        "base": {
            "name": run.base_model,
            "revision": base.revision,
            "sha256": base.sha256,
            "quantization": base.identity.quantization,
            "attention": base.identity.attention,
            "device": str(base.device),
        },
        "parameters": dataclasses.asdict(run.parameters),
        "template_date": run.template_date,
        "data": intake.report(),
        "tokens": data.report(),
        "training": {
            "steps": state.step,
            "total_steps": state.total_steps,
            "losses": list(state.losses),
            "evaluations": [list(each) for each in state.evaluations],
            "delivered_step": trained.delivered_step,
            "best_step": state.best_step,
            "steps_per_second": trained.steps_per_second,
            "changes": list(state.changes),
        },
        "evaluation": evaluation,
        "warnings": [*base.warnings, *intake.warnings, *data.warnings, *state.changes],
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def write(content: dict[str, Any], folder: Path) -> None:
    """Write both files of the report."""
    (folder / REPORT).write_text(json.dumps(content, indent=2), encoding="utf-8")
    write_language_report(content, folder / HTML_REPORT)


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """A short report for the `complete` webhook."""
    evaluation = content["evaluation"]
    before, after = evaluation.get("before"), evaluation.get("after")
    left_out = [*content["data"]["left_out"], *content["tokens"]["left_out"]]
    return {
        "rows_used": content["tokens"]["rows_trained"] + content["tokens"]["rows_held_out"],
        "rows_trained": content["tokens"]["rows_trained"],
        "rows_left_out": sum(each["count"] for each in left_out),
        "left_out": left_out[:10],
        "tokens_learned": content["tokens"]["tokens_learned"],
        "perplexity_before": before["perplexity"] if before else None,
        "perplexity_after": after["perplexity"] if after else None,
        "verdict": evaluation["verdict"],
        "steps": content["training"]["steps"],
        "warnings": content["warnings"][:10],
    }
