"""Ways to break a model folder and a checkpoint of cbq, each a function of the folder, by name."""

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Breaker = Callable[[Path], object]
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
QUANTIZED = "cbq/quantized.safetensors"
TEXTS = {
    "empty": b"",
    "an empty object": b"{}",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "no UTF-8": b"\xff\xfe\x00{",
    "nested deeply": b"[" * 100_000,
    "no JSON": b"{'a': 1}",
}
ODD_VALUES = (None, "x", -1, 0, 10**9, 10**30, 1.5, float("nan"), [], {}, [1], {"a": 1}, True, "../../x")


def write(file: str, content: bytes, folder: Path) -> None:
    (folder / file).write_bytes(content)


def remove(file: str, folder: Path) -> None:
    (folder / file).unlink()


def truncate(file: str, share: float, folder: Path) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(len(content) * share)])


def to_folder(file: str, folder: Path) -> None:
    (folder / file).unlink()
    (folder / file).mkdir()


def link(file: str, target: str, folder: Path) -> None:
    (folder / file).unlink()
    (folder / file).symlink_to(target)


def edit_json(file: str, change: Callable[[dict], object], folder: Path) -> None:
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    change(content)
    (folder / file).write_text(json.dumps(content), encoding="utf-8")


def set_value(file: str, key: str, value: object, folder: Path) -> None:
    edit_json(file, lambda content: content.update({key: value}), folder)


def drop_key(file: str, key: str, folder: Path) -> None:
    edit_json(file, lambda content: content.pop(key), folder)


def flip_bit(file: str, seed: int, last: float, folder: Path) -> None:
    """Flip one bit somewhere in the first `last` share of a file; of safetensors: 0 is the header."""
    content = bytearray((folder / file).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little") if file.endswith(".safetensors") else len(content)
    first, stop = (0, header) if not last else (header if header < len(content) else 0, int(len(content) * last))
    generator = random.Random(seed)
    content[generator.randrange(first, max(stop, first + 1))] ^= 1 << generator.randrange(8)
    (folder / file).write_bytes(content)


def edit_tensors(file: str, change: Callable[[dict[str, torch.Tensor], dict], object], folder: Path) -> None:
    with safe_open(folder / file, "pt") as stored:
        metadata = stored.metadata()
    metadata.pop("digest", None)  # what whoever writes a file on purpose computes anew
    tensors = load_file(folder / file)
    change(tensors, metadata)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / file, {key: value for key, value in metadata.items() if value is not None})


def edit_header(file: str, change: Callable[[dict], object], folder: Path) -> None:
    content = (folder / file).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    packed = json.dumps(header).encode()
    (folder / file).write_bytes(struct.pack("<Q", len(packed)) + packed + content[8 + length :])


