"""A run of the language-model kind, from its conversations to its files."""

# pylint: disable=protected-access
from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.llm import LlmRun
from sandbox.stand_in_language_model import write_conversations
from training.language import evaluation, trainer
from training.language.base import parameters_in, predicted_bytes
from training.language.work import FILES, LanguageWork
from utils.errors import (
    BaseModelUnavailable,
    CheckpointUnusable,
    LowQualityData,
    StopReason,
    TrainingFailed,
)
from utils.events import BaseModelReady, CheckpointSaved, Event, Finished, Started

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated", "ignore:`gradient_checkpointing`"
)
MakeRun = Callable[..., LlmRun]


def do(work: LanguageWork, run: LlmRun, stop_after: int = 10**9) -> tuple[Finished, list[Any]]:
    """Do a run; it is stopped when it has asked so often whether to stop."""
    events: list[Event | BaseModelReady] = []
    asked = 0

    def should_stop() -> StopReason | None:
        nonlocal asked
        asked += 1
        return StopReason.SHUTDOWN if asked > stop_after else None

    return work.run(run, events.append, should_stop), events


def adapter(finished: Finished) -> bytes:
    """The bytes of the exported weights."""
    return (Path(finished.folder) / "adapter_model.safetensors").read_bytes()


def report(finished: Finished) -> Any:
    """The report of a run."""
    return json.loads((Path(finished.folder) / "training_report.json").read_text("utf-8"))


def test_a_run_writes_all_files_and_its_held_out_perplexity_falls(
    work: LanguageWork, make_run: MakeRun
) -> None:
    finished, events = do(work, make_run("one", max_steps=40))
    assert finished.files == FILES and finished.files[-1] == "adapter_model.safetensors"
    assert {path.name for path in Path(finished.folder).iterdir()} == set(FILES)
    summary = finished.summary
    assert summary["perplexity_after"] < 0.8 * summary["perplexity_before"]
    assert summary["verdict"].startswith("Held-out perplexity fell")
    assert any(isinstance(event, Started) and event.total == 40 for event in events)
    assert report(finished)["evaluation"]["proof"]["difference"] == 0.0
    assert report(finished)["evaluation"]["proof"]["effect"] > 0.1
    page = (Path(finished.folder) / "training_report.html").read_text("utf-8")
    assert "Held-out perplexity fell" in page and "<svg" in page


def test_shuffled_answers_do_not_improve_as_much(
    work: LanguageWork, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run("real", max_steps=40)
    rows = [json.loads(line) for line in Path(run.training_file).read_text("utf-8").splitlines()]
    for index, row in enumerate(rows):
        letters = list(row["messages"][1]["content"])
        random.Random(index).shuffle(letters)
        row["messages"][1]["content"] = "".join(letters)
    control = tmp_path / "control.jsonl"
    control.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    validation = tmp_path / "validation.jsonl"
    write_conversations(validation, 20, seed=9)
    held_out = str(validation)
    taught, _ = do(work, dataclasses.replace(run, validation_file=held_out))
    other = dataclasses.replace(make_run("control", max_steps=40), training_file=str(control))
    untaught, _ = do(work, dataclasses.replace(other, validation_file=held_out))
    assert taught.summary["perplexity_after"] < 0.7 * untaught.summary["perplexity_after"]


@pytest.mark.parametrize("quantization", ["none", "4bit"])
@pytest.mark.parametrize("asked", [9, 13, 14])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    work: LanguageWork, make_run: MakeRun, quantization: str, asked: int
) -> None:
    how = {"quantization": quantization, "dropout": 0.2}
    whole, _ = do(work, make_run("whole", **how))
    stopped, events = do(work, make_run("part", **how), stop_after=asked)
    assert stopped.stopped is StopReason.SHUTDOWN and 0 < stopped.done < 8
    newest = [event for event in events if isinstance(event, CheckpointSaved)][-1]
    assert newest.step == stopped.done
    resumed, _ = do(LanguageWork(work._options), make_run("rest", newest.folder, **how))
    assert adapter(resumed) == adapter(whole)
    assert report(resumed)["training"]["losses"] == report(whole)["training"]["losses"]


