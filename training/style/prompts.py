"""What the text encoder is given: the trigger word in front, and tags in several orders."""

from __future__ import annotations

import math
import random

ORDERS = 8
"""Of a caption's tags, at most: each is encoded once and kept, 0.1 MB in half precision."""


def with_trigger(word: str, prompt: str) -> str:
    """A prompt with the trigger word in front, unless it begins with it already."""
    if not word or prompt.split(",", 1)[0].strip().casefold() == word.casefold():
        return prompt
    return f"{word}, {prompt}" if prompt else word


def orders(caption: str, *, first: str, seed: str) -> tuple[str, ...]:
    """A caption and its tags in other orders.

    Args:
        caption: Parts of it between commas are tags.
        first: A tag that stays in front, if the caption begins with it.
        seed: The same orders come of the same one.
    """
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    fixed = [tag for tag in tags[:1] if tag.casefold() == first.casefold()]
    others = tags[len(fixed) :]
    chance = random.Random(seed)
    found = {tuple(others): caption}
    while len(found) < min(ORDERS, math.factorial(len(set(others)))):
        chance.shuffle(others)
        found.setdefault(tuple(others), ", ".join(fixed + others))
    return tuple(found.values())
