"""The line of points that nothing beats, and the picture."""

from hypothesis import given
from hypothesis import strategies as st

from cbq.report.pareto import front, plot
from cbq.report.sweep import sweep_table

POINT = st.tuples(st.integers(0, 5), st.integers(0, 5))


@given(st.lists(POINT))
def test_front_is_what_brute_force_finds(points):
    def beaten(point) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    assert front(points) == sorted({point for point in points if not beaten(point)})


def test_a_picture_where_there_is_something_to_show(result, tmp_path):
    path = tmp_path / "plot.png"
    assert plot(sweep_table([result(16.0, rounding="a"), result(17.0, rounding="b")]), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not plot(sweep_table([result(status="failed")]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
