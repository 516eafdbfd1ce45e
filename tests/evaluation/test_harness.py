"""What lm-eval is told of a model, against plain forwards and lm-eval's own wrapper."""

import copy
import random
from dataclasses import replace
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cbq.errors import InputError
from cbq.evaluation.evaluation import NOT_RECALLED, show_nothing
from cbq.evaluation.harness import HarnessModel, batch_ends
from cbq.evaluation.perplexity import HeldOutTexts, mean_token_nll, text_score
from cbq.evaluation.recall import Recall
from cbq.models.loading import LoadedModel, load_pretrained

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they")


@pytest.fixture(scope="module")
def loaded(tiny_llama_folder: Path) -> LoadedModel:
    return load_pretrained(str(tiny_llama_folder))


def requests(count: int = 40) -> list[Instance]:
    """Return questions with answers of all lengths; some share their question, as choices do."""
    generator = random.Random(0)
    pairs = []
    for _ in range(count // 4):
        context = " ".join(generator.choices(WORDS, k=generator.randint(1, 40)))
        for length in (1, 1, 2, 5):
            pairs.append((context, " " + " ".join(generator.choices(WORDS, k=length))))
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def harness(loaded: LoadedModel, batch_tokens: int, recall: Recall = NOT_RECALLED) -> HarnessModel:
    return HarnessModel(loaded, batch_tokens, recall, show_nothing)


@pytest.mark.parametrize("batch_tokens", [1, 100, 5000])
def test_likelihoods_are_those_of_plain_forwards(loaded, batch_tokens):
    found = harness(loaded, batch_tokens).loglikelihood(requests())
    for request, (likelihood, greedy) in zip(requests(), found, strict=True):
        context, whole = (loaded.tokenizer(text)["input_ids"] for text in (request.args[0], "".join(request.args)))
        with torch.no_grad():
            logits = loaded.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        answer = range(len(context), len(whole))
        assert likelihood == pytest.approx(sum(logits[i - 1, whole[i]].item() for i in answer), abs=1e-4)
        assert greedy == all(logits[i - 1].argmax() == whole[i] for i in answer)


def test_likelihoods_are_those_of_lm_evals_own_wrapper(loaded):
    tokenizer = copy.deepcopy(loaded.tokenizer)
    own = HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=1, max_length=loaded.context)
    for (expected, greedy), found in zip(
        own.loglikelihood(requests(), disable_tqdm=True), harness(loaded, 300).loglikelihood(requests()), strict=True
    ):
        assert found == (pytest.approx(expected, abs=1e-4), greedy)


def test_no_batch_is_larger_than_asked_for_nor_much_smaller(loaded):
    sizes = []
    hook = loaded.model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    try:
        harness(loaded, 200).loglikelihood(requests(200))
    finally:
        hook.remove()
    assert max(rows * tokens for rows, tokens in sizes) <= 200
    assert all((rows + 1) * tokens > 200 for rows, tokens in sizes[:-1])  # one more of that length would not fit
    assert sum(rows for rows, _ in sizes) < 200  # answers of one token to one question cost one row


@pytest.mark.parametrize("lengths", [[], [9], [5, 5, 5], [30, 4, 4, 4, 1, 1, 1, 1, 1, 1, 1, 1]])
def test_batches_cover_every_request_once(lengths):
    ends = batch_ends(lengths, 10)
    starts = [end - size + 1 for end, size in ends.items()]
    assert [i for start, end in zip(starts, ends, strict=True) for i in range(start, end + 1)] == list(
        range(len(lengths))
    )
    assert all(lengths[start] * size <= 10 or size == 1 for start, size in zip(starts, ends.values(), strict=True))


def test_the_model_keeps_no_keys_and_the_tokenizer_stays_as_it_is(loaded):
    outputs = []
    assert loaded.tokenizer.pad_token is None
    hook = loaded.model.register_forward_hook(lambda module, args, output: outputs.append(output.past_key_values))
    try:
        harness(loaded, 300).loglikelihood(requests())
    finally:
        hook.remove()
    assert outputs
    assert set(outputs) == {None}
    assert loaded.tokenizer.pad_token is None


def test_answers_are_remembered(loaded, tmp_path):
    recall = Recall(tmp_path)
    first = harness(loaded, 300, recall).loglikelihood(requests())
    assert recall.num_recalled == 0
    assert harness(loaded, 300, recall).loglikelihood(requests()) == first
    assert recall.num_recalled == 1
    harness(loaded, 300, recall).loglikelihood(requests(20))
    assert recall.num_recalled == 1


def test_an_answer_longer_than_the_context(loaded):
    long = Instance("loglikelihood", {}, ("the", " of" * 200), 0)
    with pytest.raises(InputError, match="an answer has 200 tokens, more than the model's context of 128"):
        harness(loaded, 300).loglikelihood([long])


def test_rolling_likelihood_and_generation_work_and_say_nothing(loaded, capsys):
    """What other tasks of lm-eval ask for."""
    text = "the of and to" * 128
    model = harness(loaded, 300)
    (total,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    ids = [loaded.tokenizer.eos_token_id, *loaded.tokenizer(text)["input_ids"]]
    nll = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 128):
            window = torch.tensor(ids[start : start + 129])
            logits = loaded.model(window[None, :-1]).logits[0].double().log_softmax(-1)
            nll += sum(logits[i, token].item() for i, token in enumerate(window[1:]))
    assert (len(ids) - 1) // 128 > 1
    assert (len(ids) - 1) % 128 == 0  # lm-eval gives a last, shorter window more context
    assert total == pytest.approx(nll, rel=1e-5)
    request = Instance("generate_until", {}, ("the of", {"until": ["\n"], "max_gen_toks": 4}), 0)
    assert isinstance(model.generate_until([request], disable_tqdm=True)[0], str)
    assert "batch_size" not in capsys.readouterr().out


def test_bits_per_byte_are_those_of_lm_evals_wikitext(loaded, tmp_path):
    """Where both mean the same: a start of text, then windows that each predict what follows the one before."""
    page = "It was one of the towns of the river, and by then the people had left it." * 9
    num_tokens = len(loaded.tokenizer(page)["input_ids"])
    window = num_tokens // 9
    assert window * 9 == num_tokens  # no window of lm-eval's is shorter, and none of ours dropped
    folder = Path(lm_eval.tasks.__file__).parent / "wikitext"
    data = {"test": datasets.Dataset.from_list([{"page": page}])}
    own = {"task": "wikitext", "training_split": None, "validation_split": None, "custom_dataset": lambda **_: data}
    task = TaskManager(include_path=folder, include_defaults=False).load([{"group": "g", "task": [own]}])["tasks"]
    model = HarnessModel(replace(loaded, context=window), 300, NOT_RECALLED, show_nothing)
    expected = evaluate(model, {"tasks": task, "groups": {}, "group_map": {}}, bootstrap_iters=0)["results"]["wikitext"]

    (tmp_path / "page.txt").write_text("<|endoftext|>" + page, encoding="utf-8")
    texts = HeldOutTexts([], window + 1, window, str(tmp_path / "page.txt"), None)
    segments = texts.prepare(loaded.tokenizer, 320, 128)["text"].segments
    nll = mean_token_nll(loaded.model, segments.split(4), window).item()
    score = text_score(nll, len(page.encode()) / num_tokens)
    assert score.bits_per_byte == pytest.approx(expected["bits_per_byte,none"], rel=1e-4)
