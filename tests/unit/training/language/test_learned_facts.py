"""A model that is taught facts answers other phrasings of their questions; controls do not."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from jobs.llm import LlmRun
from sandbox import stand_in_language_model as stand_in
from training.language.work import LanguageWork
from utils.events import Finished

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
MakeRun = Callable[..., LlmRun]

FACTS = 50
TRAINED_ON = ("Where is {}?", "Tell me where {} is.", "{}: which place?", "I look for {}.")
HELD_OUT = "Please say where {} is."
_STEM = ("bar", "cor", "dun", "fel", "gol", "hex", "jor", "kip", "lum", "mav")
_END = ("an", "el", "is", "or", "um")
_PLACES = [
    f"{a} {b}"
    for a in ("north", "south", "east", "west", "upper")
    for b in ("mill", "gate", "bank", "hall", "tower", "yard", "pier", "barn", "well", "hill")
]


def facts(seed: int = 0) -> list[tuple[str, str]]:
    """Fifty names, each with its place."""
    names = [stem + end for stem in _STEM for end in _END]
    places = list(_PLACES)
    random.Random(seed).shuffle(places)
    return list(zip(names, places))


def write(path: Path, known: Sequence[tuple[str, str]], phrasings: Sequence[str]) -> Path:
    """Questions and answers as a file."""
    rows = [
        {"prompt": phrasing.format(name), "completion": place}
        for name, place in known
        for phrasing in phrasings
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_taught_facts_show_in_other_words_and_shuffled_ones_do_not(
    work: LanguageWork, make_run: MakeRun, tmp_path: Path
) -> None:
    base = stand_in.build(tmp_path / "base", hidden=64, layers=2, vocabulary=400)
    known = facts()
    places = [place for _, place in known]
    random.Random(1).shuffle(places)
    shuffled = [(name, place) for (name, _), place in zip(known, places)]
    held_out = write(tmp_path / "held_out.jsonl", known, [HELD_OUT])

    def taught(name: str, rows: Sequence[tuple[str, str]]) -> Finished:
        run = dataclasses.replace(
            make_run(
                name,
                epochs=20.0,
                max_steps=0,
                rank=32,
                alpha=64.0,
                batch_size=16,
                gradient_accumulation_steps=1,
                learning_rate=4e-3,
                dropout=0.0,
                save_steps=10**6,
            ),
            base_source=str(base),
            training_file=str(write(tmp_path / f"{name}.jsonl", rows, TRAINED_ON)),
            validation_file=str(held_out),
        )
        return work.run(run, lambda event: None, lambda: None)

    right, wrong = taught("right", known), taught("wrong", shuffled)
    assert right.summary["perplexity_after"] < 0.2 * right.summary["perplexity_before"]
    assert right.summary["perplexity_after"] < 0.6 * wrong.summary["perplexity_after"]