def shard(folder: Path) -> dict[str, str]:
    """Split the weights into two files with an index; return its weight map."""
    tensors = list(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, part in zip(names, (tensors[:9], tensors[9:]), strict=True):
        save_file(dict(part), folder / name, {"format": "pt"})
    return {key: names[number >= 9] for number, (key, _) in enumerate(tensors)}


def index(change: Callable[[dict], object], folder: Path) -> None:
    """Shard the weights, under an index that is not right."""
    content = {"metadata": {"total_size": 1}, "weight_map": shard(folder)}
    content = change(content) or content
    (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def map_all(value: object, content: dict) -> None:
    content["weight_map"] = dict.fromkeys(content["weight_map"], value)


def map_one(value: object, content: dict, key: str = "lm_head.weight") -> None:
    content["weight_map"][key] = value


INDEXES: dict[str, Callable[[dict], object]] = {
    "names itself": partial(map_all, INDEX),
    "names one file twice removed": partial(map_one, "model-00003-of-00002.safetensors"),
    "names a folder": partial(map_one, "."),
    "names the folder above": partial(map_one, ".."),
    "names nothing": partial(map_one, ""),
    "names a number": partial(map_one, 5),
    "names null": partial(map_one, None),
    "names a list": partial(map_one, ["model-00001-of-00002.safetensors"]),
    "names the tokenizer": partial(map_one, "tokenizer.json"),
    "names a NUL": partial(map_one, "model\0.safetensors"),
    "names a long name": partial(map_one, "x" * 400),
    "is empty": lambda content: content["weight_map"].clear(),
    "has a list for a map": lambda content: content.update(weight_map=[]),
    "has a text for a map": lambda content: content.update(weight_map="model.safetensors"),
    "lacks the map": lambda content: content.pop("weight_map") and None,
    "lacks the metadata": lambda content: content.pop("metadata") and None,
    "lacks a parameter": lambda content: content["weight_map"].pop("lm_head.weight") and None,
    "has a parameter too many": lambda content: content["weight_map"].update(
        nothing=min(content["weight_map"].values())
    ),
    "names the wrong file": lambda content: content["weight_map"].update(
        {key: max(content["weight_map"].values()) for key in content["weight_map"]}
    ),
    "is a list": lambda content: "[]",
    "is no JSON": lambda content: "{",
    "is nested deeply": lambda content: "[" * 100_000,
    "is empty text": lambda content: "",
}

NAME = "model.layers.1.mlp.down_proj.weight"
TENSORS: dict[str, Callable[[dict[str, torch.Tensor], dict], object]] = {
    "a parameter missing": lambda t, m: t.pop(NAME),
    "all parameters missing": lambda t, m: t.clear() or t.update(x=torch.zeros(1)),
    "a parameter transposed": lambda t, m: t.update({NAME: t[NAME].T}),
    "a parameter flat": lambda t, m: t.update({NAME: t[NAME].flatten()}),
    "a parameter empty": lambda t, m: t.update({NAME: torch.zeros(0, 0)}),
    "a parameter of no dimension": lambda t, m: t.update({NAME: torch.zeros(())}),
    "a parameter too small": lambda t, m: t.update({NAME: t[NAME][:-1]}),
    "a block too many": lambda t, m: t.update({NAME.replace(".1.", ".9."): t[NAME]}),
    "integers": lambda t, m: t.update({NAME: t[NAME].to(torch.int32)}),
    "truth values": lambda t, m: t.update({NAME: t[NAME] > 0}),
    "complex numbers": lambda t, m: t.update({NAME: t[NAME].to(torch.complex64)}),
    "bytes": lambda t, m: t.update({NAME: t[NAME].to(torch.uint8)}),
    "eight bits": lambda t, m: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)}),
    "a NaN": lambda t, m: t[NAME][0, 0].fill_(float("nan")),
    "an infinity": lambda t, m: t["lm_head.weight"][0, 0].fill_(float("inf")),
    "another framework": lambda t, m: m.update(format="flax"),
    "no format": lambda t, m: m.pop("format", None),
}


def header_entry(field: str, value: object) -> Callable[[dict], object]:
    def change(header: dict) -> None:
        header[NAME][field] = value

    return change


HEADERS: dict[str, Callable[[dict], object]] = {
    "a huge shape": header_entry("shape", [10**6, 10**9]),
    "a negative shape": header_entry("shape", [-1, 64]),
    "an overflowing shape": header_entry("shape", [2**62, 2**62]),
    "offsets backwards": header_entry("data_offsets", [100, 0]),
    "offsets beyond the end": header_entry("data_offsets", [0, 10**15]),
    "overlapping offsets": header_entry("data_offsets", [0, 32768]),
    "an unknown dtype": header_entry("dtype", "F99"),
    "another dtype": header_entry("dtype", "F64"),
    "a shape of text": header_entry("shape", "64"),
    "no shape": lambda header: header[NAME].pop("shape"),
    "metadata of numbers": lambda header: header.update(__metadata__={"format": 1}),
    "no tensors": lambda header: [header.pop(key) for key in list(header)],
}


def huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}")


