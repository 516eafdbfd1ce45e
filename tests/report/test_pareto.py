"""The line of points that nothing beats, and the picture."""

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from cbq.report.page import write_chart
from cbq.report.pareto import front, panels, points
from cbq.report.sweep import sweep_table

POINT = st.tuples(st.integers(0, 5), st.integers(0, 5))


@given(st.lists(POINT))
def test_front_is_what_brute_force_finds(points):
    def beaten(point) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    assert front(points) == sorted({point for point in points if not beaten(point)})


def test_a_picture_has_a_panel_a_column_and_a_name_a_point(result, tmp_path):
    runs = [result(16.0, model=model, rounding=name) for model in ("pico", "other") for name in ("first", "second")]
    runs[0]["cost"]["reconstruction_seconds"] = 50.0
    write_chart(panels(sweep_table(runs)), tmp_path / "a.b")
    assert (tmp_path / "a.b.png").read_bytes().startswith(b"\x89PNG")
    texts = [each.text for each in ElementTree.parse(tmp_path / "a.b.svg").iter() if each.tag.endswith("text")]
    for text, count in {"first": 2, "second": 2, "pico embedded": 1, "other embedded": 1, "perplexity": 2}.items():
        assert texts.count(text) == count


def test_points_and_which_nothing_beats(result):
    runs = [result(value, rounding=name) for name, value in (("fast", 17.0), ("good", 16.0), ("bad", 18.0))]
    for run, seconds in zip(runs, (10.0, 20.0, 30.0), strict=True):
        run["cost"]["reconstruction_seconds"] = seconds
    found = points(sweep_table(runs))
    assert [(each["row"], each["seconds"], each["perplexity"], each["front"]) for each in found] == [
        ("fast", 10.0, 17.0, True),
        ("good", 20.0, 16.0, True),
        ("bad", 30.0, 18.0, False),
    ]


def test_no_picture_where_there_is_nothing_to_show(result):
    assert panels(sweep_table([result(status="failed")])) is None
