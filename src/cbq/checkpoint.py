"""The result on disk: a Hugging Face folder with the fused weights, and what they are made of.

`<folder>/` loads in plain transformers, weights only. `<folder>/cbq/quantized.safetensors` holds, for each quantized
linear `X`: `X.integers` (O, I) uint8, `X.weight_scale` (O, G) float32 and `X.zero_point` (O, G) uint8; for its input
`X.act_multiplier` and `X.act_clip_ratio` () float32, whose product multiplies the step size of each token's range, and
where activations are static that step size and its zero point, `X.act_initial_scale` and `X.act_zero_point` (). For an
attention `Y` with quantized queries, keys and values there are `Y.query.range_multiplier`, `Y.key...` and `Y.value...`
(). The metadata hold the scheme of each. The sub-folder keeps the file out of sight of engines that read every
safetensors file of a folder; config.json names it where activations are quantized, so that its loss is seen. A linear's
weight is (integers - zero_point) * weight_scale.

Shapes: O out_features, I in_features, G groups a row.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cbq.errors import InputError, expanded, is_folder, one_line
from cbq.hashes import hash_file, hash_tensors
from cbq.models.attention import hook_attention_
from cbq.models.engine import load_as_it_is
from cbq.models.files import ACTIVATIONS_KEY, SHARD_SIZE, is_file, read_json
from cbq.models.linears import to_linears_, to_stored
from cbq.models.loading import (
    LoadedModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    load_pretrained,
    quiet_transformers,
)
from cbq.quant.attention import QKVQuantizer, qkv_quantizers
from cbq.quant.linear import FusedLinear, fused_linears, make_act_quantizer, product_of
from cbq.quant.quantizer import ActQuantizer
from cbq.quant.scheme import MODEL_WIDE, QuantScheme
from cbq.quant.state import QuantState
from cbq.quant.stored import check_stored_number, check_stored_weight

QUANTIZED_FILE = Path("cbq") / "quantized.safetensors"
FORMAT_VERSION = "1"
WEIGHTS_ALONE = (
    "transformers, vLLM and other engines read the weights of a checkpoint alone and silently leave out the "
    "quantization of activations; cbq.load has it, and an export where its engine can."
)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> list[str]:
    """Write a quantized model, all of whose block linears are fused, into `folder`.

    Args:
        model: what a run or `cbq.quantize` made.
        tokenizer: the model's own.
        folder: made if it is missing.

    Returns:
        What a user of the folder must know, a line each.
    """
    folder = Path(folder)
    tensors, schemes = {}, {}
    for name, linear in fused_linears(model):
        schemes[name] = {key: value for key, value in asdict(linear.scheme).items() if key not in MODEL_WIDE}
        if linear.integers is not None:
            tensors[f"{name}.integers"] = linear.integers
            tensors[f"{name}.weight_scale"] = linear.weight_scale
            tensors[f"{name}.zero_point"] = linear.zero_point
        if linear.act_quantizer is not None:
            tensors[f"{name}.act_multiplier"] = linear.act_quantizer.range_multiplier.detach()
            tensors |= {f"{name}.act_{part}": buffer for part, buffer in linear.act_quantizer.named_buffers()}
    attentions = {}
    for name, quantizer in qkv_quantizers(model):
        attentions[name] = {key: getattr(quantizer, key) for key in ("bits", "symmetric", "denominator")}
        tensors |= {f"{name}.{part}": parameter.detach() for part, parameter in quantizer.named_parameters()}
    inside = {f"{name}.{part}" for name in schemes for part in ("integers", "weight_scale", "zero_point")}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in inside and ".act_quantizer." not in name and ".qkv_quantizer." not in name
    }
    in_activations = attentions or any(linear.act_quantizer is not None for _, linear in fused_linears(model))
    if in_activations:
        setattr(model.config, ACTIVATIONS_KEY, QUANTIZED_FILE.as_posix())
    try:
        with quiet_transformers():
            stored = to_stored(model.config, state, list(schemes))
            model.save_pretrained(folder, state_dict=stored, max_shard_size=SHARD_SIZE)
            tokenizer.save_pretrained(folder)
    finally:
        if in_activations:
            delattr(model.config, ACTIVATIONS_KEY)
    file = folder / QUANTIZED_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format_version": FORMAT_VERSION,
        "linears": json.dumps(schemes),
        "attentions": json.dumps(attentions),
        "dtype": str(model.dtype).removeprefix("torch."),
        "files": json.dumps(hash_weights(folder)),
    }
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata | {"digest": digest(tensors, metadata)})
    return [WEIGHTS_ALONE] if in_activations else []


def load_checkpoint(folder: str | Path) -> LoadedModel:
    """Return the quantized model of a checkpoint, activation quantization included.

    Its logits equal to the bit those of the model that was saved, on the same machine and device.

    Args:
        folder: the `checkpoint/` of a run.

    Raises:
        InputError: the folder is not a cbq checkpoint, or is damaged.

    Example:
        `cbq.load("outputs/run/checkpoint").model.generate(...)`
    """
    folder = Path(folder)
    file = folder / QUANTIZED_FILE
    if not file.is_file():
        raise InputError(f"not a cbq checkpoint, {QUANTIZED_FILE} is missing: {folder}")
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if metadata["format_version"] != FORMAT_VERSION:
            raise InputError(f"{file} has format {metadata['format_version']}; this cbq reads {FORMAT_VERSION}")
        if metadata.pop("digest", None) not in (None, digest(tensors, metadata)):  # older ones have none
            raise InputError(f"damaged checkpoint, {file} is not as it was written")
        files = json.loads(metadata.get("files", "{}"))
        attentions = dict(json.loads(metadata["attentions"]))
        schemes = {name: QuantScheme(**options) for name, options in json.loads(metadata["linears"]).items()}
        dtype = metadata["dtype"]
        if not schemes:
            raise InputError(f"damaged checkpoint, {file} names no linear")
    except InputError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"damaged checkpoint, {file} cannot be read: {one_line(error)}") from None
    if files:
        check_hashes(folder, files)
    loaded = load_pretrained(str(folder), dtype=dtype)
    to_linears_(loaded.model)
    for name, scheme in schemes.items():
        try:
            loaded.model.set_submodule(name, load_linear(loaded.model.get_submodule(name), scheme, name, tensors))
        except (KeyError, AttributeError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"damaged checkpoint, {file} does not fit {name}: {one_line(error)}") from None
    if attentions:
        hook_attention_(loaded.model)
    for name, options in attentions.items():
        try:
            load_qkv_quantizer_(loaded.model.get_submodule(name), options, name, tensors)
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"damaged checkpoint, {file} does not fit {name}: {one_line(error)}") from None
    return loaded


def digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Return the hash of what the quantized file holds."""
    return hash_tensors(dict(sorted(tensors.items())) | {json.dumps(sorted(metadata.items())): torch.empty(0)})