def model_breakers() -> Iterator[tuple[str, Breaker]]:
    """Yield what breaks a folder of a full-precision model."""
    for file in (CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        yield f"{file} missing", partial(remove, file)
        yield f"{file} is a folder", partial(to_folder, file)
        yield f"{file} links to itself", partial(link, file, file)
        yield f"{file} links to nothing", partial(link, file, "nowhere")
        yield f"{file} links to /dev/zero", partial(link, file, "/dev/zero")
        for name, content in TEXTS.items():
            yield f"{file} {name}", partial(write, file, content)
        for share in (0.1, 0.5, 0.99):
            yield f"{file} cut at {share}", partial(truncate, file, share)
    for name, change in INDEXES.items():
        yield f"index {name}", partial(index, change)
    for name, change in TENSORS.items():
        yield f"weights with {name}", partial(edit_tensors, WEIGHTS, change)
    for name, change in HEADERS.items():
        yield f"header with {name}", partial(edit_header, WEIGHTS, change)
    yield "header of a huge length", huge_header
    for seed in range(12):
        yield f"{WEIGHTS} header bit {seed}", partial(flip_bit, WEIGHTS, seed, 0)
        yield f"{CONFIG} bit {seed}", partial(flip_bit, CONFIG, seed, 1)
        yield f"tokenizer.json bit {seed}", partial(flip_bit, "tokenizer.json", seed, 1)
    for number, key in enumerate(CONFIG_KEYS):
        for value in ODD_VALUES if key in SIZE_KEYS else ODD_VALUES[number % 4 :: 4]:
            yield f"{CONFIG} {key}={value!r}", partial(set_value, CONFIG, key, value)
        yield f"{CONFIG} without {key}", partial(drop_key, CONFIG, key)
    for key, values in TOKENIZER_VALUES.items():
        for value in values:
            yield f"tokenizer_config.json {key}={value!r}"[:80], partial(set_value, "tokenizer_config.json", key, value)
    for name, value in QUANTIZATION_CONFIGS.items():
        yield f"{CONFIG} quantized by {name}", partial(set_value, CONFIG, "quantization_config", value)


SIZE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
CONFIG_KEYS = (
    *SIZE_KEYS,
    *("architectures", "attention_bias", "bos_token_id", "dtype", "eos_token_id", "head_dim", "hidden_act"),
    *("initializer_range", "mlp_bias", "model_type", "pad_token_id", "pretraining_tp", "rms_norm_eps"),
    *("rope_parameters", "tie_word_embeddings", "transformers_version", "use_cache"),
)
TOKENIZER_VALUES = {
    "tokenizer_class": ("Nothing", "../../x", 5, None, "LlamaTokenizer", "GPT2Tokenizer"),
    "model_max_length": (-1, "x", 10**30, None),
    "eos_token": (5, None, {"a": 1}, "nowhere", ["a"]),
    "tokenizer_file": ("/etc/passwd", "../../x", 5),
    "auto_map": ({"AutoTokenizer": ["evil.Evil", None]}, 5, {"AutoTokenizer": "../../evil.Evil"}),
    "added_tokens_decoder": ({"999999999": {"content": "x"}}, {"a": 1}, 5),
    "chat_template": ("{% for", 5),
}
QUANTIZATION_CONFIGS: dict[str, object] = {
    "nothing": {},
    "a text": "gptq",
    "an unknown method": {"quant_method": "nothing"},
    "no method": {"bits": 4},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "compressed-tensors without groups": {"quant_method": "compressed-tensors"},
    "compressed-tensors with nonsense": {"quant_method": "compressed-tensors", "config_groups": 5, "format": []},
    "fp8": {"quant_method": "fp8"},
}

LINEAR = "model.layers.0.mlp.down_proj"


def linears(change: Callable[[dict], object]) -> Callable[[dict[str, torch.Tensor], dict], None]:
    """Return what changes the description of the quantized linears."""

    def apply(tensors: dict[str, torch.Tensor], metadata: dict) -> None:
        content = json.loads(metadata["linears"])
        content = change(content) or content
        metadata["linears"] = json.dumps(content)

    return apply


def option(name: str, value: object) -> Callable[[dict[str, torch.Tensor], dict], None]:
    return linears(lambda content: content[LINEAR].update({name: value}))


def tensor(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, dict], None]:
    def apply(tensors: dict[str, torch.Tensor], metadata: dict) -> None:
        tensors[f"{LINEAR}.{part}"] = change(tensors[f"{LINEAR}.{part}"])

    return apply


