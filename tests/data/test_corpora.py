import gzip
import hashlib
import json
import pydoc_data.topics
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cbq.data import corpora
from cbq.data.corpora import C4, CORPORA, Embedded, TextFile, WikiText2
from cbq.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2_raw"
COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"
WIKITEXT_FILES = {split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in ("train", "test")}
C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


@pytest.fixture(scope="module")
def documents() -> dict[str, list[str]]:
    """Paragraphs of Python's help topics, of all lengths; train and test share none."""
    topics = pydoc_data.topics.topics
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return {"train": paragraphs[:600], "test": paragraphs[600:1000]}


def write_wikitext2(folder: Path, documents: dict[str, list[str]]) -> None:
    for split, filename in WIKITEXT_FILES.items():
        (folder / filename).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": documents[split]}), folder / filename)


def write_c4(folder: Path, documents: dict[str, list[str]]) -> None:
    for split, filename in C4_FILES.items():
        (folder / filename).parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(folder / filename, "wt", encoding="utf-8") as file:
            for text in documents[split]:
                row = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"}
                file.write(json.dumps(row) + "\n")


@pytest.fixture
def text(tiny_text_file: Path, tmp_path: Path) -> TextFile:
    (tmp_path / "text.txt").write_text(tiny_text_file.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    return TextFile(str(tmp_path / "text.txt"))


def test_random_segments_are_from_the_text(text: TextFile, tokenizer: PreTrainedTokenizerBase) -> None:
    segments = text.random_segments(tokenizer, num_segments=20, segment_tokens=50, seed=1)
    assert segments.shape == (20, 50)
    assert segments.dtype == torch.long
    whole = Path(text.path).read_text(encoding="utf-8")
    for segment in segments:
        assert tokenizer.decode(segment).strip("\ufffd") in whole


def test_seed_decides_the_segments(text: TextFile, tokenizer: PreTrainedTokenizerBase) -> None:
    first, same, other = (text.random_segments(tokenizer, 4, 30, seed) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_every_offset_can_be_drawn(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "short.txt").write_text("0123456789")
    short = TextFile(str(tmp_path / "short.txt"))
    num_tokens = len(tokenizer("0123456789")["input_ids"])
    segments = short.random_segments(tokenizer, 200, num_tokens - 2, seed=0)
    assert len({tuple(segment.tolist()) for segment in segments}) == 3
    assert short.random_segments(tokenizer, 1, num_tokens, seed=0).shape == (1, num_tokens)


def test_test_segments_are_the_text_in_order_without_its_tail(
    text: TextFile, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(Path(text.path).read_text(encoding="utf-8"))["input_ids"]
    segments = text.held_out(tokenizer, 100, 100).segments
    assert len(segments) == len(ids) // 100
    assert segments.flatten().tolist() == ids[: len(segments) * 100]


def test_sha256_is_that_of_the_file(text: TextFile) -> None:
    assert text.sha256("test") == hashlib.sha256(Path(text.path).read_bytes()).hexdigest()


def test_long_text_prints_no_warning(
    text: TextFile, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture
) -> None:
    tokenizer.deprecation_warnings.clear()
    text.held_out(tokenizer, 100, 100)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(
    ("content", "segment_tokens", "message"),
    [
        (None, 4, "absent.txt cannot be read: No such file"),
        (b"caf\xe9", 4, r"is not UTF-8 \(byte 3\)"),
        (b"hi", 50, "has . tokens, less than one segment of 50"),
        (b"", 1, "has 0 tokens"),
        (b"enough text", 0, "segment_tokens must be an integer of at least 1, got 0"),
        (b"enough text", "4", "segment_tokens must be an integer of at least 1, got '4'"),
    ],
)
def test_bad_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: bytes | None, segment_tokens: int, message: str
) -> None:
    path = tmp_path / "absent.txt"
    if content is not None:
        path.write_bytes(content)
    for cut in (
        lambda: TextFile(str(path)).held_out(tokenizer, segment_tokens, segment_tokens).segments,
        lambda: TextFile(str(path)).random_segments(tokenizer, 2, segment_tokens, seed=0),
    ):
        with pytest.raises(InputError, match=message) as error:
            cut()
        assert "\n" not in str(error.value)


def test_embedded_calibrates_and_tests_on_different_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "calibration.txt").write_text("aaaa bbbb cccc " * 20)
    (tmp_path / "test.txt").write_text("1111 2222 3333 " * 20)
    assert corpora.embedded_text_folder().name == "pico"
    monkeypatch.setattr(corpora, "embedded_text_folder", lambda: tmp_path)
    embedded = Embedded()
    assert set(tokenizer.decode(embedded.random_segments(tokenizer, 1, 16, seed=0)[0])) == set("abc ")
    assert set(tokenizer.decode(embedded.held_out(tokenizer, 16, 16).segments[0])) == set("123 ")
    assert embedded.sha256("calibration") != embedded.sha256("test")


# --- WikiText-2


@pytest.mark.parametrize("flat", [False, True])
def test_wikitext2_from_a_folder(
    tmp_path: Path, documents: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, flat: bool
) -> None:
    write_wikitext2(tmp_path, documents)
    folder = tmp_path / "wikitext-2-raw-v1" if flat else tmp_path
    wikitext2 = WikiText2(data_dir=str(folder))
    joined = {split: "\n\n".join(documents[split]) for split in documents}
    ids = tokenizer(joined["test"])["input_ids"]
    assert wikitext2.held_out(tokenizer, 64, 64).segments.flatten().tolist() == ids[: len(ids) // 64 * 64]
    assert tokenizer.decode(wikitext2.random_segments(tokenizer, 1, 64, seed=0)[0]).strip("\ufffd") in joined["train"]
    assert wikitext2.sha256("test") == hashlib.sha256(joined["test"].encode()).hexdigest()


def test_wikitext2_refuses_the_tokenized_form(tmp_path: Path) -> None:
    rows = [" = Robert <unk> = \n", "", " Robert <unk> is an English film , television and theatre actor . \n"]
    write_wikitext2(tmp_path, {"train": rows, "test": rows})
    with pytest.raises(InputError, match="is the tokenized form of WikiText-2"):
        WikiText2(data_dir=str(tmp_path)).sha256("test")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the project's shared data is not here")
def test_real_wikitext2(tokenizer: PreTrainedTokenizerBase) -> None:
    raw = TextFile(str(SHARED / "wiki.test.raw"))
    segments = raw.held_out(tokenizer, 128, 128).segments
    assert segments.numel() > 200_000
    assert tokenizer.decode(segments[0]).lstrip().startswith("= Robert Boulter =")
    with pytest.raises(InputError, match="is the tokenized form"):  # what lies there as parquet is not the raw form
        WikiText2(data_dir=str(SHARED)).held_out(tokenizer, 128, 128)


# --- C4


def gptq_segments(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, num_segments: int, segment_tokens: int, seed: int
) -> list[list[int]]:
    """`get_c4` of GPTQ's datautils.py, one split of it."""
    random.seed(seed)
    segments = []
    for _ in range(num_segments):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = tokenizer(documents[i], return_tensors="pt").input_ids
            if ids.shape[1] > segment_tokens:
                break
        i = random.randint(0, ids.shape[1] - segment_tokens - 1)
        segments.append(ids[0, i : i + segment_tokens].tolist())
    return segments


def test_c4_draws_as_gptq_does(
    tmp_path: Path, documents: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase
) -> None:
    write_c4(tmp_path, documents)
    c4 = C4(data_dir=str(tmp_path))
    expected = gptq_segments(documents["train"], tokenizer, 16, 200, seed=3)
    assert c4.random_segments(tokenizer, 16, 200, seed=3).tolist() == expected
    assert c4.random_segments(tokenizer, 16, 200, seed=4).tolist() != expected
    assert c4.held_out(tokenizer, 200, 200).segments.tolist() == gptq_segments(
        documents["test"], tokenizer, 256, 200, seed=0
    )
    lines = "".join(document + "\n" for document in documents["test"])
    assert c4.sha256("test") == hashlib.sha256(lines.encode()).hexdigest()


def test_c4_without_a_long_document_ends(
    tmp_path: Path, documents: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase
) -> None:
    write_c4(tmp_path, documents)
    with pytest.raises(
        InputError, match="none of the 600 calibration documents of 'c4' is longer than a segment of 50000"
    ):
        C4(data_dir=str(tmp_path)).random_segments(tokenizer, 2, 50_000, seed=0)


@pytest.mark.parametrize("corpus", [C4(data_dir="unread"), TextFile("unread")])
@pytest.mark.parametrize(("num_segments", "segment_tokens"), [(0, 8), (8, 0), (8, True), ("8", 8)])
def test_numbers_below_one(
    tokenizer: PreTrainedTokenizerBase, corpus: C4 | TextFile, num_segments: int, segment_tokens: int
) -> None:
    with pytest.raises(InputError, match="must be an integer of at least 1"):
        corpus.random_segments(tokenizer, num_segments, segment_tokens, seed=0)


# --- both, from a folder and from the hub


@pytest.mark.parametrize("corpus", [WikiText2, C4])
def test_missing_and_corrupt_files(
    tmp_path: Path,
    documents: dict[str, list[str]],
    corpus: type[WikiText2 | C4],
    capfd: pytest.CaptureFixture,
    no_network: list[str],
) -> None:
    for data_dir in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"holds neither .*/.* nor [^/]*\.(parquet|json\.gz) "):
            corpus(data_dir=str(data_dir)).sha256("test")
    files = WIKITEXT_FILES if corpus is WikiText2 else C4_FILES
    (tmp_path / files["test"]).parent.mkdir()
    write_wikitext2(tmp_path / "good", documents)
    write_c4(tmp_path / "good", documents)
    truncated = (tmp_path / "good" / files["test"]).read_bytes()[:9000]
    for content in (b"", b"neither parquet nor gzip" * 20, truncated):
        (tmp_path / files["test"]).write_bytes(content)
        with pytest.raises(InputError, match="with a column `text`, or is corrupt") as error:
            corpus(data_dir=str(tmp_path)).sha256("test")
        assert "\n" not in str(error.value)
    assert "".join(capfd.readouterr()) == ""
    assert no_network == []


def test_file_without_text_column(tmp_path: Path) -> None:
    path = tmp_path / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"page": ["a"]}), path)
    with pytest.raises(InputError, match="is not a parquet file with a column `text`"):
        WikiText2(data_dir=str(tmp_path)).sha256("test")


