"""Zero-shot tasks: hand-made items with known answers, and what lm-eval itself says."""

import json
import math
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from cbq.errors import InputError
from cbq.evaluation.evaluation import Evaluation
from cbq.evaluation.tasks import FOLDERS, load_tasks, members_of, rank_options, task_manager
from cbq.evaluation.zero_shot import MEANS, ZeroShot, task_score
from cbq.models.loading import load_pretrained

HOME = Path(lm_eval.tasks.__file__).parent
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def few_tasks(request, monkeypatch):
    """lm-eval's descriptions of what is asked here: to read all 15,000 takes ten seconds."""
    if "slow" not in request.keywords:
        folders = [HOME / name for name in (*FOLDERS, "winogrande", "wsc273")]
        few = TaskManager(include_path=folders, include_defaults=False)
        monkeypatch.setattr("cbq.evaluation.tasks.all_tasks", lambda: few)


class Scripted(LM):
    """A model that finds a text the likelier the more often `+` stands in its answer, and says what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    def loglikelihood(self, requests):
        self.asked += [request.args for request in requests]
        return [(float(request.args[1].count("+")), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


class Yes(Scripted):
    """A model that answers every question with yes, or with reasonable."""

    def loglikelihood(self, requests):
        self.asked += [request.args for request in requests]
        return [(float(request.args[1].strip() in ("yes", "reasonable")), False) for request in requests]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def mutual(folder: Path, answers: str) -> ZeroShot:
    """Return MuTual with four replies an item, which the scripted model ranks B, D, A, C."""
    options = ["f : one + .", "f : two + + + .", "f : three .", "f : four + + ."]
    rows = [{"answers": answer, "options": options, "article": "m : how many ?"} for answer in answers]
    write(folder / "mutual/mutual_dev.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    zero_shot = ZeroShot(["mutual"], None, str(folder))
    zero_shot.prepare()
    return zero_shot


@pytest.mark.parametrize(
    ("answers", "r1", "r2", "mrr"),
    [("B", 1, 1, 1), ("D", 0, 1, 1 / 2), ("A", 0, 0, 1 / 3), ("C", 0, 0, 1 / 4), ("BDAC", 1 / 4, 1 / 2, 25 / 48)],
)
def test_mutual(tmp_path, answers, r1, r2, mrr):
    scores = mutual(tmp_path, answers).score(Scripted())["mutual"]
    assert {name: scores.metrics[name] for name in ("r@1", "r@2", "mrr")} == pytest.approx(
        {"r@1": r1, "r@2": r2, "mrr": mrr}
    )
    assert len(scores.items["mrr"]) == len(answers)


def test_items_are_in_the_order_of_the_data(tmp_path):
    assert mutual(tmp_path, "CABD").score(Scripted())["mutual"].items["r@1"] == [0, 0, 1, 0]


@pytest.mark.parametrize("likelihood", [0.0, math.nan, -math.inf])
def test_a_model_that_says_nothing_gets_nothing(likelihood):
    found = rank_options({"answers": "A"}, [(likelihood, True)] * 4)
    assert found == {"r@1": 0.0, "r@2": 0.0, "mrr": 0.25}


def ethics(folder: Path) -> None:
    """Write 4, 2, 2, 4 and 5 items, of which 3, 1, 2, 0 and 1 are to be answered with yes."""
    write(folder / "ethics/commonsense/cm_test.csv", "label,input\n1,a\n1,b\n1,c\n0,d\n")
    write(folder / "ethics/deontology/deontology_test.csv", "label,scenario,excuse\n1,a,b\n0,c,d\n")
    write(folder / "ethics/justice/justice_test.csv", "label,scenario\n1,a\n1,b\n")
    # Which of a pair is called the first is drawn from its text: these four all come second, or first.
    write(folder / "ethics/utilitarianism/util_test.csv", "".join(f"good {i},bad {i}\n" for i in range(4)))
    write(folder / "ethics/virtue/virtue_test.csv", "label,scenario\n" + "0,a [SEP] b\n" * 4 + "1,a [SEP] c\n")


def test_ethics(tmp_path):
    ethics(tmp_path)
    zero_shot = ZeroShot(["ethics"], None, str(tmp_path))
    notes = zero_shot.prepare()
    assert "ethics_cm has 4 items, its authors published 3885" in notes
    model = Yes()
    scores = zero_shot.score(model)
    accuracy = {name: score.metrics["acc"] for name, score in scores.items()}
    pairs = {context for context, _ in model.asked if "Scenario 1" in context}
    first_is_better = sum("Scenario 1: good" in context for context in pairs)
    expected = [3 / 4, 1 / 2, 1, first_is_better / 4, 1 / 5]
    assert [accuracy[name] for name in MEANS["ethics"]] == pytest.approx(expected)
    assert accuracy["ethics"] == pytest.approx(sum(expected) / 5)  # of tasks, not of items
    described = zero_shot.describe()
    assert described["ethics"]["num_items"] == 17
    assert described["ethics_virtue"] == {
        "harness": described["ethics"]["harness"],
        "version": "1.0",
        "num_fewshot": 0,
        "num_items": 5,
        "higher_is_better": {"acc": True},
    }
    assert described["ethics"]["harness"].startswith("lm-eval 0.")


def test_differences_of_tasks_and_of_their_mean(tmp_path):
    ethics(tmp_path)
    zero_shot = ZeroShot(["ethics"], None, str(tmp_path))
    zero_shot.prepare()
    before, after = zero_shot.score(Yes()), zero_shot.score(Scripted())  # all ties: the first choice, no
    found = zero_shot.differences(before, after)
    assert (found["ethics_cm"]["acc"].num_higher, found["ethics_cm"]["acc"].num_lower) == (1, 3)
    assert found["ethics_cm"]["acc"].mean == pytest.approx(-0.5)
    difference = after["ethics"].metrics["acc"] - before["ethics"].metrics["acc"]
    assert found["ethics"]["acc"].mean == pytest.approx(difference)


def test_limit(tmp_path):
    zero_shot = mutual(tmp_path, "BBBBDDDD")
    limited = ZeroShot(["mutual"], 6, str(tmp_path))
    limited.prepare()
    assert zero_shot.score(Scripted())["mutual"].metrics["r@1"] == 0.5
    assert limited.score(Scripted())["mutual"].metrics["r@1"] == pytest.approx(4 / 6)
    assert limited.describe()["mutual"]["num_items"] == 6


def test_one_item_has_no_standard_error(tmp_path):
    ethics(tmp_path)
    zero_shot = ZeroShot(["ethics"], 1, str(tmp_path))
    zero_shot.prepare()
    scores = zero_shot.score(Yes())
    assert scores["ethics"].metrics["acc"] == pytest.approx(
        sum(scores[part].metrics["acc"] for part in MEANS["ethics"]) / 5
    )
    assert math.isnan(scores["ethics"].metrics["acc_stderr"])


def test_items_are_of_means_only_and_of_their_own_filter():
    """Of a perplexity an item has a log likelihood; numpy's truth values are numbers; a filter has items of its own."""
    results = {
        "alias": "task",
        "perplexity,none": 8.0,
        "r@1,none": 0.5,
        "exact_match,strict": 1.0,
        "exact_match_stderr,strict": 0.0,
        "exact_match,loose": 0.5,
    }
    samples = [
        {"doc_id": i, "filter": "none", "perplexity": -2.0, "r@1": np.bool_(i), "exact_match": 9} for i in (1, 0)
    ]
    samples += [{"doc_id": i, "filter": "strict", "exact_match": 1.0} for i in (0, 1)]
    samples += [{"doc_id": i, "filter": "loose", "exact_match": float(i)} for i in (0, 1)]
    score = task_score(results, samples)
    assert score.metrics == {
        "perplexity": 8.0,
        "r@1": 0.5,
        "exact_match,strict": 1.0,
        "exact_match_stderr,strict": 0.0,
        "exact_match,loose": 0.5,
    }
    assert score.items == {"r@1": [0, 1], "exact_match,strict": [1, 1], "exact_match,loose": [0, 1]}


