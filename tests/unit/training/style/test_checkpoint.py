"""Checkpoints: whole or absent, verified to the byte, refused where they belong to another run."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.checkpoint_name import folder_name, order
from jobs.style import HyperParameters
from training.style import checkpoint
from training.style.checkpoint import (
    Checkpoint,
    RunState,
    load,
    refuse_another_run,
    save,
)
from training.style.plan import Course
from utils import manifest
from utils.errors import CheckpointUnusable

ASKED = HyperParameters(learning_rate=1.1e-4, batch_size=4)
STATE = RunState(
    task_id="task-1",
    style_id=10,
    claim=3,
    base_model="ab" * 32,
    course=Course(
        asked=ASKED,
        parameters=dataclasses.replace(ASKED, batch_size=2, gradient_accumulation_steps=2),
        checkpointing=True,
        rate_halved=True,
        changes=("Memory ran out.",),
    ),
    pictures=("one", "two"),
    total_steps=200,
    epoch=7,
    step=15,
    updates=14,
    skipped_in_a_row=1,
    losses=(0.1, 1 / 3, 0.30000000000000004),
    encoders="ef" * 32,
    batch_order=2,
    fast=True,
    scaler={"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 5},
)
SAVED = Checkpoint(
    state=STATE,
    lora={"a.lora_A.default.weight": torch.randn(2, 5), "a.lora_B.default.weight": torch.ones(5)},
    optimizer={"a.lora_A.default.weight/step": torch.tensor(14.0)},
    random={"noise": torch.Generator().get_state(), "loss_count": torch.tensor(3)},
)
FILES = {"lora.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's folder."""
    path = tmp_path / "checkpoints" / "epoch-0007-step-0015"
    save(path, SAVED)
    return path


def test_a_loaded_checkpoint_equals_the_saved_one_bit_for_bit(folder: Path) -> None:
    loaded = load(folder)
    assert loaded.state == STATE
    for kind in ("lora", "optimizer", "random"):
        expected, found = getattr(SAVED, kind), getattr(loaded, kind)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(found[name].dtype == expected[name].dtype for name in expected)


def test_the_manifest_names_the_job_and_every_file(folder: Path) -> None:
    facts = manifest.verify(folder)
    assert (facts["task_id"], facts["claim"], facts["epoch"], facts["step"]) == ("task-1", 3, 7, 15)
    assert set(facts["files"]) == FILES
    assert {path.name for path in folder.iterdir()} == FILES | {"manifest.json"}


def test_a_finished_checkpoint_leaves_no_other_file(folder: Path) -> None:
    assert list(folder.parent.iterdir()) == [folder]


def test_saving_again_replaces_the_folder_of_that_name(folder: Path) -> None:
    (folder / "left-over").write_text("x")
    save(folder, dataclasses.replace(SAVED, state=dataclasses.replace(STATE, claim=4)))
    assert load(folder).state.claim == 4 and not (folder / "left-over").exists()


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_save_that_breaks_off_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, {"write": "fsync", "rename": "replace"}[moment], full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "epoch-0001", SAVED)
    assert not list(tmp_path.iterdir())


def test_the_manifest_is_written_last_and_everything_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def note_sync(handle: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{handle}").rsplit("/", 1)[-1])
        sync(handle)

    def note_replace(old: Any, new: Any) -> None:
        events.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    save(tmp_path / "epoch-0001", SAVED)
    assert set(events[:4]) == FILES
    assert events[4] == "manifest.json"
    assert events[5].startswith(".epoch-0001-") and events[6] == "rename"
    assert events[7] == tmp_path.name


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_truncated_file_is_named(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(CheckpointUnusable, match=f"{name} has {len(content) - 1} bytes"):
        load(folder)


@pytest.mark.parametrize("name", sorted(FILES))
def test_an_altered_file_is_named(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointUnusable, match=f"{name} was altered"):
        load(folder)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointUnusable, match=f"{name} is missing"):
        load(folder)


def test_a_folder_without_a_manifest_was_never_finished(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointUnusable, match="never finished"):
        load(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"a": 1}}', "\udcff"])
def test_a_damaged_manifest_is_reported_as_damaged(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointUnusable, match=r"damaged manifest\.json"):
        load(folder)


def test_a_manifest_cannot_point_outside_its_folder(folder: Path) -> None:
    facts = json.loads((folder / "manifest.json").read_text())
    facts["files"]["../../etc/passwd"] = {"size": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointUnusable, match="plain file name"):
        load(folder)


def test_a_checkpoint_of_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    save(tmp_path / "new", SAVED)
    monkeypatch.undo()
    with pytest.raises(CheckpointUnusable, match="format 99"):
        load(tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task_id": "task-2"}, "belongs to job task-1"),
        ({"base_model": "cd" * 32}, "base model's weights"),
        ({"encoders": "cd" * 32}, "VAE or text encoder"),
        ({"pictures": ("two", "one")}, "images or their captions"),
        ({"total_steps": 100}, "schedule had 200 steps, has 100"),
        (
            {"course": Course.of(dataclasses.replace(ASKED, learning_rate=1e-5))},
            "learning_rate was 0.00011, is 1e-05",
        ),
        ({"course": Course.of(dataclasses.replace(ASKED, rank=8))}, "rank was 16, is 8"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(
    change: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointUnusable, match=said):
        refuse_another_run(STATE, dataclasses.replace(STATE, **change))


def test_an_earlier_releases_checkpoint_names_no_encoders_and_is_continued() -> None:
    earlier = dataclasses.replace(STATE, encoders=None, batch_order=1)
    refuse_another_run(earlier, STATE)


def test_an_earlier_release_reads_the_state_without_a_new_field(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_bytes())
    assert not {"encoders", "batch_order", "fast"} & state.keys()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    new = [manifest.pop(name) for name in ("encoders", "batch_order", "fast")]
    assert new == ["ef" * 32, 2, True]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    earlier = load(folder).state
    assert (earlier.encoders, earlier.batch_order, earlier.fast) == (None, 1, False)


def test_a_later_claim_may_go_on_from_an_earlier_claims_checkpoint() -> None:
    refuse_another_run(STATE, dataclasses.replace(STATE, claim=9, step=0, epoch=0, losses=()))


def test_a_checkpoint_of_a_changed_course_belongs_to_the_job_that_asked_for_another() -> None:
    refuse_another_run(STATE, dataclasses.replace(STATE, course=Course.of(ASKED)))


def test_a_name_states_where_training_was_and_how_often_it_had_been_changed() -> None:
    assert folder_name(10, 100, inside_epoch=False) == "epoch-0010"
    assert folder_name(12, 123, inside_epoch=True) == "epoch-0012-step-0123"
    assert folder_name(10, 100, inside_epoch=False, changes=2) == "epoch-0010-retake-2"
    assert folder_name(9, 95, inside_epoch=True, changes=1) == "epoch-0009-step-0095-retake-1"


def test_names_are_ordered_as_they_were_made_though_a_retake_goes_back() -> None:
    made = [
        "something-else",
        "epoch-0010",
        "epoch-0012-step-0123",
        "epoch-0020",
        "epoch-0010-retake-1",
        "epoch-0010-step-0101-retake-1",
        "epoch-0000-retake-2",
        "epoch-0010-retake-2",
    ]
    assert sorted(set(made), key=order) == made
