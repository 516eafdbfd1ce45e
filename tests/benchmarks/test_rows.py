"""The rows and their file."""

import json

import pytest

from benchmarks.rows import Row, Skipped, read_rows, to_json
from cbq.errors import InputError

ROWS = [
    Row("step", "A / B", "pico", (1.5, 1.0, 3.0), expected=1.5, note="n"),
    Row("run", "share of loading", "pico", (0.25,), "share", judged=False),
]


def test_value_is_the_median_of_the_samples():
    assert (ROWS[0].value, ROWS[0].low, ROWS[0].high) == (1.5, 1.0, 3.0)


def test_file_gives_the_rows_back(tmp_path):
    path = tmp_path / "a.json"
    content = to_json(ROWS, [Skipped("step 7b", "needs 40 GiB")], {"device": "cpu"}, "python -m benchmarks")
    path.write_text(json.dumps(content))
    assert read_rows(path) == (ROWS, {"device": "cpu"})


def test_file_is_the_public_format():
    content = to_json(ROWS, [Skipped("step 7b", "needs 40 GiB")], {"device": "cpu"}, "python -m benchmarks")
    assert json.loads(json.dumps(content)) == {
        "format_version": 1,
        "environment": {"device": "cpu"},
        "command": "python -m benchmarks",
        "rows": [
            {
                "key": "step/A / B/pico",
                "part": "step",
                "name": "A / B",
                "case": "pico",
                "samples": [1.5, 1.0, 3.0],
                "unit": "ratio",
                "expected": 1.5,
                "judged": True,
                "note": "n",
                "value": 1.5,
                "low": 1.0,
                "high": 3.0,
            },
            {
                "key": "run/share of loading/pico",
                "part": "run",
                "name": "share of loading",
                "case": "pico",
                "samples": [0.25],
                "unit": "share",
                "expected": None,
                "judged": False,
                "note": "",
                "value": 0.25,
                "low": 0.25,
                "high": 0.25,
            },
        ],
        "skipped": [{"what": "step 7b", "why": "needs 40 GiB"}],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "format_version None"),
        ('{"format_version": 2}', "format_version 2; these benchmarks read 1"),
        ('{"format_version": 1}', "damaged"),
        ('{"format_version": 1, "rows": [{"part": "step"}], "environment": {}}', "damaged"),
        ('{"format_version": 1, "rows": [], "environment": 3}', "damaged"),
    ],
)
def test_a_file_that_is_no_baseline(tmp_path, text, message):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(path)
