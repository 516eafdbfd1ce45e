"""Files of a run that was killed, or that somebody damaged."""

import pytest

from cbq.report.stored import StoredFiles


def test_table_without_half_lines_and_what_is_no_number(tmp_path):
    (tmp_path / "a.csv").write_text("step,window,loss\n0,0,1.5\n1,0,inf\n2,0,x\n3,0,1,2,3\n4,0,-2\n5\n")
    files = StoredFiles(tmp_path)
    table = files.table("a.csv", "step", "window")
    assert table["step"].tolist() == [0, 1, 2, 4]
    assert table["loss"].dropna().tolist() == [1.5, -2.0]
    assert files.unreadable == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\xff\x00" * 40, "can't decode"),
        (b"a,b\n1,2\n", "it has no column step or window"),
        (b'step,window\n"1', "EOF inside string"),
        (b"\n\n", "No columns"),
    ],
)
def test_table_that_cannot_be_read(tmp_path, content, reason):
    (tmp_path / "a.csv").write_bytes(content)
    files = StoredFiles(tmp_path)
    assert files.table("a.csv", "step", "window").empty
    (line,) = files.unreadable
    assert line.startswith("a.csv cannot be read and is left out: ")
    assert reason in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("content", "reason"), [(b"{", "Expecting"), (b"", "Expecting"), (b"[]", "holds no object"), (b"\xff", "decode")]
)
def test_json_that_cannot_be_read(tmp_path, content, reason):
    (tmp_path / "a.json").write_bytes(content)
    files = StoredFiles(tmp_path)
    assert files.json("a.json") == {}
    assert [reason in line for line in files.unreadable] == [True]


def test_what_is_not_there_is_no_mistake(tmp_path):
    (tmp_path / "empty.csv").touch()
    files = StoredFiles(tmp_path)
    assert files.table("a.csv", "step").empty
    assert files.table("empty.csv", "step").empty
    assert files.json("a.json") == {}
    assert files.unreadable == []