def test_a_second_job_on_the_warm_base_equals_a_fresh_process(
    work: LanguageWork, make_run: MakeRun
) -> None:
    do(work, make_run("first", seed=7, checkpointing="true"))
    assert work._base is not None and work._base.unchanged
    warm, events = do(work, make_run("second"))
    assert not any(isinstance(event, BaseModelReady) for event in events)
    fresh, _ = do(LanguageWork(work._options), make_run("fresh"))
    assert adapter(warm) == adapter(fresh)


def test_a_stopped_run_leaves_the_base_as_it_was(work: LanguageWork, make_run: MakeRun) -> None:
    stopped, _ = do(work, make_run("stopped", checkpointing="true"), stop_after=9)
    assert stopped.stopped
    assert work._base is not None and work._base.unchanged
    assert not hasattr(work._base.model, "peft_config")


def test_a_changed_base_is_given_up(work: LanguageWork, make_run: MakeRun) -> None:
    do(work, make_run("one"))
    assert work._base is not None
    with torch.no_grad():
        work._base.model.lm_head.weight.add_(1.0)
    _, events = do(work, make_run("two"))
    assert any(isinstance(event, BaseModelReady) and not event.ready for event in events)
    assert work._base is None


def test_recomputed_activations_and_smaller_batches_change_nothing(
    work: LanguageWork, make_run: MakeRun
) -> None:
    plain, _ = do(work, make_run("plain", dropout=0.0))
    again, _ = do(work, make_run("again", dropout=0.0, checkpointing="true"))
    assert adapter(plain) == adapter(again)
    how = {"dropout": 0.0, "batch_size": 2, "gradient_accumulation_steps": 4}
    small, _ = do(work, make_run("small", **how))
    pairs = zip(report(plain)["training"]["losses"], report(small)["training"]["losses"])
    assert all(one == pytest.approx(other, abs=1e-4) for one, other in pairs)


def test_a_lack_of_memory_halves_the_batches(
    work: LanguageWork, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = evaluation.learned_logits

    def scarce(model: Any, rows: Any, device: Any) -> Any:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, rows, device)

    monkeypatch.setattr(trainer, "learned_logits", scarce)
    finished, _ = do(work, make_run("one"))
    assert "forward passes have 2 conversations" in finished.summary["warnings"][-1]