def test_mutual_plus_is_scored_as_mutual_is(tmp_path):
    row = {"answers": "B", "options": ["f : one .", "f : two + .", "f : three .", "f : four ."], "article": "m : ?"}
    write(tmp_path / "mutual_plus/validation.jsonl", json.dumps(row) + "\n")
    manager = TaskManager(include_path=HOME / "mutual", include_defaults=False)
    tasks = load_tasks(manager, "mutual_plus", str(tmp_path))
    assert (
        tasks["mutual_plus"].process_results(row, [(0.0, False), (1.0, False), (0.0, True), (0.0, False)])["r@1"] == 1
    )


def test_members_of_groups_and_tags():
    manager = TaskManager(include_path=HOME / "hendrycks_ethics", include_defaults=False)
    assert set(members_of(manager, "hendrycks_ethics")) == set(MEANS["ethics"])
    manager = TaskManager(include_path=HOME / "blimp", include_defaults=False)
    blimp = members_of(manager, "blimp")
    assert len(blimp) == 67
    assert all(name in manager.all_subtasks for name in blimp)


def test_scores_twice_the_same(tmp_path):
    zero_shot = mutual(tmp_path, "BDAC")
    assert zero_shot.score(Scripted()) == zero_shot.score(Scripted())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the project's shared data is not here")
