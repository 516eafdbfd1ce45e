"""Numbers that break arithmetic, through every method: a sound model comes out, or one line says what is wrong."""

import copy
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hydra
import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, token_ids
from torch import nn
from transformers import PreTrainedModel

import cbq
from cbq.activations import ActivationCache
from cbq.cli import conf_dir
from cbq.errors import InputError
from cbq.models.families import get_blocks
from cbq.models.loading import load_pretrained
from cbq.preprocess.statistics import set_act_ranges_
from cbq.quant.linear import FusedLinear, QuantLinear, fused_linears
from cbq.quant.rounding import AdaRound
from cbq.quant.scheme import QuantScheme
from cbq.quantized import make_quantizable_
from cbq.reconstruction.linear_adaround import LinearAdaRound
from cbq.reconstruction.loop import reconstruct_
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.none import NoReconstruction
from cbq.reconstruction.result import WindowResult
from cbq.reconstruction.windows import SlidingWindows
from cbq.streams.places import ON_DEVICE

ROW, COLUMN, CHANNEL = 3, 5, 7
W4A4 = "quant=w4a4"
METHODS: dict[str, tuple[str, ...]] = {
    "cbq": (W4A4, "reconstruction.epochs=1"),
    "cbq W2A16": ("quant=w2a16", "reconstruction.epochs=1"),
    "cbq_best": (W4A4, "method=cbq_best", "reconstruction.num_steps=4"),
    "gptq": (W4A4, "method=gptq"),
    "omniquant": (W4A4, "method=omniquant", "reconstruction.epochs=1"),
    "adaround": (W4A4, "method=adaround", "reconstruction.num_steps=6"),
    "signround": (W4A4, "method=signround", "reconstruction.num_steps=4"),
    "awq": ("quant=w4a16", "method=awq", "preprocess.grid=3"),
    "smoothquant": (W4A4, "method=smoothquant"),
    "os_plus": (W4A4, "method=os_plus", "preprocess.grid=4"),
    "rtn": (W4A4, "method=rtn"),
    **{
        f"preprocess={name}": (W4A4, "reconstruction=none", f"preprocess={name}")
        for name in ("cfp", "cfp_activation", "cfp_weight", "cfp_omse", "omse", "outlier_suppression", "percentile")
    },
    "preprocess=cfp, to the letter": (
        *(W4A4, "reconstruction=none", "preprocess=cfp", "preprocess.reserved=coarse"),
        *("preprocess.relative_to=largest", "preprocess.truncate=always"),
    ),
    **{
        f"rounding={name}": (W4A4, "reconstruction.epochs=1", f"rounding={name}")
        for name in ("adaround", "dense_ste", "lora_ste", "nearest")
    },
    "from_gptq": (W4A4, "reconstruction=from_gptq", "rounding=dense_ste_far", "reconstruction.epochs=1"),
    "a static range": (W4A4, "quant.act_granularity=tensor", "reconstruction.epochs=1"),
    "symmetric groups": (
        *(W4A4, "quant.group_size=16", "quant.symmetric=true", "quant.act_symmetric=true"),
        *("reconstruction.epochs=1", "quant.scale_dtype=float16"),
    ),
    "queries, keys and values": (W4A4, "quant.qkv_bits=4", "reconstruction.epochs=1"),
}


@cache
def configuration(*overrides: str) -> dict:
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        config = hydra.compose("config", overrides=list(overrides))
    return {key: config[key] for key in ("quant", "preprocess", "cbd", "reconstruction", "rounding", "loss", "seed")}


def quantize(model: PreTrainedModel, segments: torch.Tensor, *overrides: str) -> list[WindowResult]:
    """Quantize a model in memory as a run does, without its files."""
    parts = instantiate(OmegaConf.create(configuration(*overrides)), _convert_="all")
    L.seed_everything(0, verbose=False)
    blocks = get_blocks(model)
    make_quantizable_(model, blocks, parts["quant"])
    before = logits(model)
    parts["preprocess"].apply_(model, blocks, segments, ON_DEVICE)
    set_act_ranges_(model, blocks, segments, ON_DEVICE)
    assert (logits(model) - before).norm() <= 1e-3 * before.norm(), "preprocessing keeps what the model computes"
    plan = parts["cbd"].plan(len(blocks))
    return reconstruct_(model, blocks, segments, plan, parts["reconstruction"], [], lambda result: None)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(token_ids(2, 16)).logits


def linears(model: PreTrainedModel) -> list[nn.Linear]:
    return [module for module in get_blocks(model).modules() if isinstance(module, nn.Linear)]


