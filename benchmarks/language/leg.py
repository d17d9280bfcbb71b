"""One leg of the benchmark: `python -m benchmarks.language.leg LOOP BASE DATA STEPS`."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from jobs.llm import LlmParameters, LlmRun
from training.language import base as bases
from training.language import export
from training.language.masks import TokenRow
from training.language.trainer import Trainer
from training.language.work import intake_of, tokens_of

BATCH, ACCUMULATION = 4, 2


def main(loop: str, base: str, data: str, steps: int) -> None:
    """Train, and print the figures as one line of JSON."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        run = LlmRun(
            task_id="leg",
            subject="leg",
            claim=1,
            base_model="stand-in",
            base_source=base,
            training_file=data,
            validation_file=None,
            parameters=LlmParameters(
                batch_size=BATCH,
                gradient_accumulation_steps=ACCUMULATION,
                max_steps=steps,
                target_modules="all-linear",
                dropout=0.0,
                validation_split=0.0,
                quantization="none",
            ),
            work_folder=folder,
            template_date="2026-01-31",
        )
        loaded = bases.load(run, allow_cpu=True)
        _, tokens = tokens_of(run, loaded.tokenizer, intake_of(run))
        measure = _ours if loop == "ours" else _trl
        seconds, counted = measure(run, loaded, tokens.training)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if loaded.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"tokens_per_second": counted / seconds, "peak_bytes": peak}))


def _ours(run: LlmRun, loaded: Any, rows: tuple[TokenRow, ...]) -> tuple[float, int]:
    """Seconds and tokens of all steps but the first."""
    model = peft.get_peft_model(loaded.model, export.config_of(run))
    trainer = Trainer(run, loaded, model, rows, (), emit=lambda _: None, should_stop=lambda: None)
    trainer.step()
    began = time.perf_counter()
    counted = 0
    for step in range(1, trainer.plan.total):
        counted += sum(len(rows[i].ids) for i in trainer.plan.rows_of(step, run.parameters.seed))
        trainer.step()
    return time.perf_counter() - began, counted


def _trl(run: LlmRun, loaded: Any, rows: tuple[TokenRow, ...]) -> tuple[float, int]:
    """The same with plain TRL, on the same token rows."""
    # pylint: disable=import-outside-toplevel  # only this loop needs them
    from datasets import Dataset  # type: ignore[import-untyped]
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    times: list[float] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]  # without types
        """Notes the end of each step."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """A step ended."""
            times.append(time.perf_counter())

    cuda = loaded.device.type == "cuda"
    config = SFTConfig(
        output_dir=str(Path(run.work_folder) / "trl"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=run.parameters.max_steps,
        learning_rate=run.parameters.learning_rate,
        gradient_checkpointing=False,
        bf16=cuda,
        use_cpu=not cuda,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=run.parameters.seed,
    )
    dataset = Dataset.from_list(
        [{"input_ids": list(row.ids), "labels": list(row.labels)} for row in rows]
    )
    trainer = SFTTrainer(
        model=loaded.model,
        args=config,
        train_dataset=dataset,
        processing_class=loaded.tokenizer,
        peft_config=export.config_of(run),
        callbacks=[Watch()],
    )
    trainer.train()
    mean = sum(len(row.ids) for row in rows) / len(rows)
    per_step = mean * BATCH * ACCUMULATION
    return times[-1] - times[0], round(per_step * (len(times) - 1))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
