import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cbq.evaluation.recall import Recall, fingerprint, hash_tokens


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )


def counted(calls: list, value: object):
    return lambda: calls.append(1) or value


def test_computes_once(tmp_path):
    calls = []
    for _ in range(2):
        assert Recall(tmp_path, ["model"])(["text"], counted(calls, [1.5, True])) == [1.5, True]
    assert len(calls) == 1
    Recall(tmp_path, ["model"])(["other"], counted(calls, 1))
    Recall(tmp_path, ["other"])(["text"], counted(calls, 1))
    assert len(calls) == 3


def test_numbers_come_back_to_the_bit(tmp_path):
    value = [0.1 + 0.2, -1e-300, 1 / 3]
    recall = Recall(tmp_path)
    assert recall(["a"], lambda: value) == recall(["a"], lambda: None) == value
    recall(["b"], lambda: math.nan)
    assert math.isnan(recall(["b"], lambda: 0.0))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"key": ["of", "another"], "result": 5}', '{"key": ["a"]}', "\xff"]
)
def test_a_damaged_file_is_made_anew(tmp_path, content):
    recall = Recall(tmp_path)
    recall(["a"], lambda: 1)
    (file,) = tmp_path.iterdir()
    file.write_text(content, encoding="latin-1")
    assert recall(["a"], lambda: 2) == 2
    assert json.loads(file.read_text())["result"] == 2


def test_a_folder_that_cannot_be_written_to_only_makes_it_slower(tmp_path):
    (tmp_path / "file").write_text("")
    assert Recall(tmp_path / "file")(["a"], lambda: 1) == 1


def test_no_folder_remembers_nothing():
    recall = Recall(None)
    assert [recall(["a"], lambda value=value: value) for value in (1, 2)] == [1, 2]


def test_fingerprint_changes_with_anything_that_changes_the_model():
    first = fingerprint(tiny())
    assert fingerprint(tiny()) == first
    model = tiny()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1e-7
    assert fingerprint(model) != first
    assert fingerprint(tiny().to(torch.bfloat16)) != first
    model = tiny()
    model.config.rms_norm_eps *= 2
    assert fingerprint(model) != first
    model = tiny()
    model.config._name_or_path = "/elsewhere"
    assert fingerprint(model) == first


def test_hash_of_tokens_knows_where_one_ends():
    one, two = torch.tensor([1, 2]), torch.tensor([3])
    hashes = {
        hash_tokens(parts) for parts in ([one, two], [two, one], [torch.tensor([1]), torch.tensor([2, 3])], [one])
    }
    assert len(hashes) == 4
