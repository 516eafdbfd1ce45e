import hashlib
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from cbq.data.corpora import TextFile
from cbq.errors import InputError
from cbq.evaluation.perplexity import HeldOutTexts, mean_token_nll, text_score

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2_raw" / "wiki.test.raw"


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


def held_out(path: str | None, segment_tokens: int, stride: int | None = None) -> HeldOutTexts:
    return HeldOutTexts([], segment_tokens, stride, text_path=path, data_dir=None)


def own_nll(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, stride: int) -> list:
    """Return the negative log likelihood of every token that is predicted, one plain forward a segment."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    found = []
    for start in range(0, len(ids) - tokens + 1, stride):
        segment = ids[start : start + tokens]
        with torch.no_grad():
            probabilities = model(segment[None]).logits[0].double().softmax(-1)
        first = 1 if start == 0 or stride == tokens else tokens - stride
        found += [-math.log(probabilities[i - 1, segment[i]]) for i in range(first, tokens)]
    return found


def test_agrees_with_transformers_own_loss(
    tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM, short_text: str
) -> None:
    texts = held_out(short_text, 64)
    segments = texts.prepare(tokenizer, vocab_size=320, context=128)["text"].segments
    ids = torch.tensor(tokenizer(Path(short_text).read_text(encoding="utf-8"))["input_ids"])
    expected = [ids[start : start + 64][None] for start in range(0, len(ids) - 63, 64)]
    with torch.no_grad():
        losses = [model(segment, labels=segment).loss.item() for segment in expected]
    nll = mean_token_nll(model, segments.split(5)).item()
    assert nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert texts.protocol() == {
        "text": {
            "segment_tokens": 64,
            "stride": 64,
            "num_tokens": 64 * len(expected),
            "text_sha256": hashlib.sha256(Path(short_text).read_bytes()).hexdigest(),
        }
    }


@pytest.mark.parametrize("stride", [1, 20, 63, 64])
def test_stride(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM, short_text: str, stride: int) -> None:
    Path(short_text).write_text(Path(short_text).read_text(encoding="utf-8")[:400], encoding="utf-8")
    text = held_out(short_text, 64, stride).prepare(tokenizer, 320, 128)["text"]
    expected = own_nll(model, tokenizer, Path(short_text).read_text(encoding="utf-8"), 64, stride)
    nll = mean_token_nll(model, text.segments.split(3), stride).item()
    assert nll == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_long_context_predicts_better_than_none(tokenizer: PreTrainedTokenizerBase, short_text: str) -> None:
    """What a stride is for; on the embedded model, since a random one learns nothing from context."""
    from cbq.models.loading import load_embedded

    loaded = load_embedded()
    apart = held_out(short_text, 64).prepare(loaded.tokenizer, loaded.model.config.vocab_size, 512)["text"]
    strided = held_out(short_text, 64, 16).prepare(loaded.tokenizer, loaded.model.config.vocab_size, 512)["text"]
    with_context = mean_token_nll(loaded.model, strided.segments.split(8), 16)
    assert with_context < mean_token_nll(loaded.model, apart.segments.split(8))


@pytest.mark.skipif(not SHARED.is_file(), reason="the project's shared data is not here")
def test_real_wikitext2(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM, tmp_path: Path) -> None:
    text = SHARED.read_text(encoding="utf-8")[:20_000]
    (tmp_path / "wiki.txt").write_text(text, encoding="utf-8")
    found = held_out(str(tmp_path / "wiki.txt"), 128).prepare(tokenizer, 320, 128)["text"]
    expected = own_nll(model, tokenizer, text, 128, 128)
    nll = mean_token_nll(model, found.segments.split(8)).item()
    assert math.exp(nll) == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-4)


@pytest.mark.parametrize("text", ["plain words, and more of them " * 9, "na\u00efve \u4f60\u597d \U0001f600 " * 30])
def test_bits_per_byte(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM, tmp_path: Path, text: str) -> None:
    """Against the definition, where one segment is the whole text."""
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids = tokenizer(text)["input_ids"][:128]
    whole = tokenizer.decode(ids).rstrip("\ufffd")
    (tmp_path / "text.txt").write_text(whole, encoding="utf-8")
    ids = tokenizer(whole)["input_ids"]
    found = held_out(str(tmp_path / "text.txt"), len(ids)).prepare(tokenizer, 320, 128)["text"]
    nll = own_nll(model, tokenizer, whole, len(ids), len(ids))
    score = text_score(mean_token_nll(model, found.segments.split(1)).item(), found.bytes_per_token)
    # Of the first token, which nothing predicts, the mean is assumed.
    expected = sum(nll) * len(ids) / len(nll) / math.log(2) / len(whole.encode())
    assert score.bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)


def test_batch_size_changes_nothing(
    tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM, short_text: str
) -> None:
    segments = TextFile(short_text).held_out(tokenizer, 32, 32).segments
    one, some, all_at_once = (mean_token_nll(model, segments.split(size)).item() for size in (1, 7, len(segments)))
    assert one == pytest.approx(some, rel=1e-6)
    assert one == pytest.approx(all_at_once, rel=1e-6)


def test_logits_are_float32_for_a_bfloat16_model(
    tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM, short_text: str
) -> None:
    segments = TextFile(short_text).held_out(tokenizer, 32, 32).segments[:4]
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        logits = model(segments).logits.double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), segments[:, 1:].flatten())
    nll = mean_token_nll(model, [segments])
    assert nll.dtype == torch.float64
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)


def test_hopeless_model_has_infinite_perplexity(model: LlamaForCausalLM) -> None:
    model.lm_head.weight.data.mul_(1e6)  # math.exp would raise an OverflowError
    nll = mean_token_nll(model, [torch.tensor([[0, 1, 2, 3]])]).item()
    assert text_score(nll, 3.0).perplexity == math.inf


def test_one_token_that_is_not_a_number_spoils_the_mean(model: LlamaForCausalLM) -> None:
    """A partly broken model must not look good by what it leaves out."""
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    segments = torch.full((4, 8), 3)
    assert mean_token_nll(model, segments.split(2)).isfinite()
    segments[2, 5] = 7
    assert mean_token_nll(model, segments.split(2)).isnan()


def test_parameters_can_still_be_trained(model: LlamaForCausalLM) -> None:
    ids = torch.arange(16).view(1, 16)
    mean_token_nll(model, [ids])
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize(
    ("segment_tokens", "stride", "vocab_size", "message"),
    [
        (0, None, 320, "evaluation.segment_tokens must be an integer of at least 1, got 0"),
        (1, None, 320, "evaluation.segment_tokens must be at least 2, got 1"),
        (129, None, 320, "evaluation.segment_tokens must be at most 128, the model's context, got 129"),
        (64, 65, 320, "evaluation.stride must be at most 64, the length of a segment, got 65"),
        (64, None, 300, "the model's vocabulary has 300 ids"),
    ],
)
def test_bad_input_is_refused_before_any_model(
    tokenizer: PreTrainedTokenizerBase,
    short_text: str,
    segment_tokens: int,
    stride: int | None,
    vocab_size: int,
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        held_out(short_text, segment_tokens, stride).prepare(tokenizer, vocab_size, context=128)


def test_short_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "tiny.txt").write_text("too short")
    with pytest.raises(InputError, match="less than one segment of 64"):
        held_out(str(tmp_path / "tiny.txt"), 64).prepare(tokenizer, 320, 128)


def test_stride_of_c4() -> None:
    with pytest.raises(InputError, match=r"evaluation\.stride must be null with c4"):
        HeldOutTexts(["c4"], 64, 32, None, None).prepare(None, 320, 128)


def test_unknown_corpus() -> None:
    with pytest.raises(InputError, match=r"unknown names \['ptb'\]; known: embedded, wikitext2, c4"):
        HeldOutTexts(["c4", "ptb"], 64, None, None, None)


def test_no_corpora_need_no_context(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = held_out(None, segment_tokens=2048)
    assert texts.prepare(tokenizer, vocab_size=320, context=128) == {}
    assert texts.protocol() == {}
