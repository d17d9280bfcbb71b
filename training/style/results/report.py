"""`training_report.json`: what was asked, used and left out and why, and how the training went."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jobs.fields import AUTO_WORD
from jobs.layout import MODEL_FILES, REPORT
from jobs.style import HyperParameters
from reports import html_report
from training.style.dataset import CAPTION_IGNORED
from training.style.results import readers
from training.style.results.preview import WITHOUT_LORA, row_of, sampled_epochs
from training.style.results.probe import Probed
from utils.errors import StopReason
from utils.names import is_unicode, printable

if TYPE_CHECKING:
    from jobs.style import TrainingRun
    from training.style.examples import Dataset
    from training.style.families.sd15 import BaseModel

LONGEST_REASON, MOST_REASONS = 200, 10
"""Characters and number of the reasons in the `complete` webhook."""
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a run went.

    Attributes:
        epochs, steps: Completed, over the whole job.
        loss: Mean unweighted loss of the last completed epoch; None before there is one.
        losses: The same for every completed epoch.
        seconds: Wall time of this run's training.
        steps_per_second: Measured over this run (after its last restart), checkpoints not counted;
            None when it made no step.
        peak_memory_bytes: Of the GPU, by torch's allocator, since the run's last restart; on the
            CPU the process's largest resident size.
        skipped_steps: Steps of the whole job that changed nothing, because their gradient was not
            finite; those that a restart took back are not among them.
        resumed_from: Epochs that were complete when this run began from a checkpoint; None for a
            fresh one.
        stopped: Why the run ended early; None for a finished training.
        parameters: Hyper-parameters in force at the end.
        warnings: Sentences for the report.
        probes: Measurements of the probe, over the whole job.
        best_epoch: Epoch with the lowest loss of the probe; None without a measurement.
        delivered_epoch: Epoch of the weights that are on the base now.
        samples: Sample images of checkpoints (see `training.style.results.preview`).
        probe_seconds, sample_seconds: Parts of `seconds` for probe and samples.
    """

    epochs: int
    steps: int
    loss: float | None
    losses: tuple[float, ...]
    seconds: float
    steps_per_second: float | None
    peak_memory_bytes: int
    skipped_steps: int
    resumed_from: int | None
    stopped: StopReason | None
    parameters: HyperParameters
    warnings: tuple[str, ...] = ()
    probes: tuple[Probed, ...] = ()
    best_epoch: int | None = None
    delivered_epoch: int | None = None
    samples: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    probe_seconds: float = 0.0
    sample_seconds: float = 0.0


def build_report(
    run: TrainingRun, base: BaseModel, dataset: Dataset, result: TrainingResult
) -> dict[str, Any]:
    """Gather what docs/protocol.md, section 4, wants in the report, and a little more.

    Args:
        run: The run.
        base: The base model that was trained on.
        dataset: The images and their entries.
        result: How the training went.

    Returns:
        JSON values only; a number that is not finite is None. Nothing in it names a place on this
        machine's disk.
    """
    statuses = [entry.status for entry in dataset.entries]
    # The machine's, the images' and the run's sentences, each once.
    sentences = dict.fromkeys((*base.warnings, *dataset.warnings, *result.warnings))
    report = {
        "task_id": run.task_id,
        "style_id": run.style_id,
        "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "trigger_word": run.trigger_word,
        "pictures_asked": len(statuses),
        "pictures_used": len(statuses) - statuses.count("left_out"),
        "pictures_left_out": statuses.count("left_out"),
        **_held_out(dataset),
        "pictures": [dataclasses.asdict(entry) for entry in dataset.entries],
        "validation_pictures": [
            dataclasses.asdict(entry)
            for entry in (dataset.held_out.entries if dataset.held_out else ())
        ],
        "hyperparameters": dataclasses.asdict(result.parameters),
        "hyperparameters_asked": dataclasses.asdict(run.parameters)
        | ({"epochs": AUTO_WORD} if run.epochs_auto else {}),
        "epochs": result.epochs,
        "steps": result.steps,
        "skipped_steps": result.skipped_steps,
        "loss": result.loss,
        "losses": result.losses,
        "seconds": round(result.seconds, 3),
        "steps_per_second": result.steps_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
        "resumed_from": result.resumed_from,
        "probes": [dataclasses.asdict(each) for each in result.probes],
        "best_epoch": result.best_epoch,
        "delivered_epoch": result.delivered_epoch,
        "probe_seconds": round(result.probe_seconds, 3),
        "sample_seconds": round(result.sample_seconds, 3),
        "stopped": result.stopped,
        "files": {name: readers.USES[name] for name in MODEL_FILES},
        "base_model": {"name": base.name, "hash": base.hash, "dtype": _name_of(base.dtype)},
        "versions": versions(base.device),
        "warnings": list(sentences),
        "machine_warnings": list(base.warnings),
    }
    plain: dict[str, Any] = _json_value(report)
    return plain


