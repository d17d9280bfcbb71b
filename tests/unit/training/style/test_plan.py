"""The plan: every image once an epoch, in an order and at a rate that any run can recompute."""

from __future__ import annotations

import itertools

import pytest

from jobs.style import HyperParameters
from training.style.plan import Plan

SQUARE = ("square",)


@pytest.mark.parametrize(
    ("images", "batch", "accumulation", "sizes"),
    [
        (5, 1, 1, [[1]] * 5),
        (5, 2, 1, [[2], [2], [1]]),
        (5, 2, 2, [[2, 2], [1]]),
        (3, 16, 1, [[3]]),
        (3, 16, 64, [[3]]),
        (7, 1, 4, [[1, 1, 1, 1], [1, 1, 1]]),
    ],
)
def test_every_epoch_sees_every_image_once_in_steps_of_the_right_size(
    images: int, batch: int, accumulation: int, sizes: list[list[int]]
) -> None:
    parameters = HyperParameters(
        epochs=3, batch_size=batch, gradient_accumulation_steps=accumulation
    )
    plan = Plan(SQUARE * images, parameters)
    assert plan.steps_per_epoch == len(sizes) and plan.total_steps == 3 * len(sizes)
    for epoch in range(3):
        steps = [plan.batches(epoch * len(sizes) + i) for i in range(len(sizes))]
        found = [[len(b) for b in step] for step in steps]
        assert sorted(itertools.chain(*found)) == sorted(itertools.chain(*sizes))
        assert [len(step) for step in found] == [len(step) for step in sizes]
        assert sorted(i for step in steps for b in step for i in b) == list(range(images))


@pytest.mark.parametrize(("shapes", "batch"), [((0,) * 5, 2), ((0, 0, 0, 1, 2, 0, 0), 2)])
def test_batches_that_are_not_full_come_anywhere_in_an_epoch(
    shapes: tuple[int, ...], batch: int
) -> None:
    parameters = HyperParameters(epochs=40, batch_size=batch)
    plan = Plan(shapes, parameters)
    places = {
        place
        for epoch in range(40)
        for place in range(plan.steps_per_epoch)
        if len(plan.batches(epoch * plan.steps_per_epoch + place)[0]) < batch
    }
    assert places == set(range(plan.steps_per_epoch))
    again = [Plan(shapes, parameters).batches(step) for step in range(plan.total_steps)]
    assert again == [plan.batches(step) for step in range(plan.total_steps)]


def test_jobs_of_earlier_releases_keep_their_order() -> None:
    parameters = HyperParameters(epochs=3, batch_size=2)
    earlier = Plan(SQUARE * 5, parameters, batch_order=1)
    sizes = [len(earlier.batches(step)[0]) for step in range(earlier.total_steps)]
    assert sizes == [2, 2, 1] * 3
    whole = HyperParameters(epochs=3)
    steps = range(15)
    one, other = Plan(SQUARE * 5, whole, batch_order=1), Plan(SQUARE * 5, whole)
    assert [one.batches(step) for step in steps] == [other.batches(step) for step in steps]


def test_each_epoch_has_its_own_order_that_depends_only_on_the_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        plan = Plan(SQUARE * 20, HyperParameters(epochs=5, seed=seed, batch_size=16))
        return [i for step in (0, 1) for b in plan.batches(epoch * 2 + step) for i in b]

    assert order(1, 0) == order(1, 0) != order(1, 1)
    assert order(2, 0) != order(1, 0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_warms_up_from_above_zero_peaks_and_falls_over_the_whole_job(
    schedule: str,
) -> None:
    plan = Plan(SQUARE * 10, HyperParameters(epochs=10, warmup_ratio=0.1, lr_schedule=schedule))
    rates = [plan.learning_rate(step) for step in range(plan.total_steps)]
    assert rates[0] > 0 and rates[:10] == sorted(rates[:10])
    assert rates[10] == max(rates) == pytest.approx(1e-4)
    if schedule == "constant":
        assert set(rates[10:]) == {rates[10]}
    else:
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 0.02 * rates[10]
