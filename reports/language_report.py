"""`training_report.html` of a language model: one page without outside files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE = "language_report.html.j2"
_WIDTH, _HEIGHT = 640, 200


def write_language_report(content: Mapping[str, Any], path: Path) -> None:
    """Write the page of a report.

    Args:
        content: From `training.language.report.build`.
        path: The file.

    Raises:
        OSError: The disk is full or read-only.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    training = content["training"]
    steps = [(float(i), loss) for i, loss in enumerate(training["losses"], 1)]
    held_out = [(float(step), loss) for step, loss in training["evaluations"]]
    page = environment.get_template(TEMPLATE).render(
        report=content,
        curve=_points(steps, steps + held_out),
        held_out_curve=_points(held_out, steps + held_out),
        width=_WIDTH,
        height=_HEIGHT,
    )
    path.write_text(page, encoding="utf-8")


def _points(values: Sequence[tuple[float, float]], scale: Sequence[tuple[float, float]]) -> str:
    """Points of an SVG line, within the limits of `scale`."""
    if not values:
        return ""
    right = max(x for x, _ in scale) or 1.0
    low, high = min(y for _, y in scale), max(y for _, y in scale)
    span = (high - low) or 1.0
    return " ".join(
        f"{x / right * _WIDTH:.1f},{_HEIGHT - (y - low) / span * _HEIGHT:.1f}" for x, y in values
    )