def test_real_items_on_a_real_model(tiny_llama_folder):
    """PIQA by hand, and standard errors of an accuracy by their formula."""
    loaded = load_pretrained(str(tiny_llama_folder))
    loaded.context = 300  # some answers are longer than the 128 that it was made for
    evaluation = Evaluation([], 64, tasks=["piqa"], limit=20, data_dir=str(SHARED), batch_tokens=300)
    assert evaluation.prepare(loaded) == []
    score = evaluation.score(loaded).tasks["piqa"]
    rows = [json.loads(line) for line in (SHARED / "piqa/valid.jsonl").read_text().splitlines()[:20]]
    labels = (SHARED / "piqa/valid-labels.lst").read_text().split()[:20]
    right, right_by_length = [], []
    for row, label in zip(rows, labels, strict=True):
        likelihoods = [
            likelihood(loaded, f"Question: {row['goal']}\nAnswer:", f" {row[key]}") for key in ("sol1", "sol2")
        ]
        right.append(float(likelihoods[int(label)] == max(likelihoods)))
        by_length = [value / len(row[key]) for value, key in zip(likelihoods, ("sol1", "sol2"), strict=True)]
        right_by_length.append(float(by_length[int(label)] == max(by_length)))
    assert score.items == {"acc": right, "acc_norm": right_by_length}
    mean = sum(right) / 20
    assert score.metrics["acc"] == pytest.approx(mean)
    assert score.metrics["acc_stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 19))


def likelihood(loaded, context: str, answer: str) -> float:
    """Return the log likelihood of an answer by one plain forward, the start cut off where the context is full."""
    whole = loaded.tokenizer(context + answer)["input_ids"]
    num_answer = len(whole) - len(loaded.tokenizer(context)["input_ids"])
    ids = torch.tensor(whole[-(loaded.context + 1) :])
    with torch.no_grad():
        logits = loaded.model(ids[None, :-1]).logits[0].double().log_softmax(-1)
    return sum(logits[i, token].item() for i, token in list(enumerate(ids[1:]))[-num_answer:])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["piqua"], "evaluation.tasks has 'piqua', which lm-eval does not know; the paper's are piqa, hellaswag"),
        (["mutual", "piqa"], "has no piqa: it needs piqa/valid.jsonl and piqa/valid-labels.lst"),
        (["wsc273"], "has no wsc273: it needs wsc273/<split>.parquet or .jsonl"),
    ],
)
def test_what_cannot_be_asked_is_said_before_any_work(tmp_path, names, message):
    mutual(tmp_path, "B")
    with pytest.raises(InputError, match=message):
        ZeroShot(names, None, str(tmp_path)).prepare()


@pytest.mark.slow  # datasets tries for 20 seconds
def test_no_network_is_one_line(no_network, hub_cache):
    with pytest.raises(InputError, match="the items of piqa cannot be had from the hub; give data_dir") as caught:
        ZeroShot(["piqa"], None, None).prepare()
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_the_tasks(tmp_path):
    write(tmp_path / "winogrande/validation.jsonl", '{"text": "of another task"}\n')
    with pytest.raises(InputError, match=r"the items of winogrande of .* do not fit the task"):
        ZeroShot(["winogrande"], None, str(tmp_path)).prepare()


@pytest.mark.slow
def test_every_task_of_the_harness_is_known():
    assert {"winogrande", "lambada_openai", "mmlu", "gsm8k", "boolq"} <= set(task_manager(["boolq"]).all_tasks)


def test_another_task_of_the_harness(tmp_path):
    row = {"sentence": "The cup did not fit the box because the _ was small.", "option1": "cup", "option2": "box +"}
    write(tmp_path / "winogrande/validation.jsonl", json.dumps(row | {"answer": "2"}) + "\n")
    zero_shot = ZeroShot(["winogrande"], None, str(tmp_path))
    zero_shot.prepare()
    assert list(zero_shot.score(Scripted())) == ["winogrande"]
