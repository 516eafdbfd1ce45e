import hashlib
import inspect
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from cbq.data.corpora import C4, Embedded, TextFile, WikiText2
from cbq.errors import InputError
from cbq.evaluation.perplexity import PerplexityEvaluation, mean_token_nll

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture
def tokenizer(tiny_llama_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


@pytest.fixture
def model(tiny_llama_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval()


@pytest.fixture
def short_text(tmp_path: Path, tiny_text_file: Path) -> str:
    (tmp_path / "short.txt").write_text(tiny_text_file.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return str(tmp_path / "short.txt")


def test_agrees_with_transformers_own_loss(
    tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM, short_text: str
) -> None:
    evaluation = PerplexityEvaluation([], segment_tokens=64, text_path=short_text)
    evaluation.prepare(tokenizer, vocab_size=320, context=128)
    ids = torch.tensor(tokenizer(Path(short_text).read_text(encoding="utf-8"))["input_ids"])
    segments = [ids[start : start + 64][None] for start in range(0, len(ids) - 63, 64)]
    with torch.no_grad():
        losses = [model(segment, labels=segment).loss.item() for segment in segments]
    expected = math.exp(sum(losses) / len(losses))
    assert evaluation.perplexity(model) == {"text": pytest.approx(expected, rel=1e-4)}
    assert evaluation.protocol() == {
        "text": {
            "segment_tokens": 64,
            "num_tokens": 64 * len(segments),
            "text_sha256": hashlib.sha256(Path(short_text).read_bytes()).hexdigest(),
        }
    }


def test_batch_size_changes_nothing(
    tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM, short_text: str
) -> None:
    segments = TextFile(short_text).test_segments(tokenizer, 32)
    one, some, all_at_once = (mean_token_nll(model, segments, size).item() for size in (1, 7, len(segments)))
    assert one == pytest.approx(some, rel=1e-6)
    assert one == pytest.approx(all_at_once, rel=1e-6)


def test_logits_are_float32_for_a_bfloat16_model(
    tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM, short_text: str
) -> None:
    segments = TextFile(short_text).test_segments(tokenizer, 32)[:4]
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        logits = model(segments).logits.double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), segments[:, 1:].flatten())
    nll = mean_token_nll(model, segments, 4)
    assert nll.dtype == torch.float64
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)


def test_hopeless_model_has_infinite_perplexity(model: LlamaForCausalLM) -> None:
    evaluation = PerplexityEvaluation([], 4)
    evaluation.segments = {"text": torch.tensor([[0, 1, 2, 3]])}
    model.lm_head.weight.data.mul_(1e6)  # math.exp would raise an OverflowError
    assert evaluation.perplexity(model) == {"text": math.inf}


def test_one_token_that_is_not_a_number_spoils_the_mean(model: LlamaForCausalLM) -> None:
    """A partly broken model must not look good by what it leaves out."""
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    segments = torch.full((4, 8), 3)
    assert mean_token_nll(model, segments, batch_size=2).isfinite()
    segments[2, 5] = 7
    assert mean_token_nll(model, segments, batch_size=2).isnan()


def test_parameters_can_still_be_trained(model: LlamaForCausalLM) -> None:
    ids = torch.arange(16).view(1, 16)
    mean_token_nll(model, ids, 1)
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize(
    ("segment_tokens", "vocab_size", "message"),
    [
        (0, 320, "evaluation.segment_tokens must be an integer of at least 1, got 0"),
        (1, 320, "evaluation.segment_tokens must be at least 2, got 1"),
        (129, 320, "evaluation.segment_tokens must be at most 128, the model's context, got 129"),
        (64, 300, "the model's vocabulary has 300 ids"),
    ],
)
def test_bad_input_is_refused_before_any_model(
    tokenizer: PreTrainedTokenizerBase, short_text: str, segment_tokens: int, vocab_size: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        PerplexityEvaluation([], segment_tokens, text_path=short_text).prepare(tokenizer, vocab_size, context=128)


def test_short_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "tiny.txt").write_text("too short")
    with pytest.raises(InputError, match="less than one segment of 64"):
        PerplexityEvaluation([], 64, text_path=str(tmp_path / "tiny.txt")).prepare(tokenizer, 320, 128)


def test_unknown_corpus() -> None:
    with pytest.raises(InputError, match=r"unknown names \['ptb'\]; known: embedded, wikitext2, c4"):
        PerplexityEvaluation(["c4", "ptb"], 64)


def test_batch_size_below_one() -> None:
    with pytest.raises(InputError, match=r"evaluation\.batch_size must be an integer of at least 1, got 0"):
        PerplexityEvaluation([], 64, batch_size=0)


@pytest.mark.parametrize(
    ("choice", "overrides", "corpora", "segment_tokens"),
    [
        ("none", [], [], 2048),
        ("perplexity", [], [WikiText2(), C4()], 2048),
        ("perplexity", ["evaluation.data_dir=d", "evaluation.corpora=[c4]"], [C4("d")], 2048),
        ("perplexity", ["evaluation.corpora=c4"], [C4()], 2048),
        ("embedded", [], [Embedded()], 512),
        ("embedded", ["evaluation.text_path=a.txt", "evaluation.segment_tokens=64"], [TextFile("a.txt")], 64),
    ],
)
def test_config_choices(choice: str, overrides: list[str], corpora: list[object], segment_tokens: int) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[f"+evaluation={choice}", *overrides]).evaluation
    assert set(config) - {"_target_"} == set(inspect.signature(PerplexityEvaluation).parameters)
    evaluation = instantiate(config, _convert_="all")
    assert evaluation.corpora == corpora
    assert evaluation.segment_tokens == segment_tokens


def test_no_corpora_need_no_context(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    evaluation = PerplexityEvaluation([], segment_tokens=2048)
    assert evaluation.prepare(tokenizer, vocab_size=320, context=128) == {}
    assert evaluation.perplexity(model) == {}
    assert evaluation.protocol() == {}
