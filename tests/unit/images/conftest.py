"""The tiny base model of the training tests: images are also tried in a run."""

from tests.unit.training.conftest import (
    base,
    few_passes,
    make_run,
    mixed,
    one_thread,
    options,
    photographs,
    stand_in,
    warm_base,
)

__all__ = [
    "base",
    "few_passes",
    "make_run",
    "mixed",
    "one_thread",
    "options",
    "photographs",
    "stand_in",
    "warm_base",
]