def gains(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return what norms multiply by, and their biases."""
    parameters = [module.parameters(recurse=False) for module in get_blocks(model).modules()]
    return [p.data for module in parameters for p in module if p.dim() == 1]


def zero_channels(model: PreTrainedModel) -> None:
    """Outputs and inputs of linears, and channels of norms, that are always 0 or always the same."""
    for linear in linears(model):
        linear.weight.data[ROW] = 0
        linear.weight.data[:, COLUMN] = 0
        linear.weight.data[ROW + 1] = 0.37
        linear.weight.data[ROW + 2] = -0.1
    for gain in gains(model):
        gain[CHANNEL] = 0
        gain[CHANNEL + 1] = 1e-20


def zero_block(model: PreTrainedModel) -> None:
    """A block that computes nothing."""
    block = get_blocks(model)[1]
    for parameter in block.parameters():
        parameter.data.zero_()


def zero_tokens(model: PreTrainedModel) -> None:
    """Tokens whose hidden states have no range, or one value only."""
    model.get_input_embeddings().weight.data[10:100] = 0
    model.get_input_embeddings().weight.data[100:200] = 1


def large_activations(model: PreTrainedModel) -> None:
    for gain in gains(model):
        gain.mul_(1e4)


def large_channel(model: PreTrainedModel) -> None:
    for gain in gains(model):
        gain[CHANNEL] *= 1e4


def tiny_weights(model: PreTrainedModel) -> None:
    for linear in linears(model):
        linear.weight.data.mul_(1e-30)


def as_it_is(model: PreTrainedModel) -> None:
    """Change nothing: what is odd are the segments."""


FAULTS: dict[str, tuple[Callable[[PreTrainedModel], None], torch.Tensor]] = {
    "zero channels": (zero_channels, token_ids(4, 8)),
    "a zero block": (zero_block, token_ids(4, 8)),
    "zero tokens": (zero_tokens, token_ids(4, 8)),
    "activations 10,000 times as large": (large_activations, token_ids(4, 8)),
    "a channel 10,000 times as large": (large_channel, token_ids(4, 8)),
    "weights of 1e-30": (tiny_weights, token_ids(4, 8)),
    "segments of one token": (as_it_is, token_ids(4, 1)),
    "one token again and again": (as_it_is, torch.full((4, 8), 11)),
    "one segment": (as_it_is, token_ids(1, 8)),
}
IN_SHORT = {  # the others are slow ones
    ("cbq", "zero channels"),
    ("gptq", "segments of one token"),
    ("omniquant", "zero tokens"),
    ("adaround", "weights of 1e-30"),
}


@pytest.mark.parametrize("family", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("method", "fault"),
    [
        pytest.param(method, fault, marks=() if (method, fault) in IN_SHORT else pytest.mark.slow)
        for method in METHODS
        for fault in FAULTS
    ],
)
def test_odd_numbers_give_a_sound_model(family: str, method: str, fault: str) -> None:
    spoil, segments = FAULTS[fault]
    model = copy.deepcopy(tiny(family))
    spoil(model)
    assert logits(model).isfinite().all()
    results = quantize(model, segments, *METHODS[method])
    assert logits(model).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point())
    for result in results:
        assert math.isfinite(result.rec_loss_last)
        assert result.rec_loss_last <= 1.5 * result.rec_loss_rtn + 1e-6
    for _, linear in fused_linears(model):
        assert linear.integers.max() < 2**linear.scheme.weight_bits
        if fault == "zero channels":  # 0 is on every grid
            assert not linear.weight[ROW].any()


@cache
def tiny(family: str) -> PreTrainedModel:
    return tiny_model(family)


# --- what is refused


@pytest.fixture
def folder(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    """A model whose hidden states leave what float16 holds."""
    for file in tiny_llama_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] *= 3e4
    tensors["model.layers.2.post_attention_layernorm.weight"] *= 100
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_overflow_in_float16_is_said_before_any_work(folder) -> None:
    loaded = load_pretrained(str(folder), dtype="float16")
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with pytest.raises(InputError, match=r"not finite in block 2.* in float16: model\.dtype=float32") as error:
        cbq.quantize(loaded.model, token_ids(2, 8), progress=False)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_overflows_float16_is_quantized_in_other_types(folder, dtype) -> None:
    loaded = load_pretrained(str(folder), dtype=dtype)
    cbq.quantize(loaded.model, token_ids(2, 8), epochs=1, progress=False)
    assert logits(loaded.model).isfinite().all()


def test_a_parameter_too_large_for_float16_is_named(tmp_path, folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"too large for float16: model\.norm\.weight"):
        load_pretrained(str(folder), dtype="float16")


def overflow(block: nn.Module, when: Callable[[torch.Tensor], bool]) -> None:
    """Let a block return infinity for some inputs."""

    def change(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, torch.inf) if when(args[0]) else output

    block.register_forward_hook(change)


def test_segments_that_overflow_later_end_the_run_with_a_line() -> None:
    """The first segment is fine, the last is not."""
    model = copy.deepcopy(tiny("llama"))
    segments = token_ids(12, 8)
    last = model.get_input_embeddings()(segments[-1])
    overflow(model.model.layers[0], lambda hidden: bool((hidden == last).all(-1).all(-1).any()))
    with pytest.raises(InputError, match="the model computes values that are not finite in blocks 0 to 1"):
        cbq.quantize(model, segments, epochs=1, progress=False)


@pytest.mark.parametrize("solver", [NoReconstruction(ReconstructionLoss())], ids=["rtn"])
def test_a_quantized_model_that_overflows_is_not_finished_in_silence(solver) -> None:
    model = copy.deepcopy(tiny("llama"))
    blocks = model.model.layers
    make_quantizable_(model, blocks, QuantScheme(4, 4))
    overflow(blocks[2], lambda hidden: isinstance(blocks[2].mlp.down_proj, FusedLinear))
    plan = SlidingWindows(1).plan(4)
    with pytest.raises(InputError, match="the quantized model computes values that are not finite in blocks 2 to 2"):
        reconstruct_(model, blocks, token_ids(2, 8), plan, solver, [], lambda result: None)
    assert isinstance(blocks[3].mlp.down_proj, QuantLinear), "it ended there"


def test_products_that_overflow_are_said() -> None:
    model = copy.deepcopy(tiny("llama"))
    block = model.model.layers[1]
    block.post_attention_layernorm.weight.data *= 1e20
    for linear in (block.mlp.gate_proj, block.mlp.up_proj):
        linear.weight.data *= 1e-20
    with pytest.raises(InputError, match="in block 1 are too large: their products overflow"):
        quantize(model, token_ids(2, 8), *METHODS["gptq"])


# --- losses


class Spoil(L.Callback):
    """Makes the loss of some steps, counted over all windows, a NaN."""

    def __init__(self, steps: range) -> None:
        self.steps, self.count = steps, 0

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        if self.count in self.steps:
            batch[1] = torch.full_like(batch[1], torch.nan)  # a batch's own target: the streams stay what they are
        self.count += 1


def test_a_loss_that_is_no_number_is_said_and_spoils_nothing() -> None:
    """All steps of the first of two windows: it ends rounded to nearest, and the second is learned."""
    model = copy.deepcopy(tiny("llama"))
    _, results = cbq.quantize(
        model, token_ids(6, 8), epochs=2, window=2, overlap=0, callbacks=[Spoil(range(12))], progress=False
    )
    assert "steps skipped: not finite" in results[0].guard
    assert results[0].changed_integers == 0
    assert results[1].guard is None or "not finite" not in results[1].guard
    assert all(math.isfinite(result.rec_loss_last) for result in results)
    assert logits(model).isfinite().all()


def test_adaround_that_diverges_keeps_round_to_nearest_and_says_so() -> None:
    model = copy.deepcopy(tiny("llama"))
    blocks = model.model.layers
    make_quantizable_(model, blocks, QuantScheme(4, 16))
    solver = LinearAdaRound(
        ReconstructionLoss(), lambda rows, columns: AdaRound(rows, columns, learning_rate=1e38), num_steps=4
    )
    results = reconstruct_(model, blocks, token_ids(2, 8), SlidingWindows(1).plan(4), solver, [], lambda result: None)
    assert all("kept round-to-nearest" in result.guard for result in results)
    assert all(result.rec_loss_last == pytest.approx(result.rec_loss_rtn, rel=1e-3) for result in results)
    assert logits(model).isfinite().all()


def test_the_streams_know_what_is_finite() -> None:
    """Not only where a window is learned: also where statistics are taken."""
    model = copy.deepcopy(tiny("llama"))
    overflow(model.model.layers[3], lambda hidden: True)
    cache = ActivationCache(model, model.model.layers, token_ids(2, 8))
    cache.advance_full_precision(3)
    with pytest.raises(InputError, match="blocks 3 to 3"):
        cache.advance_full_precision(4)
