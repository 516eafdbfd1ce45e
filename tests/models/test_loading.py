import json
import shutil
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import LlamaForCausalLM, MambaConfig

from cbq.errors import InputError
from cbq.models import loading
from cbq.models.loading import load_embedded, load_pretrained

REPO_FOLDER = "models--huggyllama--llama-7b"
COMMIT = "8416d3fefb0cb3ff5775a7b13c1692d10ff1aa16"
IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def folder(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "tiny"))


def cache_model(hub_cache: Path, model_folder: Path) -> Path:
    """Lay a model folder out as the hub's cache does; return the snapshot."""
    (hub_cache / REPO_FOLDER / "refs").mkdir(parents=True)
    (hub_cache / REPO_FOLDER / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(model_folder, hub_cache / REPO_FOLDER / "snapshots" / COMMIT))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_folder_gives_the_same_logits_as_transformers(tiny_llama_folder: Path, capfd: pytest.CaptureFixture) -> None:
    loaded = load_pretrained(str(tiny_llama_folder))
    assert "".join(capfd.readouterr()) == ""
    reference = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, reference(IDS).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config.use_cache  # a checkpoint made from it would generate slowly otherwise
    assert len(loaded.blocks) == 4
    assert (loaded.name, loaded.context, loaded.prompt) == (tiny_llama_folder.name, 128, "The")
    assert loaded.revision is None
    assert loaded.tokenizer.decode(loaded.tokenizer("Some text.")["input_ids"]) == "Some text."


