"""What is measured together, and how it is asked for."""

import inspect
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from cbq.cli.options import conf_dir
from cbq.data.corpora import C4, Embedded, TextFile, WikiText2
from cbq.errors import InputError
from cbq.evaluation.evaluation import Evaluation, Scores
from cbq.evaluation.perplexity import text_score
from cbq.models.loading import LoadedModel, load_pretrained

PAPER = ["piqa", "hellaswag", "arc_easy", "arc_challenge", "mutual", "ethics"]


@pytest.fixture
def loaded(tiny_llama_folder: Path) -> LoadedModel:
    return load_pretrained(str(tiny_llama_folder))


@pytest.fixture
def text(tmp_path: Path, tiny_text_file: Path) -> str:
    (tmp_path / "short.txt").write_text(tiny_text_file.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return str(tmp_path / "short.txt")


@pytest.mark.parametrize(
    ("choice", "overrides", "corpora", "segment_tokens", "tasks"),
    [
        ("none", [], [], 2048, []),
        ("perplexity", [], [WikiText2(), C4()], 2048, []),
        ("perplexity", ["evaluation.data_dir=d", "evaluation.corpora=[c4]"], [C4("d")], 2048, []),
        ("perplexity", ["evaluation.corpora=c4", "evaluation.tasks=winogrande"], [C4()], 2048, ["winogrande"]),
        ("embedded", [], [Embedded()], 512, []),
        ("embedded", ["evaluation.text_path=a.txt", "evaluation.segment_tokens=64"], [TextFile("a.txt")], 64, []),
        ("zero_shot", [], [], 2048, PAPER),
        ("full", [], [WikiText2(), C4()], 2048, PAPER),
    ],
)
def test_config_choices(choice, overrides, corpora, segment_tokens, tasks):
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = compose(overrides=[f"+evaluation={choice}", *overrides]).evaluation
    assert set(config) - {"_target_"} == set(inspect.signature(Evaluation).parameters)
    evaluation = instantiate(config, _convert_="all")
    assert evaluation.held_out.corpora == corpora
    assert evaluation.held_out.segment_tokens == segment_tokens
    assert evaluation.task_options["names"] == tasks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, r"evaluation\.batch_tokens must be an integer of at least 1, got 0"),
        ({"limit": 0}, r"evaluation\.limit must be an integer of at least 1, got 0"),
        ({"limit": 2.5}, r"evaluation\.limit must be an integer of at least 1, got 2.5"),
        ({"stride": 0}, r"evaluation\.stride must be an integer of at least 1, got 0"),
        ({"agreement_tokens": -1}, r"evaluation\.agreement_tokens must be an integer of at least 1, got -1"),
        ({"tasks": 5}, r"evaluation\.tasks must be a list of names, got 5"),
        ({"tasks": ["piqa", None]}, r"evaluation\.tasks must be a list of names"),
        ({"baselines": "no"}, r"evaluation\.baselines must be true or false"),
        ({"cache_dir": 3}, r"evaluation\.cache_dir must be a text or null"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        Evaluation(corpora=[], segment_tokens=64, **options)


def test_full_precision_is_measured_once(loaded, text, tmp_path, monkeypatch):
    """The second run of the same finds the score; another model, text or length does not."""
    options = {"corpora": [], "text_path": text, "cache_dir": str(tmp_path / "cache")}

    def score(segment_tokens: int = 64) -> tuple[float, int]:
        evaluation = Evaluation(segment_tokens=segment_tokens, **options)
        evaluation.prepare(loaded)
        scores = evaluation.score(loaded, evaluation.recall)
        return scores.texts["text"].nll, evaluation.recall.num_recalled

    first, recalled = score()
    assert recalled == 0
    assert score() == (first, 1)
    assert score(segment_tokens=32)[1] == 0
    loaded.model.lm_head.weight.data[0, 0] += 1
    changed, recalled = score()
    assert recalled == 0
    assert changed != first


def test_the_quantized_model_is_never_taken_from_memory(loaded, text, tmp_path):
    evaluation = Evaluation([], 64, text_path=text, cache_dir=str(tmp_path / "cache"))
    evaluation.prepare(loaded)
    first = evaluation.score(loaded, evaluation.recall).texts["text"].nll
    loaded.model.model.layers[0].mlp.down_proj.weight.data.mul_(0.5)
    assert evaluation.score(loaded).texts["text"].nll != first


@pytest.mark.parametrize("options", [{"baselines": False}, {"text_path": None}, {"cache_dir": None}])
def test_a_model_is_only_hashed_where_scores_are_remembered(loaded, text, tmp_path, monkeypatch, options):
    monkeypatch.setattr("cbq.evaluation.evaluation.fingerprint", lambda model: pytest.fail("hashed"))
    options = {"text_path": text, "cache_dir": str(tmp_path)} | options
    Evaluation([], 64, **options).prepare(loaded)


def test_what_is_remembered_of_another_version_is_forgotten(loaded, text, tmp_path, monkeypatch):
    def recalled() -> int:
        evaluation = Evaluation([], 64, text_path=text, cache_dir=str(tmp_path))
        evaluation.prepare(loaded)
        evaluation.score(loaded, evaluation.recall)
        return evaluation.recall.num_recalled

    assert [recalled(), recalled()] == [0, 1]
    monkeypatch.setattr("cbq.evaluation.evaluation.PROTOCOL_VERSION", "2")
    assert recalled() == 0


def test_batches_hold_no_more_tokens_than_asked_for(loaded, text):
    sizes = []
    loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    evaluation = Evaluation([], 32, text_path=text, batch_tokens=100)
    evaluation.prepare(loaded)
    evaluation.score_texts(loaded)
    assert max(sizes) == 96
    sizes.clear()
    evaluation.batch_tokens = 1  # less than a segment: one at a time
    evaluation.score_texts(loaded)
    assert set(sizes) == {32}


def test_agreement_is_of_whole_segments_and_no_more_than_asked_for(loaded, text):
    evaluation = Evaluation([], 32, text_path=text, agreement_tokens=100)
    evaluation.prepare(loaded)
    references = evaluation.remember(loaded)
    assert references["text"].segments.shape == (3, 32)
    assert evaluation.agreement(loaded, references)["text"].num_tokens == 96
    assert Evaluation([], 32, text_path=text, agreement_tokens=0).remember(loaded) == {}


def test_results_are_plain_and_say_what_was_not_measured(loaded, text):
    evaluation = Evaluation([], 32, text_path=text)
    evaluation.prepare(loaded)
    quantized = Scores({"text": text_score(2.0, 4.0)})
    results = evaluation.results(None, None, quantized, evaluation.agreement(loaded, evaluation.remember(loaded)))
    assert json.loads(json.dumps(results)) == results
    assert results["perplexity"]["text"]["full_precision"] is None
    assert results["perplexity"]["text"]["quantized"] == pytest.approx(7.389, rel=1e-4)
    assert results["bits_per_byte"]["text"]["quantized"] == pytest.approx(0.7213, rel=1e-3)
    assert results["zero_shot"] == {}
    assert results["agreement"]["text"]["top1"] == 1.0
