"""Curves of the page: the loss of one job, and of several over one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from api.page.catalogue import Texts
from reports.charts import Line, line_chart, smoothed
from utils.names import printable

Points = Sequence[dict[str, Any]]
COLOURS = 10
"""Classes `c0` to `c9` of the stylesheet."""


def loss_chart(points: Points, texts: Texts) -> Markup | None:
    """The loss of one job; None before there is a point."""
    losses = [(_step(each), each.get("loss")) for each in points]
    known = [(step, float(loss)) for step, loss in losses if loss is not None]
    if not known:
        return None
    calm = smoothed([loss for _, loss in known])
    lines = [
        Line(texts("chart.loss"), known, "raw"),
        Line(texts("chart.smoothed"), list(zip([step for step, _ in known], calm)), "main"),
    ]
    held_out = [
        (_step(each), float(each["validation_loss"]))
        for each in points
        if each.get("validation_loss") is not None
    ]
    if held_out:
        lines.append(Line(texts("chart.validation"), held_out, "other"))
    first, last = known[0], known[-1]
    title = texts(
        "chart.described",
        first=f"{first[1]:.4f}",
        last=f"{last[1]:.4f}",
        from_step=first[0],
        to_step=last[0],
    )
    return line_chart(lines, title=title, x_name=texts("chart.step"), y_name=texts("chart.loss"))


def overlaid_chart(named: Sequence[tuple[str, Points]], texts: Texts) -> Markup | None:
    """The losses of several jobs in one chart; None if none has a point."""
    lines = [
        Line(printable(name), _losses(points), f"c{index % COLOURS}")
        for index, (name, points) in enumerate(named)
    ]
    return line_chart(
        lines,
        title=texts("chart.overlaid", count=len(named)),
        x_name=texts("chart.step"),
        y_name=texts("chart.loss"),
    )


def _losses(points: Points) -> list[tuple[float, float | None]]:
    return [(_step(each), each.get("loss")) for each in points]


def _step(point: dict[str, Any]) -> int:
    return int(point["step"])