@pytest.mark.parametrize(
    ("name", "repo_folder", "write"),
    [("wikitext2", "datasets--Salesforce--wikitext", write_wikitext2), ("c4", "datasets--allenai--c4", write_c4)],
)
def test_hub_cache_is_read_without_network(
    hub_cache: Path,
    tmp_path: Path,
    documents: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    no_network: list[str],
    name: str,
    repo_folder: str,
    write: Callable[[Path, dict[str, list[str]]], None],
) -> None:
    snapshot = hub_cache / repo_folder / "snapshots" / COMMIT
    write(snapshot, documents)
    (hub_cache / repo_folder / "refs").mkdir()
    (hub_cache / repo_folder / "refs" / "main").write_text(COMMIT)
    shutil.copytree(snapshot, tmp_path / "local")
    cached, local = CORPORA[name](None), CORPORA[name](str(tmp_path / "local"))
    assert torch.equal(cached.random_segments(tokenizer, 4, 32, 0), local.random_segments(tokenizer, 4, 32, 0))
    assert torch.equal(cached.held_out(tokenizer, 32, 32).segments, local.held_out(tokenizer, 32, 32).segments)
    assert no_network == []


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_not_cached_and_no_network_fails_fast(hub_cache: Path, no_network: list[str], name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError, match="is not in the local hub cache"):
        CORPORA[name](None).sha256("test")
    assert time.perf_counter() - start < 5
    assert len(no_network) <= 2  # one question, no retries


def test_table_says_each_corpus_by_its_name() -> None:
    assert all(CORPORA[name](None).name == name for name in CORPORA)
