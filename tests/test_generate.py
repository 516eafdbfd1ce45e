"""A prompt continued."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM

from cbq.checkpoint import load_checkpoint, save_checkpoint
from cbq.cli import conf_dir
from cbq.cli.commands import COMMANDS
from cbq.errors import InputError
from cbq.generate import Generate
from cbq.models.loading import load_pretrained
from cbq.models.streaming import stream_text
from cbq.quant.linear import fuse_linears_
from cbq.quant.scheme import QuantScheme
from cbq.quantized import make_quantizable_

PROMPT = "The statement"


@pytest.fixture(scope="module")
def run_folder(tiny_llama_folder, tmp_path_factory):
    """The folder of a run: its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    loaded = load_pretrained(str(tiny_llama_folder))
    make_quantizable_(loaded.model, loaded.blocks, QuantScheme(4, 16))
    fuse_linears_(loaded.blocks)
    save_checkpoint(loaded.model, loaded.tokenizer, folder / "checkpoint")
    return folder


def test_streamed_text_is_what_generate_gives(tiny_llama_folder):
    loaded = load_pretrained(str(tiny_llama_folder))
    pieces = list(stream_text(loaded, PROMPT, max_tokens=12))
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    output = plain.generate(ids, max_new_tokens=12, do_sample=False, no_repeat_ngram_size=3, pad_token_id=0)
    expected = loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(pieces) == 12 + 1, "a piece a token, and the end"
    assert "".join(pieces).strip("\N{REPLACEMENT CHARACTER}") == expected.strip("\N{REPLACEMENT CHARACTER}")


def test_a_seed_repeats_a_sample(tiny_llama_folder):
    loaded = load_pretrained(str(tiny_llama_folder))
    first, again, other = ("".join(stream_text(loaded, PROMPT, 12, 1.0, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_prompt_that_does_not_fit(tiny_llama_folder):
    loaded = load_pretrained(str(tiny_llama_folder))
    for prompt, max_tokens in ((PROMPT, 128), (PROMPT * 100, 4)):
        with pytest.raises(InputError, match="fit the model's context of 128"):
            list(stream_text(loaded, prompt, max_tokens))


def test_both_models_beside_each_other(run_folder, tiny_llama_folder, capsys):
    base = load_pretrained(str(tiny_llama_folder))
    texts = Generate(str(run_folder), PROMPT, max_tokens=6, compare=True, load_base=lambda: base).run()
    assert texts["full precision"] == "".join(stream_text(base, PROMPT, 6))
    quantized = load_checkpoint(run_folder / "checkpoint")
    assert texts["quantized"] == "".join(stream_text(quantized, PROMPT, 6))
    output = capsys.readouterr().out
    assert "full precision (" in output
    assert "tokens/s)" in output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": ""}, "prompt must be a text"),
        ({"max_tokens": 0}, "max_tokens must be a number of at least 1"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-30}, "temperature must be 0, or at least 0.001"),
        ({"compare": "no"}, "compare must be true or false"),
        ({"compare": True}, "config.yaml names the model"),
        ({"checkpoint": "/no/folder"}, "neither a checkpoint of cbq nor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_out_of_range(run_folder, options, said):
    with pytest.raises(InputError, match=said):
        Generate(**{"checkpoint": str(run_folder), "prompt": PROMPT} | options)


def test_a_whole_number_is_a_temperature(run_folder):
    whole, real = (Generate(str(run_folder), PROMPT, max_tokens=12, temperature=each).run() for each in (8, 8.0))
    assert whole["quantized"] == real["quantized"] != ""


def test_a_failure_of_the_writing_thread_is_raised_and_not_waited_for(tiny_llama_folder, monkeypatch):
    loaded = load_pretrained(str(tiny_llama_folder))
    monkeypatch.setattr(loaded.model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream_text(loaded, "def"))


@pytest.mark.parametrize(
    "prompt", ["it's", "a\\b c\\\\d", "ends with \\", "'quoted' start", '"double" start', "costs ${x} y", "a=b, [c]"]
)
def test_prompts_come_through_the_command_line_as_they_are(prompt):
    (word,) = COMMANDS["generate"].overrides([f"prompt={prompt}"])
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        assert compose("generate", overrides=["checkpoint=x", word]).prompt == prompt
