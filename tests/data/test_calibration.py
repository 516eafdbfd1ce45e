import hashlib
import inspect
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cbq.data.calibration import Calibration
from cbq.data.corpora import C4, Embedded, TextFile, WikiText2
from cbq.errors import InputError

CONF = Path(__file__).resolve().parents[2] / "conf" / "calibration"


@pytest.fixture
def tokenizer(tiny_llama_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


def test_sample(tiny_text_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "text.txt").write_text(tiny_text_file.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    calibration = Calibration(TextFile(str(tmp_path / "text.txt")), num_segments=6, segment_tokens=40)
    segments = calibration.sample(tokenizer, vocab_size=320, context=128, seed=0)
    assert segments.shape == (6, 40)
    assert torch.equal(segments, calibration.sample(tokenizer, vocab_size=320, context=128, seed=0))
    assert not torch.equal(segments, calibration.sample(tokenizer, vocab_size=320, context=128, seed=1))


def test_describe(tiny_text_file: Path) -> None:
    assert Calibration(TextFile(str(tiny_text_file)), 6, 40).describe() == {
        "name": "text",
        "num_segments": 6,
        "segment_tokens": 40,
        "sha256": hashlib.sha256(tiny_text_file.read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize(
    ("num_segments", "segment_tokens", "vocab_size", "message"),
    [
        (0, 40, 320, "calibration.num_segments must be an integer of at least 1, got 0"),
        (2.5, 40, 320, "calibration.num_segments must be an integer of at least 1, got 2.5"),
        ("many", 40, 320, "calibration.num_segments must be an integer of at least 1, got 'many'"),
        (6, -1, 320, "calibration.segment_tokens must be an integer of at least 1, got -1"),
        (6, 129, 320, "calibration.segment_tokens must be at most 128, the model's context, got 129"),
        (6, 128, 300, "but the model's vocabulary has 300 ids"),
    ],
)
def test_bad_input(
    tiny_text_file: Path,
    tokenizer: PreTrainedTokenizerBase,
    num_segments: int,
    segment_tokens: int,
    vocab_size: int,
    message: str,
) -> None:
    calibration = Calibration(TextFile(str(tiny_text_file)), num_segments, segment_tokens)
    with pytest.raises(InputError, match=message) as error:
        calibration.sample(tokenizer, vocab_size, context=128, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("choice", "overrides", "corpus", "size"),
    [
        ("embedded", {}, Embedded(), (64, 256)),
        ("text", {"path": "a.txt"}, TextFile("a.txt"), (128, 2048)),
        ("wikitext2", {}, WikiText2(), (128, 2048)),
        ("wikitext2", {"data_dir": "d"}, WikiText2("d"), (128, 2048)),
        ("c4", {}, C4(), (128, 2048)),
        ("c4", {"data_dir": "d"}, C4("d"), (128, 2048)),
    ],
)
def test_config_choices(choice: str, overrides: dict[str, str], corpus: object, size: tuple[int, int]) -> None:
    config = OmegaConf.load(CONF / f"{choice}.yaml")
    assert set(config) - {"_target_"} == set(inspect.signature(get_object(config["_target_"])).parameters)
    assert instantiate(config, **overrides) == Calibration(corpus, *size)
    assert instantiate(config, **overrides, num_segments=3, segment_tokens=5) == Calibration(corpus, 3, 5)


def test_text_needs_a_path() -> None:
    with pytest.raises(MissingMandatoryValue):
        _ = OmegaConf.load(CONF / "text.yaml").path