def _held_out(dataset: Dataset) -> dict[str, int]:
    """The number of `pictures_used` that are held out, if there are any."""
    used = sum(entry.status != "left_out" for entry in dataset.entries)
    count = used - len(dataset.usable)
    return {"pictures_held_out": count} if count else {}


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Write `training_report.json`.

    Returns:
        The file's path.

    Raises:
        OSError: The disk is full or read-only.
        ValueError: The report has a number that JSON cannot hold.
    """
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    path = folder / REPORT
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The part of the report that the `complete` webhook sends: a few numbers and reasons.

    The reasons are those for left-out images and ignored captions. It has no captions and no
    addresses.

    Args:
        report: From `build_report`.
    """
    names = ("pictures_used", "pictures_left_out", "steps", "seconds", "steps_per_second")
    return {
        **{name: report[name] for name in names},
        "resumed_from": report["resumed_from"],
        "best_epoch": report["best_epoch"],
        "delivered_epoch": report["delivered_epoch"],
        "base_model": report["base_model"]["name"],
        "warnings": len(report["warnings"]),
        "left_out": _counted_reasons(
            reason
            for entry in report["pictures"]
            if entry["status"] == "left_out"
            for reason in entry["reasons"]
            if not reason.startswith(CAPTION_IGNORED)
        ),
        "captions_ignored": _counted_reasons(
            reason.removeprefix(CAPTION_IGNORED)
            for entry in report["pictures"]
            for reason in entry["reasons"]
            if reason.startswith(CAPTION_IGNORED)
        ),
    }


def _counted_reasons(reasons: Iterable[str]) -> list[dict[str, Any]]:
    """Reasons with the number of images that each applies to, the most frequent first."""
    counts = Counter(reason[:LONGEST_REASON] for reason in reasons)
    return [
        {"reason": reason, "pictures": count} for reason, count in counts.most_common(MOST_REASONS)
    ]


def versions(device: torch.device) -> dict[str, str]:
    """The versions that computed: the libraries' versions, Python's, and the device's name."""
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        **{library: importlib.metadata.version(library) for library in LIBRARIES},
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
    }


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _json_value(value: Any) -> Any:
    """A value that JSON and its file can hold.

    Tuples become lists, numbers that are not finite become None, and halves of characters
    become escape sequences.
    """
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str) and not is_unicode(value):
        return printable(value)
    return value


def sample_rows(result: TrainingResult) -> tuple[html_report.SampleRow, ...]:
    """The samples of a run for its HTML report."""
    titles = {WITHOUT_LORA: "Without the LoRA"} | {
        str(epoch): f"After epoch {epoch}" for epoch in sampled_epochs(result.samples)
    }
    return tuple(
        html_report.SampleRow(
            title,
            row == str(result.delivered_epoch),
            tuple(row_of(result.samples, row)),
        )
        for row, title in titles.items()
    )