def test_the_exported_adapter_loads_in_plain_peft_in_a_fresh_process(
    work: LanguageWork, make_run: MakeRun, tiny_llama: Path, tmp_path: Path
) -> None:
    run = make_run("one")
    finished, _ = do(work, run)
    code = f"""
import json, peft, torch, transformers
base = transformers.AutoModelForCausalLM.from_pretrained({str(tiny_llama)!r})
model = peft.PeftModel.from_pretrained(base, {finished.folder!r}).eval()
for each in json.load(open({finished.folder + "/fingerprint.json"!r}))["prompts"]:
    logits = model(torch.tensor([each["token_ids"]])).logits[0, -1].double()
    made = torch.log_softmax(logits, -1)[each["top_token_ids"]]
    wanted = torch.tensor(each["top_logprobs"], dtype=torch.float64)
    assert float((made - wanted).abs().max()) < 2e-6, (made, wanted)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for path in Path(finished.folder).iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content and str(tiny_llama).encode() not in content


def test_nothing_is_pickled(work: LanguageWork, make_run: MakeRun) -> None:
    with pytest.raises(AssertionError, match="pickled"):
        torch.load("any")
    finished, events = do(work, make_run("one"))
    folder = next(event.folder for event in events if isinstance(event, CheckpointSaved))
    assert {path.suffix for path in Path(folder).iterdir()} == {".safetensors", ".json"}
    assert not finished.stopped


def test_four_bit_training_keeps_its_gradients_after_an_evaluation(
    work: LanguageWork, make_run: MakeRun
) -> None:
    finished, _ = do(work, make_run("one", quantization="4bit", eval_steps=1))
    losses = report(finished)["training"]["evaluations"]
    assert len({loss for _, loss in losses}) == len(losses) == 8


def test_a_checkpoint_of_another_job_is_refused(work: LanguageWork, make_run: MakeRun) -> None:
    _, events = do(work, make_run("one"))
    folder = next(event.folder for event in events if isinstance(event, CheckpointSaved))
    with pytest.raises(CheckpointUnusable, match="learning_rate"):
        do(work, make_run("two", folder, learning_rate=1e-3))


def test_early_stopping_and_the_best_checkpoint(work: LanguageWork, make_run: MakeRun) -> None:
    how = {"deliver": "best", "early_stopping_patience": 2, "eval_steps": 1}
    finished, _ = do(work, make_run("one", learning_rate=0.1, max_steps=40, epochs=50.0, **how))
    training = report(finished)["training"]
    lowest = min(training["evaluations"], key=lambda each: each[1])
    assert training["delivered_step"] == training["best_step"] == lowest[0]
    after = report(finished)["evaluation"]["after"]["loss"]
    assert after == pytest.approx(lowest[1], abs=1e-6)
    assert training["steps"] < 40


def test_divergence_is_an_error_with_a_remedy(
    work: LanguageWork, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = evaluation.learned_logits

    def broken(*args: Any) -> Any:
        logits, *rest = real(*args)
        return (logits * float("nan"), *rest)

    monkeypatch.setattr(trainer, "learned_logits", broken)
    with pytest.raises(Exception, match="Lower learning_rate"):
        do(work, make_run("one", max_steps=40))


@pytest.mark.parametrize("folder", ["missing", "no weights", "cut off"])
def test_an_unusable_base_is_an_error_before_the_first_step(
    work: LanguageWork, make_run: MakeRun, tmp_path: Path, tiny_llama: Path, folder: str
) -> None:
    base = tmp_path / "base"
    if folder != "missing":
        base.mkdir()
        for path in tiny_llama.iterdir():
            content = path.read_bytes()
            if path.suffix == ".safetensors":
                content = content[:-100]
            if path.suffix != ".safetensors" or folder == "cut off":
                (base / path.name).write_bytes(content)
    run = dataclasses.replace(make_run("one"), base_source=str(base))
    with pytest.raises(BaseModelUnavailable):
        do(work, run)


def test_memory_is_predicted_from_headers(make_run: MakeRun, tiny_llama: Path) -> None:
    run = make_run("one")
    model_parameters = parameters_in(tiny_llama)
    assert model_parameters > 10_000
    full = predicted_bytes(tiny_llama, run, "none", cuda=True)
    assert full > predicted_bytes(tiny_llama, run, "4bit", cuda=True) > 0.6 * model_parameters


def test_a_target_that_matches_nothing_is_an_error(work: LanguageWork, make_run: MakeRun) -> None:
    with pytest.raises((ValueError, TrainingFailed), match="target"):
        do(work, make_run("one", target_modules="no_such_layer"))
    assert work._base is None or work._base.unchanged


def test_too_few_conversations_are_named_with_their_reasons(
    work: LanguageWork, make_run: MakeRun
) -> None:
    run = make_run("one")
    Path(run.training_file).write_text('{"messages": []}\n[1]\n', "utf-8")
    with pytest.raises(LowQualityData, match="row 1"):
        do(work, run)


def test_the_held_out_loss_depends_on_no_batch_size(
    work: LanguageWork, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for tokens in (1, 300, 100_000):
        monkeypatch.setattr(evaluation, "EVALUATION_TOKENS", tokens)
        finished, _ = do(work, make_run(f"of {tokens}", max_steps=1))
        losses.append(report(finished)["evaluation"]["before"]["loss"])
    assert max(losses) - min(losses) < 1e-5


def test_the_longest_copy_is_found() -> None:
    assert evaluation.longest_copy("xx the old mill yy", ["at the old mill.", "mill yyy"]) == 13
    assert evaluation.longest_copy("abc", []) == 0


def test_packed_rows_train_as_padded_ones_do(work: LanguageWork, make_run: MakeRun) -> None:
    padded, _ = do(work, make_run("padded", dropout=0.0))
    packed, _ = do(work, make_run("packed", dropout=0.0, packing=True))
    pairs = list(zip(report(padded)["training"]["losses"], report(packed)["training"]["losses"]))
    assert len(pairs) == 8
    assert all(one == pytest.approx(other, abs=1e-4) for one, other in pairs)


def test_a_packed_run_resumes_to_the_bit(work: LanguageWork, make_run: MakeRun) -> None:
    how = {"packing": True, "dropout": 0.2}
    whole, _ = do(work, make_run("whole", **how))
    stopped, events = do(work, make_run("part", **how), stop_after=13)
    assert stopped.stopped
    newest = [event for event in events if isinstance(event, CheckpointSaved)][-1]
    resumed, _ = do(LanguageWork(work._options), make_run("rest", newest.folder, **how))
    assert adapter(resumed) == adapter(whole)


def test_a_base_whose_attention_mixes_packed_rows_is_refused(
    work: LanguageWork, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixed(model: Any, rows: Any, device: Any) -> Any:
        logits, *others = evaluation.learned_logits(model, rows, device)
        return logits.roll(1, 0), *others

    monkeypatch.setattr(evaluation, "packed_logits", mixed)
    with pytest.raises(TrainingFailed, match="Set packing to false"):
        do(work, make_run("one", packing=True))


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_the_merged_model_acts_as_the_trained_one_in_a_fresh_process(
    work: LanguageWork, make_run: MakeRun, tiny_llama: Path, tmp_path: Path, quantization: str
) -> None:
    finished, _ = do(work, make_run("one", merged=True, quantization=quantization))
    folder = Path(finished.folder)
    assert finished.files[-1] == "adapter_model.safetensors"
    written = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert written == set(finished.files) > set(FILES)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (folder / "merged" / name).read_bytes() == (tiny_llama / name).read_bytes()
    facts = report(finished)["evaluation"]["merged"]
    largest = facts["largest_logit"]
    assert facts["trained_on"] == quantization and facts["dtype"] == "float32"
    assert facts["difference"] < (1e-5 if quantization == "none" else 0.5) * largest
    assert (facts["difference"] > 1e-4 * largest) == (quantization == "4bit")
    page = (folder / "training_report.html").read_text("utf-8")
    assert f"{facts['difference']:.3g}" in page and str(tmp_path) not in page
    code = f"""
import json, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({finished.folder + "/merged"!r}).eval()
far = 0.0
for each in json.load(open({finished.folder + "/fingerprint.json"!r}))["prompts"]:
    logits = model(torch.tensor([each["token_ids"]])).logits[0, -1].double()
    made = torch.log_softmax(logits, -1)[each["top_token_ids"]]
    far = max(far, float((made - torch.tensor(each["top_logprobs"]).double()).abs().max()))
print(far)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < (1e-4 if quantization == "none" else 2 * facts["difference"])


def test_a_held_out_part_without_an_answer_is_an_error_at_the_start(
    work: LanguageWork, make_run: MakeRun, tmp_path: Path
) -> None:
    validation = tmp_path / "validation.jsonl"
    validation.write_text('{"prompt": "a", "completion": "<|im_end|>"}\n', "utf-8")
    run = dataclasses.replace(make_run("one"), validation_file=str(validation))
    with pytest.raises(LowQualityData, match="held-out"):
        do(work, run)
