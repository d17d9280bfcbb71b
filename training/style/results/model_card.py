"""What a model file says of itself: who made it of what, for the programs that list and sort LoRAs.

`ss_*` are kohya's names, `modelspec.*` those of Stability AI's model metadata standard.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.style import TrainingRun
    from training.style.dataset import Dataset
    from training.style.families.sd15 import BaseModel
    from training.style.results.result import TrainingResult

MOST_TAGS = 200
LONGEST_TAG = 200
SHOWN_TAGS = 20


def model_card(
    run: TrainingRun,
    base: BaseModel,
    dataset: Dataset,
    result: TrainingResult,
) -> dict[str, str]:
    """Header entries for the kohya file, besides those that `lora_formats.kohya_metadata` makes.

    Args:
        run: Whose model it is.
        base: What it was trained on.
        dataset: The images and their captions.
        result: How the training went.
    """
    tags = tag_counts(example.caption for example in dataset.usable)
    entries = {
        "task_id": run.task_id,
        "style_id": run.style_id,
        "claim": run.claim,
        "ss_output_name": f"style_{run.style_id}",
        "ss_steps": result.steps,
        "ss_epoch": result.delivered_epoch or result.epochs,
        "ss_num_train_images": len(dataset.usable),
        "ss_enable_bucket": True,
        "ss_bucket_info": json.dumps({"buckets": _frames(dataset)}),
        "ss_tag_frequency": json.dumps({"training": tags}, ensure_ascii=False),
        # Of the base's UNet as diffusers keeps it, which is what the LoRA was made for.
        "ss_new_sd_model_hash": base.hash,
        "modelspec.title": f"Style {run.style_id or run.trigger_word}".strip(),
        "modelspec.description": f"A style learnt from {len(dataset.usable)} images.",
        "modelspec.tags": ", ".join(list(tags)[:SHOWN_TAGS]),
        "ss_shuffle_caption": run.parameters.shuffle_tags,
        "modelspec.trigger_phrase": run.trigger_word,
    }
    return {name: str(value) for name, value in entries.items() if value != ""}


def _frames(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """How many images were trained on in each size, by a number, as kohya's readers expect."""
    frames = Counter(tuple(8 * side for side in reversed(shape[1:])) for shape in dataset.shapes)
    return {
        str(number): {"resolution": list(size), "count": count}
        for number, (size, count) in enumerate(sorted(frames.items()))
    }


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """How often each part of the captions between commas occurs; the most frequent first."""
    parts = (" ".join(part.split()) for caption in captions for part in caption.split(","))
    counts = Counter(part[:LONGEST_TAG] for part in parts if part)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_TAGS])
