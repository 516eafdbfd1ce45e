"""The benchmarks' items: as their authors publish them, whole and damaged."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cbq.data.benchmarks import BENCHMARKS, load_benchmark
from cbq.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ARC = [
    {
        "id": "1",
        "question": {
            "stem": "Which is hot?",
            "choices": [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}],
        },
        "answerKey": "B",
    }
]
HELLASWAG = [
    {
        "ind": 1,
        "activity_label": "Cooking",
        "ctx_a": "He cooks.",
        "ctx_b": "then he",
        "ctx": "...",
        "endings": ["eats", "flies", "melts", "sings"],
        "label": 0,
    }
]
MUTUAL = [{"answers": "B", "options": ["f : no .", "f : yes ."], "article": "m : is it ?", "id": "dev_1"}]
LABELLED = {"ethics_cm": "input", "ethics_justice": "scenario"}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_all(folder: Path) -> None:
    """Write a small file of every benchmark, as its authors would."""
    write(folder / "piqa/valid.jsonl", lines([{"goal": "open it", "sol1": "pull", "sol2": "eat"}] * 2))
    write(folder / "piqa/valid-labels.lst", "0\n1\n")
    write(folder / "hellaswag/hellaswag_val.jsonl", lines([*HELLASWAG, HELLASWAG[0] | {"ctx_b": ""}]))  # as of WikiHow
    write(folder / "ARC-Easy/ARC-Easy-Test.jsonl", lines(ARC))
    write(folder / "ARC-Challenge/ARC-Challenge-Test.jsonl", lines(ARC))
    write(folder / "mutual/mutual_dev.jsonl", lines(MUTUAL))
    write(folder / "ethics/commonsense/cm_test.csv", 'label,input,is_short,edited\n1,"I hit, ""him"".",True,False\n')
    write(
        folder / "ethics/deontology/deontology_test.csv",
        "label,scenario,excuse\n0,Paint it.,No because it is raining.\n",
    )
    write(folder / "ethics/justice/justice_test.csv", "label,scenario\n1,I paid because she worked.\n")
    write(folder / "ethics/utilitarianism/util_test.csv", 'I won.,"I lost, badly."\n')
    write(folder / "ethics/virtue/virtue_test.csv", "label,scenario\n1,Ann was at ease. [SEP] trustful\n")


EXPECTED = {
    "piqa": {"goal": "open it", "sol1": "pull", "sol2": "eat", "label": 0},
    "hellaswag": {key: HELLASWAG[0][key] for key in ("activity_label", "ctx_a", "ctx_b", "endings", "label")},
    "arc_easy": {
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "mutual": {key: MUTUAL[0][key] for key in ("article", "options", "answers")},
    "ethics_cm": {"input": 'I hit, "him".', "label": 1},
    "ethics_deontology": {"scenario": "Paint it.", "excuse": "No because it is raining.", "label": 0},
    "ethics_justice": {"scenario": "I paid because she worked.", "label": 1},
    "ethics_utilitarianism": {"activity": "I won.", "baseline": "I lost, badly."},
    "ethics_virtue": {"scenario": "Ann was at ease.", "trait": "trustful", "label": 1},
}
EXPECTED["arc_challenge"] = EXPECTED["arc_easy"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_authors_files(tmp_path, name):
    write_all(tmp_path)
    data = load_benchmark(name, str(tmp_path))
    assert list(data) == [BENCHMARKS[name].split]
    assert data[BENCHMARKS[name].split][0] == EXPECTED[name]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_harness_columns_and_any_other_task(tmp_path, kind):
    rows = [{"question": "Why?", "answer": "Because."}, {"question": "When?", "answer": "Now."}]
    (tmp_path / "my_task").mkdir()
    path = tmp_path / "my_task" / f"test.{kind}"
    if kind == "jsonl":
        write(path, lines(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data = load_benchmark("my_task", str(tmp_path))
    assert {split: list(items) for split, items in data.items()} == {"test": rows}


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if (SHARED / name.split("_")[0]).is_dir()])
def test_real_data(name):
    (items,) = load_benchmark(name, str(SHARED)).values()
    assert len(items) == BENCHMARKS[name].num_items


def test_no_data_on_the_harness_own_way():
    assert load_benchmark("piqa", None) is None
    assert load_benchmark("winogrande", None) is None


def test_script_datasets_are_asked_for_as_parquet(no_network, hub_cache):
    with pytest.raises(InputError, match=r"EleutherAI/mutual: mutual/validation/0000\.parquet"):
        load_benchmark("mutual", None)


@pytest.mark.parametrize(
    ("name", "file", "damage", "message"),
    [
        ("piqa", "piqa/valid.jsonl", lambda text: text[:-20], r"valid\.jsonl line 2 is not a JSON object"),
        ("piqa", "piqa/valid.jsonl", lambda text: text.splitlines()[0], "must hold a 0 or a 1 for each of the 1 lines"),
        ("piqa", "piqa/valid-labels.lst", lambda text: "0\n2\n", "must hold a 0 or a 1 for each of the 2 lines"),
        ("piqa", "piqa/valid.jsonl", lambda text: text.replace("sol2", "sol3"), "item 1 has no 'sol2'"),
        ("mutual", "mutual/mutual_dev.jsonl", lambda text: text.replace('"B"', '"C"'), "an answer that is none of its"),
        ("mutual", "mutual/mutual_dev.jsonl", lambda text: "", "holds no items"),
        ("mutual", "mutual/mutual_dev.jsonl", lambda text: "[1]\n", "line 1 is not a JSON object"),
        ("hellaswag", "hellaswag/hellaswag_val.jsonl", lambda text: text.replace(": 0}", ": 4}"), "an answer that is"),
        ("arc_easy", "ARC-Easy/ARC-Easy-Test.jsonl", lambda text: text.replace('Key": "B"', 'Key": "E"'), "an answer"),
        (
            "arc_easy",
            "ARC-Easy/ARC-Easy-Test.jsonl",
            lambda text: text.replace("stem", "stam"),
            "fields of ARC: 'stem'",
        ),
        ("ethics_cm", "ethics/commonsense/cm_test.csv", lambda text: text[:-20], "line 2 is not as its header says"),
        ("ethics_cm", "ethics/commonsense/cm_test.csv", lambda text: text.replace("\n1,", "\n3,"), "line 2 is not as"),
        ("ethics_cm", "ethics/commonsense/cm_test.csv", lambda text: text.split("\n")[0], "holds no items"),
        (
            "ethics_justice",
            "ethics/justice/justice_test.csv",
            lambda text: text.replace("scen", "scan"),
            "no 'scenario'",
        ),
        (
            "ethics_virtue",
            "ethics/virtue/virtue_test.csv",
            lambda text: text.replace(" [SEP] ", " "),
            r"without ' \[SEP",
        ),
        (
            "ethics_virtue",
            "ethics/virtue/virtue_test.csv",
            lambda text: text.replace("scen", "scan"),
            r"without ' \[SEP",
        ),
        ("ethics_utilitarianism", "ethics/utilitarianism/util_test.csv", lambda text: text + '"open', "line 2 is not"),
    ],
)
def test_damaged_files(tmp_path, name, file, damage, message):
    write_all(tmp_path)
    path = tmp_path / file
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_benchmark(name, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_line_separators_inside_a_text(tmp_path):
    text = json.dumps(MUTUAL[0] | {"article": "m : one\u2028two\x85three"}, ensure_ascii=False) + "\n"
    write(tmp_path / "mutual/mutual_dev.jsonl", text)
    assert load_benchmark("mutual", str(tmp_path))["validation"][0]["article"] == "m : one\u2028two\x85three"


def test_answers_in_the_harness_columns_are_checked_too(tmp_path):
    write(tmp_path / "mutual/validation.jsonl", lines([MUTUAL[0], MUTUAL[0] | {"answers": "E"}]))
    with pytest.raises(InputError, match="item 2 has an answer that is none of its choices"):
        load_benchmark("mutual", str(tmp_path))


def test_encoding_and_absence(tmp_path):
    write_all(tmp_path)
    (tmp_path / "mutual/mutual_dev.jsonl").write_bytes(b'{"article": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"mutual_dev.jsonl is not UTF-8"):
        load_benchmark("mutual", str(tmp_path))
    with pytest.raises(InputError, match=r"has no piqa: it needs piqa/valid.jsonl and piqa/valid-labels.lst, or piqa/"):
        load_benchmark("piqa", str(tmp_path / "mutual"))
    with pytest.raises(InputError, match="has no piqa"):
        load_benchmark("piqa", "~nobody/data")
    (tmp_path / "winogrande").mkdir()
    (tmp_path / "winogrande/test.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match=r"test.parquet is not a parquet file, or is corrupt"):
        load_benchmark("winogrande", str(tmp_path))
