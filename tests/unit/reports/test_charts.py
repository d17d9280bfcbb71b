"""Charts draw what is known, leave a gap where nothing is, and show text as text."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from reports.charts import DOTS_UP_TO, HEIGHT, LEFT, WIDTH, Line, line_chart, smoothed


def drawn(*lines: Line, mark: float | None = None) -> str:
    """A chart of these lines."""
    chart = line_chart(lines, title="A curve", x_name="epoch", y_name="loss", mark=mark)
    assert chart is not None
    ElementTree.fromstring(chart)  # well-formed
    return str(chart)


def paths(chart: str, name: str) -> list[str]:
    """The path data of a class."""
    return re.findall(rf'<path class="{name}[^"]*" d="([^"]+)"', chart)


def test_the_highest_value_is_drawn_highest_and_everything_is_inside() -> None:
    chart = drawn(Line("a", [(1, 0.5), (2, 0.1), (3, 0.3)]))
    (path,) = paths(chart, "line")
    points = [tuple(map(float, each.split())) for each in re.split("[ML]", path)[1:]]
    assert [x for x, _ in points] == sorted(x for x, _ in points) and points[0][0] == LEFT
    assert points[0][1] < points[2][1] < points[1][1]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in points)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_value_that_is_not_known_leaves_a_gap(missing: float | None) -> None:
    chart = drawn(Line("a", [(1, 0.5), (2, missing), (3, 0.3)]))
    (path,) = paths(chart, "line")
    assert path.count("M") == 2 and "L" not in path
    assert len(re.findall("M", paths(chart, "dots")[0])) == 2
    assert not re.search("nan|inf", chart)


@pytest.mark.parametrize("points", [[], [(1, None)], [(1, math.nan)]])
def test_without_a_known_value_there_is_no_chart(
    points: list[tuple[float, float | None]],
) -> None:
    assert line_chart([Line("a", points)], title="", x_name="", y_name="") is None


def test_a_flat_line_and_a_single_point_can_be_drawn() -> None:
    for points in ([(1, 0.0), (2, 0.0)], [(5, -3.0)], [(0, 1e-30)]):
        assert paths(drawn(Line("a", points)), "line")


def test_a_long_line_has_no_dots() -> None:
    many = [(float(n), float(n)) for n in range(DOTS_UP_TO + 1)]
    assert not paths(drawn(Line("a", many)), "dots")
    assert paths(drawn(Line("a", many[1:])), "dots")


def test_the_delivered_epoch_is_marked_where_it_is_in_the_chart() -> None:
    line = Line("a", [(1, 0.5), (2, 0.4), (4, 0.3)])
    chart = drawn(line, mark=2)
    (mark,), (path,) = paths(chart, "mark"), paths(chart, "line")
    second = re.split("[ML]", path)[2]
    assert mark.split()[0] == f"M{second.split()[0]}"
    assert not paths(drawn(line, mark=9), "mark") and not paths(drawn(line), "mark")


def test_every_name_is_text() -> None:
    evil = "<script>\"'"
    chart = line_chart(
        [Line(evil, [(1, 1.0)])], title=f"{evil}1", x_name=f"{evil}2", y_name=f"{evil}3"
    )
    assert chart is not None
    assert "<script>" not in chart and chart.count("&lt;script&gt;") == 4
    ElementTree.fromstring(chart)


def test_a_smoothed_curve_averages_five_epochs_or_a_tenth_and_skips_unknown_values() -> None:
    assert smoothed([3.0, 0.0, math.nan, 0.0]) == pytest.approx([3.0, 2.0, 2.0, 4 / 3])
    long = smoothed([1.0, *[0.0] * 99])
    assert long[1] == pytest.approx(1 - 2 / 11)
    assert math.isnan(smoothed([math.nan])[0])
