"""Prompts: the trigger word in front, tags in several orders, the same ones each time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from jobs.style import TrainingRun, checked_trigger_word
from tests.unit.training.conftest import MakeRun
from training.style.dataset import ORDERS, orders, prepare, with_trigger
from training.style.families.sd15 import BaseModel
from training.style.results.examiner import prompts_of


@pytest.mark.parametrize(
    ("prompt", "result"),
    [
        ("a harbour, dawn", "inkstyle, a harbour, dawn"),
        ("", "inkstyle"),
        ("InkStyle, a harbour", "InkStyle, a harbour"),
        ("inkstyle", "inkstyle"),
        ("inkstyles", "inkstyle, inkstyles"),
    ],
)
def test_the_trigger_word_comes_first_and_only_once(prompt: str, result: str) -> None:
    assert with_trigger("inkstyle", prompt) == result
    assert with_trigger("", prompt) == prompt


def test_a_trigger_word_is_one_short_tag_on_one_line() -> None:
    assert checked_trigger_word(" ink \n style ") == "ink style"
    for wrong in ("ink, style", "x" * 65):
        with pytest.raises(ValueError, match="must"):
            checked_trigger_word(wrong)


def test_orders_have_the_same_tags_behind_the_trigger_word_and_depend_only_on_the_seed() -> None:
    caption = "ink, a harbour, dawn, gulls, fog"
    found = orders(caption, first="ink", seed="1")
    assert found[0] == caption and len(set(found)) == len(found) == ORDERS
    assert all(sorted(each.split(", ")) == sorted(caption.split(", ")) for each in found)
    assert all(each.startswith("ink, ") for each in found)
    assert found == orders(caption, first="ink", seed="1") != orders(caption, first="ink", seed="2")
    assert any(not each.startswith("ink, ") for each in orders(caption, first="", seed="1"))


@pytest.mark.parametrize("caption", ["", "a harbour", "ink, a harbour"])
def test_a_caption_with_one_order_stays_as_it_is(caption: str) -> None:
    assert orders(caption, first="ink", seed="1") == (caption,)


def captioned(run: TrainingRun, *captions: str) -> TrainingRun:
    """The run with these captions."""
    images = tuple(
        dataclasses.replace(image, caption=caption)
        for image, caption in zip(run.images, captions, strict=True)
    )
    return dataclasses.replace(run, images=images)


def test_every_prompt_begins_with_the_trigger_word_also_where_a_long_caption_is_cut(
    base: BaseModel, make_run: MakeRun
) -> None:
    long = ", ".join(f"a small house number {number}" for number in range(60))
    run = captioned(make_run(trigger_word="inkstyle"), "a boat", "", long)
    data = prepare(run, base)
    boat, bare, cut = (entry.caption for entry in data.entries)
    assert (boat, bare) == ("inkstyle, a boat", "inkstyle")
    assert cut.startswith("inkstyle, a small house number 0, ") and cut != f"inkstyle, {long}"
    assert ["cut" in " ".join(entry.reasons) for entry in data.entries] == [False, False, True]
    assert prompts_of(run, data) == [boat, bare, cut]
    asked = dataclasses.replace(run, sample_prompts=("a tree", "inkstyle, fog"))
    assert prompts_of(asked, data) == ["inkstyle, a tree", "inkstyle, fog"]


def test_shuffled_tags_come_in_another_order_each_epoch_and_in_the_same_ones_again(
    base: BaseModel, make_run: MakeRun
) -> None:
    captions = ("red, boat, fog", "a pier", "blue, sea, gull, dawn")
    run = captioned(make_run(shuffle_tags=True), *captions)
    data, again = prepare(run, base), prepare(run, base)
    assert [len(example.orders) for example in data.usable] == [6, 1, ORDERS]
    for epoch in range(10):
        texts = data.batch([0, 1, 2], epoch)[1]
        said = [each.orders[epoch % len(each.orders)] for each in data.usable]
        assert torch.equal(texts, base.encode_prompts(said))
        assert torch.equal(texts, again.batch([0, 1, 2], epoch)[1])
    first, second = data.batch([0, 1, 2], 0)[1], data.batch([0, 1, 2], 1)[1]
    assert [torch.equal(*pair) for pair in zip(first, second, strict=True)] == [False, True, False]
    # Off, as it is by default, a caption stays as it was written.
    plain = prepare(captioned(make_run(), *captions), base)
    assert all(torch.equal(plain.batch([0], epoch)[1], plain.batch([0])[1]) for epoch in range(9))