CHECKPOINTS: dict[str, Callable[[dict[str, torch.Tensor], dict], object]] = {
    "no metadata": lambda t, m: m.clear(),
    "a later format": lambda t, m: m.update(format_version="2"),
    "a format of no number": lambda t, m: m.update(format_version="x"),
    "linears of no JSON": lambda t, m: m.update(linears="{"),
    "linears of a list": lambda t, m: m.update(linears="[]"),
    "linears of null": lambda t, m: m.update(linears="null"),
    "linears of a number": lambda t, m: m.update(linears="5"),
    "linears nested deeply": lambda t, m: m.update(linears="[" * 100_000),
    "no linears": lambda t, m: m.update(linears="{}"),
    "a scheme that is null": linears(lambda c: c.update({LINEAR: None})),
    "a scheme that is a list": linears(lambda c: c.update({LINEAR: []})),
    "a linear that is none": linears(lambda c: c.update({"model.norm": c[LINEAR]})),
    "a linear that is the model": linears(lambda c: c.update({"": c[LINEAR]})),
    "a linear that is not there": linears(lambda c: c.update({"model.layers.99.x": c[LINEAR]})),
    "a linear with dots": linears(lambda c: c.update({"..": c[LINEAR]})),
    "a linear that is a private name": linears(lambda c: c.update({"__class__": c[LINEAR]})),
    "nine bits": option("weight_bits", 9),
    "bits of text": option("weight_bits", "4"),
    "other bits": option("weight_bits", 2),
    "groups of 7": option("group_size", 7),
    "groups of 32": option("group_size", 32),
    "a scale of 8 bits": option("scale_dtype", "float8"),
    "a static range": option("act_granularity", "tensor"),
    "an unknown option": option("colour", 1),
    "overrides in a linear": option("overrides", [{"linears": ".*", "weight_bits": 2}]),
    "an unknown dtype": lambda t, m: m.update(dtype="int7"),
    "an attribute for a dtype": lambda t, m: m.update(dtype="__name__"),
    "no dtype": lambda t, m: m.pop("dtype"),
    "attentions of a list": lambda t, m: m.update(attentions="[1]"),
    "attentions of nonsense": lambda t, m: m.update(attentions='{"model.layers.0.self_attn": {"bits": "x"}}'),
    "attentions that are none": lambda t, m: m.update(attentions='{"model.norm": {"bits": 4}}'),
    "integers missing": lambda t, m: t.pop(f"{LINEAR}.integers"),
    "scales missing": lambda t, m: t.pop(f"{LINEAR}.weight_scale"),
    "zero points missing": lambda t, m: t.pop(f"{LINEAR}.zero_point"),
    "a multiplier missing": lambda t, m: t.pop(f"{LINEAR}.act_multiplier"),
    "integers of another shape": tensor("integers", lambda x: x[:, :-1]),
    "integers of fewer rows": tensor("integers", lambda x: x[:1]),
    "integers transposed": tensor("integers", lambda x: x.T),
    "integers flat": tensor("integers", lambda x: x.flatten()),
    "integers as floats": tensor("integers", lambda x: x.float()),
    "integers as int64": tensor("integers", lambda x: x.long() - 300),
    "integers out of range": tensor("integers", lambda x: x + 200),
    "scales of another shape": tensor("weight_scale", lambda x: x[:-1]),
    "scales of three groups": tensor("weight_scale", lambda x: x.expand(-1, 3)),
    "scales of no group": tensor("weight_scale", lambda x: x[:, :0]),
    "scales flat": tensor("weight_scale", lambda x: x.flatten()),
    "scales of one row": tensor("weight_scale", lambda x: x[:1]),
    "NaN scales": tensor("weight_scale", lambda x: x * float("nan")),
    "infinite scales": tensor("weight_scale", lambda x: x * float("inf")),
    "negative scales": tensor("weight_scale", lambda x: -x),
    "zero scales": tensor("weight_scale", lambda x: x * 0),
    "integer scales": tensor("weight_scale", lambda x: x.int()),
    "zero points of another shape": tensor("zero_point", lambda x: x[:-1]),
    "zero points as floats": tensor("zero_point", lambda x: x.float() + 0.5),
    "zero points out of range": tensor("zero_point", lambda x: x + 99),
    "a NaN multiplier": tensor("act_multiplier", lambda x: x * float("nan")),
    "a negative multiplier": tensor("act_multiplier", lambda x: -x),
    "a vector of multipliers": tensor("act_multiplier", lambda x: x.expand(3)),
    "a NaN ratio": tensor("act_clip_ratio", lambda x: x * float("nan")),
    "a vector of ratios": tensor("act_clip_ratio", lambda x: x.expand(3)),
    "integer multipliers": tensor("act_multiplier", lambda x: x.int()),
}


def checkpoint_breakers() -> Iterator[tuple[str, Breaker]]:
    """Yield what breaks a checkpoint of cbq."""
    for name, change in CHECKPOINTS.items():
        yield f"quantized file with {name}", partial(edit_tensors, QUANTIZED, change)
    for file in (QUANTIZED, WEIGHTS, CONFIG, "tokenizer.json"):
        yield f"checkpoint's {file} missing", partial(remove, file)
        yield f"checkpoint's {file} is a folder", partial(to_folder, file)
        yield f"checkpoint's {file} links to itself", partial(link, file, Path(file).name)
        for share in (0, 0.3, 0.99):
            yield f"checkpoint's {file} cut at {share}", partial(truncate, file, share)
    for seed in range(20):
        yield f"{QUANTIZED} header bit {seed}", partial(flip_bit, QUANTIZED, seed, 0)
        yield f"{QUANTIZED} data bit {seed}", partial(flip_bit, QUANTIZED, seed, 1)
        yield f"checkpoint's {WEIGHTS} data bit {seed}", partial(flip_bit, WEIGHTS, seed, 1)
    yield (
        "checkpoint's folder empty",
        lambda folder: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in folder.iterdir()],
    )


MODEL_BREAKERS = dict(model_breakers())
CHECKPOINT_BREAKERS = dict(checkpoint_breakers())