def hash_weights(folder: Path) -> dict[str, str]:
    """Return the hash of each file of a folder that holds weights, by its name."""
    return {file.name: hash_file(file) for file in sorted(folder.glob("model*.safetensors")) if is_file(file)}


def check_hashes(folder: Path, files: dict[str, str]) -> None:
    """Refuse files of weights that are not as they were written.

    Raises:
        InputError: one is not, or is missing.
    """
    found = hash_weights(folder)
    wrong = sorted(name for name in files if found.get(name) != files[name])
    if wrong:
        raise InputError(f"damaged checkpoint, {folder / wrong[0]} is missing or not as it was written")


def find_any(folder: str) -> Path:
    """Return a model's folder, given that or the folder of the run that made it.

    Raises:
        InputError: there is no such folder.
    """
    path = expanded(folder)
    if not is_folder(path):
        raise InputError(f"checkpoint {folder!r} is not a folder: give a run's, or one that transformers loads")
    return path / "checkpoint" if is_folder(path / "checkpoint") else path


def load_any(folder: Path) -> LoadedModel:
    """Return a model to measure: a checkpoint of cbq, or what transformers loads, quantized or not.

    Raises:
        InputError: there is no model in the folder, or a checkpoint of which a part is missing.
    """
    if (folder / QUANTIZED_FILE).is_file():
        return load_checkpoint(folder)
    if has_activations(folder):
        raise InputError(
            f"damaged checkpoint, {folder / QUANTIZED_FILE} is missing, which quantizes its activations; without "
            f"{ACTIVATIONS_KEY} in its config.json the weights alone are a model"
        )
    return load_as_it_is(folder)


