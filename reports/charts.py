"""Line charts as SVG, in the colours of the page's light and dark schemes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 34
TICKS = 4
DOTS_UP_TO = 60
"""Points of a longer line are not marked."""


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        name: For the legend.
        points: Pairs of x and y. A y that is None or not finite leaves a gap.
        style: The class of the page's stylesheet that colours it: `raw`, `main` or `other`.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    style: str = "main"


def line_chart(
    lines: Sequence[Line], *, title: str, x_name: str, y_name: str, mark: float | None = None
) -> Markup | None:
    """An SVG element with the lines; None if they have no point at all.

    Args:
        lines: The lines.
        title: The chart in words, for a person who cannot see it.
        x_name: The quantity on the horizontal axis.
        y_name: The quantity on the vertical axis.
        mark: An x that a vertical line marks.
    """
    known = [(x, y) for line in lines for x, y in line.points if _is_known(y)]
    if not known:
        return None
    scale = _Scale.of([x for x, _ in known], [y for _, y in known if y is not None])
    parts = [*_grid(scale), *(_path(line, scale) for line in lines)]
    if mark is not None and scale.x_low <= mark <= scale.x_high:
        x = scale.x(mark)
        stroke = Markup('<path class="mark" d="M{:.1f} {}V{}"/>')
        parts.append(stroke.format(x, TOP, HEIGHT - BOTTOM))
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + WIDTH - RIGHT) // 2, HEIGHT - 2, x_name
        )
    )
    legend = Markup("").join(
        Markup('<li class="{}">{}</li>').format(line.style, line.name) for line in lines
    )
    return Markup(
        '<figure class="chart"><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" role="img" '
        'aria-label="{}">{}</svg><ul class="legend">{}</ul></figure>'
    ).format(y_name, WIDTH, HEIGHT, title, Markup("").join(parts), legend)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average over about a tenth of the epochs, at least five.

    Values that are not finite are passed over.
    """
    rate = 2 / (max(5, len(losses) // 10) + 1)
    course: list[float] = []
    mean = math.nan
    for loss in losses:
        if math.isfinite(loss):
            mean = loss if math.isnan(mean) else mean + rate * (loss - mean)
        course.append(mean)
    return course


@dataclasses.dataclass(frozen=True, slots=True)
class _Scale:
    """Places of values on the canvas, in pixels."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @classmethod
    def of(cls, xs: Sequence[float], ys: Sequence[float]) -> _Scale:
        """The scale that shows all values, with a little room above and below."""
        low, high = min(ys), max(ys)
        room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        return cls(min(xs), max(xs), low - room, high + room)

    def x(self, value: float) -> float:
        """From the left."""
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """From the top."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _grid(scale: _Scale) -> Iterator[Markup]:
    """Horizontal lines with their values, and the first and last x."""
    for n in range(TICKS + 1):
        value = scale.y_low + (scale.y_high - scale.y_low) * n / TICKS
        y = scale.y(value)
        yield Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, WIDTH - RIGHT)
        yield Markup('<text x="{}" y="{:.1f}" text-anchor="end">{:.4g}</text>').format(
            LEFT - 6, y + 4, value
        )
    for value, anchor in ((scale.x_low, "start"), (scale.x_high, "end")):
        yield Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{:g}</text>').format(
            scale.x(value), HEIGHT - BOTTOM + 16, anchor, value
        )


def _path(line: Line, scale: _Scale) -> Markup:
    """The line; a point without a known neighbour is drawn as a dot."""
    steps, dots, pen_up = [], [], True
    for x, y in line.points:
        if y is None or not math.isfinite(y):
            pen_up = True
            continue
        at = f"{scale.x(x):.1f} {scale.y(y):.1f}"
        steps.append(f"{'M' if pen_up else 'L'}{at}")
        dots.append(f"M{at}h.01")
        pen_up = False
    drawn = Markup('<path class="line {}" d="{}"/>').format(line.style, "".join(steps))
    if len(dots) <= DOTS_UP_TO:
        drawn += Markup('<path class="dots {}" d="{}"/>').format(line.style, "".join(dots))
    return drawn


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