def test_embedded_reads_the_package_folder(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    monkeypatch.setattr(loading, "embedded_folder", lambda name: tiny_llama_folder if name == "pico" else tmp_path)
    loaded = load_embedded()
    assert (loaded.name, loaded.prompt, len(loaded.blocks)) == ("pico", "    def __init__(self", 4)
    with pytest.raises(InputError, match="the package ships no model 'nano'"):
        load_embedded("nano")
    assert no_network == []


def test_embedded_folder_lies_in_the_package() -> None:
    assert loading.embedded_folder("pico") == Path(loading.__file__).parents[1] / "pico"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tiny_llama_folder: Path, dtype: str) -> None:
    loaded = load_pretrained(str(tiny_llama_folder), dtype=dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(("cuda", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_auto_dtype_is_the_checkpoints_only_on_a_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cuda: bool, expected: torch.dtype
) -> None:
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert load_pretrained(str(folder)).model.dtype == expected


def test_unknown_dtype(tiny_llama_folder: Path) -> None:
    with pytest.raises(InputError, match="dtype must be one of auto, float32, bfloat16, float16, got 'int8'"):
        load_pretrained(str(tiny_llama_folder), dtype="int8")


def test_tied_lm_head_is_not_missing(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    model = load_pretrained(str(folder)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_sharded_checkpoint(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    with torch.no_grad():
        assert torch.equal(load_pretrained(str(folder)).model(IDS).logits, model(IDS).logits)
    shards[1].unlink()
    with pytest.raises(InputError, match=f"lacks {shards[1].name}"):
        load_pretrained(str(folder))


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_tensors_where_there_are_no_safetensors(folder: Path, shards: int) -> None:
    """As in the repositories of OPT."""
    expected = load_pretrained(str(folder)).model(IDS).logits
    pickle_instead(folder)
    if shards > 1:
        shard_pickle(folder)
    assert torch.equal(load_pretrained(str(folder)).model(IDS).logits, expected)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_repository_without_safetensors_is_asked_for_its_pickles(
    hub_cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    pickle_instead(folder)
    if shards > 1:
        shard_pickle(folder)
    asked: list[list[str]] = []

    def download(repo_id: str, patterns: list[str], is_complete: Callable, revision: str | None = None) -> Path:
        asked.append(list(patterns))
        found = Path(shutil.copytree(folder, hub_cache / str(len(asked))))
        for file in found.iterdir():
            if not any(fnmatch(file.name, pattern) for pattern in patterns):
                file.unlink()
        return found

    monkeypatch.setattr(loading, "fetch_snapshot", download)
    assert len(load_pretrained("facebook/opt-125m").blocks) == 4
    assert ["pytorch_model*.bin" in patterns for patterns in asked] == [False, True]


def test_added_tokens_beyond_the_vocabulary(folder: Path) -> None:
    """As Gemma 3's, whose text model has no row for the image's token."""
    tokenizer = load_pretrained(str(folder)).tokenizer
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    loaded = load_pretrained(str(folder))
    assert max(loaded.tokenizer.get_vocab().values()) == loaded.model.config.vocab_size


def test_code_that_comes_with_a_model_is_run_where_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes of its own for configuration and model, which transformers cannot build without its code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    expected = load_pretrained(str(folder)).model(IDS).logits
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    own = 1\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(folder, auto_map=names, architectures=["OwnForCausalLM"])
    loaded = load_pretrained(str(folder), trust_remote_code=True)
    assert type(loaded.model).__name__ == "OwnForCausalLM"
    assert torch.equal(loaded.model(IDS).logits, expected)


def test_position_tables_of_old_checkpoints_are_ignored(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    load_pretrained(str(folder))


def test_masks_of_old_gpt2_checkpoints_are_ignored(folder: Path) -> None:
    """As the hub's gpt2 has them; transformers itself leaves out `attn.bias` alone."""
    model = tiny_model("gpt2")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    masks = {"attn.bias": torch.ones(1, 1, 64, 64).tril() > 0, "attn.masked_bias": torch.tensor(-1e4)}
    named = {f"transformer.h.{block}.{name}": mask.clone() for block in range(4) for name, mask in masks.items()}
    edit_weights(folder, lambda tensors: tensors.update(named))
    with torch.no_grad():
        assert torch.equal(load_pretrained(str(folder)).model(IDS).logits, model(IDS).logits)


# --- bad folders: each one is one line


def corrupt_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a safetensors file, but a long enough one")


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def pickle_instead(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shard_pickle(folder: Path) -> None:
    tensors = list(torch.load(folder / "pytorch_model.bin").items())
    (folder / "pytorch_model.bin").unlink()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for name, part in zip(names, (tensors[:9], tensors[9:]), strict=True):
        torch.save(dict(part), folder / name)
    weight_map = {key: names[index >= 9] for index, (key, _) in enumerate(tensors)}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


class Code:
    """What a pickle can do to whoever reads it."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("the code of a checkpoint was run",))


def code_instead(folder: Path) -> None:
    torch.save({"lm_head.weight": Code()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated_pickle(folder: Path) -> None:
    pickle_instead(folder)
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


def lose_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


DOWN = "model.layers.2.mlp.down_proj.weight"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "has a corrupt config.json"),
    "config of another kind": (lambda folder: (folder / "config.json").write_text("[1]"), "has a corrupt config.json"),
    "unknown model type": (lambda folder: edit_config(folder, model_type="foo"), "supported: llama"),
    "supported by transformers only": (
        lambda folder: (folder / "config.json").write_text(MambaConfig().to_json_string()),
        "model type 'mamba' is not supported; supported: llama",
    ),
    "quantized already": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantized already",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    "code among pickled weights": (code_instead, "pytorch_model.bin holds more than tensors, or is broken"),
    "truncated pickled weights": (truncated_pickle, "pytorch_model.bin holds more than tensors, or is broken"),
    "corrupt weights": (corrupt_header, "model.safetensors is not a safetensors file"),
    "truncated weights": (truncate, "model.safetensors is not a safetensors file, or a truncated one"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is not a safetensors file"),
    "missing parameter": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.pop(DOWN)),
        f"lacks parameters: {DOWN}",
    ),
    "missing lm_head that is not tied": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight")),
        "lacks parameters: lm_head.weight",
    ),
    "wrong shape": (
        lambda folder: edit_config(folder, intermediate_size=96),
        "has parameters of a wrong shape: .* and 9",
    ),
    "more blocks than the config says": (lambda folder: edit_config(folder, num_hidden_layers=3), "has no place for"),
    "no tokenizer": (lose_tokenizer, "has no tokenizer"),
    "corrupt tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer in .* cannot be read",
    ),
    "ids beyond the vocabulary": (
        lambda folder: edit_config(folder, vocab_size=300),
        "has ids up to 319, but the model's vocabulary has 300 ids",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder_is_one_line(folder: Path, case: str, capfd: pytest.CaptureFixture, no_network: list[str]) -> None:
    breaks, message = BAD_FOLDERS[case]
    breaks(folder)
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(str(folder))
    assert "\n" not in str(error.value)
    assert "".join(capfd.readouterr()) == ""
    assert no_network == []


# --- the hub


def test_hub_id_is_loaded_from_the_cache_without_network(
    hub_cache: Path, tiny_llama_folder: Path, no_network: list[str]
) -> None:
    cache_model(hub_cache, tiny_llama_folder)
    loaded = load_pretrained("huggyllama/llama-7b")
    assert loaded.name == "huggyllama/llama-7b"
    assert len(loaded.blocks) == 4
    assert loaded.revision == COMMIT  # of which main is another name
    assert load_pretrained("huggyllama/llama-7b", revision=COMMIT).revision == COMMIT
    assert no_network == []


def test_another_revision_than_the_cached_one_is_not_made_do_with(
    hub_cache: Path, tiny_llama_folder: Path, no_network: list[str]
) -> None:
    cache_model(hub_cache, tiny_llama_folder)
    with pytest.raises(InputError, match=r"huggyllama/llama-7b at 0{40} is not in the local hub cache"):
        load_pretrained("huggyllama/llama-7b", revision="0" * 40)


def test_hub_id_that_is_not_cached_fails_fast(hub_cache: Path, no_network: list[str]) -> None:
    start = time.perf_counter()
    with pytest.raises(
        InputError, match=r"huggyllama/llama-7b is not in the local hub cache .* cannot be reached"
    ) as error:
        load_pretrained("huggyllama/llama-7b")
    assert time.perf_counter() - start < 5
    assert "\n" not in str(error.value)
    assert len(no_network) <= 2  # one question, no retries


def test_hub_that_never_answers_fails_fast(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: time.sleep(30))
    start = time.perf_counter()
    with pytest.raises(InputError, match="no answer in 4 seconds"):
        load_pretrained("huggyllama/llama-7b")
    assert time.perf_counter() - start < 5


def test_interrupted_download_is_not_taken_for_the_model(
    hub_cache: Path, tiny_llama_folder: Path, no_network: list[str]
) -> None:
    (cache_model(hub_cache, tiny_llama_folder) / "model.safetensors").unlink()
    with pytest.raises(InputError, match="is not in the local hub cache"):
        load_pretrained("huggyllama/llama-7b")


LOCAL_PATHS = [
    "~nosuchuser/x",
    "/no/such/folder",
    "./absent",
    "../absent",
    "~/absent-folder",
    "a/b/c",
    "existing/absent",
]


@pytest.mark.parametrize("path", LOCAL_PATHS)
def test_local_path_that_is_no_folder_never_asks_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing").mkdir()
    with pytest.raises(InputError, match=f"'{path}' is not a folder"):
        load_pretrained(path)
    assert no_network == []


@pytest.mark.parametrize("path", ["", None, 5], ids=repr)
def test_a_path_is_a_text(path: object) -> None:
    with pytest.raises(InputError, match=r"model\.path must be a text"):
        load_pretrained(path)


def test_file_instead_of_a_folder(tiny_llama_folder: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        load_pretrained(str(tiny_llama_folder / "config.json"))


def test_malformed_hub_id(no_network: list[str]) -> None:
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        load_pretrained("no spaces/in-an-id")
    assert no_network == []