def has_activations(folder: Path) -> bool:
    """Return whether config.json says that the folder's model is one with quantized activations."""
    try:
        return is_file(folder / "config.json") and ACTIVATIONS_KEY in read_json(folder / "config.json")
    except ValueError:  # who loads the folder says what is wrong with it
        return False


def find_checkpoint(path: str) -> Path:
    """Return the folder of a checkpoint, given that or the folder of the run that made it.

    Raises:
        InputError: neither holds a checkpoint.
    """
    if not isinstance(path, str) or not path:
        raise InputError(f"checkpoint must be a folder, got {path!r}")
    for folder in (expanded(path), expanded(path) / "checkpoint"):
        if is_folder(folder) and (folder / QUANTIZED_FILE).is_file():
            return folder
    raise InputError(f"checkpoint {path} is neither a checkpoint of cbq nor the folder of a finished run")


def load_linear(linear: nn.Linear, scheme: QuantScheme, name: str, tensors: dict[str, torch.Tensor]) -> FusedLinear:
    """Return the fused form of a linear from its stored tensors.

    Raises:
        KeyError: one is missing.
        ValueError: one is not what the scheme says.
    """
    weights, activations = scheme.quantizes_weights, scheme.quantizes_activations
    if weights:
        parts = (tensors[f"{name}.{part}"] for part in ("integers", "weight_scale", "zero_point"))
        check_stored_weight(scheme, linear.weight.shape, *parts)
    return FusedLinear(
        scheme=scheme,
        integers=tensors[f"{name}.integers"] if weights else None,
        weight_scale=tensors[f"{name}.weight_scale"] if weights else None,
        zero_point=tensors[f"{name}.zero_point"] if weights else None,
        weight=linear.weight.detach(),
        bias=linear.bias,
        act_quantizer=load_act_quantizer(scheme, name, tensors) if activations else None,
        product=product_of(linear),
    )


def load_act_quantizer(scheme: QuantScheme, name: str, tensors: dict[str, torch.Tensor]) -> ActQuantizer:
    """Return the activation quantizer of a linear from its stored tensors.

    Raises:
        KeyError: one is missing.
        ValueError: one is no number.
    """
    quantizer = make_act_quantizer(scheme)
    for part in ("multiplier", *(part for part, _ in quantizer.named_buffers())):
        check_stored_number(tensors[f"{name}.act_{part}"])
    quantizer.range_multiplier = nn.Parameter(tensors[f"{name}.act_multiplier"], requires_grad=False)
    for part, buffer in quantizer.named_buffers():
        buffer.copy_(tensors[f"{name}.act_{part}"])
    return quantizer


def load_qkv_quantizer_(attention: nn.Module, options: dict, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Give an attention module its stored `qkv_quantizer`; a KeyError if a tensor is missing."""
    quantizer = QKVQuantizer(**options)
    for part, multiplier in quantizer.named_parameters():
        check_stored_number(tensors[f"{name}.{part}"])
        multiplier.copy_(tensors[f"{name}.{part}"])
    quantizer.state = QuantState.LEARNED
    attention.qkv_quantizer = quantizer.to(next(attention.parameters()).device)
