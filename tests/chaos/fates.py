"""The jobs that fail in training, as the stand-in trainer knows them: by their parameter `seed`."""

from __future__ import annotations

from tests.chaos.reference import Destiny

SEEDS = {
    Destiny.LOW_QUALITY: 7001,
    Destiny.DIVERGES: 7002,
    Destiny.GIVEN_UP: 7003,
    Destiny.GIVEN_UP_REDRIVEN: 7004,
}
